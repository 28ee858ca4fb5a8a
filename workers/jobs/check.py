"""Check: what takes too long at the door. The stored bytes are read back and compared with their names.

Weights that were found sound are measured beside the pipeline: prototypes, fingerprint, neighbours.
"""

import hashlib
from pathlib import Path
from typing import Any

from django.db import transaction

from moerge.errors import MoergeError
from moerge.tensors import files as tensor_files
from registry import jobs, storage
from registry.checks import cards, files
from registry.errors import Fault, HubError, StorageUnavailable
from registry.models import File, Revision
from registry.services import blobs, revisions
from registry.services.limits import header_limits
from workers.runner import Work


def run(work: Work) -> dict[str, Any]:
    """Read every file of the revision once more; write down the figures of its card. Can be run again."""
    assert work.lease.revision_id is not None
    revision = Revision.objects.get(pk=work.lease.revision_id)
    rows = list(File.objects.filter(revision=revision).select_related("blob"))
    total = sum(row.blob.size_bytes for row in rows) or 1
    done, tensors = 0, 0
    for row in rows:
        work.progress(done / total, f"Reading back {row.path}"[:300])
        try:
            with storage.current().as_path(row.blob_id) as path:
                compare(row, path)
                if files.is_weights(row.path):
                    tensors += agree(row.path, path)
                if row.path == files.CARD:
                    revisions.record_figures(revision, cards.parse(files.read_text(row.path, path)).figures)
        except FileNotFoundError as error:
            raise StorageUnavailable(f"The bytes of {row.path} are not in the storage.") from error
        done += row.blob.size_bytes
    if revision.expert_id is not None and revision.state != Revision.State.INCOMPLETE:
        with transaction.atomic():
            jobs.enqueue_fingerprint(revision)
    return {"files": len(rows), "bytes": done, "tensors": tensors}


def compare(row: File, path: Path) -> None:
    """The stored bytes against their digest. Raises HubError for damage."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in blobs.chunks_of(stream):
            digest.update(chunk)
    if digest.hexdigest() != row.blob_id:
        fault = Fault(files.pointer_of(row.path), digest.hexdigest(), row.blob_id, "Upload the file again.", "A8")
        raise HubError(f"The stored bytes of {row.path} are damaged.", faults=[fault])


def agree(path: str, file: Path) -> int:
    """Whether the reference reader sees the same tensors in the stored bytes; returns how many."""
    found = files.read_header(path, file, limits=header_limits())
    try:
        tensor_files.check_agreement(file, found)
    except MoergeError as error:
        raise files.translated(error, path) from error
    return len(found.tensors)
