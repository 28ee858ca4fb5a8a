"""Bytes into storage: the row first, then the file, so that no file lies there without a row."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from registry import storage
from registry.errors import Fault, TooLarge, UploadInvalid
from registry.models import Blob

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Staged:
    """Bytes that lie in the staging folder, counted and hashed while they were written."""

    path: Path
    sha256: str
    # Empty for bytes that were hashed in an earlier request; `read_back` fills it before they are kept.
    git_sha1: str
    size_bytes: int

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def staging_path() -> Path:
    """A fresh name in the staging folder."""
    folder = Path(settings.HUB_STAGING_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / secrets.token_hex(16)


def stage(chunks: Iterable[bytes], *, limit_bytes: int, pointer: str = "") -> Staged:
    """Write a stream to staging; one that grows past `limit_bytes` is cut there. Raises TooLarge."""
    path = staging_path()
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > limit_bytes:
                    raise TooLarge(
                        f"More than {limit_bytes} bytes arrived.",
                        faults=[Fault(pointer, f"more than {limit_bytes} bytes", f"at most {limit_bytes} bytes")],
                    )
                digest.update(chunk)
                file.write(chunk)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Staged(path, digest.hexdigest(), git_sha1(path, size), size)


def stage_bytes(data: bytes) -> Staged:
    return stage([data], limit_bytes=len(data))


def stage_file(path: Path) -> Staged:
    """Hash a file that already lies in staging; it is taken as it is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in chunks_of(file):
            digest.update(chunk)
    size = path.stat().st_size
    return Staged(path, digest.hexdigest(), git_sha1(path, size), size)


def read_back(staged: Staged) -> Staged:
    """The same bytes with all their digests, compared with what is expected of them. Raises UploadInvalid."""
    if staged.git_sha1:
        return staged
    found = stage_file(staged.path)
    if found.sha256 != staged.sha256:
        fault = Fault("/files", found.sha256, staged.sha256, "Send the file again.", "U5")
        raise UploadInvalid("A file was damaged while it waited.", faults=[fault])
    return found


def git_sha1(path: Path, size_bytes: int) -> str:
    """Git's id of a file: SHA-1 over the header and the bytes."""
    digest = hashlib.sha1(f"blob {size_bytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        for chunk in chunks_of(file):
            digest.update(chunk)
    return digest.hexdigest()


def chunks_of(file: BinaryIO) -> Iterable[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def keep(staged: Staged) -> Blob:
    """Move staged bytes into storage and give their row. Call before, never inside, the transaction that refers to it.

    The row is committed before the file appears. Until something refers to it, only the grace time protects it.
    """
    with transaction.atomic(durable=True):
        blob, _ = Blob.objects.update_or_create(
            sha256=staged.sha256,
            defaults={"touched_at": timezone.now()},
            create_defaults={
                "sha256": staged.sha256,
                "git_sha1": staged.git_sha1,
                "size_bytes": staged.size_bytes,
                "touched_at": timezone.now(),
            },
        )
    storage.current().put(staged.path, staged.sha256)
    return blob


def touch(digests: Iterable[str]) -> None:
    """Restart the grace time of blobs inside the transaction that refers to them; this locks them against the sweep."""
    Blob.objects.filter(sha256__in=list(digests)).update(touched_at=timezone.now())


def manifest(files: Iterable[tuple[str, str, int]]) -> str:
    """What a tree of files is: SHA-256 over its sorted (path, sha256, size) list."""
    rows = [list(file) for file in sorted(files)]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def free_bytes() -> int:
    """Room left on the disk that takes uploads."""
    place = Path(settings.HUB_STAGING_DIR)
    while not place.exists():
        place = place.parent
    stat = os.statvfs(place)
    return stat.f_bavail * stat.f_frsize


def verify() -> Iterator[tuple[str, str]]:
    """Re-hash every blob: its digest and what is wrong with it, empty when nothing is.

    A row without bytes is wrong only when something refers to it; bytes without a row are nobody's.
    """
    stored = set(storage.current().digests())
    for row in Blob.objects.order_by("pk").iterator():
        if row.pk in stored:
            yield row.pk, _damage(row)
        elif row.files.exists() or row.encoded.exists() or row.fingerprints.exists():
            yield row.pk, "missing"
        stored.discard(row.pk)
    for sha256 in sorted(stored):
        # The row may have been written since the list of rows was read.
        if not Blob.objects.filter(pk=sha256).exists():
            yield sha256, "without a row"


def _damage(row: Blob) -> str:
    digest, size = hashlib.sha256(), 0
    try:
        with storage.current().open(row.pk) as file:
            for chunk in chunks_of(file):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        return "missing"
    if size != row.size_bytes:
        return f"damaged: {size} bytes instead of {row.size_bytes}"
    return "" if digest.hexdigest() == row.pk else f"damaged: its digest is {digest.hexdigest()}"
