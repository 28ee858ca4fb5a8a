"""The model card of a demo expert: front matter as the Hugging Face Hub reads it, and the same in words below."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 120


@dataclass(frozen=True)
class Measured:
    """What training and measuring gave; accuracies are shares in [0, 1] over the same `n` rows.

    `compressed` gives the accuracy after compression by the preset `default`, by density.
    """

    base_accuracy: float
    accuracy: float
    compressed: Mapping[float, float]
    n: int
    split: str
    n_train: int
    seed: int
    epochs: float
    cpu_seconds: float


def write(
    name: str,
    *,
    expert: Mapping[str, Any],
    source: Mapping[str, Any],
    label_texts: Sequence[str],
    measured: Measured,
    base_name: str,
) -> str:
    """The text of README.md."""
    front = yaml.safe_dump(
        _front_matter(
            name,
            expert=expert,
            source=source,
            label_texts=label_texts,
            measured=measured,
            base_name=base_name,
        ),
        sort_keys=False,
        allow_unicode=True,
        width=WIDTH,
    )
    sections = [
        _task(expert),
        _results(name, source=source, measured=measured, n_labels=len(label_texts)),
        _use(base_name=base_name, label_texts=label_texts),
        _training(name, expert=expert, measured=measured),
        _licence(source),
    ]
    return f"---\n{front}---\n\n# {expert['title']}\n\n" + "\n\n".join(sections) + "\n"


@dataclass(frozen=True)
class Stated:
    """The figures in the front matter of a card, rounded as they stand there."""

    base_accuracy: float
    accuracy: float
    compressed: Mapping[float, float]
    n: int


def stated(card: str) -> Stated:
    """What the front matter of a card says."""
    front = yaml.safe_load(card.split("---\n", 2)[1])
    metrics = front["model-index"][0]["results"][0]["metrics"]
    named = {metric["name"]: metric for metric in metrics}
    expert = named["accuracy of the expert"]
    return Stated(
        base_accuracy=named["accuracy of the untouched base"]["value"],
        accuracy=expert["value"],
        compressed={
            metric["args"]["compression"]["density"]: metric["value"]
            for metric in metrics
            if "compression" in metric["args"]
        },
        n=expert["args"]["n"],
    )


def trained(card: str) -> tuple[int, float, float]:
    """Seed, epochs and CPU seconds of the training that a card tells of."""
    words = " ".join(card.split())
    found = re.search(r"Seed (\d+); .* for ([\d.]+) epochs, .* It took (\d+) s of CPU time", words)
    if found is None:
        raise ValueError("the card does not tell how the expert was trained")
    return int(found[1]), float(found[2]), float(found[3])


def scaling(expert: Mapping[str, Any]) -> float:
    """The factor c in base + c·B·A: alpha over rank, over its square root for rsLoRA (arXiv:2312.03732)."""
    divisor = expert["rank"] ** 0.5 if expert["use_rslora"] else expert["rank"]
    return float(expert["lora_alpha"] / divisor)


def _front_matter(
    name: str,
    *,
    expert: Mapping[str, Any],
    source: Mapping[str, Any],
    label_texts: Sequence[str],
    measured: Measured,
    base_name: str,
) -> dict[str, Any]:
    def metric(title: str, value: float, **more: Any) -> dict[str, Any]:
        return {"type": "accuracy", "name": title, "value": round(value, 4), "args": {"n": measured.n, **more}}

    result = {
        "task": {"type": "text-classification", "name": "Intent classification by nearest label text"},
        "dataset": {
            "name": f"{source['title']}, {len(label_texts)} intents",
            "type": source["hub_id"],
            "split": measured.split,
        },
        "metrics": [
            metric("accuracy of the expert", measured.accuracy),
            metric("accuracy of the untouched base", measured.base_accuracy),
            *(
                metric(
                    f"accuracy compressed at density {density:g}",
                    value,
                    compression={"preset": "default", "density": density},
                )
                for density, value in measured.compressed.items()
            ),
        ],
    }
    return {
        "license": source["license"],
        "language": ["en"],
        "base_model": base_name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "sentence-similarity",
        "tags": ["lora", "intent-classification", "sentence-embeddings"],
        "datasets": [source["hub_id"]],
        "moerge": {
            "task": expert["description"],
            "examples": list(expert["examples"]),
            "labels": list(label_texts),
        },
        "model-index": [{"name": name, "results": [result]}],
    }


def _task(expert: Mapping[str, Any]) -> str:
    examples = "\n".join(f"- {example}" for example in expert["examples"])
    return f"{_wrapped(expert['description'])}\n\n## Example inputs\n\nWritten for this card:\n\n{examples}"


def _results(name: str, *, source: Mapping[str, Any], measured: Measured, n_labels: int) -> str:
    gain = 100 * (measured.accuracy - measured.base_accuracy)
    words = (
        f"Accuracy of the nearest label text among {n_labels} on {measured.n} rows of the {measured.split} split of "
        f"{source['title']}, none of which was used in training. Base and expert see the same rows and label texts."
    )
    rows = "\n".join(
        f"| {100 * density:g} % | {100 * value:.1f} % | {_points(value - measured.accuracy)} points |"
        for density, value in measured.compressed.items()
    )
    small = (
        "Compressed by Moerge with the preset `default` (ComPEFT, arXiv:2311.13171), which sees no data, and read back "
        "by PEFT, on the same rows:"
    )
    return f"""## Results

{_wrapped(words)}

| | accuracy | n |
| --- | --- | --- |
| untouched base | {100 * measured.base_accuracy:.1f} % | {measured.n} |
| this expert | {100 * measured.accuracy:.1f} % ({gain:+.1f} points) | {measured.n} |

{_wrapped(small)}

| values kept | accuracy | against the original |
| --- | --- | --- |
{rows}

Seed {measured.seed}; measured on the files of this folder as PEFT loads them. To repeat it:

    python examples/train_experts.py --data DIR --only {name} --check"""


def _use(*, base_name: str, label_texts: Sequence[str]) -> str:
    words = (
        "The adapter has no head. Encode the message and all label texts with base and adapter, take the mean over the "
        "tokens, normalise, and choose the label text with the largest cosine. The label texts are also in the front "
        "matter, under `moerge: labels`."
    )
    return f"""## How to use it

{_wrapped(words)}

```python
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base_name}")
model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base_name}"), FOLDER).eval()
```

Label texts: {"; ".join(label_texts)}."""


def _training(name: str, *, expert: Mapping[str, Any], measured: Measured) -> str:
    kind = "rsLoRA" if expert["use_rslora"] else "LoRA"
    modules = ", ".join(f"`{module}`" for module in expert["target_modules"])
    words = (
        f"Stock PEFT on {measured.n_train} training rows for {measured.epochs:g} epochs, learning rate "
        f"{expert['learning_rate']:g}: softmax cross-entropy over the cosine similarities of a message to all label "
        f"texts at temperature 0.05. It took {measured.cpu_seconds:.0f} s of CPU time on one core."
    )
    return f"""## Training

{_wrapped(words)}

| kind | rank | lora_alpha | scaling | target modules | stored as |
| --- | --- | --- | --- | --- | --- |
| {kind} | {expert["rank"]} | {expert["lora_alpha"]} | {scaling(expert):.4g} | {modules} | {expert["dtype"]} |

    python examples/train_experts.py --data DIR --only {name} --seed {measured.seed} --epochs {measured.epochs:g}"""


def _licence(source: Mapping[str, Any]) -> str:
    words = (
        f"Trained on {source['title']}: {source['attribution']}. The data is licensed under "
        f"[{source['license_name']}]({source['license_url']}); rows were selected by intent and not changed. "
        "The adapter is offered under the same licence, so that whoever passes it on, alone or merged, has one "
        "condition to meet: name the authors of the data and say what was changed."
    )
    base = (
        "The base model, sentence-transformers/all-MiniLM-L6-v2, is under the Apache License 2.0 and is not part of "
        "this folder."
    )
    return f"## Licence and attribution\n\n{_wrapped(words)}\n\n{_wrapped(base)}"


def _points(difference: float) -> str:
    """A difference of shares in points, never a negative zero."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def _wrapped(words: str) -> str:
    return textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)
