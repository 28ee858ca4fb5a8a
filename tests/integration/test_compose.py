"""docker-compose.yml against its schema, itself, the settings and the launcher."""

import copy
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from local import hub
from tests import compose

SETTINGS = compose.settings_read()
VARIABLES = dict.fromkeys(("HUB_SECRET_KEY", "HUB_ROUTER_SECRET", "POSTGRES_PASSWORD", "REDIS_PASSWORD"), "secret")


@pytest.fixture
def loaded():
    return copy.deepcopy(compose.load())


def schema_says(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "check-jsonschema"
    return subprocess.run(
        [str(program), "--builtin-schema", "vendor.compose-spec", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_file_follows_the_compose_specification(tmp_path):
    assert schema_says(compose.FILE).returncode == 0
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(compose.FILE.read_text().replace("service_healthy", "service_healthyy", 1))
    assert schema_says(broken).returncode == 1


def test_everything_that_is_named_exists_and_every_setting_is_read(loaded):
    assert compose.faults(loaded, settings=SETTINGS) == []
    assert {"HUB_HOME", "DATABASE_URL", "BROKER_URL", "HUB_ROUTER_URL"} <= SETTINGS


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda file: file["services"]["web"]["depends_on"].update(redos={}), "web: depends on redos"),
        (lambda file: file["services"]["redis"].pop("healthcheck"), "waits for the health of redis"),
        (lambda file: file["volumes"].pop("blobs"), "volume blobs"),
        (lambda file: file["networks"].pop("inside"), "network inside"),
        (lambda file: file["services"]["web"]["environment"].update(HUB_HOMES="/x"), "HUB_HOMES is read nowhere"),
        (
            lambda file: file["services"]["web"]["environment"].update(BROKER_URL="redis://redos/0"),
            "names the host redos",
        ),
        (lambda file: file["services"]["redis"].update(image="redis:latest"), "names no release"),
        (lambda file: file["services"]["redis"].update(image="redis"), "names no release"),
    ],
)
def test_a_planted_fault_is_found(loaded, plant, fault):
    plant(loaded)
    assert any(fault in line for line in compose.faults(loaded, settings=SETTINGS))


def test_secrets_have_no_default():
    for name in VARIABLES:
        with pytest.raises(KeyError, match=name):
            compose.filled(compose.FILE.read_text(), {**VARIABLES, name: ""})
    assert "secret@postgres:5432" in compose.filled(compose.FILE.read_text(), VARIABLES)


def test_every_process_has_the_environment_of_the_hub(loaded):
    own = {name: service for name, service in loaded["services"].items() if "build" in service}
    assert set(own) == {"prepare", "web", "router", "worker-light", "worker-heavy", "beat"}
    environments = [service["environment"] for service in own.values()]
    assert all(environment == environments[0] for environment in environments)
    assert all("blobs:/data" in service["volumes"] for service in own.values())


def test_the_services_are_the_processes_of_the_launcher_with_the_same_arguments(loaded, tmp_path):
    options = hub.Options(home=tmp_path, port=0, demo=False, routers=1, workers=1, timeout_seconds=1)
    with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as router:
        doors = hub.Doors(web=web, router=router)
        parts = [*hub.served_parts({}, doors, options), *hub.worker_parts(hub.Home(tmp_path), {}, options)]
        launched = {part.name: [Path(part.command().argv[0]).name, *part.command().argv[1:]] for part in parts}
    for name, argv in launched.items():
        service = loaded["services"][name]["command"]
        assert [masked(value) for value in argv] == [masked(value) for value in service], name
    assert set(launched) == set(loaded["services"]) - {"postgres", "redis", "prepare"}


def masked(value: str) -> str:
    """Where a process listens and keeps its schedule differs by place."""
    return re.sub(r"^(fd://\d+|0\.0\.0\.0:\d+)$", "ADDRESS", re.sub(r"^/.*/beat$", "/beat", value))


def test_the_image_copies_files_that_exist_and_starts_the_web_as_the_file_does(loaded):
    lines = (compose.ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((compose.ROOT / word).exists() for word in copied)
    assert any(re.match(r"FROM python:3\.1[12]-", line) for line in lines)
    command = next(line for line in lines if line.startswith("CMD "))
    assert sorted(yaml_list(command.removeprefix("CMD "))) == sorted(loaded["services"]["web"]["command"])
    assert any(line.startswith("USER ") and line != "USER root" for line in lines)


def yaml_list(text: str) -> list[str]:
    return compose.load(text)
