"""Time of a routed forward beside the same model with one plain adapter, and of Arrow's prototypes.

Models take turns in one process and the fastest of the repeats counts, so that a busy machine hits all alike.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from benchmarks.merge import row
from moerge.routing import gates, prototypes
from moerge.routing.gates import About
from moerge.tensors import files
from moerge.tensors.kind import LowRank

NAME = "routed-forward"
SUMMARY = "Forward of a model whose experts are chosen per token, beside one plain adapter; Arrow's prototypes"

FEW, MANY, TOP_K = 8, 32, 2
TARGETS = {"few": 2.0, "many": 1.5, "prototypes": 0.5}
# The module count and size at which prototypes are to take half a second: a model of 32 layers with 7 adapted each.
MODULES, WIDTH, RANK = 224, 4096, 16
TARGET_MODULES = {
    "attention": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the model (default: 1024)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default: 2)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a forward, in two inputs (default: 256)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the experts (default: 16)")
    parser.add_argument("--targets", choices=TARGET_MODULES, default="all", help="adapted layers (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="the fastest counts (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and numpy (default: 1)")
    parser.add_argument("--no-prototypes", action="store_true", help="leave Arrow's prototypes out")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; returns the rows of the report, in milliseconds of CPU time."""
    if min(arguments.width, arguments.layers, arguments.tokens, arguments.rank, arguments.repeats) < 1:
        raise ValueError("wanted sizes of at least 1")
    with threadpoolctl.threadpool_limits(arguments.threads), tempfile.TemporaryDirectory() as place:
        rows = [] if arguments.no_prototypes else prototype_rows(arguments)
        return rows + forward_rows(arguments, Path(place))


def forward_rows(arguments: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    torch, transformers, peft, runtime = map(
        importlib.import_module, ("torch", "transformers", "peft", "moerge.runtime")
    )
    torch.set_num_threads(arguments.threads)

    def base() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=1000, hidden_size=arguments.width, intermediate_size=arguments.width * 11 // 4,
            num_hidden_layers=arguments.layers, num_attention_heads=max(1, arguments.width // 64),
            num_key_value_heads=max(1, arguments.width // 64),
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    say(f"{MANY} experts of rank {arguments.rank} on a model of width {arguments.width}")
    settings = {"r": arguments.rank, "target_modules": TARGET_MODULES[arguments.targets]}
    folders = [write_expert(place / f"e{number}", peft, base(), settings, seed=number) for number in range(MANY)]
    models = {"one plain adapter": peft.PeftModel.from_pretrained(base(), str(folders[0])).eval()}
    for strategy in ("arrow", "phatgoose"):
        for count in (FEW, MANY):
            models[f"{strategy}, {count} experts"] = runtime.RoutedModel.from_folders(
                base(), folders[:count], strategy=strategy, top_k=TOP_K
            )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for shape in ((2, max(1, arguments.tokens // 2)), (1, 1)):
        tokens = torch.randint(0, 1000, shape, generator=generator)
        say(f"forwards of {tokens.numel()} tokens")
        rows += compared(torch, models, tokens, arguments.repeats)
    return rows


def compared(torch: Any, models: dict[str, Any], tokens: Any, repeats: int) -> list[dict[str, Any]]:
    """Rows for forwards of these tokens; only those of many tokens have targets."""
    with torch.no_grad():
        found = in_turn({name: lambda model=model: model(input_ids=tokens) for name, model in models.items()}, repeats)
    plain = found.pop("one plain adapter")
    count = tokens.numel()
    rows = [row(f"{count} tokens, one plain adapter", plain * 1e3, "ms")]
    few = {}
    for name, seconds in found.items():
        strategy, _, many = name.partition(", ")
        peer, peer_name, target = plain, "one plain adapter", TARGETS["few"]
        if many == f"{MANY} experts":
            peer, peer_name, target = few[strategy], f"{FEW} experts", TARGETS["many"]
        few.setdefault(strategy, seconds)
        made = row(f"{count} tokens, {name}", seconds * 1e3, "ms", peer=peer_name, peer_value=peer * 1e3)
        rows.append(made)
        rows.append(row(f"{count} tokens, {name} / {peer_name}", seconds / peer, "times",
                        target=target if count > 1 else None))  # fmt: skip
    return rows


def in_turn(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The fastest CPU time of each, after one run that does not count."""
    fastest = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:
                fastest[name] = min(fastest[name], time.process_time() - start)
    return fastest


def write_expert(folder: Path, peft: Any, base: Any, settings: dict[str, Any], *, seed: int) -> Path:
    """A LoRA of noise with gates of noise, as a folder that PEFT would have saved."""
    chance = np.random.default_rng(seed)
    folder.mkdir()
    config = peft.LoraConfig(base_model_name_or_path="bench", **settings).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
    tensors: dict[str, files.Tensor] = {}
    vectors = {}
    for name, layer in base.named_modules():
        if name.rpartition(".")[2] in settings["target_modules"]:
            width_out, width_in = layer.weight.shape
            vectors[name] = chance.standard_normal(width_in, np.float32)
            for factor, shape in (("A", (settings["r"], width_in)), ("B", (width_out, settings["r"]))):
                values = 0.02 * chance.standard_normal(shape, np.float32)
                tensors[f"base_model.model.{name}.lora_{factor}.weight"] = values
    files.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    gates.save(folder / gates.FILE, vectors, About(method="phatgoose"))
    return folder


def prototype_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    say(f"prototypes of {MODULES} modules of width {WIDTH} and rank {RANK}")
    chance = np.random.default_rng(0)
    deltas = {
        f"layers.{number}.module": LowRank(
            chance.standard_normal((RANK, WIDTH), np.float32), chance.standard_normal((WIDTH, RANK), np.float32), 1.0
        )
        for number in range(MODULES)
    }
    seconds = in_turn({"": lambda: prototypes.of_deltas(deltas)}, min(3, arguments.repeats))[""]
    name = f"Arrow prototypes of {MODULES} modules, width {WIDTH}, rank {RANK}: CPU time"
    return [row(name, seconds, "s", target=TARGETS["prototypes"])]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
