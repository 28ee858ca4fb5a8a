"""`moerge train-gates`: the gates by which PHATGOOSE and GLIDER send tokens to an expert."""

import argparse
from pathlib import Path

from moerge.cli import arguments
from moerge.cli.terminal import Terminal
from moerge.cli.verify import add_timeout
from moerge.client import Hub, environment, pulling
from moerge.client.references import Reference
from moerge.errors import MoergeError, ParameterInvalid
from moerge.routing import gates
from moerge.tensors import files

NAME = "train-gates"
HELP = "train the gates that send tokens to an expert"
DESCRIPTION = """Trains one vector per adapted module (PHATGOOSE, arXiv 2402.05859) with the base model and the expert
frozen, and writes FILE, which is uploaded beside the expert's weights as routing_gates.safetensors. Each line of the
data is a JSON object: input and output; or text and label for a model that classifies. It needs torch, transformers and
peft: pip install 'moerge[runtime]'."""
EXAMPLE = """example:
  moerge train-gates ./my-lora --base ./base-model --data train.jsonl --out ./my-lora/routing_gates.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("expert", metavar="EXPERT", help="folder of a LoRA, or owner/name[@revision]")
    parser.add_argument("--base", metavar="MODEL", required=True, help="folder or name of the base model")
    parser.add_argument("--data", metavar="FILE", type=Path, required=True, help="JSON lines the expert is good at")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="file to write; replaced when it exists"
    )
    parser.add_argument("--steps", type=arguments.count, default=100, help="steps of training (default: %(default)s)")
    parser.add_argument("--lr", type=arguments.number, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--batch", type=arguments.count, default=8, help="lines per step (default: %(default)s)")
    parser.add_argument(
        "--length", type=arguments.count, default=512, help="tokens of a line used (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the lines (default: %(default)s)")
    add_timeout(parser)


def run(wanted: argparse.Namespace, terminal: Terminal) -> None:
    # It loads torch, transformers and peft, which take seconds and which no other command needs.
    from moerge.runtime import training  # noqa: PLC0415

    _check_out(wanted.out)
    schedule = training.Schedule(
        steps=wanted.steps, rate=wanted.lr, batch=wanted.batch, length=wanted.length, seed=wanted.seed
    )
    folder = _folder(wanted, terminal)
    done = training.train(folder, wanted.base, wanted.data, schedule, progress=terminal.watch)
    about = gates.About(
        method="phatgoose", steps=wanted.steps, lr=wanted.lr, dataset=wanted.data.name, base_model=done.base_model
    )
    gates.save(wanted.out, done.gates, about)
    for module in done.still:
        terminal.warn(f"{module} has no gate: the expert changes nothing there.")
    tenth = max(1, len(done.losses) // 10)
    first, last = (sum(part) / tenth for part in (done.losses[:tenth], done.losses[-tenth:]))
    record = {
        "out": str(wanted.out),
        "modules": len(done.gates),
        "steps": len(done.losses),
        "loss_first": first,
        "loss_last": last,
        "without_gate": list(done.still),
        "sha256": files.sha256(wanted.out),
    }
    rows = [
        ("written", f"{wanted.out}, gates of {len(done.gates)} modules"),
        ("loss", f"{first:.4f} → {last:.4f} (mean of the first and of the last {tenth} of {len(done.losses)} steps)"),
        ("sha256", str(record["sha256"])),
    ]
    terminal.answer(record, arguments.table(rows))


def _folder(wanted: argparse.Namespace, terminal: Terminal) -> Path:
    """The expert's folder; one that is on a hub is fetched."""
    if Path(wanted.expert).is_dir():
        return Path(wanted.expert)
    reference = Reference.parse(wanted.expert)
    with Hub(wanted.endpoint, wanted.token, wait_seconds=wanted.timeout, progress=terminal.watch) as hub:
        snapshot = hub.snapshot(reference)
        place = environment.cache() / "experts" / reference.owner / reference.name / snapshot.commit
        return pulling.pull(hub, reference, place, snapshot=snapshot).folder


def _check_out(out: Path) -> None:
    """Writing may replace older gates, and nothing else. Raises ParameterInvalid."""
    if out.is_dir() or (out.exists() and out.name != gates.FILE and not _holds_gates(out)):
        raise ParameterInvalid(
            f"{out} is no file of gates, and would be lost.", pointer="--out", met=str(out), wanted="a new file",
            remedy="Name another file.",
        )  # fmt: skip


def _holds_gates(path: Path) -> bool:
    try:
        gates.load(path)
    except MoergeError:
        return False
    return True
