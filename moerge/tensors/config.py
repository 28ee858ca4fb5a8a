"""adapter_config.json, parsed once and strictly into a frozen record."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from moerge.errors import ConfigInvalid
from moerge.tensors import strict

MAX_BYTES = 256_000
MAX_KEYS = 10_000
MAX_DEPTH = 32
_MAX_RANK = 65_536
_WRITE_AGAIN = "Upload the adapter_config.json that PeftModel.save_pretrained wrote beside the weights."
# Only these kinds keep ranks and alphas per module; in others the same words hold other things (AdaLoRA: masks).
_WITH_PATTERNS = frozenset({"LORA", "LOHA", "LOKR"})


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter_config.json. Values without a field here are kept in `raw` as text and never acted upon.

    `layers_to_transform` and the patterns mean what they mean in PEFT; None stands for "not given". `sha256` is that of
    the bytes it was read from.
    """

    peft_type: str
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    feedforward_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    base_model_name_or_path: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sha256: str = field(default="", repr=False, compare=False)


def parse(data: bytes) -> AdapterConfig:
    """The bytes of an adapter_config.json as a record. Raises ConfigInvalid with a JSON pointer to the field."""
    if len(data) > MAX_BYTES:
        raise _invalid("The config is too large", "", f"{len(data)} bytes", f"at most {MAX_BYTES} bytes", rule="J1")
    try:
        raw = strict.loads(data, max_keys=MAX_KEYS, max_depth=MAX_DEPTH)
    except strict.Malformed as error:
        pointer = f"/{error.pointer}" if error.pointer else ""
        raise _invalid("The config is not strict JSON", pointer, str(error), "JSON that every reader understands alike",
                       rule="J1") from error  # fmt: skip
    if not isinstance(raw, dict):
        raise _invalid("The config is not an object", "", type(raw).__name__, "a JSON object", rule="J1")
    peft_type = _field(raw, "peft_type", _text, "")
    if not peft_type:
        raise _invalid("The config does not say what kind of adapter it is", "/peft_type", raw.get("peft_type"),
                       "a kind that PEFT knows, such as LORA")  # fmt: skip
    patterned = peft_type in _WITH_PATTERNS
    alpha = "alpha" if peft_type in {"LOHA", "LOKR"} else "lora_alpha"
    layers = _field(raw, "layers_to_transform", _integers, None)
    targets = _field(raw, "target_modules", _texts_or_pattern, None)
    record = AdapterConfig(
        peft_type=peft_type,
        r=_field(raw, "r", _rank, 8),
        lora_alpha=_field(raw, alpha, _alpha, 8.0),
        use_rslora=_field(raw, "use_rslora", _boolean, default=False),
        use_dora=_field(raw, "use_dora", _boolean, default=False),
        fan_in_fan_out=_field(raw, "fan_in_fan_out", _boolean, default=False),
        rank_pattern=_mapping(raw, "rank_pattern", _rank) if patterned else {},
        alpha_pattern=_mapping(raw, "alpha_pattern", _alpha) if patterned else {},
        target_modules=targets,
        exclude_modules=_field(raw, "exclude_modules", _texts_or_pattern, None),
        feedforward_modules=_field(raw, "feedforward_modules", _texts_or_pattern, None),
        layers_to_transform=layers,
        layers_pattern=_as_tuple(_field(raw, "layers_pattern", _texts_or_pattern, ())),
        modules_to_save=_as_tuple(_field(raw, "modules_to_save", _texts_or_pattern, ())),
        bias=_field(raw, "bias", _text, "none"),
        base_model_name_or_path=_field(raw, "base_model_name_or_path", _text, None),
        raw=raw,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    _check_ranges(record)
    return record


def _check_ranges(config: AdapterConfig) -> None:
    """Values that no LoRA can have. Other kinds use the same words for other things, so theirs stay unread."""
    if config.peft_type not in _WITH_PATTERNS:
        return
    ranks = {"/r": config.r} | {_pointer("rank_pattern", key): value for key, value in config.rank_pattern.items()}
    for pointer, rank in ranks.items():
        if not 1 <= rank <= _MAX_RANK:
            raise _invalid("A rank is out of range", pointer, rank, f"1 to {_MAX_RANK}", rule="T4")
    alphas = {"/lora_alpha": config.lora_alpha}
    alphas |= {_pointer("alpha_pattern", key): value for key, value in config.alpha_pattern.items()}
    for pointer, alpha in alphas.items():
        if not alpha > 0:
            raise _invalid("An alpha is out of range", pointer, alpha, "a finite number above 0", rule="T4")
    if config.bias not in {"none", "all", "lora_only"}:
        raise _invalid("This bias setting is not known", "/bias", config.bias, "none, all or lora_only")


def _pointer(name: str, key: str) -> str:
    escaped = key.replace("~", "~0").replace("/", "~1")
    return f"/{name}/{escaped[:200]}"


class _WrongTypeError(ValueError):
    """A value is not of the type its reader wants; the message names that type."""


def _field(raw: Mapping[str, Any], name: str, read: Callable[[Any], Any], default: Any) -> Any:
    value = raw.get(name)
    if value is None:
        return default
    try:
        return read(value)
    except _WrongTypeError as error:
        raise _invalid(f"{name} has the wrong type", f"/{name}", _shown(value), str(error)) from error


def _mapping(raw: Mapping[str, Any], name: str, read: Callable[[Any], Any]) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(f"{name} has the wrong type", f"/{name}", _shown(value), "an object of patterns and numbers")
    result = {}
    for key, item in value.items():
        try:
            result[key] = read(item)
        except _WrongTypeError as error:
            raise _invalid(f"A value of {name} has the wrong type", _pointer(name, key), _shown(item),
                           str(error)) from error  # fmt: skip
    return result


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongTypeError("a string")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _WrongTypeError("true or false")
    return value


def _rank(value: Any) -> int:
    # JSON's true is Python's 1, so the type itself is compared.
    if type(value) is not int:
        raise _WrongTypeError("a whole number")
    return value


def _alpha(value: Any) -> float:
    if type(value) not in (int, float):
        raise _WrongTypeError("a number")
    try:
        number = float(value)
    except OverflowError:
        raise _WrongTypeError("a number that a float can hold") from None
    if not isfinite(number):
        raise _WrongTypeError("a finite number")
    return number


def _integers(value: Any) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in items):
        raise _WrongTypeError("a whole number or a list of them")
    return tuple(items)


def _texts_or_pattern(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _WrongTypeError("a string or a list of strings")
    return tuple(value)


def _as_tuple(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:100]!r}"


def _invalid(detail: str, pointer: str, met: object, wanted: object, *, rule: str = "T4") -> ConfigInvalid:
    return ConfigInvalid(
        f"{detail}: met {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=_WRITE_AGAIN,
        rule=rule,
    )  # fmt: skip
