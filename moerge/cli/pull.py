"""`moerge pull`: an expert from a hub to a folder, verified, whole or in its compressed form."""

import argparse
from pathlib import Path

from moerge import client, compression
from moerge.cli import arguments
from moerge.cli.terminal import Terminal
from moerge.cli.verify import add_timeout
from moerge.client import Hub, Pulled, Reference
from moerge.errors import ParameterInvalid

NAME = "pull"
HELP = "fetch an expert from a hub into a folder"
DESCRIPTION = """Fetches all files of an expert (owner/name, at main or @revision: a branch, a tag or a commit) or of a
merge (merges/<id>), and checks the SHA-256 of each. With --compressed the weights travel in their compressed form, are
verified and decoded here, without torch. The folder is touched only when everything has arrived; a transfer that
breaks off goes on where it stopped, also in the next call."""
EXAMPLE = """example:
  moerge pull ann/travel-desk --out ./travel-desk --endpoint http://127.0.0.1:8000
  moerge pull ann/travel-desk@main --out ./travel-desk --compressed --density 0.1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF", help="owner/name[@revision], or merges/<id>")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to fill; made when not there")
    parser.add_argument("--compressed", action="store_true", help="fetch the compressed weights and decode them here")
    parser.add_argument(
        "--density", type=arguments.share, metavar="SHARE",
        help="with --compressed: share of values kept, such as 0.1 (default: what the hub made at upload)",
    )  # fmt: skip
    parser.add_argument(
        "--preset",
        "--recipe",
        dest="preset",
        choices=compression.PRESETS,
        help="with --compressed: how it is compressed",
    )
    add_timeout(parser)


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    if not wanted.compressed and (wanted.density is not None or wanted.preset is not None):
        raise ParameterInvalid(
            "--density and --preset are about the compressed form.", pointer="--density", met="no --compressed",
            wanted="--compressed with them", remedy="Add --compressed, or leave them out.",
        )  # fmt: skip
    reference = Reference.parse(wanted.reference)
    with Hub(wanted.endpoint, wanted.token, wait_seconds=wanted.timeout, progress=terminal.watch) as hub:
        pulled = client.pull(
            hub, reference, wanted.out, compressed=wanted.compressed, density=wanted.density, preset=wanted.preset
        )
    terminal.answer(_record(pulled, wanted.out), _lines(pulled, wanted.out))


def _record(pulled: Pulled, out: Path) -> dict[str, object]:
    return {
        "reference": pulled.reference.full_name,
        "revision": pulled.commit,
        "out": str(out),
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in pulled.files],
        "kept": list(pulled.kept),
        "downloaded_bytes": pulled.downloaded_bytes,
        "compressed": pulled.encoded.facts if pulled.encoded else None,
    }


def _lines(pulled: Pulled, out: Path) -> list[str]:
    rows = [("pulled", f"{pulled.reference.full_name} at {pulled.commit}"), ("into", str(out))]
    rows.append(("files", f"{len(pulled.files)}, {pulled.downloaded_bytes:,} bytes downloaded"))
    if pulled.kept:
        rows.append(("there already", ", ".join(pulled.kept)))
    if pulled.encoded:
        rows += [("compressed", f"ok: {check}") for check in pulled.encoded.checks]
    else:
        rows.append(("sha256", "ok: every file"))
    return arguments.table(rows)
