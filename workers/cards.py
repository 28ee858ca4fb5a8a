"""The card of a merge, written from its recipe alone: what was computed stands in report.json beside it."""

from collections.abc import Iterator
from typing import Any

import yaml

from moerge.merging.recipe import Recipe
from registry.models import Merge, MergeParent

_LIBRARIES = {"lora": "peft", "ia3": "peft", "full": "transformers"}
_RESULTS = {
    "lora": "a LoRA adapter",
    "ia3": "an IA3 adapter",
    "delta": "a dense task vector, what is to be added to each tensor of the base",
    "ternary": "a ternary task vector, what is to be added to each tensor of the base in ComPEFT's encoding",
    "full": "a full checkpoint, the base with the merge added",
}
_PHRASES = {
    "ok": "The licences of all parents and of the base model can be joined.",
    "warn": "**Look at the licences before you use or pass on this merge.**",
    "block": "**The licences of the parents and of the base model contradict each other.**",
}


def of_merge(merge: Merge, recipe: Recipe) -> str:
    """README.md: front matter that Hub clients read, the recipe and its parents in words, licences, how to load it."""
    parents = list(merge.parents.select_related("revision__expert__namespace", "revision__base_model"))
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front(merge, recipe, parents), sort_keys=False, allow_unicode=True).strip(),
            "---",
            f"# {merge.full_name}",
            "",
            f"{len(parents)} experts on {merge.base_model.name}, merged by `{recipe.method}`: {recipe.spec.summary}",
            "",
            *_made_of(parents),
            *_recipe(recipe),
            *_licences(merge),
            *_loading(merge, recipe),
            "## Files",
            "",
            "`recipe.json` holds the recipe, `lineage.json` the digests of all it was made of, `report.json` what was",
            "computed: ranks, the energy that was kept, warnings and the check that this result loads as computed.",
            "",
        ]
    )


def _front(merge: Merge, recipe: Recipe, parents: list[MergeParent]) -> dict[str, Any]:
    licence = merge.licence.get("licence")
    return {
        "base_model": merge.base_model.name,
        **({"library_name": _LIBRARIES[recipe.output.kind]} if recipe.output.kind in _LIBRARIES else {}),
        "base_model_relation": "merge",
        **({"license": licence} if licence else {}),
        "tags": ["moerge", "merge", recipe.method],
        "moerge": {
            "recipe_digest": merge.recipe_id,
            "method": recipe.method,
            "parents": sorted({_name(parent) for parent in parents}),
        },
    }


def _made_of(parents: list[MergeParent]) -> Iterator[str]:
    yield from ("## Made of", "", "| weight | expert | revision | licence | base model |", "|---|---|---|---|---|")
    for parent in parents:
        revision = parent.revision
        licence = _cell(str(revision.facts.get("licence") or "none stated"))
        base = revision.base_model.name if revision.base_model else ""
        yield f"| {parent.weight:g} | {_name(parent)} | `{revision.commit}` | {licence} | {base} |"
    yield ""


def _recipe(recipe: Recipe) -> Iterator[str]:
    output = recipe.output
    paper = f", {recipe.spec.paper}" if recipe.spec.paper else ""
    yield from ("## How", "", f"- method: `{recipe.method}`, version {recipe.spec.version}{paper}")
    yield from (f"- {name}: `{value}`" for name, value in sorted(recipe.parameters.items()))
    if recipe.spec.is_random:
        yield f"- seed: `{recipe.seed}`"
    yield f"- result: {_RESULTS[output.kind]}"
    known = {"dtype": output.dtype, "rank": output.rank, "energy to keep": output.energy, "density": output.density}
    yield from (f"- {name}: `{value}`" for name, value in known.items() if value is not None)
    if output.saved is not None:
        yield f"- tensors that replace the base's are those of {output.saved}, where they cannot be merged"
    if recipe.base_weights is not None:
        yield f"- weights of the base model: `{recipe.base_weights}`"
    yield ""


def _licences(merge: Merge) -> Iterator[str]:
    known = merge.licence
    yield from ("## Licences", "", _PHRASES.get(known.get("verdict", ""), "The licences were not compared."), "")
    yield from (f"- {_cell(reason['detail'])}" for reason in known.get("reasons", ()))
    if known.get("carried"):
        yield f"- This merge carries on the conditions of {_cell(', '.join(known['carried']))}."
    yield from (f"- notice: {_cell(notice)}" for notice in known.get("notices", ()))
    yield ""


def _loading(merge: Merge, recipe: Recipe) -> Iterator[str]:
    """Calls that fetch the merge from the hub it is read from; `HUB` stands for its address."""
    name, base, kind = merge.full_name, merge.base_model.name, recipe.output.kind
    yield from ("## How to load it", "", "`$HUB` is the address of the hub that this page comes from.", "")
    yield from ("```sh", f"moerge pull {name} --out ./merge --endpoint $HUB")
    yield from (f"curl -L $HUB/{name}/resolve/{merge.commit}/{path} -O" for path in _paths(kind))
    if kind == "ternary":
        yield "moerge decompress ./merge/delta.compeft ./merge/decoded"
    if kind == "lora":
        yield f"vllm serve {base} --enable-lora --lora-modules merge=./merge --max-lora-rank 64  # at least its r"
    if kind == "full":
        yield "vllm serve ./merge"
    yield from ("```", "")
    if kind in {"lora", "ia3"}:
        yield from (
            "```python",
            "# with HF_ENDPOINT=$HUB in the environment",
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(base, "{name}", revision="{merge.commit}")  # base: {base}',
            "```",
            "",
        )
    if kind == "full":
        yield from ("```python", "from transformers import AutoModel", "",
                    'model = AutoModel.from_pretrained("./merge")', "```", "")  # fmt: skip
    if kind in {"delta", "ternary"}:
        yield from ("Add each tensor to the tensor of the same name of the base model, in float32, and round once.", "")


def _paths(kind: str) -> tuple[str, ...]:
    return {
        "delta": ("delta.safetensors", "delta.json"),
        "ternary": ("delta.compeft", "delta.json"),
        "full": ("config.json",),
    }.get(kind, ("adapter_config.json", "adapter_model.safetensors"))


def _name(parent: MergeParent) -> str:
    assert parent.revision.expert is not None, "a merge is no parent of a merge"
    return parent.revision.expert.full_name


def _cell(text: str) -> str:
    """What people wrote, on one line, without what would end a cell or begin markup."""
    return " ".join(text.split()).replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'")
