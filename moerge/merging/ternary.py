"""The ternary output: the dense task vector of a merge, made small by a codec that the caller hands in.

Merging and compression do not lean on each other, so whoever may use both brings the codec.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from moerge.merging.cost import TERNARY_DENSITY
from moerge.merging.outputs import DELTA_FILE, TERNARY_FILE
from moerge.merging.recipe import Recipe
from moerge.merging.report import ENERGY_WANTED


class Encoded(Protocol):
    """What a codec tells of a file; `cosine` and `rel_error` (Frobenius) compare before and after, None for zeros."""

    @property
    def density(self) -> float: ...
    @property
    def bytes(self) -> int: ...
    @property
    def original_bytes(self) -> int: ...
    @property
    def cosine(self) -> float | None: ...
    @property
    def rel_error(self) -> float | None: ...


def encode(
    report: dict[str, Any],
    folder: Path,
    recipe: Recipe,
    *,
    compress: Callable[..., Encoded],
    progress: Callable[[float], None],
) -> None:
    """Replace the dense task vector in `folder` by its ternary form and say in the report what that keeps.

    Its energy kept is the share of the squared norm that the error leaves. `compress` is
    moerge.compression.compress_delta.
    """
    dense = folder / DELTA_FILE
    found = compress(
        dense,
        folder / TERNARY_FILE,
        density=recipe.output.density or TERNARY_DENSITY,
        base_model=recipe.base_model,
        progress=progress,
    )
    dense.unlink()
    report["ternary"] = {
        "density": found.density,
        "bytes": found.bytes,
        "dense_bytes": found.original_bytes,
        "cosine": found.cosine,
        "rel_error": found.rel_error,
    }
    if found.rel_error is None:
        return
    report["energy_kept"] = share = max(0.0, 1.0 - found.rel_error**2)
    if share < ENERGY_WANTED:
        report["warnings"].append(
            f"Ternary at density {found.density:g} keeps {share:.1%} of the merged delta's energy, less than"
            f" {ENERGY_WANTED:.0%}. A higher density keeps more, output delta everything."
        )
