"""Merge full checkpoints of one base model, tensor by tensor in blocks, so that memory does not grow with the model.

An expert's delta is its tensor less the base's, taken in float32 as it is read. The merged delta is added to the base
and rounded once, to the dtype that is written. Without a base, methods that average merge the weights themselves.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging import engine, full
from moerge.merging.base import Spec
from moerge.merging.full_checkpoints.plan import Plan, planned
from moerge.merging.full_checkpoints.work import Told, Work, is_local, rounded_sum
from moerge.merging.full_checkpoints.written import Files
from moerge.merging.recipe import Recipe
from moerge.merging.sources import Watch, never, silent
from moerge.tensors import checkpoints, files
from moerge.tensors.bases import BaseWeights
from moerge.tensors.header import ITEM_BYTES

__all__ = ["SPHERICAL", "Report", "bytes_needed", "check", "merge", "rounded_sum"]

# Methods on the lengths and angles of whole tensors.
SPHERICAL = ("slerp", "nuslerp", "multislerp", "karcher")
_WHOLE = (*SPHERICAL, "layer_swapping")
_WITHOUT_BASE = ("linear", *SPHERICAL)
_FIXED_BYTES = 64 << 20


@dataclass(frozen=True)
class Report:
    """What was written: files by name, merged tensors, ties (tensor -> the one it is the same as), copied tensors."""

    method: str
    files: tuple[str, ...]
    merged: tuple[str, ...]
    tied: Mapping[str, str]
    copied: tuple[str, ...]
    values: int
    bytes: int


def merge(
    recipe: Recipe,
    folders: Mapping[str, str | Path],
    out_dir: str | Path,
    *,
    base: BaseWeights | None = None,
    memory_bytes: int | None = None,
    threads: int = 1,
    block_values: int | None = None,
    progress: Callable[[float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Report:
    """Merge the checkpoints in `folders`, found by `Expert.digest`, and write a checkpoint to `out_dir`.

    `base` is what the experts were trained from. The files that lie beside its weights, such as config and tokenizer,
    are copied; without a base those of the first expert. Threads and blocks change no byte of the result.

    Raises RecipeInvalid when the method cannot be applied to checkpoints or the memory does not fit,
    ExpertsIncompatible when checkpoints do not fit together or hold NaN, CheckpointInvalid when one cannot be read,
    Cancelled when told to stop. Nothing is left in `out_dir` then.
    """
    check(recipe, has_base=base is not None)
    if base is not None and recipe.base_weights is not None and recipe.base_weights != base.digest:
        raise ExpertsIncompatible(
            "The base at hand is not the one that the recipe names.",
            pointer="/base_weights",
            met=base.digest,
            wanted=recipe.base_weights,
            remedy="Hand in the base whose digest the recipe names.",
        )
    out = Path(out_dir)
    if base is not None:
        _check_apart(out, base.folder, "the base")
    with contextlib.ExitStack() as stack:
        experts = [
            stack.enter_context(checkpoints.open_checkpoint(_folder(recipe, position, folders, out)))
            for position in range(len(recipe.experts))
        ]
        plan = planned(recipe, experts, None if base is None else base.checkpoint)
        _check_memory(recipe, plan, memory_bytes)
        work = Work(
            recipe,
            plan,
            engine.Settings(block_values=block_values, threads=threads, watch=Watch(silent, cancelled or never)),
            Told(progress or silent, plan.values),
        )
        out.mkdir(parents=True, exist_ok=True)
        written = Files(plan, work.dtypes, out)
        try:
            _write(work, written)
            beside = Path(folders[recipe.experts[0].digest]) if base is None else base.folder
            full.copy_beside(beside if beside.is_dir() else beside.parent, out, recipe.output.dtype)
        except BaseException:
            written.discard()
            raise
    work.told.say(1.0)
    return Report(
        recipe.method, tuple(sorted(written.places)), plan.floats, plan.tied, plan.copied, plan.values, written.total
    )


def _folder(recipe: Recipe, position: int, folders: Mapping[str, str | Path], out: Path) -> Path:
    expert = recipe.experts[position]
    given = folders.get(expert.digest)
    if given is None:
        raise ExpertsIncompatible(
            f"The checkpoint of {expert.expert} was not handed in.",
            pointer=f"/experts/{position}",
            met="nothing",
            wanted=expert.digest,
            remedy="Hand in one folder per digest of the recipe.",
        )
    _check_apart(out, Path(given), expert.expert)
    return Path(given)


def _check_apart(out: Path, given: Path, label: str) -> None:
    """Raise RecipeInvalid when the merge would be written over what it is made from."""
    if out.exists() and out.samefile(given if given.is_dir() else given.parent):
        raise RecipeInvalid(
            f"The merge would be written over {label}.",
            pointer="/output",
            met=out.name,
            wanted="a folder that holds neither the base nor an expert",
            remedy="Write to another folder.",
        )


def _check_memory(recipe: Recipe, plan: Plan, memory_bytes: int | None) -> None:
    needed = bytes_needed(recipe, [plan.size(name) for name in plan.floats])
    if memory_bytes is not None and needed > memory_bytes:
        raise RecipeInvalid(
            f"This merge needs about {needed >> 20} MiB and may use {memory_bytes >> 20} MiB.",
            pointer="/method",
            met=needed,
            wanted=memory_bytes,
            remedy="Use linear or ties, which keep one merged tensor in memory, or a larger machine.",
        )


def _write(work: Work, written: Files) -> None:
    """Write all tensors, the merged ones in the order in which they are merged."""
    plan = work.plan
    for name in plan.floats:
        written.put(name, work.blocks(name))
    for name, first in plan.tied.items():
        written.put(name, written.stored(first, plan.size(name) * ITEM_BYTES[work.dtypes[name]]))
    for name in plan.copied:
        file, own = plan.reference.file(name)
        written.put(name, files.raw_blocks(file, own))
    written.write_index()
    written.close()


def check(recipe: Recipe, *, has_base: bool) -> None:
    """Raise RecipeInvalid when this recipe cannot be carried out on full checkpoints, before one is opened."""
    spec = recipe.spec
    if recipe.output.kind != "full":
        raise RecipeInvalid(
            f"Full checkpoints are merged into a full checkpoint, not into {recipe.output.kind}.",
            pointer="/output/kind",
            met=recipe.output.kind,
            wanted="full",
            remedy="Set output.kind to full.",
        )
    reason = _reason_against(spec)
    if reason:
        raise RecipeInvalid(
            f"{spec.name} cannot merge full checkpoints: {reason}.",
            pointer="/method",
            met=spec.name,
            wanted="a method on dense deltas whose memory does not grow with the model",
            remedy="Choose ties, dare, linear or another element-wise method.",
        )
    if has_base:
        return
    if spec.name not in _WITHOUT_BASE:
        raise RecipeInvalid(
            f"{spec.name} works on deltas, and without the base there are none.",
            pointer="/base_model",
            met="no base weights",
            wanted="the checkpoint that the experts were trained from",
            remedy="Hand in the base, or choose " + ", ".join(_WITHOUT_BASE) + ".",
        )
    whole = math.fsum(expert.weight for expert in recipe.experts)
    if spec.name == "linear" and not recipe.parameters.normalize and abs(whole - 1) > 1e-6:
        raise RecipeInvalid(
            f"The weights sum to {whole:g}, which would make the weights of the model as many times larger.",
            pointer="/experts",
            met=whole,
            wanted="weights whose sum is 1",
            remedy="Set normalize to true, change the weights, or hand in the base.",
        )


def _reason_against(spec: Spec) -> str:
    if spec.needs:
        return f"it needs {' and '.join(spec.needs)} of every expert"
    if spec.form == "factor":
        return "it works on the factors of adapters"
    if spec.form == "ordered":
        return "it keeps every tensor of the merge in memory"
    if spec.form == "whole" and spec.name not in _WHOLE:
        return "it works on adapters"
    return ""


def bytes_needed(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Memory a merge of tensors of these numbers of values takes beside the interpreter; an upper estimate."""
    experts, largest = len(recipe.experts), max(sizes, default=0)
    needed = _FIXED_BYTES + 24 * experts * max(1 << 16, (1 << 19) // experts)
    if not is_local(recipe):
        # Values near a cut are gathered, with their places, out of all values of an expert.
        needed += 2 * sum(sizes)
    if recipe.spec.form == "core":
        return needed + (24 * experts + 40) * largest
    # SCE ranks variances and NuSLERP takes products of rows in float64; where values are cut, those near the cut are
    # gathered.
    return needed + (40 if recipe.method in {"sce", "nuslerp"} else 16) * largest
