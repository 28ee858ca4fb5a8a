"""The models of mergekit's recipes: adapters of a base or whole models, what is merged on what, and their weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moerge.errors import RecipeInvalid
from moerge.merging.base import shown
from moerge.merging.mergekit.methods import Method
from moerge.merging.mergekit.reading import Scopes, look_up, mapping, refused, scope, sequence, typed

_SOURCE_FIELDS = ("model", "layer_range", "parameters")


@dataclass(frozen=True)
class Model:
    """One model of the recipe: where it stands there, what it is, and its own parameters over those of its slice."""

    pointer: str
    name: str
    revision: str | None
    base: str | None
    scopes: Scopes

    @property
    def whole(self) -> str:
        """The reference as one text, to tell whether two are the same."""
        return f"{self.base or ''}+{self.name}@{self.revision or ''}"


def read(document: Mapping[str, Any]) -> tuple[list[Model], Scopes]:
    """The models, and the parameters that a slice puts between theirs and those of the whole recipe."""
    given = document.get("slices")
    if given is None:
        models = enumerate(sequence(document.get("models"), "/models"))
        return [_model(item, f"/models/{at}", ("model", "parameters")) for at, item in models], ()
    if document.get("models") is not None:
        raise refused("/slices", "The recipe has both models and slices", "both", "one of them", "Leave slices out.")
    return _of_slice(sequence(given, "/slices"))


def _of_slice(slices: list[Any]) -> tuple[list[Model], Scopes]:
    """As `read`, for a recipe with one slice of all layers."""
    if len(slices) > 1:
        raise refused(
            "/slices",
            "Models put together from several slices cannot be said here",
            len(slices),
            "one slice with all layers",
            "List the models under models; layer_swapping takes whole layers from one expert.",
        )
    here = "/slices/0"
    fields = mapping(slices[0], here, ("sources", "parameters", "base_model", "residual_weight"))
    for name in ("base_model", "residual_weight"):
        if fields.get(name) is not None:
            raise refused(
                f"{here}/{name}", f"{name} of a slice cannot be said here", fields[name], "none", "Leave it out."
            )
    sources = sequence(fields.get("sources"), f"{here}/sources")
    ranges = [
        mapping(item, f"{here}/sources/{at}", _SOURCE_FIELDS).get("layer_range") for at, item in enumerate(sources)
    ]
    for at, found in enumerate(ranges):
        begins = isinstance(found, list) and len(found) == 2 and found[0] == 0 and type(found[1]) is int
        if not begins or found != ranges[0]:
            raise refused(
                f"{here}/sources/{at}/layer_range",
                f"Layers {shown(found)} of a model cannot be merged with other layers here",
                found,
                "the same range from 0 on for every source",
                "List the models under models to merge all of their layers.",
            )
    models = [_model(item, f"{here}/sources/{at}", _SOURCE_FIELDS) for at, item in enumerate(sources)]
    return models, ((f"{here}/parameters", scope(fields.get("parameters"), f"{here}/parameters")),)


def _model(item: object, pointer: str, known: tuple[str, ...]) -> Model:
    fields = mapping(item, pointer, known)
    base, name, revision = _reference(fields.get("model"), f"{pointer}/model")
    own = scope(fields.get("parameters"), f"{pointer}/parameters")
    return Model(pointer, name, revision, base, ((f"{pointer}/parameters", own),))


def _reference(given: object, pointer: str) -> tuple[str | None, str, str | None]:
    """Base, name and revision of `base+name@revision`; the base is None where the model stands alone."""
    if isinstance(given, dict):
        fields = mapping(given, pointer, ("model", "lora"))
        whole = _path(fields.get("model"), f"{pointer}/model")
        adapter = None if fields.get("lora") is None else _path(fields["lora"], f"{pointer}/lora")
    else:
        if not isinstance(given, str) or not given or given.count("+") > 1:
            raise refused(pointer, f"The model is {shown(given)}", given, "a model, or base+adapter", "Name one model.")
        first, plus, second = given.partition("+")
        whole, adapter = _path(first, pointer), _path(second, pointer) if plus else None
    if adapter is None:
        return None, *whole
    if whole[1] is not None:
        raise refused(
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
        fields = mapping(given, pointer, ("path", "revision"))
        name, revision = fields.get("path"), fields.get("revision")
    else:
        name, at, behind = given.partition("@") if isinstance(given, str) else (given, "", "")
        revision = behind if at else None
    is_pinned = isinstance(revision, str) and revision != "" and "@" not in revision
    if isinstance(name, str) and name and (revision is None or is_pinned):
        return name, revision
    raise refused(pointer, f"The model is {shown(given)}", given, "name, folder or name@revision", "Name one model.")


def read_base(given: object) -> Model | None:
    """The recipe's base_model, which may be a base+adapter too."""
    if given is None:
        return None
    base, name, revision = _reference(given, "/base_model")
    return Model("/base_model", name, revision, base, ())


def merged(method: Method, models: list[Model], base: Model | None) -> tuple[list[Model], str | None, list[Model]]:
    """What is merged, the base it is merged on, and models whose weights count though they add nothing."""
    have_bases = {model.base is not None for model in models if base is None or model.whole != base.whole}
    if len(have_bases) > 1:
        odd = next(model for model in models if model.base is None)
        raise refused(
            odd.pointer + "/model",
            f"{odd.name} is a model and others are adapters of a base",
            odd.name,
            "adapters alone, or models alone",
            "Merge adapters with adapters.",
        )
    if True in have_bases:
        return _adapters(method, models, base)
    if method.base == "model":
        return _with_base(method, models, base), None, []
    if base is None:
        if method.base == "needed":
            raise _needs_base(method)
        return models, None, []
    _check_alone(base)
    return [model for model in models if model.whole != base.whole], base.name, []


def _with_base(method: Method, models: list[Model], base: Model | None) -> list[Model]:
    """The models and the base, as one of them; slerp starts from it."""
    if base is None:
        if method.ours == "slerp":
            raise refused(
                "/base_model",
                "slerp starts from the base_model, and there is none",
                None,
                "one of the two models",
                "Name the model at t = 0 as base_model.",
            )
        return models
    if all(model.whole != base.whole for model in models):
        models = [*models, base]
    return sorted(models, key=lambda model: model.whole != base.whole) if method.ours == "slerp" else models


def _adapters(method: Method, models: list[Model], base: Model | None) -> tuple[list[Model], str | None, list[Model]]:
    """As `merged_models`, for adapters of one base."""
    if base is None and method.base == "needed":
        raise _needs_base(method)
    if method.ours != "linear" and (method.base == "model" or base is None):
        raise refused(
            "/merge_method",
            f"mergekit's {method.name} of base+adapter turns the whole models, and what is merged here are deltas",
            method.name,
            "a method on deltas" if method.base == "model" else "a base_model, which makes it a method on deltas",
            "Name base_model."
            if method.base == "optional"
            else f"Write a recipe of this hub, with method {method.name}.",
        )
    adapters = [model for model in models if model.base is not None]
    bases = {model.base for model in adapters}
    if base is not None:
        _check_alone(base)
        bases.add(base.name)
    if len(bases) > 1:
        odd = next(model for model in adapters if model.base != (adapters[0].base if base is None else base.name))
        raise refused(
            odd.pointer + "/model",
            f"{odd.name} belongs to {odd.base}, the others to another base",
            odd.base,
            "one base",
            "Merge adapters of one base model.",
        )
    return adapters, bases.pop(), [model for model in models if model.base is None]


def _check_alone(base: Model) -> None:
    if base.base is not None or base.revision is not None:
        met = base.name if base.base is not None else base.revision
        raise refused(
            "/base_model",
            f"The base is {shown(met)}, part of another model or at a revision",
            met,
            "the base by its name alone",
            "Name the model that the experts were trained from.",
        )


def _needs_base(method: Method) -> RecipeInvalid:
    return refused(
        "/base_model",
        f"{method.name} works on deltas and needs a base_model",
        None,
        "the model that was trained on",
        "Name the base_model.",
    )


def weight(method: Method, model: Model, scopes: Scopes) -> float:
    """The weight of a model, its own or that of all. Raises RecipeInvalid where there is none."""
    pointer, value = look_up("weight", (*model.scopes, *scopes))
    if value is None:
        raise refused(
            f"{model.pointer}/parameters/weight",
            f"{method.name} needs a weight for {model.name}",
            None,
            "a number",
            "Give every model a weight.",
        )
    return float(typed(value, float, pointer))


def averaged(
    weights: list[float], counted: list[float], parameters: dict[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    """Weights of an average of whole models. The base, where it is one of them, takes a share and adds no delta."""
    whole = math.fsum([*weights, *counted])
    if not parameters["normalize"] and abs(whole - 1) > 1e-6:
        raise refused(
            "/parameters/normalize",
            f"The weights sum to {whole:g}, and without normalize the base itself would be multiplied by that",
            False,
            "true, or weights whose sum is 1",
            "Set normalize to true, or use task_arithmetic.",
        )
    if not counted or not parameters["normalize"] or abs(whole) < 1e-8:
        return weights, parameters
    return [weight / whole for weight in weights], {**parameters, "normalize": False}
