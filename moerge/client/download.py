"""One file of a hub to one file on disk: resumed where it broke off, and under its final name only when verified."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moerge.client.errors import AnswerInvalid, BrokenOff, DownloadDamaged
from moerge.client.hub import PAUSES_SECONDS, Answer, Hub
from moerge.client.patience import Patience
from moerge.client.records import SHA256
from moerge.tensors import files

LIMIT_BYTES = 2**34
# More bytes that do not fit what is there already than a hub sends by accident.
_RESTARTS = 3
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


@dataclass(frozen=True)
class Wanted:
    """What to fetch. Where no digest and size are known before, the answer's ETag and length tell them."""

    path: str
    label: str
    params: Mapping[str, str] | None = None
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Fetched:
    """What lies on disk now; `digest` is of the kind that was wanted."""

    size: int
    digest: str
    etag: str


class _StartOver(Exception):
    """What is on disk and what the hub has now are not parts of one file."""


def fetch(hub: Hub, wanted: Wanted, target: Path, *, patience: Patience | None = None) -> Fetched:
    """Download to `target`, which appears whole and verified or not at all.

    Bytes gather in `.NAME.part` beside it. When the caller knows the SHA-256, a later call goes on from there; within
    a call, a transfer that breaks off goes on by Range under If-Range. Raises DownloadDamaged when size or SHA-256
    are wrong, AnswerInvalid, HubRefused, HubUnreachable, WaitedTooLong, OSError.
    """
    part = target.with_name(f".{target.name}.part")
    if wanted.digest is None:
        part.unlink(missing_ok=True)
    transfer = _Transfer(hub, wanted, part, patience or hub.patience())
    for _ in range(_RESTARTS):
        try:
            found = transfer.run()
        except _StartOver:
            part.unlink(missing_ok=True)
            continue
        part.replace(target)
        return found
    raise DownloadDamaged(
        f"{wanted.label} changes while it is downloaded.", pointer=wanted.label, met="another file at each attempt",
        wanted="one file", remedy="Try again when nobody writes to the expert, or name a commit as the revision.",
    )  # fmt: skip


class _Transfer:
    """The state of one download over its interruptions."""

    def __init__(self, hub: Hub, wanted: Wanted, part: Path, patience: Patience) -> None:
        self._hub = hub
        self._known = wanted
        self._wanted = wanted
        self._part = part
        self._patience = patience
        self._etag = ""
        # Bytes of more than one answer may be of more than one file.
        self._is_patched = part.exists()

    def run(self) -> Fetched:
        """From what is there to a verified part. Raises _StartOver where beginning again may help."""
        failures = 0
        while not self._is_complete():
            before = self._have()
            try:
                self._receive(before)
            except BrokenOff as error:
                failures += 1
                if self._have() > before:
                    # What moves may take as long as it needs.
                    failures, self._patience = 0, self._hub.patience()
                if failures >= len(PAUSES_SECONDS):
                    raise
                self._patience.wait(PAUSES_SECONDS[failures], error)
                self._is_patched = True
        return self._verified()

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _is_complete(self) -> bool:
        if self._wanted.size is None or not (self._part.exists() or self._wanted.size == 0):
            return False
        if self._have() > self._wanted.size:
            raise _StartOver
        return self._have() == self._wanted.size

    def _receive(self, have: int) -> None:
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and self._etag:
            headers["If-Range"] = f'"{self._etag}"'
        accept = (200, 206, 416) if have else (200,)
        with self._hub.stream(
            self._wanted.path, params=self._wanted.params, headers=headers, accept=accept, patience=self._patience
        ) as answer:
            start = self._start_of(answer, have)
            self._learn(answer, start)
            with self._part.open("ab" if start else "wb") as stream:
                count = start
                for block in answer.blocks:
                    count += len(block)
                    self._check_count(count)
                    stream.write(block)
                    self._tell(count)
                stream.flush()
                os.fsync(stream.fileno())
        self._wanted = replace(self._wanted, size=self._wanted.size or count)
        if count < (self._wanted.size or 0):
            raise BrokenOff(
                f"{self._wanted.label} broke off.", pointer=self._wanted.label, met=f"{count} bytes",
                wanted=f"{self._wanted.size}", remedy="Try again; it goes on where it stopped.",
            )  # fmt: skip

    def _start_of(self, answer: Answer, have: int) -> int:
        """Where in the file the bytes of an answer begin. Raises _StartOver where they do not fit what is there."""
        if answer.status == 200:
            return 0
        # An answer 416 tells the size alone: what is there is longer than the file is now.
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        is_other = bool(self._etag) and _etag(answer) != self._etag
        if match is None or int(match[1]) != have or is_other:
            raise _StartOver
        self._check_total(int(match[3]))
        self._wanted = replace(self._wanted, size=int(match[3]))
        return have

    def _learn(self, answer: Answer, start: int) -> None:
        """Take what an answer tells of the file where the caller did not know it."""
        self._etag = _etag(answer)
        if start:
            return
        self._is_patched = False
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal():
            self._check_total(int(length[:19]))
            self._wanted = replace(self._wanted, size=int(length[:19]))
        if self._known.digest is None:
            digest = next((tag for tag in (_linked(answer), self._etag) if SHA256.fullmatch(tag)), "")
            if not digest:
                raise AnswerInvalid(
                    f"The hub does not tell the SHA-256 of {self._wanted.label}.", pointer=self._wanted.label,
                    met=f"ETag {self._etag[:80]!r}", wanted="an ETag of 64 hexadecimal digits",
                    remedy="Check that nothing between here and the hub changes its headers.",
                )  # fmt: skip
            self._wanted = replace(self._wanted, sha256=digest)

    def _check_total(self, total: int) -> None:
        known = self._known.size
        if (known is not None and total != known) or total > LIMIT_BYTES:
            raise self._damaged(f"{total} bytes", f"{known if known is not None else f'at most {LIMIT_BYTES}'}")

    def _check_count(self, count: int) -> None:
        limit = self._wanted.size if self._wanted.size is not None else LIMIT_BYTES
        if count > limit:
            self._part.unlink(missing_ok=True)
            raise self._damaged(f"more than {limit} bytes", f"{limit}")

    def _verified(self) -> Fetched:
        if not self._part.exists():
            self._part.touch()
        name, met = ("SHA-256", files.sha256(self._part)) if self._wanted.sha256 else ("SHA-1", git_sha1(self._part))
        if met != self._wanted.digest:
            self._part.unlink()
            if self._is_patched:
                raise _StartOver
            raise self._damaged(f"{name} {met}", f"{self._wanted.digest}")
        return Fetched(self._part.stat().st_size, met, self._etag)

    def _tell(self, count: int) -> None:
        size = self._wanted.size
        self._hub.progress(self._wanted.label, count / size if size else None)

    def _damaged(self, met: str, wanted: str) -> DownloadDamaged:
        return DownloadDamaged(
            f"{self._wanted.label} is not what the hub told: met {met}, wanted {wanted}.", pointer=self._wanted.label,
            met=met, wanted=wanted, remedy="Try again; if it stays so, the hub's copy is damaged: tell its operator.",
        )  # fmt: skip


def git_sha1(path: Path) -> str:
    """The name that git gives to a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _etag(answer: Answer) -> str:
    """The strong entity tag; a weak one does not stand for bytes."""
    tag = answer.headers.get("ETag", "")
    return "" if tag.startswith("W/") else tag.strip('"')


def _linked(answer: Answer) -> str:
    return answer.headers.get("X-Linked-Etag", "").strip('"')
