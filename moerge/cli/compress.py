"""`moerge compress`: an adapter, or a full checkpoint with its base, into one small file."""

import argparse
from pathlib import Path

from moerge import compression
from moerge.cli import arguments
from moerge.cli.terminal import Terminal
from moerge.client import examine
from moerge.compression.adapters import INCLUDES
from moerge.compression.report import Report
from moerge.errors import ParameterInvalid

NAME = "compress"
HELP = "make an adapter or a fine-tuned checkpoint small"
DESCRIPTION = """Writes OUT, a ComPEFT file (arXiv 2311.13171), 17x to 45x smaller than bf16: of each tensor the largest
values are kept, as signs and one scale. IN is a folder that PEFT's save_pretrained wrote, or a full checkpoint
(a folder, or one .safetensors file) together with --base, the checkpoint it was fine-tuned from."""
EXAMPLE = """example:
  moerge compress ./my-lora my-lora.compeft --density 0.1
  moerge compress ./fine-tuned tuned.compeft --base ./base-model"""
_DETAILS = ("tensors", "modules")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", type=Path, help="folder of a PEFT adapter, or a full checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write; replaced when it exists")
    parser.add_argument(
        "--density", type=arguments.share, metavar="SHARE",
        help="share of the values kept, above 0 to 1 (default: 0.2; less for large base models)",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", "--preset", dest="preset", choices=compression.PRESETS, default="default",
        help="how values and scales are chosen: default needs no data; paper is the published rule; hq looks for "
        "better factors first (LoRA only); int4 keeps every value at 4 bits, nearly lossless (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--scale-rule", metavar="RULE",
        help="unbiased, norm, proj, geo, mse or hq; with --recipe paper: sigma or stc (default: the recipe's own)",
    )  # fmt: skip
    parser.add_argument("--alpha", type=float, help="factor on the scale, with --recipe paper only (default: 1)")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="the base of a full checkpoint: folder or file")
    parser.add_argument(
        "--base-parameters", type=arguments.count, metavar="N",
        help="size of the base model, such as 7B: decides the density when none is given",
    )  # fmt: skip
    parser.add_argument(
        "--include", action="append", choices=INCLUDES, default=[],
        help="also make these small: ia3 (IA3's vectors), saved (modules_to_save that --base has too); may be repeated",
    )  # fmt: skip
    parser.add_argument("--heads", choices=("bf16",), help="store modules_to_save in bf16 (default: as they are)")
    parser.add_argument("--details", action="store_true", help="with --json: also what each tensor and module lost")


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    _check_out(wanted.source, wanted.out)
    report = compression.compress(
        wanted.source,
        wanted.out,
        preset=wanted.preset,
        density=wanted.density,
        scale_rule=wanted.scale_rule,
        alpha=wanted.alpha,
        base=wanted.base,
        include=tuple(wanted.include),
        heads=wanted.heads,
        base_parameters=wanted.base_parameters,
        progress=lambda share: terminal.watch("compressing", share),
    )
    record = report.as_dict()
    if not wanted.details:
        record = {name: value for name, value in record.items() if name not in _DETAILS}
    for warning in report.warnings:
        terminal.warn(warning)
    terminal.answer({"out": str(wanted.out), **record}, _lines(wanted.out, report))


def _check_out(source: Path, out: Path) -> None:
    """Writing may replace an older compressed file, and nothing else. Raises ParameterInvalid."""
    met = ""
    if out.is_dir():
        met = "a folder"
    elif out.exists() and (out.samefile(source) or (out.suffix in {".safetensors", ".json"} and _is_other(out))):
        met = "a file that is not a compressed one"
    if met:
        raise ParameterInvalid(
            f"{out} is {met}, and would be lost.", pointer="OUT", met=met,
            wanted="a new file, or an older compressed one", remedy="Name another file.",
        )  # fmt: skip


def _is_other(out: Path) -> bool:
    return out.suffix == ".json" or not examine.is_encoded(out)


def _lines(out: Path, report: Report) -> list[str]:
    rows = [
        ("written", f"{out} ({report.preset}, {report.scale_rule}, density {report.density:g})"),
        ("whole file", f"{report.original_bytes:,} → {report.bytes:,} bytes, {report.ratio:.1f}x smaller"),
    ]
    if report.ternary_ratio is not None:
        alone = f"{report.ternary_original_bytes:,} → {report.ternary_bytes:,} bytes against bf16"
        rows.append(("compressed part", f"{alone}, {report.ternary_ratio:.1f}x smaller"))
        rows.append(("kept", f"{report.kept:,} of {report.size:,} values"))
    cosines = (("cosine", report.cosine), ("cosine of B·A", report.product_cosine))
    rows += [(name, f"{value:.4f}") for name, value in cosines if value is not None]
    rows.append(("sha256", report.sha256))
    return arguments.table(rows)
