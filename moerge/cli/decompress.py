"""`moerge decompress`: a compressed file back into a folder that stock PEFT or transformers loads."""

import argparse
from pathlib import Path

from moerge import compression
from moerge.cli import arguments
from moerge.cli.terminal import Terminal
from moerge.tensors import files

NAME = "decompress"
HELP = "make a folder of a compressed file again"
DESCRIPTION = """Checks every rule of FILE, then writes adapter_model.safetensors into OUT_DIR, with the config
that moerge compress laid beside FILE, so that PeftModel.from_pretrained(base, OUT_DIR) loads it. A full checkpoint
needs --base, the checkpoint it was compressed against, and comes back as model.safetensors."""
EXAMPLE = """example:
  moerge decompress my-lora.compeft ./restored
  moerge decompress tuned.compeft ./restored --base ./base-model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="what moerge compress wrote")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write to; made when it is not there")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="the base it was compressed against, if any")
    parser.add_argument(
        "--config", type=Path, metavar="JSON", help="adapter_config.json to put there (default: the one beside FILE)"
    )


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    config = wanted.config.read_bytes() if wanted.config else None
    terminal.watch("checking", None)
    weights = compression.decompress(
        wanted.file,
        wanted.out_dir,
        config=config,
        base=wanted.base,
        progress=lambda share: terminal.watch("decoding", share),
    )
    has_config = (wanted.out_dir / "adapter_config.json").is_file()
    if weights.name.startswith("adapter_") and not has_config:
        terminal.warn("No adapter_config.json was given or found: PEFT needs one beside the weights (--config).")
    record = {"out": str(weights), "bytes": weights.stat().st_size, "sha256": files.sha256(weights)}
    rows = [("written", str(weights)), ("bytes", f"{record['bytes']:,}"), ("sha256", str(record["sha256"]))]
    terminal.answer(record, arguments.table(rows))
