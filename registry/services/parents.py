"""Experts of a recipe as their rows tell them: what a merge of them needs to know before any file is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moerge.merging.experts import ACCEPTED
from moerge.tensors import places
from registry.models import Revision
from registry.services import layouts
from registry.services.layouts import Module


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
    def modules(self) -> Mapping[str, Module] | None:
        """Its modules by name; None where only the base tells them, or they were not yet written down."""
        return layouts.unpack(self.facts.get("layout") or []) or None

    @cached_property
    def saved(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what replaces tensors of the base, by the base's names."""
        shapes = self.facts.get("saved_shapes", {})
        return {places.of_base_tensor(name): tuple(shape) for name, shape in shapes.items()}

    @cached_property
    def is_dense(self) -> bool:
        """Whether its deltas come as matrices, not as factors."""
        is_rescaled = any(item["pointer"] == "/use_dora" for item in self.blockers)
        return is_rescaled or self.family == "ia3" or any(not module.rank for module in (self.modules or {}).values())

    @property
    def blockers(self) -> list[Mapping[str, Any]]:
        """Why its own files are not enough to merge it, but for saved tensors, of which a merge takes care itself."""
        found: Sequence[Mapping[str, Any]] = self.facts.get("blockers", [])
        return [item for item in found if item["pointer"] not in ACCEPTED]

    def has_statistics(self, needs: Sequence[str]) -> bool:
        """Whether it comes with all these kinds of statistics."""
        return set(needs) <= set(self.facts.get("statistics", {}).get("kinds", []))
