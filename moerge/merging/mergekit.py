"""mergekit's recipes in our terms, so that both give the same formula; what cannot be said here is refused by name.

A model is either `base+adapter`, an adapter and the base it belongs to, or one name or folder alone. Slices are taken
where all sources have the same layers from the first on, which is how whole models are often written. Defaults are
those of mergekit 0.1.5 and are written out, since ours are others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moerge.errors import RecipeInvalid
from moerge.merging.base import nearest, shown

_FIELDS = ("merge_method", "models", "slices", "base_model", "dtype", "out_dtype", "parameters")
_SOURCE_FIELDS = ("model", "layer_range", "parameters")
_DTYPES = ("float32", "bfloat16", "float16")
_SMALLEST_EPSILON = 1e-8
_LARGEST = 1e12


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A parameter of mergekit: our name for it (None where it changes no result), its default, and what it may be."""

    ours: str | None
    default: Any = None
    kind: type = float
    only: Any = None  # the one value that can be said here, where there is only one
    words: Mapping[bool, str] | None = None  # our words for true and false


@dataclass(frozen=True, kw_only=True)
class _Method:
    """A method of mergekit: ours, what is fixed in ours, its parameters as a whole and per model, and its base.

    `base` is `needed`, `optional` (deltas where there is one, else the models themselves), or `model` where the base is
    a model like the others.
    """

    ours: str
    base: str = "needed"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, _Setting] = field(default_factory=dict)
    each: Mapping[str, _Setting] = field(default_factory=dict)
    has_weights: bool = True
    counts: tuple[int, int] = (1, 100)


def _flag(ours: str | None, *, default: bool) -> _Setting:
    return _Setting(ours=ours, default=default, kind=bool)


_L1 = {True: "l1", False: "none"}
_SCALE = _Setting(ours="scale", default=1.0)
_MASK = _flag(None, default=False)
_NEVER = _Setting(ours=None, default=False, kind=bool, only=False)
_RESCALE = _Setting(ours="rescale", default=True, kind=bool, words=_L1)
_DENSITY = _Setting(ours="density", default=1.0)
_EPSILON = _Setting(ours=None, default=_SMALLEST_EPSILON, only=_SMALLEST_EPSILON)


def _arithmetic(
    ours: str,
    fixed: Mapping[str, Any],
    *,
    normalize: bool,
    rescale: _Setting,
    each: Mapping[str, _Setting] | None = None,
) -> _Method:
    """A method that trims deltas, may elect signs, and adds up."""
    shared = {"normalize": _flag("normalize", default=normalize), "rescale": rescale, "lambda": _SCALE}
    return _Method(ours=ours, fixed=fixed, shared={**shared, "int8_mask": _MASK}, each=each or {})


_METHODS = {
    "linear": _Method(ours="linear", base="model", shared={"normalize": _flag("normalize", default=True)}),
    "task_arithmetic": _arithmetic("task_arithmetic", {}, normalize=False, rescale=_flag(None, default=False)),
    "ties": _arithmetic("ties", {"variant": "mergekit"}, normalize=True, rescale=_NEVER, each={"density": _DENSITY}),
    "dare_linear": _arithmetic(
        "dare", {"elect": "none"}, normalize=False, rescale=_RESCALE, each={"density": _DENSITY}
    ),
    "dare_ties": _arithmetic("dare", {"elect": "ties"}, normalize=False, rescale=_RESCALE, each={"density": _DENSITY}),
    "della": _arithmetic(
        "della",
        {"elect": "ties"},
        normalize=True,
        rescale=_RESCALE,
        each={"density": _DENSITY, "epsilon": _Setting(ours="epsilon", default=0.15)},
    ),
    "della_linear": _arithmetic(
        "della",
        {"elect": "none"},
        normalize=False,
        rescale=_RESCALE,
        each={"density": _DENSITY, "epsilon": _Setting(ours="epsilon", default=0.15)},
    ),
    "breadcrumbs": _arithmetic(
        "breadcrumbs",
        {"scope": "tensor"},
        normalize=False,
        rescale=_NEVER,
        each={"density": _DENSITY, "gamma": _Setting(ours="gamma", default=0.01)},
    ),
    "sce": _Method(
        ours="sce",
        fixed={"variant": "mergekit"},
        shared={"select_topk": _Setting(ours="select", default=1.0), "int8_mask": _MASK},
        has_weights=False,
    ),
    "slerp": _Method(
        ours="slerp",
        base="model",
        fixed={"threshold": 0.9995},
        shared={"t": _Setting(ours="t")},
        has_weights=False,
        counts=(2, 2),
    ),
    "nuslerp": _Method(
        ours="nuslerp",
        base="optional",
        shared={
            "nuslerp_flatten": _flag("flatten", default=True),
            "nuslerp_row_wise": _flag("row_wise", default=False),
        },
        counts=(2, 2),
    ),
    "multislerp": _Method(
        ours="multislerp",
        base="optional",
        shared={"normalize_weights": _flag("normalize", default=True), "eps": _EPSILON},
    ),
    "karcher": _Method(
        ours="karcher",
        base="model",
        shared={
            "max_iter": _Setting(ours="steps", default=10, kind=int),
            "tol": _Setting(ours="tolerance", default=1e-5),
        },
        has_weights=False,
    ),
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
_REFUSED_FIELDS = {
    "modules": ("parts of a model cannot be merged apart from each other", "List the models under models."),
    "tokenizer_source": ("tokenizers and vocabularies are not changed here", "Leave it out: one base, one tokenizer."),
    "tokenizer": ("tokenizers and vocabularies are not changed here", "Leave it out: one base, one tokenizer."),
    "chat_template": ("tokenizers are not changed here", "Leave it out and write it into the tokenizer's folder."),
}


@dataclass(frozen=True)
class _Model:
    """One model of the recipe: where it stands there, what it is, and its own parameters over those of its slice."""

    pointer: str
    name: str
    revision: str | None
    base: str | None
    scopes: tuple[tuple[str, Mapping[str, Any]], ...]

    @property
    def whole(self) -> str:
        """The reference as one text, to tell whether two are the same."""
        return f"{self.base or ''}+{self.name}@{self.revision or ''}"


def is_meant(document: Mapping[str, Any]) -> bool:
    """Whether a recipe is written for mergekit."""
    return "merge_method" in document


def translate(document: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in our terms: base_model, method, parameters, experts with weights, output.

    Raises RecipeInvalid with a pointer to what is unknown, or cannot be said here.
    """
    name, method = _method(document.get("merge_method"))
    for key in document:
        if key in _REFUSED_FIELDS and document[key] is not None:
            reason, remedy = _REFUSED_FIELDS[key]
            raise _refused(f"/{key}", f"{key} cannot be said here: {reason}", document[key], "no such field", remedy)
        if key not in _FIELDS and key not in _REFUSED_FIELDS:
            raise _refused(
                f"/{key}", f"There is no field {shown(key)} here", key, _listed(_FIELDS), nearest(key, _FIELDS)
            )
    whole = _scope(document.get("parameters"), "/parameters")
    models, between = _models(document)
    scopes = (*between, ("/parameters", whole))
    _check_known(name, method, models, scopes)
    base = _base(document.get("base_model"))
    experts, base_model, is_counted = _experts(name, method, models, base)
    if not method.counts[0] <= len(experts) <= method.counts[1]:
        wanted = "2 models" if method.counts == (2, 2) else f"at least {method.counts[0]} model beside the base"
        raise _refused("/models", f"{name} has {len(experts)} models to merge", len(experts), wanted, f"Give {wanted}.")
    parameters = {**method.fixed, **_shared(name, method, scopes), **_each(name, method, experts, scopes)}
    weights = [_weight(name, model, scopes) if method.has_weights else 1.0 for model in experts]
    if method.ours == "linear":
        counted = [_weight(name, model, scopes) for model in is_counted]
        weights, parameters = _averaged(weights, counted, parameters)
    return {
        **({} if base_model is None else {"base_model": base_model}),
        "method": method.ours,
        "parameters": _adjusted(method, parameters),
        "experts": [
            {
                "expert": model.name,
                **({} if model.revision is None else {"revision": model.revision}),
                "weight": weight,
            }
            for model, weight in zip(experts, weights, strict=True)
        ],
        **_output(document),
    }


def _method(name: object) -> tuple[str, _Method]:
    if isinstance(name, str) and name in _METHODS:
        return name, _METHODS[name]
    wanted = _listed(_METHODS)
    if isinstance(name, str) and name in _ABSENT:
        reason, remedy = _ABSENT[name]
        raise _refused("/merge_method", f"mergekit's {name} cannot be said here: {reason}", name, wanted, remedy)
    remedy = nearest(name if isinstance(name, str) else "", list(_METHODS))
    raise _refused("/merge_method", f"There is no merge method {shown(name)} here", name, wanted, remedy)


def _models(document: Mapping[str, Any]) -> tuple[list[_Model], tuple[tuple[str, Mapping[str, Any]], ...]]:
    """The models, and the parameters that a slice puts between theirs and those of the whole recipe."""
    given = document.get("slices")
    if given is None:
        models = enumerate(_list(document.get("models"), "/models"))
        return [_model(item, f"/models/{at}", ("model", "parameters")) for at, item in models], ()
    if document.get("models") is not None:
        raise _refused("/slices", "The recipe has both models and slices", "both", "one of them", "Leave slices out.")
    slices = _list(given, "/slices")
    if len(slices) > 1:
        raise _refused(
            "/slices",
            "Models put together from several slices cannot be said here",
            len(slices),
            "one slice with all layers",
            "List the models under models; layer_swapping takes whole layers from one expert.",
        )
    here = "/slices/0"
    fields = _mapping(slices[0], here, ("sources", "parameters", "base_model", "residual_weight"))
    for name in ("base_model", "residual_weight"):
        if fields.get(name) is not None:
            raise _refused(
                f"{here}/{name}", f"{name} of a slice cannot be said here", fields[name], "none", "Leave it out."
            )
    sources = _list(fields.get("sources"), f"{here}/sources")
    ranges = [
        _mapping(item, f"{here}/sources/{at}", _SOURCE_FIELDS).get("layer_range") for at, item in enumerate(sources)
    ]
    for at, found in enumerate(ranges):
        begins = isinstance(found, list) and len(found) == 2 and found[0] == 0 and type(found[1]) is int
        if not begins or found != ranges[0]:
            raise _refused(
                f"{here}/sources/{at}/layer_range",
                f"Layers {shown(found)} of a model cannot be merged with other layers here",
                found,
                "the same range from 0 on for every source",
                "List the models under models to merge all of their layers.",
            )
    found_models = [_model(item, f"{here}/sources/{at}", _SOURCE_FIELDS) for at, item in enumerate(sources)]
    return found_models, ((f"{here}/parameters", _scope(fields.get("parameters"), f"{here}/parameters")),)


def _model(item: object, pointer: str, known: tuple[str, ...]) -> _Model:
    fields = _mapping(item, pointer, known)
    base, name, revision = _reference(fields.get("model"), f"{pointer}/model")
    own = _scope(fields.get("parameters"), f"{pointer}/parameters")
    return _Model(pointer, name, revision, base, ((f"{pointer}/parameters", own),))


def _reference(given: object, pointer: str) -> tuple[str | None, str, str | None]:
    """Base, name and revision of `base+name@revision`; the base is None where the model stands alone."""
    if isinstance(given, dict):
        fields = _mapping(given, pointer, ("model", "lora"))
        whole = _path(fields.get("model"), f"{pointer}/model")
        adapter = None if fields.get("lora") is None else _path(fields["lora"], f"{pointer}/lora")
    else:
        if not isinstance(given, str) or not given or given.count("+") > 1:
            raise _refused(
                pointer, f"The model is {shown(given)}", given, "a model, or base+adapter", "Name one model."
            )
        first, plus, second = given.partition("+")
        whole, adapter = _path(first, pointer), _path(second, pointer) if plus else None
    if adapter is None:
        return None, *whole
    if whole[1] is not None:
        raise _refused(
            pointer,
            f"The base stands at revision {whole[1]}",
            whole[1],
            "the base by its name alone",
            "Leave its revision out; a recipe here names the base by the digest of its weights.",
        )
    return whole[0], *adapter


def _path(given: object, pointer: str) -> tuple[str, str | None]:
    """A name or folder, and its revision where one stands behind it."""
    if isinstance(given, dict):
        fields = _mapping(given, pointer, ("path", "revision"))
        name, revision = fields.get("path"), fields.get("revision")
    else:
        name, at, behind = given.partition("@") if isinstance(given, str) else (given, "", "")
        revision = behind if at else None
    is_pinned = isinstance(revision, str) and revision != "" and "@" not in revision
    if isinstance(name, str) and name and (revision is None or is_pinned):
        return name, revision
    raise _refused(pointer, f"The model is {shown(given)}", given, "name, folder or name@revision", "Name one model.")


def _base(given: object) -> _Model | None:
    if given is None:
        return None
    base, name, revision = _reference(given, "/base_model")
    return _Model("/base_model", name, revision, base, ())


def _experts(
    name: str, method: _Method, models: list[_Model], base: _Model | None
) -> tuple[list[_Model], str | None, list[_Model]]:
    """What is merged, the base it is merged on, and models whose weights count though they add nothing."""
    have_bases = {model.base is not None for model in models if base is None or model.whole != base.whole}
    if len(have_bases) > 1:
        odd = next(model for model in models if model.base is None)
        raise _refused(
            odd.pointer + "/model",
            f"{odd.name} is a model and others are adapters of a base",
            odd.name,
            "adapters alone, or models alone",
            "Merge adapters with adapters.",
        )
    if True in have_bases:
        return _adapters(name, method, models, base)
    if method.base == "model":
        if base is not None and all(model.whole != base.whole for model in models):
            models = [*models, base] if method.ours != "slerp" else [base, *models]
        elif base is not None and method.ours == "slerp":
            models = sorted(models, key=lambda model: model.whole != base.whole)
        elif base is None and method.ours == "slerp":
            raise _refused(
                "/base_model",
                "slerp starts from the base_model, and there is none",
                None,
                "one of the two models",
                "Name the model at t = 0 as base_model.",
            )
        return models, None, []
    if base is None:
        if method.base == "needed":
            raise _needs_base(name)
        return models, None, []
    _check_alone(base)
    return [model for model in models if model.whole != base.whole], base.name, []


def _adapters(
    name: str, method: _Method, models: list[_Model], base: _Model | None
) -> tuple[list[_Model], str | None, list[_Model]]:
    """As `_experts`, for adapters of one base."""
    if base is None and method.base == "needed":
        raise _needs_base(name)
    if method.ours != "linear" and (method.base == "model" or base is None):
        raise _refused(
            "/merge_method",
            f"mergekit's {name} of base+adapter turns the whole models, and what is merged here are deltas",
            name,
            "a method on deltas" if method.base == "model" else "a base_model, which makes it a method on deltas",
            "Name base_model." if method.base == "optional" else f"Write a recipe of this hub, with method {name}.",
        )
    adapters = [model for model in models if model.base is not None]
    bases = {model.base for model in adapters}
    if base is not None:
        _check_alone(base)
        bases.add(base.name)
    if len(bases) > 1:
        odd = next(model for model in adapters if model.base != (adapters[0].base if base is None else base.name))
        raise _refused(
            odd.pointer + "/model",
            f"{odd.name} belongs to {odd.base}, the others to another base",
            odd.base,
            "one base",
            "Merge adapters of one base model.",
        )
    return adapters, bases.pop(), [model for model in models if model.base is None]


def _check_alone(base: _Model) -> None:
    if base.base is not None or base.revision is not None:
        met = base.name if base.base is not None else base.revision
        raise _refused(
            "/base_model",
            f"The base is {shown(met)}, part of another model or at a revision",
            met,
            "the base by its name alone",
            "Name the model that the experts were trained from.",
        )


def _needs_base(name: str) -> RecipeInvalid:
    return _refused(
        "/base_model",
        f"{name} works on deltas and needs a base_model",
        None,
        "the model that was trained on",
        "Name the base_model.",
    )


def _check_known(
    name: str, method: _Method, models: Sequence[_Model], scopes: Sequence[tuple[str, Mapping[str, Any]]]
) -> None:
    """Refuse parameters that would be ignored."""
    each = {*method.each, *(["weight"] if method.has_weights else [])}
    known = [(scopes, {*method.shared, *each})] + [(model.scopes, each) for model in models]
    for places, names in known:
        for pointer, scope in places:
            for key in scope:
                if key not in names:
                    wanted = _listed(names) or "no parameters"
                    what = "a model of " if places is not scopes else ""
                    remedy = nearest(key, sorted(names))
                    raise _refused(
                        f"{pointer}/{key}",
                        f"{what.capitalize()}{name} has no parameter {shown(key)}",
                        key,
                        wanted,
                        remedy,
                    )


def _shared(name: str, method: _Method, scopes: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    found = {}
    for key, setting in method.shared.items():
        pointer, value = _look_up(key, scopes)
        value = setting.default if value is None else _typed(value, setting.kind, pointer)
        if value is None:
            raise _refused(f"/parameters/{key}", f"{name} needs {key}", None, "a number", f"Give {key}.")
        if setting.only is not None and value != setting.only:
            raise _refused(
                pointer,
                f"{name} with {key} {shown(value)} cannot be said here",
                value,
                str(setting.only).lower(),
                f"Leave {key} out.",
            )
        if setting.ours:
            found[setting.ours] = value if setting.words is None else setting.words[value]
    return found


def _each(
    name: str, method: _Method, models: Sequence[_Model], scopes: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Parameters that mergekit has per model and we have per recipe."""
    found: dict[str, Any] = {}
    for key, setting in method.each.items():
        for model in models:
            pointer, given = _look_up(key, (*model.scopes, *scopes))
            value = setting.default if given is None else _typed(given, setting.kind, pointer)
            if found.setdefault(str(setting.ours), value) != value:
                raise _refused(
                    f"{model.pointer}/parameters/{key}",
                    f"{key} is {value:g} for {model.name} and {found[str(setting.ours)]:g} for another model, and"
                    f" {name} takes one for all here",
                    value,
                    f"the same {key} for every model",
                    f"Give {key} once, under parameters.",
                )
    return found


def _weight(name: str, model: _Model, scopes: Sequence[tuple[str, Mapping[str, Any]]]) -> float:
    pointer, value = _look_up("weight", (*model.scopes, *scopes))
    if value is None:
        raise _refused(
            f"{model.pointer}/parameters/weight",
            f"{name} needs a weight for {model.name}",
            None,
            "a number",
            "Give every model a weight.",
        )
    return float(_typed(value, float, pointer))


def _averaged(
    weights: list[float], counted: list[float], parameters: dict[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    """Weights of an average of whole models. The base, where it is one of them, takes a share and adds no delta."""
    whole = math.fsum([*weights, *counted])
    if not parameters["normalize"] and abs(whole - 1) > 1e-6:
        raise _refused(
            "/parameters/normalize",
            f"The weights sum to {whole:g}, and without normalize the base itself would be multiplied by that",
            False,
            "true, or weights whose sum is 1",
            "Set normalize to true, or use task_arithmetic.",
        )
    if not counted or not parameters["normalize"] or abs(whole) < 1e-8:
        return weights, parameters
    return [weight / whole for weight in weights], {**parameters, "normalize": False}


def _adjusted(method: _Method, parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters that are put together from several of mergekit's."""
    if method.ours == "nuslerp":
        is_flat, is_row_wise = parameters.pop("flatten"), parameters.pop("row_wise")
        # What mergekit calls row-wise takes the first dimension as the one that a vector runs along.
        return {**parameters, "scope": "tensor" if is_flat else "column" if is_row_wise else "row"}
    if method.ours == "della" and parameters["density"] == 1:
        return {**parameters, "epsilon": 0.0}
    return parameters


def _output(document: Mapping[str, Any]) -> dict[str, Any]:
    """The dtype that is written; arithmetic is in float32 whatever `dtype` says."""
    for key in ("out_dtype", "dtype"):
        given = document.get(key)
        if given is not None:
            name = given.removeprefix("torch.") if isinstance(given, str) else given
            if name not in _DTYPES:
                raise _refused(
                    f"/{key}", f"{key} is {shown(given)}", given, _listed(_DTYPES), "Write bfloat16 or float32."
                )
            return {"output": {"dtype": name}}
    return {}


def _look_up(key: str, scopes: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, Any]:
    """The value of a parameter in the first scope that has it, and where that is."""
    for pointer, scope in scopes:
        if key in scope:
            value = _one(scope[key], f"{pointer}/{key}")
            if value is not None:
                return f"{pointer}/{key}", value
    return f"/parameters/{key}", None


def _one(setting: object, pointer: str) -> Any:
    """The one value of a setting. Raises RecipeInvalid where it differs by layer or by name of tensor."""
    if isinstance(setting, dict):
        fields = _mapping(setting, pointer, ("value", "filter"))
        if fields.get("filter") not in (None, "*"):
            raise _refused(
                f"{pointer}/filter",
                "Parameters that hold for some tensors alone cannot be said here",
                fields["filter"],
                "one value for all tensors",
                "Give a single number.",
            )
        return _one(fields.get("value"), f"{pointer}/value")
    if not isinstance(setting, list):
        return setting
    if setting and isinstance(setting[0], dict):
        # The first that fits a tensor counts, and one without a filter fits all.
        return _one(setting[0], f"{pointer}/0")
    if any(value != setting[0] for value in setting):
        raise _refused(
            pointer,
            "A parameter that changes from layer to layer cannot be said here",
            setting,
            "one value for all layers",
            "Give a single number; layer_swapping sets shares by layer.",
        )
    return setting[0] if setting else None


def _typed(value: object, kind: type, pointer: str) -> Any:
    if kind is bool and type(value) in (bool, int) and value in (0, 1):
        return bool(value)
    if kind is int and type(value) is int:
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise _refused(pointer, f"{pointer} is {shown(value)}", value, wanted, f"Give {wanted}.")


def _scope(given: object, pointer: str) -> Mapping[str, Any]:
    return {} if given is None else _mapping(given, pointer, None)


def _mapping(given: object, pointer: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _refused(
            pointer, f"{pointer} is {shown(given)}", given, "fields", "Write it as mergekit's documentation does."
        )
    for key in given:
        if known is not None and key not in known:
            raise _refused(
                f"{pointer}/{key}",
                f"There is no field {shown(key)} here",
                key,
                _listed(known),
                nearest(str(key), known),
            )
    return given


def _list(given: object, pointer: str) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise _refused(pointer, f"{pointer} is {shown(given)}", given, "a list of models", "List the models.")
    return given


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def _refused(pointer: str, detail: str, met: object, wanted: str, remedy: str) -> RecipeInvalid:
    return RecipeInvalid(f"{detail}.", pointer=pointer, met=shown(met), wanted=wanted, remedy=remedy)
