"""Fields of mergekit's recipes as they are read: of the right type, found where they stand, or refused by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from moerge.errors import RecipeInvalid
from moerge.merging.base import nearest, shown

# Where parameters stand, and those that stand there; the first that has one counts.
Scopes = tuple[tuple[str, Mapping[str, Any]], ...]

_LARGEST = 1e12


def mapping(given: object, pointer: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    """Fields, all of them known where `known` says which there are. Raises RecipeInvalid."""
    if not isinstance(given, dict):
        raise refused(
            pointer, f"{pointer} is {shown(given)}", given, "fields", "Write it as mergekit's documentation does."
        )
    for key in given:
        if known is not None and key not in known:
            raise refused(
                f"{pointer}/{key}",
                f"There is no field {shown(key)} here",
                key,
                listed(known),
                nearest(str(key), known),
            )
    return given


def scope(given: object, pointer: str) -> Mapping[str, Any]:
    """The parameters that stand in one place; whether there are such parameters is for the method to say."""
    return {} if given is None else mapping(given, pointer, None)


def sequence(given: object, pointer: str) -> list[Any]:
    """A list of models that is not empty. Raises RecipeInvalid."""
    if not isinstance(given, list) or not given:
        raise refused(pointer, f"{pointer} is {shown(given)}", given, "a list of models", "List the models.")
    return given


def look_up(key: str, scopes: Scopes) -> tuple[str, Any]:
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
        fields = mapping(setting, pointer, ("value", "filter"))
        if fields.get("filter") not in (None, "*"):
            raise refused(
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
        raise refused(
            pointer,
            "A parameter that changes from layer to layer cannot be said here",
            setting,
            "one value for all layers",
            "Give a single number; layer_swapping sets shares by layer.",
        )
    return setting[0] if setting else None


def typed(value: object, kind: type, pointer: str) -> Any:
    """A bool, int or float, as mergekit would take it: 0 and 1 are bools too. Raises RecipeInvalid."""
    if kind is bool and type(value) in (bool, int) and value in (0, 1):
        return bool(value)
    if kind is int and type(value) is int:
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise refused(pointer, f"{pointer} is {shown(value)}", value, wanted, f"Give {wanted}.")


def listed(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(sorted(names))


def refused(pointer: str, detail: str, met: object, wanted: str, remedy: str) -> RecipeInvalid:
    """The error to raise; `detail` is a sentence without its full stop."""
    return RecipeInvalid(f"{detail}.", pointer=pointer, met=shown(met), wanted=wanted, remedy=remedy)
