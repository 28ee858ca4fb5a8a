"""The ternary presets: `default`, made for experts without evaluation data; `hq`, which changes the factors first, for
low densities; `paper`, the release's rule bit for bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moerge.compression import balance, published, scales, selection
from moerge.compression.arithmetic import NUMPY, Arithmetic
from moerge.compression.differences import TensorSource, difference, init_of
from moerge.compression.planes import Positions
from moerge.compression.report import Ledger
from moerge.compression.scales import Kept
from moerge.compression.ternary import DTYPES, Ternary, ternary
from moerge.errors import AdapterInvalid, ParameterInvalid
from moerge.tensors.files import Float32

DEFAULT, PAPER, HQ = "default", "paper", "hq"
SIGMA = "sigma"
# The scale rules of each preset, its own one first.
RULES = {DEFAULT: scales.RULES, PAPER: (SIGMA, published.STC), HQ: (HQ,)}
# A tensor alone has no product to be unbiased in. Measured (docs/compeft-quality.md): a difference from the base keeps
# its likelihood by the unbiased scale, a vector of IA3 by its norm; there the unbiased scale overshoots.
_LONE_RULE, _BASE_RULE = "norm", "unbiased"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Parsed parameters. `alpha` is for the paper's scale alone; `lone_rule` was chosen, or the tensor decides."""

    preset: str
    density: float
    scale_rule: str
    lone_rule: str | None
    alpha: float | None

    @property
    def mode(self) -> float | str:
        """What `published.plan` calls it."""
        return published.STC if self.scale_rule == published.STC else float(self.alpha or 1.0)


def settings(parameters: Mapping[str, Any]) -> Settings:
    """Values of the codec's parameters, each in its own range, as settings that fit together.

    `hq` may be named as preset or as scale rule; it is stored as both.
    """
    preset, rule = parameters["preset"], parameters["scale_rule"]
    if preset == DEFAULT and rule == HQ:
        preset = HQ
    allowed = RULES[preset]
    rule = rule or allowed[0]
    if rule not in allowed:
        raise ParameterInvalid(
            f"The preset {preset} has no scale rule {rule}.", pointer="scale_rule", met=rule,
            wanted=", ".join(allowed), remedy="Choose a rule of the preset, or leave it out.",
        )  # fmt: skip
    if parameters["alpha"] is not None and rule != SIGMA:
        raise ParameterInvalid(
            "Only the scale rule sigma of the preset paper has an alpha; the others find their scale from the tensors.",
            pointer="alpha", met=parameters["alpha"], wanted="no alpha", remedy="Leave alpha out.",
        )  # fmt: skip
    alpha = (parameters["alpha"] or 1.0) if rule == SIGMA else None
    density = parameters["density"] or selection.density_for(None)
    lone_rule = parameters["scale_rule"] if preset == DEFAULT else None
    return Settings(preset=preset, density=density, scale_rule=rule, lone_rule=lone_rule, alpha=alpha)


def passes(wanted: Settings) -> int:
    """How often each chosen tensor is read: the published rule needs its threshold and scale over all of them first."""
    if wanted.preset != PAPER:
        return 1
    return 5 if wanted.scale_rule == published.STC else 4


def chosen(source: TensorSource, preset: str, initial: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the tensors to encode, sorted, with their initial values.

    LoRA factors start from 0; one of fewer than 1,024 values stays as it is, but for the published rule, which knows
    no such limit. Other tensors join only when `initial` names them, of whatever size.
    """
    wanted: dict[str, Any] = dict.fromkeys(selection.factors(source.names()), 0) | dict(initial)
    found = {}
    for name in sorted(wanted):
        dtype, shape = source.claim(name)
        is_large = np.prod(shape, dtype=object) >= selection.SMALLEST
        if dtype in DTYPES and (is_large or name in initial or preset == PAPER):
            found[name] = wanted[name]
    return found


class Ternariser:
    """Makes the chosen tensors of a source ternary, in the order of their names, and keeps the ledger.

    Memory holds one tensor, or one LoRA pair, at a time.
    """

    def __init__(
        self, source: TensorSource, names: Mapping[str, Any], wanted: Settings, arithmetic: Arithmetic = NUMPY
    ) -> None:
        self.ledger = Ledger()
        self._arithmetic = arithmetic
        self._source = source
        self._initial = names
        self._settings = wanted
        self._partners = selection.factors(source.names())
        self._plan: published.Plan | None = None

    def __iter__(self) -> Iterator[Ternary]:
        if self._settings.preset == PAPER:
            self._plan = published.plan(
                lambda: map(self._difference, self._initial), density=self._settings.density, mode=self._settings.mode
            )
        waiting: dict[str, Ternary] = {}
        for name in self._initial:
            if name not in waiting:
                partner = self._partners.get(name)
                made = [self._lone(name)] if partner is None else self._pair(name, partner)
                waiting |= {tensor.name: tensor for tensor in made}
            yield waiting.pop(name)
        if self._settings.preset == PAPER:
            self._warn_of_erased()

    def _difference(self, name: str) -> Float32:
        return difference(self._source, name, self._initial.get(name, 0))

    def _keep(self, values: Float32) -> Positions:
        if self._plan is not None:
            return self._plan.keep(values)
        return self._arithmetic.keep_largest(values, self._settings.density)

    def _make(self, name: str, values: Float32, positions: Positions, kept: Kept, scale: float) -> Ternary:
        dtype, shape = self._source.claim(name)
        init = init_of(self._initial[name])
        made = ternary(name=name, dtype=dtype, values=values.reshape(shape), positions=positions, scale=scale,
                       init=init)  # fmt: skip
        self.ledger.add_ternary(made, kept, flipped=scale < 0)
        return made

    def _lone(self, name: str) -> Ternary:
        values = self._difference(name)
        positions = self._keep(values)
        kept = scales.measure(values, positions)
        if self._plan is not None:
            return self._make(name, values, positions, kept, self._plan.scale or 0.0)
        usual = _BASE_RULE if init_of(self._initial[name]) == "base" else _LONE_RULE
        return self._make(name, values, positions, kept, scales.lone(kept, self._settings.lone_rule or usual))

    def _pair(self, name: str, partner: str) -> list[Ternary]:
        """Both factors of a module; one that is not chosen stays exact and enters the product as it is."""
        first, second = (name, partner) if selection.is_first(name) else (partner, name)
        side_a, side_b = self._side(first), self._side(second)
        rank, wanted = side_a.values.shape[:1], side_b.values.shape[1:2]
        if rank != wanted or not rank:
            raise AdapterInvalid(
                f"The factors of {selection.module_of(first)} do not fit together.", pointer=first,
                met=f"A {list(side_a.values.shape)}, B {list(side_b.values.shape)}",
                wanted="A of rank x in, B of out x rank", remedy="Save the adapter again with save_pretrained.",
            )  # fmt: skip
        A, B = side_a.values.reshape(rank[0], -1), side_b.values.reshape(-1, rank[0])
        if self._settings.preset == HQ and side_a.positions is not None and side_b.positions is not None:
            side_a, side_b = self._balanced(side_a, side_b, A, B)
        moments = self._arithmetic.product(A, B, side_a.image.reshape(A.shape), side_b.image.reshape(B.shape))
        kept = [side for side in (side_a, side_b) if side.positions is not None]
        made = [
            self._make(side.name, side.values, side.positions, side.kept, scale)
            for side, scale in zip(kept, self._scales(kept, moments), strict=True)
            if side.positions is not None
        ]
        self._note(side_a, side_b, (A, B), moments, made)
        return made

    def _balanced(self, side_a: "_Side", side_b: "_Side", A: Float32, B: Float32) -> tuple["_Side", "_Side"]:
        """The pair in other factors: balanced ones, the second solved again when the first has become ternary."""
        first, second = balance.balanced(A, B)
        new_a = self._ternary_side(side_a.name, first.reshape(side_a.values.shape))
        solved = balance.compensated(first, second, new_a.image.reshape(A.shape))
        return new_a, self._ternary_side(side_b.name, solved.reshape(side_b.values.shape))

    def _side(self, name: str) -> "_Side":
        values = self._difference(name)
        if name not in self._initial:
            return _Side(name, values, values, None, scales.measure(values, np.empty(0, np.int64)))
        return self._ternary_side(name, values)

    def _ternary_side(self, name: str, values: Float32) -> "_Side":
        positions = self._keep(values)
        kept = scales.measure(values, positions)
        return _Side(name, values, scales.image(values, positions, kept.mean), positions, kept)

    def _scales(self, sides: list["_Side"], moments: scales.Product) -> list[float]:
        """The factor on the product, shared evenly so that merging A and B apart stays balanced."""
        if self._plan is not None:
            return [self._plan.scale or 0.0 for _ in sides]
        share = scales.factor(moments, self._settings.scale_rule) ** (1 / len(sides))
        return [side.kept.mean * share for side in sides]

    def _note(
        self,
        side_a: "_Side",
        side_b: "_Side",
        originals: tuple[Float32, Float32],
        moments: scales.Product,
        made: list[Ternary],
    ) -> None:
        factor = 1.0
        for tensor in made:
            mean = (side_a if tensor.name == side_a.name else side_b).kept.mean
            # Twice turned round or not at all: a negative scale of the release cancels out in a product.
            sign = -1.0 if len(made) == 1 and self._plan is not None and (self._plan.scale or 0.0) < 0 else 1.0
            factor *= sign * tensor.stored_scale / mean if mean else 0.0
        sigmas = [self.ledger.add_spread(letter, values) for letter, values in zip("AB", originals, strict=True)]
        self.ledger.add_module(
            selection.module_of(side_a.name), moments, factor=factor, sigmas=(sigmas[0], sigmas[1])
        )  # fmt: skip
        if side_b.positions is not None:
            self.ledger.add_kept_of_b(side_b.values.size, side_b.positions.size)

    def _warn_of_erased(self) -> None:
        share = self.ledger.share_of_b()
        if share is not None and share < self._settings.density / 4:
            ratio = self.ledger.sigma_ratio()
            self.ledger.warnings.append(
                f"The preset paper keeps {share:.2%} of the values of B (density {self._settings.density:.0%}): "
                f"A is {ratio or float('inf'):.3g} times as large as B and both share one threshold: the adapter is "
                "nearly or wholly erased. The preset default has one threshold per tensor."
            )


@dataclass(frozen=True, eq=False)
class _Side:
    """One factor of a pair: `image` is the mean kept magnitude with signs, or the values if it stays as it is."""

    name: str
    values: Float32
    image: Float32
    positions: Positions | None
    kept: Kept
