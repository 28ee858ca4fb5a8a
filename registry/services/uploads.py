"""Uploads under way: files promised, sent in chunks that can be resumed, then committed together.

Bytes lie in the staging folder under a name made from the row, and the true offset is what lies there: a process that
died, a cut connection or a lost disk cache can make it smaller than the row says, never wrong. Blobs are made only when
the whole upload has passed its checks.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from registry import selectors
from registry.checks import cards, files
from registry.errors import (
    Conflict,
    Fault,
    OffsetMismatch,
    RequestInvalid,
    RequestMalformed,
    StorageUnavailable,
    TooLarge,
    UploadInvalid,
    UploadNotFound,
)
from registry.models import Blob, Revision, Upload, UploadFile, User
from registry.services import blobs, experts, plans, revisions
from registry.services.blobs import Staged
from registry.services.limits import header_limits

DIGEST = re.compile(r"[0-9a-f]{64}")
LOCK_SECONDS = 3.0


@dataclass(frozen=True)
class Claim:
    """One file that the caller promises to send."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Started:
    """An upload, its files in the order of their paths, and what need not be sent at all, with the reason."""

    upload: Upload
    files: tuple[UploadFile, ...]
    ignored: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Range:
    """Where a chunk goes: bytes `start` up to `end` (not included) of a file."""

    start: int
    end: int


class Stream(Protocol):
    """Where bytes come from; a request's body is one."""

    def read(self, size: int, /) -> bytes: ...


def start(
    *,
    user: User,
    expert: str,
    claims: Sequence[Claim],
    private: bool = False,
    message: str = "",
    card: Mapping[str, Any] | None = None,
    compression: Mapping[str, Any] | None = None,
    parent_commit: str = "",
) -> Started:
    """Open an upload after everything that can be said from names, sizes and digests alone has been checked.

    A file that the caller can already read, by the same digest, need not be sent. Leftovers of training are named and
    not waited for. `compression` chooses the compressed form as the card's own section does, and wins over it. Raises
    NameInvalid, NotAllowed, UploadInvalid, TooLarge, QuotaExceeded, StorageUnavailable.
    """
    namespace, _ = experts.claim(user=user, full_name=expert)
    given = cards.overrides({**(card or {}), "compression": compression})
    ignored = tuple((claim.path, files.leftover(claim.path)) for claim in claims if files.leftover(claim.path))
    wanted = [claim for claim in claims if not files.leftover(claim.path)]
    _check_claims(claims, wanted)
    total = sum(claim.size_bytes for claim in wanted)
    plans.check_quota(namespace, total)
    if total > blobs.free_bytes():
        raise StorageUnavailable("The hub has no room for these files.", retry_after_seconds=60)
    known = {claim.path: blob for claim in wanted if (blob := _readable(user, claim)) is not None}
    with transaction.atomic():
        upload = Upload.objects.create(
            user=user,
            expert_name=expert,
            is_private=private,
            message=message[:300],
            card=given,
            parent_commit=parent_commit,
            expires_at=timezone.now() + timedelta(hours=settings.HUB_UPLOAD_SESSION_HOURS),
        )
        rows = UploadFile.objects.bulk_create(
            [
                UploadFile(
                    upload=upload,
                    path=claim.path,
                    size_bytes=claim.size_bytes,
                    sha256=claim.sha256,
                    offset=claim.size_bytes if claim.path in known else 0,
                    blob=known.get(claim.path),
                )
                for claim in sorted(wanted, key=lambda claim: claim.path)
            ]
        )
        blobs.touch(blob.pk for blob in known.values())
    return Started(upload, tuple(rows), ignored)


def find(*, user: User, upload_id: str) -> Upload:
    """An upload of this user. Raises UploadNotFound, alike for what is absent and what is somebody else's."""
    upload = Upload.objects.filter(pk=upload_id, user=user).select_related("revision__expert__namespace").first()
    if upload is None:
        raise UploadNotFound(f"You have no upload {upload_id[:80]!r}.")
    return upload


def offsets(upload: Upload) -> list[tuple[UploadFile, int]]:
    """Every file of an upload with the bytes that have truly arrived."""
    return [(row, true_offset(row)) for row in upload.files.all()]


def true_offset(row: UploadFile) -> int:
    """How much of a file is here: what the row says, unless less lies in staging."""
    if row.blob_id or row.upload.state == Upload.State.COMPLETED:
        return row.size_bytes
    try:
        return min(row.offset, _place(row).stat().st_size)
    except FileNotFoundError:
        return 0


def put_chunk(*, user: User, upload_id: str, path: str, stream: Stream, where: Range | None) -> tuple[UploadFile, int]:
    """Take bytes of one file; `where` is None when the whole file comes at once. Returns the row and its new offset.

    What arrives of a chunk that is cut counts. A finished file is hashed and its content checked at once; one that is
    not what was promised is dropped, so that it can be sent again. Raises UploadNotFound, OffsetMismatch with the true
    offset, UploadInvalid, RequestMalformed.
    """
    upload = _open(user, upload_id)
    row = upload.files.filter(path=path).first()
    if row is None:
        raise UploadNotFound(f"The upload has no file {path[:200]!r}.")
    where = where or Range(0, row.size_bytes)
    if where.end > row.size_bytes:
        raise TooLarge(
            f"{path} was promised with {row.size_bytes} bytes.",
            faults=[
                Fault(
                    "Content-Range",
                    f"bytes up to {where.end}",
                    f"at most {row.size_bytes} bytes",
                    "Start a new upload with the true size.",
                    "U4",
                )
            ],
        )
    with _locked(_place(row)) as file:
        row.refresh_from_db()
        offset = true_offset(row)
        if where.start != offset:
            raise OffsetMismatch(
                f"{path} stands at byte {offset}; the chunk starts at {where.start}.",
                offset=offset,
                faults=[Fault("Content-Range", where.start, offset, f"Go on from byte {offset}.", "A4")],
            )
        if row.blob_id:
            return row, offset
        try:
            offset, staged = _receive(row, file, stream, where)
            _check_received(row, offset, staged)
        except UploadInvalid:
            _drop(row, file)
            raise
    if offset < where.end:
        raise RequestMalformed(
            f"The chunk ended at byte {offset}.",
            faults=[
                Fault("Content-Range", f"up to byte {offset}", f"up to byte {where.end}", f"Go on from byte {offset}.")
            ],
        )
    return row, offset


def complete(
    *, user: User, upload_id: str, card: Mapping[str, Any] | None = None, message: str = ""
) -> tuple[Upload, Revision]:
    """Make a revision of the files; asked again, the same revision. `card` answers what the first try was asked.

    Raises UploadNotFound, UploadInvalid for missing bytes, and what `revisions.commit` raises; the files stay then, so
    that an answer can be given without sending them again.
    """
    upload = find(user=user, upload_id=upload_id)
    if not _is_completed(upload):
        with _locked(_folder() / f"upload-{upload.pk}.lock"):
            upload = find(user=user, upload_id=upload_id)
            if not _is_completed(upload):
                _complete(_open(user, upload_id), user=user, card=card or {}, message=message)
        upload = find(user=user, upload_id=upload_id)
    assert upload.revision is not None
    return upload, upload.revision


def _is_completed(upload: Upload) -> bool:
    return upload.state == Upload.State.COMPLETED and upload.revision is not None


def _complete(upload: Upload, *, user: User, card: Mapping[str, Any], message: str) -> None:
    given = {**upload.card, **cards.overrides(card)}
    rows = list(upload.files.select_related("blob", "upload"))
    _check_all_here(rows)
    expert = experts.find(upload.expert_name)
    sources = {row.path: row.blob or _staged(row) for row in rows}
    try:
        revisions.commit(
            user=user,
            expert=expert or revisions.New(upload.expert_name, is_private=upload.is_private),
            changes=revisions.Changes(sources),
            message=message or upload.message or "Upload",
            parent_commit=upload.parent_commit or None,
            card=given,
            upload=upload,
        )
    except UploadInvalid as error:
        if any(fault.rule == "U5" for fault in error.faults):
            _forget(upload, rows)
        raise
    finally:
        for source in sources.values():
            if isinstance(source, Staged):
                source.discard()
    _forget(upload, rows)


def abort(*, user: User, upload_id: str) -> None:
    """End an upload that is under way and forget its bytes; one that is over stays as it is."""
    upload = find(user=user, upload_id=upload_id)
    if upload.state == Upload.State.COMPLETED:
        raise Conflict("The upload is complete; delete the expert or commit again.")
    rows = list(upload.files.all())
    Upload.objects.filter(pk=upload.pk).update(state=Upload.State.ABORTED)
    UploadFile.objects.filter(upload=upload).update(blob=None, offset=0)
    _forget(upload, rows)


def _check_claims(claims: Sequence[Claim], wanted: Sequence[Claim]) -> None:
    if not wanted:
        raise UploadInvalid("There is nothing to upload.", faults=[Fault("/files", len(claims), "at least one file")])
    if len(claims) > settings.HUB_UPLOAD_MAX_FILES:
        fault = Fault("/files", len(claims), f"at most {settings.HUB_UPLOAD_MAX_FILES} files", "Leave files out.", "U4")
        raise TooLarge(f"{len(claims)} files are too many.", faults=[fault])
    seen: set[str] = set()
    for position, claim in enumerate(claims):
        if claim not in wanted:
            continue
        pointer = f"/files/{position}"
        rule = files.rule_for(claim.path, pointer=f"{pointer}/path", limit_bytes=settings.HUB_FILE_MAX_BYTES)
        if claim.path.casefold() in seen:
            fault = Fault(f"{pointer}/path", claim.path, "every file once", "Leave one of the two out.", "U3")
            raise UploadInvalid(f"{claim.path} is named twice.", faults=[fault])
        seen.add(claim.path.casefold())
        if not DIGEST.fullmatch(claim.sha256):
            fault = Fault(
                f"{pointer}/sha256",
                claim.sha256[:80],
                "64 hexadecimal digits in lower case",
                "Send the SHA-256 of the file.",
                "U5",
            )
            raise RequestInvalid(f"The digest of {claim.path} is not one.", faults=[fault])
        files.check_size(claim.path, claim.size_bytes, rule, pointer=f"{pointer}/size")
    total = sum(claim.size_bytes for claim in wanted)
    if total > settings.HUB_UPLOAD_MAX_BYTES:
        fault = Fault("/files", total, f"at most {settings.HUB_UPLOAD_MAX_BYTES} bytes", "Leave files out.", "U4")
        raise TooLarge(f"The files have {total} bytes together.", faults=[fault])


def _readable(user: User, claim: Claim) -> Blob | None:
    """The blob of a promised file, for a caller who can read it anyway; nobody else is told that it exists."""
    blob = Blob.objects.filter(pk=claim.sha256, size_bytes=claim.size_bytes).first()
    return blob if blob is not None and selectors.may_read_blob(user, claim.sha256) else None


def _open(user: User, upload_id: str) -> Upload:
    upload = find(user=user, upload_id=upload_id)
    if upload.state != Upload.State.OPEN or upload.expires_at < timezone.now():
        raise Conflict(
            f"The upload is {upload.state if upload.state != Upload.State.OPEN else 'over'}.",
            faults=[Fault("/upload", upload.state, "open", "Start a new upload.")],
        )
    return upload


def _folder() -> Path:
    return Path(settings.HUB_STAGING_DIR)


def _place(row: UploadFile) -> Path:
    return _folder() / f"upload-{row.upload_id}-{row.pk}"


def _forget(upload: Upload, rows: Iterable[UploadFile]) -> None:
    """Remove what lies in staging for an upload that is over."""
    for row in rows:
        _place(row).unlink(missing_ok=True)
    (_folder() / f"upload-{upload.pk}.lock").unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[BinaryIO]:
    """A staging file, for one request at a time. Raises Conflict when another one does not end."""
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Conflict("Another request is at work on this upload.", retry_after_seconds=2) from None
                time.sleep(0.05)
        yield file


def _receive(row: UploadFile, file: BinaryIO, stream: Stream, where: Range) -> tuple[int, Staged | None]:
    """Write the chunk; returns the new offset, and the digests when the whole file came in this one chunk."""
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(f"blob {row.size_bytes}\0".encode(), usedforsecurity=False)
    file.truncate(where.start)
    file.seek(where.start)
    offset, head = where.start, b""
    limits, needed = header_limits(), 0
    try:
        for piece in _pieces(stream, where.end - where.start):
            if where.start == 0:
                sha256.update(piece)
                sha1.update(piece)
                # A wrong format or an impossible header is refused while the rest is still on its way.
                if offset < 64:
                    head = (head + piece)[:64]
                    rule = files.rule_for(row.path, pointer="/path", limit_bytes=settings.HUB_FILE_MAX_BYTES)
                    needed = files.check_start(row.path, head, row.size_bytes, rule, limits)
            file.write(piece)
            before, offset = offset, offset + len(piece)
            if needed and before < needed <= offset:
                file.flush()
                files.read_header(row.path, _place(row), limits=limits, size_bytes=row.size_bytes)
    finally:
        file.flush()
        UploadFile.objects.filter(pk=row.pk).update(offset=offset)
        row.offset = offset
    is_whole = where.start == 0 and offset == row.size_bytes
    return offset, Staged(_place(row), sha256.hexdigest(), sha1.hexdigest(), offset) if is_whole else None


def _pieces(stream: Stream, count: int) -> Iterator[bytes]:
    """At most `count` bytes of a stream. A connection that is cut ends it."""
    while count > 0:
        try:
            piece = stream.read(min(blobs.CHUNK_BYTES, count))
        except OSError:
            return
        if not piece:
            return
        count -= len(piece)
        yield piece


def _check_received(row: UploadFile, offset: int, staged: Staged | None) -> None:
    """Digest and content of a file that is whole. Raises UploadInvalid."""
    if offset < row.size_bytes:
        return
    found = staged or blobs.stage_file(_place(row))
    if found.sha256 != row.sha256:
        fault = Fault(files.pointer_of(row.path, "sha256"), found.sha256, row.sha256, "Send the file again.", "U5")
        raise UploadInvalid(f"{row.path} is not the file that was promised.", faults=[fault])
    rule = files.rule_for(row.path, pointer=files.pointer_of(row.path), limit_bytes=settings.HUB_FILE_MAX_BYTES)
    files.check_content(row.path, _place(row), rule, limits=header_limits())


def _drop(row: UploadFile, file: BinaryIO) -> None:
    file.truncate(0)
    UploadFile.objects.filter(pk=row.pk).update(offset=0)


def _check_all_here(rows: Iterable[UploadFile]) -> None:
    faults = [
        Fault(
            files.pointer_of(row.path),
            f"{offset} bytes",
            f"{row.size_bytes} bytes",
            f"Send the file from byte {offset} on.",
            "A4",
        )
        for row in rows
        if (offset := true_offset(row)) < row.size_bytes or not _is_here(row)
    ]
    if faults:
        raise UploadInvalid("Not all bytes have arrived.", faults=faults)


def _is_here(row: UploadFile) -> bool:
    """Whether an empty file was made, too: it needs one request like every other."""
    return bool(row.blob_id) or _place(row).exists()


def _staged(row: UploadFile) -> Staged:
    """The bytes of a file under a second name, so that the first stays when the commit is refused or dies.

    They were hashed when the last chunk arrived; they are read again only when everything else has been checked.
    """
    copy = blobs.staging_path()
    os.link(_place(row), copy)
    return Staged(copy, row.sha256, "", row.size_bytes)
