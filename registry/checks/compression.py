"""Which compressed form is meant: a preset, the share of values kept, and what differs from the preset's own rule."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moerge.compression.adapters import INT4
from moerge.compression.presets import DEFAULT, HQ, PAPER
from moerge.compression.presets import RULES as TERNARY_RULES
from moerge.compression.selection import density_for
from registry.errors import Fault, Invalid, RequestInvalid

__all__ = ["DEFAULT", "HQ", "INT4", "PAPER", "RULES", "STANDARD_DENSITIES", "Choice", "Form", "asked", "parse"]

# The scale rules of each preset, its own one first.
RULES: dict[str, tuple[str, ...]] = {**TERNARY_RULES, INT4: ()}
# What any reader may have made. Everything else is made for who may write to the expert.
STANDARD_DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
# Shares closer to each other than this are one share, so that the forms of an expert are finitely many.
DECIMALS = 4
INT4_DENSITY = 1.0
MOST_ALPHA = 1000.0
_DECIMAL = re.compile(r"[0-9]{0,3}\.?[0-9]{1,20}")
_SHARES = f"{', '.join(f'{density:g}' for density in STANDARD_DENSITIES[:-1])} or {STANDARD_DENSITIES[-1]:g}"
WANTED_DENSITY = (
    f"a share: {_SHARES}; with scope write also any other above 0 and below 1 with at most {DECIMALS} decimals"
)


@dataclass(frozen=True)
class Form:
    """One compressed form of a revision: what its row and its job are known by."""

    preset: str
    density: float
    variant: str = ""  # what differs from the preset's own scale rule

    @property
    def is_standard(self) -> bool:
        """Whether any reader may have it made."""
        return (self.preset, self.variant) == (DEFAULT, "") and self.density in STANDARD_DENSITIES

    @property
    def key(self) -> str:
        return f"{self.preset}:{self.density:g}:{self.variant}"

    @property
    def query(self) -> str:
        """How the download of a form with the preset's own rule is addressed."""
        return f"preset={self.preset}" + ("" if self.preset == INT4 else f"&density={self.density:g}")


@dataclass(frozen=True)
class Choice:
    """What somebody chose; without a density the size of the base model decides."""

    preset: str = DEFAULT
    density: float | None = None
    scale_rule: str | None = None
    alpha: float | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "Choice":
        """What `as_dict` wrote, out of the parameters of a job."""
        return cls(**{name: parameters[name] for name in cls.__dataclass_fields__ if parameters.get(name) is not None})

    def as_dict(self) -> dict[str, Any]:
        """What was chosen and nothing else, ready for JSON."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in found.items() if value is not None}

    def form(self, base_parameters: int | None) -> Form:
        """The form that comes of it on a base model of this many parameters."""
        if self.preset == INT4:
            return Form(INT4, INT4_DENSITY)
        density = density_for(base_parameters) if self.density is None else self.density
        variant = "" if self.scale_rule in {None, RULES[self.preset][0]} else str(self.scale_rule)
        if self.alpha not in {None, 1.0}:
            variant = f"alpha={self.alpha:g}"
        return Form(self.preset, density, variant)


def asked(*, preset: str | None, density: str | None) -> Choice | None:
    """The form that a query names; None when it names none and the revision's own is meant. Raises RequestInvalid."""
    if preset is None and density is None:
        return None
    claims: dict[str, Any] = {} if preset is None else {"preset": preset}
    if density is not None:
        claims["density"] = float(density) if _DECIMAL.fullmatch(density) else density
    return parse(claims, pointer="?", error=RequestInvalid)


def parse(claims: Mapping[str, Any], *, pointer: str, error: type[Invalid]) -> Choice:
    """What was given as `{preset, density, scale_rule, alpha}`; each may be left out or null.

    Faults point at `pointer` and the field's name. Raises `error`.
    """
    refuse = _Refusal(pointer, error)
    given = {name: value for name, value in claims.items() if value is not None}
    for name in given.keys() - Choice.__dataclass_fields__.keys():
        raise refuse(name, name, wanted="preset, density, scale_rule or alpha", remedy="Leave this field out.")
    preset, rule = given.get("preset", DEFAULT), given.get("scale_rule")
    if not isinstance(preset, str) or preset not in RULES:
        raise refuse("preset", preset, wanted=f"one of {', '.join(RULES)}", remedy="Choose one of these.")
    if rule == HQ and preset == DEFAULT:
        # The one rule that changes the factors themselves is a preset of its own.
        preset = HQ
    if rule is not None and rule not in RULES[preset]:
        known = ", ".join(RULES[preset]) or "none with int4"
        remedy = f"Choose a rule of the preset {preset}, or leave it out."
        raise refuse("scale_rule", rule, wanted=known, remedy=remedy)
    density, alpha = given.get("density"), given.get("alpha")
    return Choice(
        preset,
        None if density is None else _density(density, preset, refuse),
        rule,
        None if alpha is None else _alpha(alpha, preset, rule, refuse),
    )


@dataclass(frozen=True)
class _Refusal:
    """Makes the error of one field."""

    pointer: str
    error: type[Invalid]

    def __call__(self, name: str, met: object, *, wanted: str, remedy: str) -> Invalid:
        is_plain = isinstance(met, int) or (isinstance(met, float) and math.isfinite(met))
        shown = met if is_plain else str(met)[:60]
        fault = Fault(f"{self.pointer}{name}", shown, wanted, remedy)
        return self.error(f"The compression's {name} is {shown!a}; wanted {wanted}.", faults=[fault])


def _density(value: object, preset: str, refuse: _Refusal) -> float:
    """Above 0, below 1, and no finer than forms are told apart."""
    if preset == INT4:
        raise refuse("density", value, wanted="none: int4 keeps every value", remedy="Leave it out.")
    unfit = refuse("density", value, wanted=WANTED_DENSITY, remedy="Write a share: 0.1 for 10 %.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unfit
    if not 0 < value < 1 or round(float(value), DECIMALS) != value:
        raise unfit
    return float(value)


def _alpha(value: object, preset: str, rule: object, refuse: _Refusal) -> float:
    if preset != PAPER or rule == "stc":
        raise refuse("alpha", value, wanted="no alpha but with preset paper and rule sigma", remedy="Leave it out.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_ALPHA:
        raise refuse("alpha", value, wanted=f"a number above 0, {MOST_ALPHA:g} at most", remedy="Correct this field.")
    # As it is written into the form's name.
    return float(f"{value:g}")
