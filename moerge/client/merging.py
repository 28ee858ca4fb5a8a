"""Carry out a recipe: by a hub, which computes it once for everybody, or here, from folders and fetched experts.

Both leave the same folder: what the merge became, `recipe.json` with the digests of its experts, and `report.json`.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moerge.client import pulling, records, staging
from moerge.client.drafts import Draft
from moerge.client.hub import Hub
from moerge.client.patience import Progress, silent
from moerge.client.preparing import Ready, prepared
from moerge.client.records import File, Merge
from moerge.client.references import Reference
from moerge.compression import compress_delta
from moerge.errors import ExpertsIncompatible, ParameterInvalid, RecipeInvalid
from moerge.merging import cost, experts, full_checkpoints, run, ternary
from moerge.merging.recipe import Expert
from moerge.tensors import files, strict

RECIPE, REPORT, LINEAGE = "recipe.json", "report.json", "lineage.json"
# By these a folder would be taken for something else than was put there last.
_RESULTS = (LINEAGE, "adapter_config.json", "adapter_model.safetensors", "delta*", "model*.safetensors*", "config.json")
# What a resolved recipe says of an expert's content, which a hub finds out itself.
_CONTENTS = ("digest", "statistics")
_KEYS, _DEPTH = 1_000_000, 64


@dataclass(frozen=True)
class Result:
    """What a folder now holds, `digest` that of its recipe. `merge` is None where it was computed here."""

    folder: Path
    digest: str
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    files: tuple[File, ...]
    merge: Merge | None = None


def ask(hub: Hub, draft: Draft) -> Merge:
    """Have a hub compute a recipe; the same recipe is the same merge. Raises HubRefused and what waiting raises."""
    body = _body(draft)
    _check_digests(hub, draft, body)
    status, answer = hub.post("/api/v1/merges", body)
    return records.merge(answer, is_new=status == 202)


def check(hub: Hub, draft: Draft) -> dict[str, Any]:
    """What a hub says of a recipe before any work: digest, experts, output, cost, licence, kinship, warnings.

    Raises as `ask` does.
    """
    return records.mapping(hub.post("/api/v1/merges/check", _body(draft))[1], "the check")


def fetch(hub: Hub, merge: Merge, out_dir: str | Path) -> Result:
    """Wait for a merge and fetch it, every file against its SHA-256; the folder changes when everything has arrived.

    Raises ClientError, ParameterInvalid where the folder holds something else, OSError.
    """
    folder = Path(out_dir).absolute()
    check_free(folder)
    pulled = pulling.pull(hub, Reference("merges", merge.id), folder)
    merge = records.merge(hub.json(f"/api/v1/merges/{merge.id}"))
    if REPORT not in (file.path for file in pulled.files):
        staging.put(folder / REPORT, _dump(merge.report))
    return _settled(folder, merge.digest, pulled.files, merge)


def here(draft: Draft, out_dir: str | Path, *, hub: Hub | None = None, progress: Progress = silent) -> Result:
    """Compute a recipe on this machine; `hub` is where references are fetched from.

    The folder changes when everything is there, and nothing stays of a merge that was stopped. Raises RecipeInvalid,
    ExpertsIncompatible, ParameterInvalid where the folder holds something else, ClientError, OSError.
    """
    folder = Path(out_dir).absolute()
    check_free(folder)
    with prepared(draft, hub=hub) as ready, staging.stage(folder, resumes=False) as stage:
        report = _carry_out(ready, stage, progress)
        staging.put(stage / RECIPE, _dump(ready.recipe.to_dict()))
        staging.put(stage / REPORT, _dump(report))
        made = tuple(File(path.name, path.stat().st_size, files.sha256(path)) for path in sorted(stage.iterdir()))
        staging.land(stage, folder)
    return _settled(folder, ready.recipe.digest, made)


def _carry_out(ready: Ready, stage: Path, progress: Progress) -> dict[str, Any]:
    """Write the weights; returns what is to be told of them."""
    recipe, threads = ready.recipe, os.cpu_count() or 1
    is_ternary = recipe.output.kind == "ternary"

    def watch(share: float) -> None:
        progress(f"merging by {recipe.method}", share * (0.9 if is_ternary else 1.0))

    if ready.checkpoints:
        whole = full_checkpoints.merge(
            recipe, ready.checkpoints, stage, base=ready.base, threads=threads, progress=watch
        )
        return {**asdict(whole), "kind": recipe.output.kind, "warnings": [*ready.warnings]}
    report = run.merge(
        recipe,
        ready.adapters,
        stage,
        base=ready.base,
        statistics_by_digest=ready.statistics,
        threads=threads,
        progress=watch,
    ).to_dict()
    report["warnings"] = [*ready.warnings, *report["warnings"]]
    if is_ternary:
        ternary.encode(
            report,
            stage,
            recipe,
            compress=compress_delta,
            progress=lambda share: progress("encoding", 0.9 + 0.1 * share),
        )
    return report


def check_here(draft: Draft, *, hub: Hub | None = None) -> dict[str, Any]:
    """What a merge on this machine would take and give, in the words of a hub. Raises as `here` does."""
    with prepared(draft, hub=hub) as ready, ExitStack() as opened:
        recipe, needed = ready.recipe, None
        if ready.checkpoints:
            full_checkpoints.check(recipe, has_base=ready.base is not None)
        else:
            brought = experts.gather(
                recipe, ready.adapters, base=ready.base, statistics_by_digest=ready.statistics, opened=opened
            )
            run.check_rank(recipe, brought)
            size = ready.base.checkpoint.file_bytes if ready.base else 0
            needed = cost.estimate(recipe.spec, recipe.output, brought.sizes, saved=brought.saved, base_bytes=size)
        return {
            "ok": True,
            "digest": recipe.digest,
            "recipe": recipe.to_dict(),
            "experts": [_facts(expert, ready) for expert in recipe.experts],
            "output": {
                "kind": recipe.output.kind,
                "rank": needed and needed.rank,
                "bytes": needed and needed.written_bytes,
            },
            "cost": needed
            and {
                "memory_bytes": needed.memory_bytes,
                "written_bytes": needed.written_bytes,
                "cpu_seconds": float(f"{needed.seconds:.3g}"),
            },
            "warnings": list(ready.warnings),
        }


def _facts(expert: Expert, ready: Ready) -> dict[str, Any]:
    told: dict[str, Any] = {"expert": expert.expert, "revision": expert.revision}
    adapter = ready.adapters.get(expert.digest)
    if adapter is None:
        return {**told, "kind": "checkpoint"}
    facts = adapter.facts
    return {**told, "kind": facts.kind, "family": facts.family, "rank": facts.rank, "modules": len(facts.modules)}


def check_free(folder: Path) -> None:
    """A folder may be new, empty, or an earlier merge, which is replaced. Raises ParameterInvalid."""
    if folder.is_dir():
        holds = {path.name for path in folder.iterdir()} - {staging.INSIDE}
        if not holds or {"method", "experts"} <= _object_in(folder / RECIPE).keys():
            return
    if folder.exists() or folder.is_symlink():
        met = "a folder with something else in it" if folder.is_dir() else "a file"
        raise ParameterInvalid(
            f"{folder} is {met}.", pointer="--out", met=met, wanted="a new folder, or one that holds an earlier merge",
            remedy="Name another folder.",
        )  # fmt: skip


def _settled(folder: Path, digest: str, made: tuple[File, ...], merge: Merge | None = None) -> Result:
    """Take away what an earlier merge has left and this one did not make."""
    names = {REPORT, *(file.path for file in made)}
    left = {path.name for pattern in _RESULTS for path in folder.glob(pattern)} - names
    if LINEAGE in left:
        # Only a hub's merge has one, and a card that tells of it.
        left |= {"README.md"} - names
    for name in left:
        (folder / name).unlink(missing_ok=True)
    return Result(folder, digest, _object_in(folder / RECIPE), _object_in(folder / REPORT), made, merge)


def _object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which somebody else may have written; empty where there is none."""
    try:
        found = strict.loads(path.read_bytes(), max_keys=_KEYS, max_depth=_DEPTH)
    except (OSError, strict.Malformed):
        return {}
    return found if isinstance(found, dict) else {}


def _body(draft: Draft) -> dict[str, Any]:
    """A draft as the API takes it. Raises RecipeInvalid where an expert or the base is a folder."""
    if draft.folders or draft.base:
        position = draft.folders[0] if draft.folders else None
        pointer = "/base_model" if position is None else f"/experts/{position}/expert"
        met = str(draft.base) if position is None else draft.experts[position].text
        raise RecipeInvalid(
            f"A hub cannot read the folder {met}.", pointer=pointer, met=met,
            wanted="references alone, or folders alone", remedy="Add --local to fetch the references and compute here.",
        )  # fmt: skip
    items = []
    for named in draft.experts:
        reference = named.reference
        assert reference is not None, "what is no folder is a reference"
        given = {name: value for name, value in named.fields.items() if name not in _CONTENTS}
        items.append({"expert": reference.full_name, "revision": reference.revision, **given})
    return {**draft.fields, "experts": items}


def _check_digests(hub: Hub, draft: Draft, body: Mapping[str, Any]) -> None:
    """A recipe that names the content of its experts is not merged with another content."""
    given = {str(named.fields[name]) for named in draft.experts for name in _CONTENTS if name in named.fields}
    if not given:
        return
    told = records.mapping(hub.post("/api/v1/merges/check", body)[1], "the check").get("recipe")
    items = records.mapping(told, "the recipe").get("experts", [])
    found = {str(item[name]) for item in items for name in _CONTENTS if name in item}
    if given - found:
        raise ExpertsIncompatible(
            "An expert is not what the recipe was written for.", pointer="/experts", met=sorted(found - given),
            wanted=sorted(given - found), remedy="Name the revisions that were meant, or leave the digests out.",
        )  # fmt: skip


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
