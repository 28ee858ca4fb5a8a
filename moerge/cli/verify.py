"""`moerge verify`: whether a file, a folder or an expert on a hub is what it says it is."""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moerge import client
from moerge.cli import arguments
from moerge.cli.terminal import Terminal
from moerge.client import Hub, Reference, environment, examine
from moerge.client.errors import AddressInvalid
from moerge.client.examine import Found

NAME = "verify"
HELP = "check a file, a folder or an expert on a hub"
DESCRIPTION = """Checks everything that can be checked without trust, and says what that was: of a compressed file every
rule of its format and its hash; of an adapter's folder the config, the header of the weights, both against each
other, and that no value is NaN; of a reference all of that, with the SHA-256 of every file and the compressed
form the hub made. What exists on this disk is taken for a path, everything else for a reference."""
EXAMPLE = """example:
  moerge verify my-lora.compeft
  moerge verify ./my-lora
  moerge verify ann/travel-desk@main --endpoint http://127.0.0.1:8000

Exit status 3 when a check fails; the rule is named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="PATH_OR_REF", help="a file, a folder, or owner/name[@revision]")
    add_timeout(parser)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=arguments.seconds, default=600.0, metavar="SECONDS",
        help="how long to wait for a hub that says it is not ready (default: %(default)g)",
    )  # fmt: skip


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    place = Path(wanted.what)
    told: dict[str, Any] = {"what": wanted.what}
    if place.exists():
        terminal.watch("verifying", None)
        found = tuple(examine.path(place))
    else:
        reference = _reference(wanted.what, wanted.endpoint)
        with (
            Hub(wanted.endpoint, wanted.token, wait_seconds=wanted.timeout, progress=terminal.watch) as hub,
            tempfile.TemporaryDirectory(prefix="moerge-verify-") as work,
        ):
            verified = client.verify(hub, reference, Path(work))
        found = verified.found
        told |= {"reference": reference.full_name, "revision": verified.commit}
    for one in found:
        for warning in one.warnings:
            terminal.warn(f"{one.name}: {warning}")
    told |= {"verified": True, "checks": [asdict(one) for one in found]}
    terminal.answer(told, _lines(found))


def _reference(text: str, endpoint: str | None) -> Reference:
    """What is not on this disk, as a reference. Raises FileNotFoundError where it cannot be one."""
    try:
        environment.endpoint(endpoint)
        return Reference.parse(text)
    except AddressInvalid as error:
        raise FileNotFoundError(2, f"no such file or folder, nor an expert: {error.detail}", text) from error


def _lines(found: tuple[Found, ...]) -> list[str]:
    rows = [(one.name, check) for one in found for check in one.checks]
    return [*arguments.table([(name, f"ok: {check}") for name, check in rows]), "verified"]
