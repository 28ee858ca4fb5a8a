"""The pages about merge methods, written from the catalogue: an overview, and one page for each method."""

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from moerge import merging, table
from moerge.merging import methods
from moerge.merging.base import Spec

FORMS = {
    "element-wise": "Value by value on the dense delta, read in blocks, so that no more than one lies in memory.",
    "core": "On the small cores of the experts' factors; no dense delta is formed where experts are low rank.",
    "factor": "On the rank units of B and A themselves.",
    "ordered": "One expert after the other; the order of the recipe counts.",
    "whole": "On all tensors of all experts.",
}
RANKS = {
    "all": "The sum of the experts' ranks, always: the result is exact.",
    "sum": "The sum of the experts' ranks: the result is exact. A smaller `output.rank` truncates it by SVD.",
    "largest": "The largest rank of the experts, or `output.rank`.",
    "dense": (
        "The merged delta is not of low rank. The default is the sum of the experts' ranks, 64 at most; the report "
        "says how much of it is kept, and `output.kind` `delta` or `ternary` keeps what no rank does."
    ),
}
GROUPS = {
    1: "Needs the adapters alone.",
    2: "Needs statistics beside each expert, as `stats.safetensors`.",
    3: "Needs figures that an evaluation has found.",
}
GENERATED = "Written from the catalogue by `bin/docs`."


def overview() -> str:
    """All methods in one table."""
    lines = [
        "# Merge methods",
        "",
        f"{GENERATED} [Which method when](which-method.md) helps to choose; every name leads to a page with",
        "parameters and a recipe. Methods work on deltas (scaling times B times A) and so give the same for every way",
        "to split a delta into factors; only those called `peft_` merge A and B apart from each other, as PEFT does,",
        "and are here for comparison. Weights are those of the experts in a recipe; `density` is always the share of",
        "values kept.",
        "",
        "| method | what it does | result | needs |",
        "|---|---|---|---|",
    ]
    for name, spec in merging.catalogue().items():
        result = {"dense": "dense", "largest": "low rank"}.get(spec.rank_rule, "low rank, exact")
        needs = ", ".join(spec.needs) or ("weights found by search" if spec.group == 3 else "–")
        lines.append(f"| [{name}](methods/{name}.md) | {spec.summary} | {result} | {needs} |")
    return "\n".join([*lines, ""])


def pages() -> Iterator[tuple[str, str]]:
    """Name and page of every method."""
    modules: Mapping[str, Any] = table.load(methods)
    for name, spec in merging.catalogue().items():
        yield name, _page(spec, modules[name])


def _page(spec: Spec, module: Any) -> str:
    first, _, more = (inspect.getdoc(module) or "").partition("\n\n")
    lines = [f"# {spec.title}", "", f"`{spec.name}`, version {spec.version}. {GENERATED}", "", first, ""]
    lines += [f"**When.** {spec.when}", "", f"**Source.** {spec.paper}", ""]
    lines += ["## What comes out", "", RANKS[spec.rank_rule], "", f"{FORMS[spec.form]} {GROUPS[spec.group]}"]
    lines += _remarks(spec)
    if more:
        lines += ["", "## How it works", "", *_prose(more)]
    lines += ["", "## Parameters", "", *_parameters(spec), "", "## A recipe", "", "```json", _recipe(spec), "```", ""]
    lines += [
        "Send it to `POST /api/v1/merges`, or hand the file to `moerge merge`. [All methods](../merge-methods.md)",
        "",
    ]
    return "\n".join(lines)


def _remarks(spec: Spec) -> list[str]:
    remarks = []
    if spec.needs:
        remarks.append(f"Every expert must come with {' and '.join(spec.needs)}.")
    if spec.most_experts is not None:
        remarks.append(f"It takes at most {spec.most_experts} experts.")
    if spec.is_random:
        remarks.append(
            "It is random: the same `seed` gives the same bytes, whatever the order and the number of threads."
        )
    if spec.is_ordered:
        remarks.append("The order of the experts in the recipe counts.")
    if spec.divides_by_weights:
        remarks.append("Weights that sum to zero are refused where it divides by their sum.")
    return ["", " ".join(remarks)] if remarks else []


def _prose(text: str) -> list[str]:
    """A docstring as Markdown: what is set in columns stays so."""
    lines = []
    for block in text.split("\n\n"):
        is_set = any("   " in line.strip() or line.startswith(" ") for line in block.splitlines())
        lines += ["```", block, "```", ""] if is_set else [block, ""]
    return lines[:-1]


def _parameters(spec: Spec) -> list[str]:
    if not spec.parameters:
        return ["None."]
    rows = ["| parameter | default | allowed | meaning |", "|---|---|---|---|"]
    for parameter in spec.parameters:
        default = json.dumps(parameter.default)
        rows.append(f"| `{parameter.name}` | `{default}` | {parameter.wanted()} | {parameter.help} |")
    for limit in spec.limits:
        phrase = " - ".join([" + ".join(limit.plus), *limit.minus])
        bound = f"more than {limit.above:g}" if limit.above is not None else f"at most {limit.at_most:g}"
        rows += ["", f"Together: {phrase} is {bound}."]
    return rows


def _recipe(spec: Spec) -> str:
    """A recipe that is accepted, with the first two parameters spelled out."""
    experts = [{"expert": "ann/first", "weight": 0.6}, {"expert": "ben/second", "weight": 0.4}]
    values = {item.name: item.default for item in spec.parameters[:2] if item.default is not None}
    recipe: dict[str, Any] = {"method": spec.name, "parameters": values, "experts": experts}
    if spec.is_random:
        recipe["seed"] = 0
    return json.dumps(recipe, indent=2)
