"""The parameters of mergekit's recipes in our terms, with mergekit's defaults written out."""

from collections.abc import Sequence
from typing import Any

from moerge.merging.base import nearest, shown
from moerge.merging.mergekit.methods import Method
from moerge.merging.mergekit.models import Model
from moerge.merging.mergekit.reading import Scopes, listed, look_up, refused, typed


def check_known(method: Method, models: Sequence[Model], scopes: Scopes) -> None:
    """Refuse parameters that would be ignored."""
    own = {*method.each, *(["weight"] if method.has_weights else [])}
    known = [(method.name, scopes, {*method.shared, *own})]
    known += [(f"A model of {method.name}", model.scopes, own) for model in models]
    for who, places, names in known:
        for pointer, scope in places:
            for key in scope:
                if key not in names:
                    raise refused(
                        f"{pointer}/{key}",
                        f"{who} has no parameter {shown(key)}",
                        key,
                        listed(names) or "no parameters",
                        nearest(key, sorted(names)),
                    )


def shared(method: Method, scopes: Scopes) -> dict[str, Any]:
    """Parameters of the whole recipe. Raises RecipeInvalid."""
    found = {}
    for key, setting in method.shared.items():
        pointer, value = look_up(key, scopes)
        value = setting.default if value is None else typed(value, setting.kind, pointer)
        if value is None:
            raise refused(f"/parameters/{key}", f"{method.name} needs {key}", None, "a number", f"Give {key}.")
        if setting.only is not None and value != setting.only:
            raise refused(
                pointer,
                f"{method.name} with {key} {shown(value)} cannot be said here",
                value,
                str(setting.only).lower(),
                f"Leave {key} out.",
            )
        if setting.ours:
            found[setting.ours] = value if setting.words is None else setting.words[value]
    return found


def each(method: Method, models: Sequence[Model], scopes: Scopes) -> dict[str, Any]:
    """Parameters that mergekit has per model and we have per recipe."""
    found: dict[str, Any] = {}
    for key, setting in method.each.items():
        for model in models:
            pointer, given = look_up(key, (*model.scopes, *scopes))
            value = setting.default if given is None else typed(given, setting.kind, pointer)
            if found.setdefault(str(setting.ours), value) != value:
                raise refused(
                    f"{model.pointer}/parameters/{key}",
                    f"{key} is {value:g} for {model.name} and {found[str(setting.ours)]:g} for another model, and"
                    f" {method.name} takes one for all here",
                    value,
                    f"the same {key} for every model",
                    f"Give {key} once, under parameters.",
                )
    return found


def adjusted(method: Method, parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters that are put together from several of mergekit's."""
    if method.ours == "nuslerp":
        is_flat, is_row_wise = parameters.pop("flatten"), parameters.pop("row_wise")
        # What mergekit calls row-wise takes the first dimension as the one that a vector runs along.
        return {**parameters, "scope": "tensor" if is_flat else "column" if is_row_wise else "row"}
    if method.ours == "della" and parameters["density"] == 1:
        return {**parameters, "epsilon": 0.0}
    return parameters
