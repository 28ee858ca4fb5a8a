"""Carry out a merge: read the parents' weights, merge, write card, recipe and lineage beside the result."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from django.conf import settings

from moerge.compression import compress_delta
from moerge.merging import recipe as recipes
from moerge.merging import run as merging
from moerge.merging import sidecar, ternary
from moerge.merging.recipe import Recipe
from moerge.tensors import adapters
from moerge.tensors.bases import BaseWeights
from registry import selectors, storage
from registry.checks import files
from registry.models import Merge, Revision
from registry.services import base_weights, blobs, lineage, merges
from registry.services import recipes as pinned
from workers import cards, selfcheck
from workers.runner import Stopped, Work


def run(work: Work) -> dict[str, Any]:
    """Compute one merge. A second run finds the result of the first."""
    merge = Merge.objects.select_related("recipe", "base_model").get(jobs=work.lease.job_id)
    if merge.state == Merge.State.READY:
        return {"commit": merge.commit}
    recipe = parsed(merge)
    parents = {
        pinned.content_digest(parent.revision): parent.revision
        for parent in merge.parents.select_related("revision__expert__namespace")
    }
    folder = blobs.staging_path()
    folder.mkdir()
    try:
        report = compute(work, merge, recipe, parents, folder)
        work.progress(0.96, "Storing the result")
        told = lineage.record(merge, recipe, environment=report["environment"])
        texts = {
            "README.md": cards.of_merge(merge, recipe),
            "recipe.json": json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n",
            "report.json": json.dumps(report, indent=2, sort_keys=True) + "\n",
            "lineage.json": json.dumps(told, indent=2, sort_keys=True) + "\n",
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
        merges.finish(merge=merge, staged=merges.stage_folder(folder), report=report)
    except merging.Cancelled as error:
        raise Stopped from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"commit": merge.commit, "rank": report["rank"], "energy_kept": report["energy_kept"]}


def compute(work: Work, merge: Merge, recipe: Recipe, parents: dict[str, Revision], folder: Path) -> dict[str, Any]:
    """Write the merged weights to `folder`; returns what is to be told of them."""
    kept = storage.current()
    with ExitStack() as opened:
        base = opened.enter_context(base_weights.open(merge.base_model)) if recipe.base_weights else None
        loaded = {digest: load(revision, opened, base=base) for digest, revision in parents.items()}
        known = {
            expert.statistics: sidecar.load(opened.enter_context(kept.as_path(expert.statistics)))
            for expert in recipe.experts
            if expert.statistics
        }
        sample = selfcheck.Sample(recipe.digest)
        work.progress(0.02, f"Merging {len(loaded)} experts")
        report = merging.merge(
            recipe,
            loaded,
            folder,
            base=base,
            statistics_by_digest=known,
            memory_bytes=settings.HUB_MERGE_MEMORY_BYTES,
            progress=lambda share: work.progress(0.02 + 0.83 * share),
            cancelled=work.is_stopped,
            observe=sample,
        ).to_dict()
        if recipe.output.kind == "ternary":
            work.progress(0.86, "Encoding")
            ternary.encode(
                report,
                folder,
                recipe,
                compress=compress_delta,
                progress=lambda share: work.progress(0.86 + 0.06 * share),
            )
        work.progress(0.92, "Loading the result as its readers will")
        report["self_check"] = selfcheck.check(
            folder,
            recipe=recipe,
            sample=sample,
            adapters=list(loaded.values()),
            base=base,
            base_shapes=merge.base_model.shapes,
        )
    return report


def parsed(merge: Merge) -> Recipe:
    """The recipe of a merge, read back from its canonical bytes."""
    body = json.loads(merge.recipe.canonical)
    body.pop("version")
    return recipes.parse(body)


def load(revision: Revision, opened: ExitStack, *, base: BaseWeights | None) -> adapters.Adapter:
    """The adapter of a revision, open for as long as `opened` lasts."""
    kept = storage.current()
    with kept.open(selectors.file(revision, files.CONFIG).blob_id) as file:
        config = adapters.parse_config(file.read())
    path = opened.enter_context(kept.as_path(selectors.file(revision, files.WEIGHTS).blob_id))
    return adapters.load(config, path, accept=merging.ACCEPTED, base=base)
