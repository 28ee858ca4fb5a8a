"""Experts of a recipe as their rows tell them: what a merge of them needs to know before any file is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from registry.models import Revision
from registry.services import layouts
from registry.services.layouts import Module

# What `output.saved` lets one expert keep as it is: tensors that replace tensors of the base.
KEPT = frozenset({"/modules_to_save", "/bias"})


@dataclass(frozen=True, eq=False)
class Parent:
    """One expert of a recipe, pinned. `position` is its place in the request."""

    position: int
    digest: str
    revision: Revision

    @property
    def name(self) -> str:
        assert self.revision.expert is not None
        return self.revision.expert.full_name

    @property
    def pointer(self) -> str:
        return f"/experts/{self.position}"

    @property
    def facts(self) -> Mapping[str, Any]:
        facts: Mapping[str, Any] = self.revision.facts
        return facts

    @property
    def kind(self) -> str:
        return self.revision.adapter_kind

    @property
    def family(self) -> str:
        return "ia3" if self.kind == "ia3" else "lora"

    @property
    def licence(self) -> str:
        return str(self.facts.get("licence") or "")

    @cached_property
    def modules(self) -> dict[str, Module] | None:
        """Its modules by name; None for a revision that was checked before they were written down."""
        lines = self.facts.get("layout")
        return None if lines is None else layouts.unpack(lines)

    @cached_property
    def saved(self) -> dict[str, tuple[int, ...]]:
        """Tensors that replace tensors of the base, with their shapes."""
        return {name: tuple(shape) for name, shape in self.facts.get("saved_shapes", {}).items()}

    @property
    def is_dense(self) -> bool:
        """Whether its delta is formed with the base and is not low rank."""
        return any(item["pointer"] == "/use_dora" for item in self.facts.get("blockers", []))

    def blockers(self, *, keeps_saved: bool) -> list[Mapping[str, Any]]:
        """Why its own files are not enough to merge it. `keeps_saved`: one expert's saved tensors stay as they are."""
        found: Sequence[Mapping[str, Any]] = self.facts.get("blockers", [])
        return [item for item in found if not (keeps_saved and item["pointer"] in KEPT)]

    def has_statistics(self, needs: Sequence[str]) -> bool:
        """Whether it comes with all these kinds of statistics."""
        return set(needs) <= set(self.facts.get("statistics", {}).get("kinds", []))
