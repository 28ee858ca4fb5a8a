"""A recipe: which experts to merge, with what weights, how, and into what; parsed strictly, with canonical bytes.

No numpy here: a web process parses recipes against the cards of methods that it keeps as rows.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moerge import merging
from moerge.errors import ExpertsIncompatible, RecipeInvalid
from moerge.merging.base import Parameters, Spec, nearest, shown

MOST_EXPERTS = 100
HIGHEST_RANK = 4096
LARGEST_SEED = 2**63 - 1
LARGEST_WEIGHT = 1e6
KINDS = ("lora", "ia3", "delta", "ternary", "full")
DTYPES = ("float32", "bfloat16", "float16")

_FIELDS = ("base_model", "base_weights", "method", "parameters", "seed", "experts", "output")
_EXPERT_FIELDS = ("expert", "revision", "digest", "weight", "base_model", "statistics")
_OUTPUT_FIELDS = ("kind", "rank", "dtype", "density", "saved")


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert of a recipe. `digest` names its content: order and noise follow it, so that names do not matter.

    `statistics` names the content of what is known of it beside its deltas, for methods that need it.
    """

    expert: str
    revision: str
    digest: str
    weight: float
    statistics: str | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """What the merge becomes.

    `lora` has a rank: `rank`, or as many as keep the share `energy` of the squared norm of each module, or the method's
    own where both are None. `ia3` takes IA3 experts and gives IA3. `delta` is the dense task vector, `ternary` the same
    as a ComPEFT file of `density`, `full` the base with the delta added, in the base's own dtype where `dtype` is None.
    `saved` names the expert whose saved modules and other tensors that replace the base's are kept as they are, instead
    of being merged.
    """

    kind: str = "lora"
    rank: int | None = None
    energy: float | None = None
    dtype: str | None = "float32"
    density: float | None = None
    saved: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `parse` reads it; what was added later stands only where it was asked for, so that digests stay."""
        rank = self.rank if self.energy is None else {"energy": self.energy}
        more = {"density": self.density, "saved": self.saved}
        return {"kind": self.kind, "rank": rank, "dtype": self.dtype} | {
            name: value for name, value in more.items() if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe. Experts are sorted by digest unless the method takes them in order."""

    base_model: str | None
    spec: Spec
    parameters: Parameters
    seed: int
    experts: tuple[Expert, ...]
    output: Output
    base_weights: str | None = None  # digest of the base's weights, where the result depends on them

    @property
    def method(self) -> str:
        return self.spec.name

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values, in the shape `parse` reads."""
        return {
            "base_model": self.base_model,
            "method": self.method,
            "parameters": dict(self.parameters),
            "seed": self.seed,
            "experts": [
                {"expert": item.expert, "revision": item.revision, "digest": item.digest, "weight": item.weight}
                | ({} if item.statistics is None else {"statistics": item.statistics})
                for item in self.experts
            ],
            "output": self.output.to_dict(),
        } | ({} if self.base_weights is None else {"base_weights": self.base_weights})

    def canonical(self) -> bytes:
        """The bytes that two equal recipes share: defaults filled in, experts sorted, the method's version named.

        The seed counts for random methods alone, since no other result depends on it.
        """
        values = {**self.to_dict(), "version": self.spec.version}
        if not self.spec.is_random:
            del values["seed"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()


def parse(body: object, *, specs: Mapping[str, Spec] | None = None) -> Recipe:
    """A recipe from JSON values whose experts are resolved to revision and digest.

    `specs` are the cards of the methods there are, by default those installed here. Raises RecipeInvalid with a JSON
    pointer to the field, and ExpertsIncompatible when the experts name different base models.
    """
    specs = merging.catalogue() if specs is None else specs
    fields = _object(body, "", _FIELDS)
    spec = _method(fields.get("method"), specs)
    parameters = spec.parse(_mapping(fields.get("parameters", {}), "/parameters"))
    base_model = fields.get("base_model")
    if base_model is not None:
        base_model = _text(base_model, "/base_model")
    experts = _experts(fields.get("experts"), base_model)
    spec.check_weights([expert.weight for expert in experts], parameters)
    _check_statistics(spec, experts)
    if not spec.is_ordered:
        experts.sort(key=lambda item: (item.digest, item.weight, item.expert, item.revision))
    seed, weights = fields.get("seed", 0), fields.get("base_weights")
    return Recipe(
        base_model=base_model,
        spec=spec,
        parameters=parameters,
        seed=_whole(seed, "/seed", lowest=0, highest=LARGEST_SEED),
        experts=tuple(experts),
        output=_output(fields.get("output", {})),
        base_weights=None if weights is None else _text(weights, "/base_weights"),
    )


def _method(name: object, specs: Mapping[str, Spec]) -> Spec:
    if isinstance(name, str) and name in specs:
        return specs[name]
    raise RecipeInvalid(
        "The recipe names no method." if name is None else f"There is no merge method {shown(name)}.",
        pointer="/method",
        met=name if isinstance(name, str) else shown(name),
        wanted="one of " + ", ".join(sorted(specs)),
        remedy=nearest(name if isinstance(name, str) else "", sorted(specs)),
    )


def _experts(values: object, base_model: str | None) -> list[Expert]:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_EXPERTS:
        raise RecipeInvalid(
            f"A recipe needs a list of 1 to {MOST_EXPERTS} experts.",
            pointer="/experts",
            met=len(values) if isinstance(values, list) else shown(values),
            wanted=f"1 to {MOST_EXPERTS} experts",
            remedy="Name the experts and their weights.",
        )
    experts = []
    for position, value in enumerate(values):
        here = f"/experts/{position}"
        fields = _object(value, here, _EXPERT_FIELDS)
        base, given = fields.get("base_model"), fields.get("statistics")
        if base is not None:
            base_model = _same_base(_text(base, f"{here}/base_model"), base_model, here, fields.get("expert"))
        experts.append(
            Expert(
                expert=_text(fields.get("expert"), f"{here}/expert"),
                revision=_text(fields.get("revision"), f"{here}/revision"),
                digest=_text(fields.get("digest"), f"{here}/digest"),
                weight=_number(fields.get("weight"), f"{here}/weight"),
                statistics=None if given is None else _text(given, f"{here}/statistics"),
            )
        )
    return experts


def _check_statistics(spec: Spec, experts: list[Expert]) -> None:
    for position, expert in enumerate(experts):
        if spec.needs and expert.statistics is None:
            raise ExpertsIncompatible(
                f"{spec.name} needs {' and '.join(spec.needs)} of every expert, and {expert.expert} comes without.",
                pointer=f"/experts/{position}/statistics",
                met="nothing",
                wanted=f"the digest of its statistics, with {' and '.join(spec.needs)}",
                remedy="Choose a method that needs no statistics, such as linear.",
            )


def _same_base(base: str, wanted: str | None, here: str, expert: object) -> str:
    if wanted is not None and base != wanted:
        raise ExpertsIncompatible(
            f"{expert} was trained on {base}, the others on {wanted}.",
            pointer=here,
            met=base,
            wanted=wanted,
            remedy="Merge experts of one base model.",
        )
    return base


def _output(value: object) -> Output:
    fields = _object(value, "/output", _OUTPUT_FIELDS)
    kind = _one_of(fields.get("kind", "lora"), "/output/kind", KINDS)
    rank, energy = _rank(fields.get("rank"), kind)
    density, saved, dtype = fields.get("density"), fields.get("saved"), fields.get("dtype")
    if dtype is not None or (kind != "full" and "dtype" in fields):
        dtype = _one_of(dtype, "/output/dtype", DTYPES)
    elif kind != "full":
        dtype = "float32"
    if density is not None and kind != "ternary":
        raise _wrong(density, "/output/density", "none: only ternary output has a density")
    return Output(
        kind=kind,
        rank=rank,
        energy=energy,
        dtype=dtype,
        density=None if density is None else _share(density, "/output/density"),
        saved=None if saved is None else _text(saved, "/output/saved"),
    )


def _rank(value: object, kind: str) -> tuple[int | None, float | None]:
    """A rank, or the share of energy that decides it."""
    if value is not None and kind != "lora":
        raise _wrong(value, "/output/rank", f"none: {kind} output has no rank")
    if isinstance(value, dict):
        fields = _object(value, "/output/rank", ("energy",))
        return None, _share(fields.get("energy"), "/output/rank/energy")
    return None if value is None else _whole(value, "/output/rank", lowest=1, highest=HIGHEST_RANK), None


def _share(value: object, pointer: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1:  # type: ignore[operator]
        raise _wrong(value, pointer, "a share above 0 and at most 1")
    return float(value)  # type: ignore[arg-type]


def _mapping(value: object, pointer: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RecipeInvalid(
            f"{pointer or 'The recipe'} is {shown(value)}, wanted an object.",
            pointer=pointer,
            met=shown(value),
            wanted="an object",
            remedy="Send a JSON object.",
        )
    return value


def _object(value: object, pointer: str, known: tuple[str, ...]) -> dict[str, Any]:
    fields = _mapping(value, pointer)
    for name in fields:
        if name not in known:
            raise RecipeInvalid(
                f"There is no field {shown(name)} here.",
                pointer=f"{pointer}/{name}",
                met=name,
                wanted="one of " + ", ".join(known),
                remedy=nearest(name, known),
            )
    return fields


def _text(value: object, pointer: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(value, pointer, "a text that is not empty")
    return value


def _number(value: object, pointer: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -LARGEST_WEIGHT <= value <= LARGEST_WEIGHT:  # type: ignore[operator]
        raise _wrong(value, pointer, "a finite number of at most a million")
    # Adding zero turns -0.0 into 0.0, so that both make the same recipe.
    return float(value) + 0.0  # type: ignore[arg-type]


def _whole(value: object, pointer: str, *, lowest: int, highest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise _wrong(value, pointer, f"a whole number from {lowest} to {highest}")
    return value


def _one_of(value: object, pointer: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _wrong(value, pointer, "one of " + ", ".join(choices))
    return value


def _wrong(value: object, pointer: str, wanted: str) -> RecipeInvalid:
    met = shown(value)
    return RecipeInvalid(
        f"{pointer} is {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=f"Give {wanted}."
    )
