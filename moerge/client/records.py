"""Answers of the API as records: checked where they come in, so that nothing behind asks what a field is."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moerge.client.errors import AnswerInvalid, JobFailed, PathUnsafe

FILES = 10_000
# The most that the Hub protocol tells of a tree at once; a derived revision has a handful of files.
PAGE = 1000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[0-9A-Za-z]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
_OVER = frozenset({"done", "not_applicable", "failed", "cancelled"})
_CONTROL = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


@dataclass(frozen=True)
class File:
    """One file of a revision; the path is plain and relative.

    A small file of a revision that the hub derives is known by its name in git alone.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """The files of an expert or a merge at one commit."""

    full_name: str
    commit: str
    base_model: str
    files: tuple[File, ...]

    def file(self, path: str) -> File | None:
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True)
class Job:
    """Work of the hub; `progress` is a share, 0 to 1."""

    id: str
    kind: str
    state: str
    progress: float
    message: str
    error: str

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    def raise_if_failed(self) -> None:
        """Raises JobFailed for a job that ended without its result."""
        if self.state in {"failed", "cancelled"}:
            raise JobFailed(
                f"The hub's job {self.id} ({self.kind}) {self.state}: {self.error or 'no reason was given'}",
                pointer=self.id, met=self.state, wanted="done",
                remedy="Correct what the reason names; an owner can try the job again on the expert's page.",
            )  # fmt: skip


@dataclass(frozen=True)
class Merge:
    """A merge that a hub knows: its address and its commit stand before it is computed.

    `is_new` where the request that told of it was the one that began it.
    """

    id: str
    digest: str
    commit: str
    state: str
    job: Job | None
    report: Mapping[str, Any]
    is_new: bool

    @property
    def full_name(self) -> str:
        return f"merges/{self.id}"


def snapshot(body: Any, *, full_name: str, commit_field: str) -> Snapshot:
    """An expert's or a merge's record. Raises AnswerInvalid, PathUnsafe."""
    fields = mapping(body, "the record")
    rows = fields.get("files")
    if not isinstance(rows, list) or len(rows) > FILES:
        raise _odd("files", rows, f"a list of at most {FILES} files")
    files = tuple(_file(row) for row in rows)
    check_paths(file.path for file in files)
    commit, base = fields.get(commit_field), fields.get("base_model")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _odd(commit_field, commit, "40 hexadecimal digits")
    return Snapshot(full_name, commit, base if isinstance(base, str) else "", files)


def commit(body: Any) -> str:
    """The commit of a repository as the Hub protocol tells it. Raises AnswerInvalid."""
    found = mapping(body, "the repository").get("sha")
    if not isinstance(found, str) or not _COMMIT.fullmatch(found):
        raise _odd("sha", found, "40 hexadecimal digits")
    return found


def derived(nodes: Any, *, full_name: str, commit: str) -> Snapshot:
    """A tree as the Hub protocol tells it. Raises AnswerInvalid, PathUnsafe."""
    if not isinstance(nodes, list) or len(nodes) >= PAGE:
        raise _odd("tree", nodes, f"a list of fewer than {PAGE} files")
    files = tuple(_node(node) for node in nodes if not (isinstance(node, dict) and node.get("type") == "directory"))
    check_paths(file.path for file in files)
    return Snapshot(full_name, commit, "", files)


def job(body: Any) -> Job:
    """A job's record. Raises AnswerInvalid."""
    fields = mapping(body, "the job")
    progress = fields.get("progress")
    error = fields.get("error")
    share = float(progress) if isinstance(progress, int | float) and not isinstance(progress, bool) else 0.0
    return Job(
        id=str(fields.get("id") or "")[:64],
        kind=str(fields.get("kind") or "")[:64],
        state=str(fields.get("state") or "")[:64],
        progress=min(1.0, max(0.0, share)),
        message=str(fields.get("message") or "")[:300],
        error=str(error.get("detail") or "")[:1000] if isinstance(error, dict) else "",
    )


def merge_state(body: Any) -> tuple[str, Job | None]:
    """State of a merge and the job that computes it. Raises AnswerInvalid."""
    fields = mapping(body, "the merge")
    return str(fields.get("state") or ""), job(fields["job"]) if fields.get("job") else None


def merge(body: Any, *, is_new: bool = False) -> Merge:
    """A merge's record; `is_new` says whether the request that told it made it. Raises AnswerInvalid."""
    state, found = merge_state(body)
    for field, pattern in (("id", _NAME), ("digest", SHA256), ("commit", _COMMIT)):
        if not isinstance(body.get(field), str) or not pattern.fullmatch(body[field]):
            raise _odd(field, body.get(field), f"a text like {pattern.pattern}")
    report = body.get("report")
    return Merge(
        id=body["id"],
        digest=body["digest"],
        commit=body["commit"],
        state=state,
        job=found,
        report=report if isinstance(report, dict) else {},
        is_new=is_new,
    )


def check_paths(paths: Iterable[str]) -> None:
    """Every path plain and relative, none twice, none a folder of another. Raises PathUnsafe."""
    seen: set[str] = set()
    for path in paths:
        parts = path.split("/")
        is_plain = all(part not in {"", ".", ".."} and len(part.encode(errors="replace")) <= 255 for part in parts)
        odd = any(unicodedata.category(sign) in _CONTROL or sign in '\\:*?"<>|' for sign in path)
        if not is_plain or odd or path.startswith("~") or path in seen:
            raise PathUnsafe(
                f"The hub names a file {ascii(path)[:120]}, which is not taken.", pointer=ascii(path)[:120],
                met=ascii(path)[:120], wanted="a plain relative path, once", remedy="Tell the owner of the expert.",
            )  # fmt: skip
        seen.add(path)
    folders = {"/".join(path.split("/")[:end]) for path in seen for end in range(1, path.count("/") + 1)}
    if both := sorted(folders & seen):
        raise PathUnsafe(
            f"The hub names {both[0]!r} as a file and as a folder.", pointer=both[0], met="both", wanted="one of them",
            remedy="Tell the owner of the expert.",
        )  # fmt: skip


def _file(row: Any) -> File:
    fields = mapping(row, "a file")
    path, size, sha256 = fields.get("path"), fields.get("size"), fields.get("sha256")
    if not isinstance(path, str):
        raise _odd("files/path", path, "a text")
    if type(size) is not int or size < 0:
        raise _odd(f"{path[:80]}/size", size, "a number of bytes")
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise _odd(f"{path[:80]}/sha256", sha256, "64 hexadecimal digits")
    return File(path, size, sha256)


def _node(node: Any) -> File:
    fields = mapping(node, "a file")
    large = fields.get("lfs")
    if isinstance(large, dict):
        return _file({"path": fields.get("path"), "size": fields.get("size"), "sha256": large.get("oid")})
    found = _file({"path": fields.get("path"), "size": fields.get("size"), "sha256": "0" * 64})
    sha1 = fields.get("oid")
    if not isinstance(sha1, str) or not _COMMIT.fullmatch(sha1):
        raise _odd(f"{found.path[:80]}/oid", sha1, "40 hexadecimal digits")
    return File(found.path, found.size, None, sha1)


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A JSON object of an answer. Raises AnswerInvalid."""
    if not isinstance(value, dict):
        raise _odd(what, value, "an object")
    return value


def _odd(what: str, met: Any, wanted: str) -> AnswerInvalid:
    return AnswerInvalid(
        f"The hub's answer has an odd {what}.", pointer=what, met=ascii(met)[:120], wanted=wanted,
        remedy="Check that the endpoint is the address of a hub of this version.",
    )  # fmt: skip
