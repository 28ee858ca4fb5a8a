"""What a compression kept and lost, per tensor, per LoRA module and over all."""

from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

from moerge.compression import selection
from moerge.compression.scales import Kept, Product
from moerge.compression.ternary import Ternary
from moerge.tensors.files import Float32


@dataclass(frozen=True)
class TensorLoss:
    """One tensor. `cosine` and `rel_error` compare the task vector before and after; None for a zero one.

    `scale` is None where there is one for every row. With `hq` the task vector is the balanced factor.
    """

    name: str
    dtype: str
    size: int
    kept: int
    scale: float | None
    cosine: float | None
    rel_error: float | None


@dataclass(frozen=True)
class ModuleLoss:
    """One LoRA module: cosine and relative error of B·A, and the ratio of the standard deviations of A and B."""

    module: str
    cosine: float | None
    rel_error: float | None
    sigma_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished compression.

    `ternary_bytes` are the bytes of the file that stand for encoded tensors, `ternary_original_bytes` the same tensors
    in bfloat16; `bytes` and `original_bytes` are the whole files, with everything that stays as it is.
    """

    preset: str
    scale_rule: str
    density: float
    alpha: float | None
    size: int
    kept: int
    cosine: float | None
    rel_error: float | None
    product_cosine: float | None
    product_rel_error: float | None
    sigma_ratio: float | None
    ternary_bytes: int
    ternary_original_bytes: int
    bytes: int
    original_bytes: int
    sha256: str
    planes_sha256: str
    source_sha256: str
    warnings: tuple[str, ...] = ()
    tensors: tuple[TensorLoss, ...] = field(default=(), repr=False)
    modules: tuple[ModuleLoss, ...] = field(default=(), repr=False)

    @property
    def ternary_ratio(self) -> float | None:
        """How many times smaller the encoded tensors alone are than bfloat16."""
        return self.ternary_original_bytes / self.ternary_bytes if self.size else None

    @property
    def ratio(self) -> float:
        """How many times smaller the whole file is."""
        return self.original_bytes / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"ternary_ratio": self.ternary_ratio, "ratio": self.ratio}


@dataclass
class _Sums:
    """<v, v>, <v, v̂>, <v̂, v̂>."""

    original: float = 0.0
    across: float = 0.0
    image: float = 0.0

    def add(self, original: float, across: float, image: float) -> None:
        self.original += original
        self.across += across
        self.image += image

    def cosine(self) -> float | None:
        return self.across / sqrt(self.original * self.image) if self.original > 0 and self.image > 0 else None

    def rel_error(self) -> float | None:
        if self.original <= 0:
            return None
        return sqrt(max(0.0, self.original - 2 * self.across + self.image) / self.original)


class Ledger:
    """Collects losses while tensors pass by."""

    def __init__(self) -> None:
        self.tensors: list[TensorLoss] = []
        self.modules: list[ModuleLoss] = []
        self.all = _Sums()
        self.products = _Sums()
        self.warnings: list[str] = []
        self._variance = {"A": [0.0, 0.0], "B": [0.0, 0.0]}
        self._kept_of_b = [0, 0]

    def add_ternary(self, made: Ternary, kept: Kept, *, flipped: bool = False) -> None:
        """One ternary tensor, by the scale that a reader will apply. `flipped`: the rule's scale was negative."""
        scale = -made.stored_scale if flipped else made.stored_scale
        inner = (kept.squared_norm, scale * kept.mean * kept.count, scale**2 * made.positions.size)
        self.add_tensor(made.name, made.dtype, size=made.size, kept=made.positions.size, scale=made.stored_scale,
                        inner=inner)  # fmt: skip

    def add_tensor(
        self, name: str, dtype: str, *, size: int, kept: int, scale: float | None, inner: tuple[float, float, float]
    ) -> None:
        """One tensor v and what a reader will see, v̂. `inner` is <v, v>, <v, v̂>, <v̂, v̂>."""
        sums = _Sums(*inner)
        self.all.add(*inner)
        self.tensors.append(TensorLoss(name, dtype, size, kept, scale, sums.cosine(), sums.rel_error()))

    def add_module(self, module: str, moments: Product, *, factor: float, sigmas: tuple[float, float]) -> None:
        """One LoRA pair. `factor` is the one on the product of the two images, with stored scales."""
        ratio = sigmas[0] / sigmas[1] if sigmas[1] > 0 else None
        error = moments.relative_error(factor)
        self.modules.append(ModuleLoss(module, moments.cosine() if factor else None, error, ratio))
        self.products.add(moments.oo, factor * moments.x, factor**2 * moments.hh)

    def add_spread(self, side: str, values: Float32) -> float:
        """Note one factor ("A" or "B") for the ratio over all modules; returns its standard deviation."""
        count, _, squares = selection.spread([values])
        self._variance[side][0] += count
        self._variance[side][1] += squares
        return sqrt(squares / count) if count else 0.0

    def add_kept_of_b(self, size: int, kept: int) -> None:
        self._kept_of_b[0] += size
        self._kept_of_b[1] += kept

    def sigma_ratio(self) -> float | None:
        """Standard deviation within the tensors of A over that within those of B."""
        (count_a, squares_a), (count_b, squares_b) = self._variance["A"], self._variance["B"]
        return sqrt((squares_a / count_a) / (squares_b / count_b)) if count_a and squares_b > 0 else None

    def share_of_b(self) -> float | None:
        """Share of the values of all B that are kept."""
        size, kept = self._kept_of_b
        return kept / size if size else None
