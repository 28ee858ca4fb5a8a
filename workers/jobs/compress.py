"""Make the compressed form of a revision: ComPEFT, preset `default`, at the density that suits the base's size."""

from dataclasses import asdict
from typing import Any

from moerge.compression import compress_adapter
from moerge.compression.report import Report
from registry import selectors, storage
from registry.checks import files
from registry.models import Revision
from registry.services import blobs, encodings
from workers.runner import NotApplicable, Work

# A page and an API answer stay small; whoever wants every tensor can measure it from the two files.
MOST_MODULES_REPORTED = 500


def run(work: Work) -> dict[str, Any]:
    """Encode the weights of one revision. Running it twice gives the same bytes under the same row."""
    revision = Revision.objects.select_related("base_model").get(jobs=work.lease.job_id)
    config = selectors.file(revision, files.CONFIG)
    weights = selectors.file(revision, files.WEIGHTS)
    kept = storage.current()
    with kept.open(config.blob_id) as file:
        config_bytes = file.read()
    out = blobs.staging_path()
    try:
        with kept.as_path(weights.blob_id) as path:
            report = compress_adapter(
                config_bytes,
                path,
                out,
                base_parameters=revision.base_model.parameter_count if revision.base_model else None,
                progress=lambda share: work.progress(share, "Encoding"),
            )
        if not report.size:
            raise NotApplicable("This adapter has no LoRA factor large enough to be made ternary.")
        encodings.record(
            revision=revision,
            preset=report.preset,
            density=report.density,
            staged=blobs.stage_file(out),
            original_bytes=report.ternary_original_bytes,
            report=summary(report),
        )
    finally:
        out.unlink(missing_ok=True)
    return {"bytes": report.bytes, "original_bytes": report.original_bytes, "sha256": report.sha256}


def summary(report: Report) -> dict[str, Any]:
    """What the hub keeps of a report: everything but the list of tensors; modules up to a bound."""
    kept = report.as_dict()
    del kept["tensors"]
    kept["modules"] = [asdict(module) for module in report.modules[:MOST_MODULES_REPORTED]]
    return kept
