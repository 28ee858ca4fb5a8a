"""What a codec is: one file in `codecs/` with a SPEC and three functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moerge.compression.container import Initial
from moerge.compression.manifest import Budget
from moerge.errors import ParameterInvalid
from moerge.tensors.files import BF16, Array

Tensors = Mapping[str, "Array | BF16"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One setting of a codec: a number with a range (`low` itself is excluded if `above`), or one of some choices.

    A default of None means that the codec decides from the other parameters, as `help` says.
    """

    name: str
    default: float | str | None
    help: str
    low: float = 0.0
    high: float = 0.0
    above: bool = False
    choices: tuple[str, ...] = ()

    def parse(self, value: object) -> float | str:
        """The value as it will be used. Raises ParameterInvalid."""
        if self.choices:
            if isinstance(value, str) and value in self.choices:
                return value
            raise self._invalid(value, f"one of {', '.join(self.choices)}")
        wanted = f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._invalid(value, wanted)
        if not self.low <= value <= self.high or (self.above and value == self.low):
            raise self._invalid(value, wanted)
        return float(value)

    def describe(self) -> dict[str, Any]:
        """The parameter as plain data, for catalogues and forms."""
        shown: dict[str, Any] = {"name": self.name, "default": self.default, "help": self.help}
        if self.choices:
            return shown | {"type": "string", "choices": list(self.choices)}
        return shown | {"type": "number", "minimum": self.low, "maximum": self.high, "exclusive_minimum": self.above}

    def _invalid(self, value: object, wanted: str) -> ParameterInvalid:
        return ParameterInvalid(
            f"{self.name} is {ascii(value)[:80]}, wanted {wanted}.", pointer=self.name, met=ascii(value)[:80],
            wanted=wanted, remedy=f"{self.help}",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Name, version of the written format, paper (arXiv id), media type and settings of a codec."""

    name: str
    version: str
    title: str
    paper: str
    parameters: tuple[Parameter, ...]

    def parse(self, parameters: Mapping[str, object]) -> dict[str, float | str | None]:
        """All parameters, given or default. Raises ParameterInvalid, naming an unknown one."""
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in parameters:
            if name not in known:
                raise ParameterInvalid(
                    f"The codec {self.name} has no parameter {ascii(name)[:80]}.", pointer=str(name)[:80],
                    met=ascii(name)[:80], wanted=", ".join(known), remedy="Leave it out or correct its name.",
                )  # fmt: skip
        return {
            name: known[name].parse(parameters[name]) if parameters.get(name) is not None else known[name].default
            for name in known
        }

    def describe(self) -> dict[str, Any]:
        """The codec as plain data, for catalogues and forms."""
        return {
            "name": self.name,
            "version": self.version,
            "title": self.title,
            "paper": self.paper,
            "parameters": [parameter.describe() for parameter in self.parameters],
        }


class Codec(Protocol):
    """A module of `codecs/`. The same tensors and parameters always give the same bytes.

    Tensors are numpy float arrays, or BF16. `initial` maps names to initial values of 0, 1 or a base tensor and so
    says what besides LoRA factors is compressed.
    """

    SPEC: Spec

    def encode(
        self,
        tensors: Tensors,
        parameters: Mapping[str, object],
        *,
        initial: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes: ...

    def decode(
        self, data: bytes, *, initial: Initial | None = None, budget: Budget = ...
    ) -> dict[str, "Array | BF16"]: ...

    def size_bound(
        self,
        tensors: Tensors,
        parameters: Mapping[str, object],
        *,
        initial: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Bytes that `encode` never exceeds for tensors of these names, shapes and dtypes."""
        ...
