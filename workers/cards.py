"""The card of a merge, written from its recipe."""

from typing import Any

import yaml

from moerge.merging.recipe import Recipe
from registry.models import Merge


def of_merge(merge: Merge, recipe: Recipe, report: dict[str, Any]) -> str:
    """README.md: front matter that Hub clients read, the recipe in words, the parents and their licences."""
    parents = list(merge.parents.select_related("revision__expert__namespace"))
    licences = {
        parent.revision.expert.full_name: parent.revision.expert.licence or "none stated"
        for parent in parents
        if parent.revision.expert
    }
    front = {
        "base_model": merge.base_model.name,
        "library_name": "peft",
        "tags": ["moerge", "merge", recipe.method],
        "moerge": {"recipe_digest": merge.recipe_id, "method": recipe.method, "parents": sorted(licences)},
    }
    rows = [
        f"| {parent.weight:g} | {parent.revision.expert.full_name} | `{parent.revision.commit}` | "
        f"{licences[parent.revision.expert.full_name]} |"
        for parent in parents
        if parent.revision.expert
    ]
    parameters = [f"- {name}: `{value}`" for name, value in sorted(recipe.parameters.items())] or ["- none"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {merge.full_name}",
        "",
        f"{len(parents)} experts on {merge.base_model.name}, merged by `{recipe.method}` {recipe.spec.version}.",
        "",
        "| weight | expert | revision | licence |",
        "|---|---|---|---|",
        *rows,
        "",
        "The licences of all parents and of the base model hold for this merge together.",
        "",
        "## Parameters",
        "",
        *parameters,
        "",
        "## Result",
        "",
        f"- rank {report['rank']}",
        f"- energy kept {report['energy_kept']:.4f}",
        *[f"- warning: {warning}" for warning in report["warnings"]],
        "",
        "`recipe.json` holds the recipe, `lineage.json` the digests of the parents.",
        "",
    ]
    return "\n".join(lines)
