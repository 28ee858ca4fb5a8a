"""What a merge method says about itself, and the five forms it can take.

A method is one file in `methods/` with a SPEC and pure functions on arrays. The form fixes which functions:

element-wise  `merge(block, state, parameters) -> (values,)` sees the same stretch of one tensor in every expert.
              `prepare(stream, parameters) -> state`, where present, first reads everything once for thresholds and
              elections of a scope wider than a stretch.
core          `merge(cores, weights, ranks, parameters) -> (rows, columns)` sees each delta in the bases that the
              experts' factors span together, R x R for a total rank R; `merge_vectors(values, weights, parameters)`
              sees tensors that are not matrices.
factor        `merge(factors, weights, parameters) -> Factors` sees the rank units of B and A themselves.
ordered       `step(state, delta, weight, parameters) -> state` takes one expert after the other in the order of the
              recipe, `finish(state) -> deltas` reads the result; a state can be kept and continued.
whole         `merge(stream, parameters)` yields name and delta of every tensor, for what fits none of the others: it
              reads deltas as factors, statistics of the experts, and streams of its own making.

A method whose result is a sum of deltas says so by `coefficients(weights, parameters) -> (experts,)`; the frame then
forms the sum on the factors, exactly, and never a dense delta.

This file imports no numpy: web processes check recipes against specs that were stored as rows.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from moerge.errors import RecipeInvalid
from moerge.merging import layers

Form = Literal["element-wise", "core", "factor", "ordered", "whole"]
Kind = Literal["number", "integer", "choice", "flag", "layers"]
RankRule = Literal["all", "sum", "largest", "dense"]
Value = float | int | str | bool | None

DENSE_RANK = 64


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One setting of a method with its default, range and help. `above` and `below` exclude the bound itself.

    A default of None means that the method chooses, as its help says; None may then also be handed in.
    """

    name: str
    kind: Kind
    default: Value
    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: bool = False
    below: bool = False
    choices: tuple[str, ...] = ()

    def wanted(self) -> str:
        """The values that are accepted, as a phrase."""
        if self.kind == "flag":
            phrase = "true or false"
        elif self.kind == "choice":
            phrase = "one of " + ", ".join(self.choices)
        elif self.kind == "layers":
            phrase = f'a map of layers such as "{layers.EXAMPLE}"'
        else:
            bounds = []
            if self.minimum is not None:
                bounds.append(f"{'more than' if self.above else 'at least'} {self.minimum:g}")
            if self.maximum is not None:
                bounds.append(f"{'less than' if self.below else 'at most'} {self.maximum:g}")
            noun = "a number" if self.kind == "number" else "a whole number"
            phrase = " ".join([noun, " and ".join(bounds)]).strip()
        return f"{phrase}, or null" if self.default is None else phrase

    def check(self, value: object) -> Value:
        """The value in its canonical type. Raises RecipeInvalid when it has another type or lies out of range."""
        accepted = self._accept(value)
        if accepted is None and not (value is None and self.default is None):
            raise RecipeInvalid(
                f"Parameter {self.name} is {shown(value)}, wanted {self.wanted()}.",
                pointer=f"/parameters/{self.name}",
                met=shown(value),
                wanted=self.wanted(),
                remedy=self._remedy(value),
            )
        return accepted

    def _accept(self, value: object) -> Value:
        if self.kind == "flag":
            return value if isinstance(value, bool) else None
        if self.kind == "choice":
            return value if isinstance(value, str) and value in self.choices else None
        if self.kind == "layers":
            found = layers.parse(value) if isinstance(value, str) else None
            return None if found is None else str(found)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.kind == "integer":
            return value if isinstance(value, int) and self._in_range(value) else None
        # An int of JSON can be too large for a float.
        if isinstance(value, int) and abs(value) > 2**53:
            return None
        return float(value) + 0.0 if math.isfinite(value) and self._in_range(value) else None

    def _in_range(self, value: float) -> bool:
        if self.minimum is not None and (value <= self.minimum if self.above else value < self.minimum):
            return False
        return self.maximum is None or (value < self.maximum if self.below else value <= self.maximum)

    def _remedy(self, value: object) -> str:
        if self.kind == "choice" and isinstance(value, str):
            return nearest(value, self.choices)
        default = "null" if self.default is None else repr(self.default)
        return f"Leave {self.name} out for its default, {default}. {self.help}"


def number(
    name: str,
    *,
    default: float | None,
    help: str,  # noqa: A002  A parameter's help is called help in every form, schema and command line.
    minimum: float | None = None,
    maximum: float | None = None,
    above: bool = False,
    below: bool = False,
) -> Parameter:
    """A real-valued parameter; `above` and `below` exclude the bounds themselves."""
    return Parameter(
        name=name, kind="number", default=default, help=help, minimum=minimum, maximum=maximum, above=above, below=below
    )


def integer(
    name: str,
    *,
    default: int | None,
    help: str,  # noqa: A002
    minimum: int | None = None,
    maximum: int | None = None,
) -> Parameter:
    """A whole-number parameter."""
    return Parameter(name=name, kind="integer", default=default, help=help, minimum=minimum, maximum=maximum)


def choice(name: str, choices: Sequence[str], *, default: str | None, help: str) -> Parameter:  # noqa: A002
    """A parameter that is one of a few words."""
    return Parameter(name=name, kind="choice", default=default, help=help, choices=tuple(choices))


def flag(name: str, *, default: bool, help: str) -> Parameter:  # noqa: A002
    """A parameter that is true or false."""
    return Parameter(name=name, kind="flag", default=default, help=help)


def layer_map(name: str, *, default: str, help: str) -> Parameter:  # noqa: A002
    """A parameter that says which expert each layer comes from, as moerge.merging.layers reads it."""
    return Parameter(name=name, kind="layers", default=default, help=help)


def density(*, default: float = 0.2) -> Parameter:
    """The share of values that is kept, the same parameter wherever a method trims."""
    return number(
        "density", default=default, minimum=0.0, above=True, maximum=1.0, help="Share of values of each tensor to keep."
    )


def scale(*, default: float = 1.0) -> Parameter:
    """The factor on the merged delta."""
    return number("scale", default=default, help="Factor on the merged delta.")


MISSING = choice(
    "missing",
    ["zero", "skip"],
    default="zero",
    help="A module that an expert does not have counts as a zero delta, or leaves the expert out for that module.",
)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound on the sum of the parameters `plus` less the parameters `minus`."""

    plus: tuple[str, ...]
    minus: tuple[str, ...] = ()
    above: float | None = None
    at_most: float | None = None

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise RecipeInvalid when the parameters together break the bound."""
        total = math.fsum([*(parameters[name] for name in self.plus), *(-parameters[name] for name in self.minus)])
        phrase = " - ".join([" + ".join(self.plus), *self.minus])
        if self.above is not None and total <= self.above:
            wanted = f"{phrase} more than {self.above:g}"
        elif self.at_most is not None and total > self.at_most:
            wanted = f"{phrase} at most {self.at_most:g}"
        else:
            return
        raise RecipeInvalid(
            f"{phrase} is {total:g}, wanted {wanted}.",
            pointer=f"/parameters/{self.plus[0]}",
            met=total,
            wanted=wanted,
            remedy=f"Change {' or '.join([*self.plus, *self.minus])}.",
        )


class Parameters(Mapping[str, Value]):
    """The checked parameters of one method, every default filled in, read as attributes: `parameters.density`."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(sorted(values.items()))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Parameters({self._values})"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The card of a merge method; `when` is one sentence of advice.

    `version` enters the identity of every merge made with the method and is raised when its values change.
    `group` 1 needs the adapters alone, 2 needs statistics stored beside them, 3 needs evaluation; `needs` names the
    kinds of statistics that every expert must come with.
    `rank_rule` gives the output rank from shapes alone: `all` the sum of the ranks as it is, `sum` the same but not
    more than a delta can have, `largest` the largest rank, and `dense`, for a result that is not low rank, the sum but
    at most 64. `divides_by_weights` marks methods that refuse weights summing to zero
    when `normalize` is set, or always where there is no such parameter. `most_experts` bounds their number.
    """

    name: str
    title: str
    form: Form
    summary: str
    when: str
    paper: str
    version: int = 1
    group: int = 1
    needs: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    limits: tuple[Limit, ...] = ()
    rank_rule: RankRule = "dense"
    is_random: bool = False
    is_ordered: bool = False
    divides_by_weights: bool = False
    most_experts: int | None = None

    def parameter(self, name: str) -> Parameter:
        """One parameter by name. Raises RecipeInvalid with the nearest known name."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        names = [item.name for item in self.parameters]
        raise RecipeInvalid(
            f"Method {self.name} has no parameter {shown(name)}.",
            pointer=f"/parameters/{name}",
            met=name,
            wanted=("one of " + ", ".join(names)) if names else "no parameters",
            remedy=nearest(name, names),
        )

    def parse(self, given: Mapping[str, object]) -> Parameters:
        """Check every given parameter and fill in the defaults. Raises RecipeInvalid."""
        checked = {name: self.parameter(name).check(value) for name, value in given.items()}
        parameters = Parameters({item.name: checked.get(item.name, item.default) for item in self.parameters})
        for limit in self.limits:
            limit.check(parameters)
        return parameters

    def check_weights(self, weights: Sequence[float], parameters: Parameters) -> None:
        """Raise RecipeInvalid when a weight is not finite, or the method divides by a sum of weights that is zero.

        So it does when there are more experts than the method takes.
        """
        if self.most_experts is not None and len(weights) > self.most_experts:
            raise RecipeInvalid(
                f"Method {self.name} takes at most {self.most_experts} experts, and here are {len(weights)}.",
                pointer="/experts",
                met=len(weights),
                wanted=f"at most {self.most_experts} experts",
                remedy="Leave experts out, or choose a method for any number of them.",
            )
        self._check_layers(len(weights), parameters)
        for position, weight in enumerate(weights):
            if not math.isfinite(weight):
                raise RecipeInvalid(
                    f"The weight of expert {position} is {weight}.",
                    pointer=f"/experts/{position}/weight",
                    met=str(weight),
                    wanted="a finite number",
                    remedy="Give a number such as 0.5.",
                )
        divides = self.divides_by_weights and parameters.get("normalize", True)
        if divides and weights and abs(math.fsum(weights)) < 1e-8:
            raise RecipeInvalid(
                f"The weights sum to {math.fsum(weights):g}, and {self.name} divides by their sum.",
                pointer="/experts",
                met=math.fsum(weights),
                wanted="weights whose sum is not zero",
                remedy="Set normalize to false or change the weights."
                if "normalize" in parameters
                else "Change the weights.",
            )

    def _check_layers(self, count: int, parameters: Parameters) -> None:
        """Raise RecipeInvalid when a map of layers names an expert that is not there."""
        for item in self.parameters:
            found = layers.parse(str(parameters[item.name])) if item.kind == "layers" else None
            if found is not None and count and found.experts_needed > count:
                raise RecipeInvalid(
                    f"Parameter {item.name} names expert {found.experts_needed - 1}, and here are {count}.",
                    pointer=f"/parameters/{item.name}",
                    met=found.experts_needed - 1,
                    wanted=f"positions from 0 to {count - 1}",
                    remedy="Correct the map, or add the expert to the recipe.",
                )

    def to_dict(self) -> dict[str, Any]:
        """This card as JSON values; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The card that `to_dict` wrote, also after a trip through JSON."""
        parameters = tuple(Parameter(**{**item, "choices": tuple(item["choices"])}) for item in values["parameters"])
        limits = tuple(
            Limit(**{**item, "plus": tuple(item["plus"]), "minus": tuple(item["minus"])}) for item in values["limits"]
        )
        return cls(**{**values, "needs": tuple(values["needs"]), "parameters": parameters, "limits": limits})


def shown(value: object) -> str:
    """A value as it may be repeated in a message: NaN and long texts do not survive JSON or a page."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: str, known: Sequence[str]) -> str:
    """A sentence that names the known word closest to the one met, or all of them."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if found:
        return f"Did you mean {found[0]}?"
    return f"Known: {', '.join(sorted(known))}." if known else "Leave it out."


def output_rank(rule: RankRule, ranks: Sequence[Mapping[str, int]], shapes: Mapping[str, tuple[int, int]]) -> int:
    """The rank of the merged adapter from shapes alone: one mapping module -> rank per expert, one module -> shape.

    A single number holds for the whole adapter; modules of smaller rank are padded with zeros.
    """
    totals: dict[str, int] = {}
    for expert in ranks:
        for module, rank in expert.items():
            totals[module] = totals.get(module, 0) + rank
    if rule == "all":
        return max(totals.values(), default=1)
    if rule == "largest":
        return max((rank for expert in ranks for rank in expert.values()), default=1)
    # No delta has more rank than its shorter side.
    total = max((min(rank, *shapes.get(module, (rank,))) for module, rank in totals.items()), default=1)
    return total if rule == "sum" else min(total, DENSE_RANK)
