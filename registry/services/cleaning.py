"""Remove what nobody reads and nothing refers to: weights of merges long unread, blobs past their grace time, uploads
past their time, forgotten staging files.
"""

import logging
import time
from datetime import timedelta
from pathlib import Path

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, OuterRef
from django.utils import timezone

from registry import storage
from registry.models import Blob, Encoded, File, Fingerprint, Upload, UploadFile
from registry.services import merges

log = logging.getLogger(__name__)


def clean() -> dict[str, int]:
    """One round of everything; returns what was removed, by kind."""
    return {
        "uploads": close_stale_uploads(),
        "merges": merges.collect(),
        "blobs": collect_garbage(),
        "staging": clear_staging(),
    }


def collect_garbage(*, grace_seconds: int | None = None) -> int:
    """Delete blobs that nothing refers to and that nobody touched within the grace time; returns how many.

    File first, then row, under a lock on the row: a crash in between leaves a row without a file, which a
    later upload of the same bytes heals, and never a file without a row.
    """
    grace = settings.HUB_GARBAGE_GRACE_SECONDS if grace_seconds is None else grace_seconds
    before = timezone.now() - timedelta(seconds=grace)
    referring = (File, Encoded, Fingerprint, UploadFile)
    unused = Blob.objects.filter(touched_at__lt=before)
    for model in referring:
        unused = unused.filter(~Exists(model.objects.filter(blob=OuterRef("pk"))))
    count = 0
    for digest in list(unused.values_list("pk", flat=True)[:10_000]):
        with transaction.atomic():
            row = unused.select_for_update(skip_locked=True, of=("self",)).filter(pk=digest).first()
            if row is None:
                continue
            storage.current().delete(digest)
            row.delete()
            count += 1
    if count:
        log.info("Swept unreferenced blobs.", extra={"blob.count": count})
    return count


def close_stale_uploads() -> int:
    """Abort uploads whose time is over; their bytes go with the next sweep."""
    stale = Upload.objects.filter(state=Upload.State.OPEN, expires_at__lt=timezone.now())
    UploadFile.objects.filter(upload__in=stale).update(blob=None)
    return stale.update(state=Upload.State.ABORTED)


def clear_staging() -> int:
    """Remove staging files that no open upload can still want."""
    folder = Path(settings.HUB_STAGING_DIR)
    before = time.time() - settings.HUB_UPLOAD_SESSION_HOURS * 3600 - 3600
    count = 0
    for path in folder.glob("*") if folder.exists() else ():
        if path.is_file() and path.stat().st_mtime < before:
            path.unlink(missing_ok=True)
            count += 1
    return count
