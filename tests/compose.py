"""docker-compose.yml as data: what a schema does not see in it, and how its services are run without an engine."""

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")
CONDITIONS_OF_HEALTH = {"service_healthy"}


def load(text: str | None = None) -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text() if text is None else text)


def filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with its ${NAME}, ${NAME:-default} and ${NAME:?message} filled in, as compose does it."""

    def value(match: re.Match[str]) -> str:
        if given := variables.get(match["name"]):
            return given
        if match["kind"] == "-":
            return match["rest"]
        raise KeyError(f"{match['name']}: {match['rest'] or 'not set'}")

    return VARIABLE.sub(value, text)


def mapped(tree: Any, change: Callable[[str], str]) -> Any:
    """The same tree with every string changed."""
    if isinstance(tree, dict):
        return {key: mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [mapped(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree


def settings_read() -> set[str]:
    """The names of the environment that config/ reads."""
    names = {"DATABASE_URL"}
    for path in (ROOT / "config").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_reader = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_reader and getattr(node.func.value, "id", "") == "env" and node.args:
                names.add(node.args[0].value)
    return names


def faults(compose: Mapping[str, Any], *, settings: set[str]) -> list[str]:
    """What is wrong with references inside the file and with the names of settings; empty when nothing is."""
    services, found = compose["services"], []
    for name, service in services.items():
        found += [f"{name}: depends on {other}" for other in _dependencies(service) if other not in services]
        for other, need in _dependencies(service).items():
            wants_health = need.get("condition") in CONDITIONS_OF_HEALTH
            if other in services and wants_health and "healthcheck" not in services[other]:
                found.append(f"{name}: waits for the health of {other}, which has no healthcheck")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if not source.startswith((".", "/")) and source not in compose.get("volumes", {}):
                found.append(f"{name}: volume {source}")
        found += [f"{name}: network {net}" for net in service.get("networks", []) if net not in compose["networks"]]
        if "build" in service:
            found += _faults_of_environment(name, service["environment"], services, settings)
        elif not re.fullmatch(r"[\w./-]+:[\w.-]+", service["image"]) or service["image"].endswith(":latest"):
            found.append(f"{name}: image {service['image']} names no release")
    return found


def _dependencies(service: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    wanted = service.get("depends_on", {})
    return wanted if isinstance(wanted, dict) else {name: {} for name in wanted}


def _faults_of_environment(
    name: str, environment: Mapping[str, Any], services: Mapping[str, Any], settings: set[str]
) -> list[str]:
    found = [f"{name}: setting {key} is read nowhere" for key in environment if key not in settings]
    for key, value in environment.items():
        # Messages of variables hold blanks and colons, which are no part of an address.
        host = urlsplit(VARIABLE.sub("x", str(value))).hostname
        if host is not None and host not in services:
            found.append(f"{name}: {key} names the host {host}")
    return found
