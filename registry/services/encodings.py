"""The compressed form of a revision: derived from its files, kept beside them, rebuilt at will."""

from typing import Any

from django.db import transaction

from registry.models import Encoded, Revision
from registry.services import blobs
from registry.services.blobs import Staged


def record(
    *, revision: Revision, preset: str, density: float, staged: Staged, original_bytes: int, report: dict[str, Any]
) -> Encoded:
    """Keep an encoded file and its report; a second run of the same work finds the first one's row.

    `original_bytes` are those of the same tensors at two bytes a value. The staged file is consumed.
    """
    blob = blobs.keep(staged)
    with transaction.atomic():
        blobs.touch([blob.pk])
        encoded, _ = Encoded.objects.update_or_create(
            revision=revision,
            preset=preset,
            density=density,
            defaults={"blob": blob, "original_bytes": original_bytes, "report": report},
        )
    return encoded
