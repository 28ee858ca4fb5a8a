"""`bin/docs`: write the generated parts of the documentation, or check that they are up to date."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from local import install

DOCS = install.ROOT / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bin/docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    wanted = parser.parse_args()
    install.enter("local.commands.docs", sys.argv[1:], need="run")
    writers = {"openapi.json": _write_openapi, "merge-methods.md": _write_merge_methods}
    stale = []
    with tempfile.TemporaryDirectory() as folder:
        for name, write in writers.items():
            fresh, kept = Path(folder) / name, DOCS / name
            write(fresh)
            if kept.exists() and fresh.read_bytes() == kept.read_bytes():
                continue
            stale.append(f"docs/{name}")
            if not wanted.check:
                kept.write_bytes(fresh.read_bytes())
    if stale and wanted.check:
        raise SystemExit(f"{', '.join(stale)} not up to date: run bin/docs")
    print(f"wrote {', '.join(stale)}" if stale else "the generated documentation is up to date")


def _write_openapi(path: Path) -> None:
    """The schema of the REST doors as the code has it; a warning of the generator is an error."""
    manage = [str(install.PYTHON), str(install.ROOT / "manage.py")]
    options = ["--format", "openapi-json", "--fail-on-warn", "--validate", "--file", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(install.ROOT)}
    if subprocess.run([*manage, "spectacular", *options], env=environment, check=False).returncode:
        raise SystemExit("the OpenAPI schema could not be made; the reasons stand above")


def _write_merge_methods(path: Path) -> None:
    """Every merge method with its parameters, as the catalogue tells them."""
    from moerge import merging  # noqa: PLC0415 - numpy stands only in the environment that was entered by now.

    lines = [
        "# Merge methods",
        "",
        "Written from the catalogue by `bin/docs`. Weights are those of the experts in a recipe; `density` is the",
        "share of values kept. Methods work on deltas (scaling times B times A); only those called `peft_` merge A and",
        "B apart from each other, as PEFT does, and are here for comparison.",
        "",
        "What a method needs beside the deltas is handed to the library by kind and tensor; a recipe whose experts",
        "name no such statistics is refused before anything is computed. `fisher_diag` is the mean squared gradient",
        "per value of a delta, `gram_in` and `gram_out` are the Gram matrices of what a module reads and of the",
        "gradients at what it writes. Twin-Merging, 1bit-Merging and Mediator make a shared part and one exclusive",
        "part per expert, which `moerge.merging.arrays.split` gives with the error of each and",
        "`moerge.merging.exclusive.apply` puts together; in a recipe the weights say how much of each exclusive",
        "part is added.",
    ]
    for name, spec in merging.catalogue().items():
        lines += ["", f"## {name}", "", f"{spec.summary} {spec.paper}".strip(), ""]
        takes = "" if spec.most_experts is None else f" At most {spec.most_experts} experts."
        needs = f" Needs {' and '.join(spec.needs)} of every expert." if spec.needs else ""
        lines += [f"Form: {spec.form}. Version {spec.version}.{takes}{needs}"]
        if spec.parameters:
            lines += ["", "| parameter | default | allowed | meaning |", "|---|---|---|---|"]
        for parameter in spec.parameters:
            default = json.dumps(parameter.default)
            lines.append(f"| `{parameter.name}` | `{default}` | {parameter.wanted()} | {parameter.help} |")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
