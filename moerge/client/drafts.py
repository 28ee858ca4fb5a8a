"""Recipes as people write them: each expert a folder on this disk or a reference to a hub, pinned to nothing yet."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moerge.client.errors import AddressInvalid
from moerge.client.references import Reference
from moerge.errors import RecipeInvalid
from moerge.merging import documents
from moerge.merging.base import shown
from moerge.merging.recipe import MOST_EXPERTS

# Of other files the first sign tells.
_KINDS: Mapping[str, Literal["yaml", "json"]] = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
_PATH_STARTS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class Named:
    """An expert as a recipe names it: `text` as it stands there, what it means, and its other fields."""

    text: str
    folder: Path | None
    reference: Reference | None
    fields: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        """What a resolved recipe calls it."""
        return self.reference.full_name if self.reference else self.text


@dataclass(frozen=True)
class Draft:
    """A recipe before its experts are resolved: `fields` is all but them.

    `base` is the folder with the base's weights, where base_model is a folder and no name.
    """

    fields: Mapping[str, Any]
    experts: tuple[Named, ...]
    base: Path | None = None

    @property
    def folders(self) -> list[int]:
        """Positions of the experts that are folders."""
        return [position for position, expert in enumerate(self.experts) if expert.folder is not None]

    def weights(self) -> list[dict[str, Any]]:
        """The experts' `weight` fields; where none has one, all count alike."""
        if any("weight" in expert.fields for expert in self.experts):
            return [{"weight": expert.fields["weight"]} if "weight" in expert.fields else {} for expert in self.experts]
        return [{"weight": 1 / len(self.experts)}] * len(self.experts)


def read(path: str | Path) -> Draft:
    """The recipe in a YAML or JSON file. Raises RecipeInvalid with line or JSON pointer, OSError."""
    path = Path(path)
    with path.open("rb") as file:
        text = file.read(documents.LARGEST_BYTES + 1)
    return parse(documents.read(text, kind=_KINDS.get(path.suffix.lower())), beside=path.parent)


def parse(body: Mapping[str, Any], *, beside: Path) -> Draft:
    """A recipe from JSON values; relative folders are looked for in `beside`, then in the working directory.

    Only the experts and the base are looked at: the rest is judged when the experts are resolved. Raises RecipeInvalid.
    """
    items = body.get("experts")
    if not isinstance(items, list) or not 1 <= len(items) <= MOST_EXPERTS:
        met = len(items) if isinstance(items, list) else shown(items)
        raise _wrong("/experts", met, f"a list of 1 to {MOST_EXPERTS} experts", "Name the experts and their weights.")
    named = body.get("base_model")
    base = _folder(named, "/base_model", beside) if isinstance(named, str) else None
    return Draft(
        fields={name: value for name, value in body.items() if name not in {"experts", base and "base_model"}},
        experts=tuple(_named(item, f"/experts/{position}", beside) for position, item in enumerate(items)),
        base=base,
    )


def _named(item: object, pointer: str, beside: Path) -> Named:
    if not isinstance(item, dict):
        raise _wrong(pointer, shown(item), "an object with expert and weight", "Write expert and weight.")
    text = item.get("expert")
    if not isinstance(text, str) or not text:
        raise _wrong(f"{pointer}/expert", shown(text), "owner/name[@revision], or a folder", "Name the expert.")
    fields = {name: value for name, value in item.items() if name not in {"expert", "revision"}}
    folder = _folder(text, f"{pointer}/expert", beside)
    if folder is not None:
        return Named(text, folder, None, fields)
    return Named(text, None, _reference(text, item.get("revision"), pointer), fields)


def _reference(text: str, revision: object, pointer: str) -> Reference:
    """An expert on a hub; its revision stands behind the name or in a field of its own."""
    if not isinstance(revision, str | None):
        raise _wrong(f"{pointer}/revision", shown(revision), "a branch, a tag or a commit", "Leave it out for main.")
    if revision and "@" in text and not text.endswith(f"@{revision}"):
        raise _wrong(f"{pointer}/revision", revision[:200], f"the one in {text[:200]}", "Name the revision once.")
    try:
        return Reference.parse(f"{text}@{revision}" if revision and "@" not in text else text)
    except AddressInvalid as error:
        raise _wrong(
            f"{pointer}/expert", text[:200], "owner/name[@revision], or a folder that is there",
            "Correct the name; begin it with ./ to say that it is a folder.",
        ) from error  # fmt: skip


def _folder(text: str, pointer: str, beside: Path) -> Path | None:
    """The folder that a text means; None for what is neither one nor written as one. Raises RecipeInvalid."""
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - an unknown user is no error here
    found = next((place for place in (beside / path, path) if place.is_dir()), None)
    if found is None and text.startswith(_PATH_STARTS):
        raise _wrong(pointer, f"no folder {text[:200]}", "a folder that is there", "Correct the path.")
    return found


def _wrong(pointer: str, met: object, wanted: str, remedy: str) -> RecipeInvalid:
    return RecipeInvalid(
        f"{pointer} is {met}, wanted {wanted}.", pointer=pointer, met=met, wanted=wanted, remedy=remedy
    )
