"""What people type for an expert: owner/name, or owner/name@revision."""

import re
from dataclasses import dataclass
from typing import Self

from moerge.client.errors import AddressInvalid

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,~-]{0,126}")


@dataclass(frozen=True)
class Reference:
    """An expert, or a merge as `merges/<id>`, at a branch, a tag or a commit."""

    owner: str
    name: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`owner/name` or `owner/name@revision`. Raises AddressInvalid."""
        full_name, at, revision = text.partition("@")
        parts = full_name.split("/")
        is_named = len(parts) == 2 and all(_is_name(part) for part in parts)
        if not is_named or (at and not (_REVISION.fullmatch(revision) and ".." not in revision)):
            raise AddressInvalid(
                f"{text[:200]!r} is not a reference to an expert.", pointer="REF", met=text[:200],
                wanted="owner/name or owner/name@revision", remedy="Write it as it stands on the expert's page.",
            )  # fmt: skip
        return cls(parts[0], parts[1], revision or "main")

    @property
    def full_name(self) -> str:
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        return f"{self.full_name}@{self.revision}"


def _is_name(part: str) -> bool:
    return _PART.fullmatch(part) is not None and "--" not in part and ".." not in part and not part.endswith(".git")
