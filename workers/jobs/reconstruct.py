"""Make the reconstruction of a revision: encode it where that was not done before, decode, keep the files."""

import shutil
from collections.abc import Callable
from typing import Any

from moerge.compression import decompress
from registry import selectors, storage
from registry.checks import files
from registry.models import Encoded, Revision
from registry.services import blobs, encodings, reconstructions
from registry.services.reconstructions import Reconstruction
from workers.jobs import compress
from workers.runner import Work

# Decoding is a few times faster than encoding, and the rest is copying.
ENCODED_SHARE = 0.6


def run(work: Work) -> dict[str, Any]:
    """Write the decoded weights beside the other files of the source. A second run finds the first one's result."""
    source = Revision.objects.select_related("base_model").get(jobs=work.lease.job_id)
    form = work.lease.parameters[reconstructions.FORM]
    wanted = Reconstruction(source, form, reconstructions.commit_of(source, form), None)
    encoded = encodings.find(source, wanted.choice)
    if encoded is None:
        encoded = compress.encode(
            source,
            wanted.choice,
            is_own=False,
            progress=lambda share: work.progress(ENCODED_SHARE * share, "Encoding"),
        )
    made = decode(
        source,
        form,
        encoded,
        progress=lambda share: work.progress(ENCODED_SHARE + (1 - ENCODED_SHARE) * share, "Decoding"),
    )
    return {"commit": made.commit, "encoded": encoded.blob_id}


def decode(source: Revision, form: str, encoded: Encoded, *, progress: Callable[[float], None]) -> Revision:
    """Decode a form of a revision and publish it. The same encoded bytes give the same weights, byte for byte."""
    kept = storage.current()
    with kept.open(selectors.file(source, files.CONFIG).blob_id) as file:
        config = file.read()
    folder = blobs.staging_path()
    folder.mkdir()
    try:
        with kept.as_path(encoded.blob_id) as path:
            decompress(path, folder, config=config, progress=progress)
        weights = blobs.stage_file(folder / files.WEIGHTS)
        return reconstructions.finish(source=source, form=form, encoded=encoded, weights=weights)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
