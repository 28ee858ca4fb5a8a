"""mergekit's merge methods: which of ours each is, what its parameters mean here, and which have no counterpart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moerge.merging.base import nearest, shown
from moerge.merging.mergekit.reading import listed, refused


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A parameter of mergekit: our name for it (None where it changes no result), its default, and what it may be."""

    ours: str | None
    default: Any = None
    kind: type = float
    only: Any = None  # the one value that can be said here, where there is only one
    words: Mapping[bool, str] | None = None  # our words for true and false


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of mergekit: ours, what is fixed in ours, its parameters as a whole and per model, and its base.

    `base` is `needed`, `optional` (deltas where there is one, else the models themselves), or `model` where the base is
    a model like the others.
    """

    name: str
    ours: str
    base: str = "needed"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, _Setting] = field(default_factory=dict)
    each: Mapping[str, _Setting] = field(default_factory=dict)
    has_weights: bool = True
    counts: tuple[int, int] = (1, 100)


def _flag(ours: str | None, *, default: bool) -> _Setting:
    return _Setting(ours=ours, default=default, kind=bool)


def _sum(*, normalize: bool, rescale: _Setting) -> dict[str, _Setting]:
    """Parameters of methods that trim deltas, may elect signs, and add up."""
    return {
        "normalize": _flag("normalize", default=normalize),
        "rescale": rescale,
        "lambda": _Setting(ours="scale", default=1.0),
        "int8_mask": _MASK,
    }


_MASK = _flag(None, default=False)
_NEVER = _Setting(ours=None, default=False, kind=bool, only=False)
_RESCALE = _Setting(ours="rescale", default=True, kind=bool, words={True: "l1", False: "none"})
_DENSITY = {"density": _Setting(ours="density", default=1.0)}
_DELLA = {**_DENSITY, "epsilon": _Setting(ours="epsilon", default=0.15)}
METHODS = {
    method.name: method
    for method in (
        Method(name="linear", ours="linear", base="model", shared={"normalize": _flag("normalize", default=True)}),
        Method(
            name="task_arithmetic",
            ours="task_arithmetic",
            shared=_sum(normalize=False, rescale=_flag(None, default=False)),
        ),
        Method(
            name="ties",
            ours="ties",
            fixed={"variant": "mergekit"},
            shared=_sum(normalize=True, rescale=_NEVER),
            each=_DENSITY,
        ),
        Method(
            name="dare_linear",
            ours="dare",
            fixed={"elect": "none"},
            shared=_sum(normalize=False, rescale=_RESCALE),
            each=_DENSITY,
        ),
        Method(
            name="dare_ties",
            ours="dare",
            fixed={"elect": "ties"},
            shared=_sum(normalize=False, rescale=_RESCALE),
            each=_DENSITY,
        ),
        Method(
            name="della",
            ours="della",
            fixed={"elect": "ties"},
            shared=_sum(normalize=True, rescale=_RESCALE),
            each=_DELLA,
        ),
        Method(
            name="della_linear",
            ours="della",
            fixed={"elect": "none"},
            shared=_sum(normalize=False, rescale=_RESCALE),
            each=_DELLA,
        ),
        Method(
            name="breadcrumbs",
            ours="breadcrumbs",
            fixed={"scope": "tensor"},
            shared=_sum(normalize=False, rescale=_NEVER),
            each={**_DENSITY, "gamma": _Setting(ours="gamma", default=0.01)},
        ),
        Method(
            name="sce",
            ours="sce",
            fixed={"variant": "mergekit"},
            shared={"select_topk": _Setting(ours="select", default=1.0), "int8_mask": _MASK},
            has_weights=False,
        ),
        Method(
            name="slerp",
            ours="slerp",
            base="model",
            fixed={"threshold": 0.9995},
            shared={"t": _Setting(ours="t")},
            has_weights=False,
            counts=(2, 2),
        ),
        Method(
            name="nuslerp",
            ours="nuslerp",
            base="optional",
            shared={
                "nuslerp_flatten": _flag("flatten", default=True),
                "nuslerp_row_wise": _flag("row_wise", default=False),
            },
            counts=(2, 2),
        ),
        Method(
            name="multislerp",
            ours="multislerp",
            base="optional",
            shared={
                "normalize_weights": _flag("normalize", default=True),
                "eps": _Setting(ours=None, default=1e-8, only=1e-8),
            },
        ),
        Method(
            name="karcher",
            ours="karcher",
            base="model",
            shared={
                "max_iter": _Setting(ours="steps", default=10, kind=int),
                "tol": _Setting(ours="tolerance", default=1e-5),
            },
            has_weights=False,
        ),
    )
}
_ABSENT = {
    "breadcrumbs_ties": ("Breadcrumbs here adds up without electing signs", "Use breadcrumbs or ties."),
    "model_stock": ("it has no counterpart here", "Use linear, or karcher for a mean on the sphere."),
    "passthrough": ("layers cannot be stacked here", "Use layer_swapping to take whole layers from one expert."),
    "nearswap": ("it has no counterpart here", "Use linear or magmax."),
    "arcee_fusion": ("it has no counterpart here", "Use sce."),
    "ram": ("it has no counterpart here", "Use consensus_ta."),
    "ramplus_tl": ("it has no counterpart here", "Use consensus_ta."),
}


def chosen(name: object) -> Method:
    """The method of that name. Raises RecipeInvalid."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    wanted = listed(METHODS)
    if isinstance(name, str) and name in _ABSENT:
        reason, remedy = _ABSENT[name]
        raise refused("/merge_method", f"mergekit's {name} cannot be said here: {reason}", name, wanted, remedy)
    remedy = nearest(name if isinstance(name, str) else "", list(METHODS))
    raise refused("/merge_method", f"There is no merge method {shown(name)} here", name, wanted, remedy)
