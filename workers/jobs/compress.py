"""Make a compressed form of a revision: ComPEFT or int4, as the job's parameters say.

What they leave open is the preset `default` at the density that suits the base's size.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from django.conf import settings

from moerge.compression import compress_adapter
from moerge.compression.report import Report
from registry import selectors, storage
from registry.checks import compression, files
from registry.checks.compression import Choice
from registry.models import Encoded, Revision
from registry.services import blobs, encodings
from workers import devices
from workers.runner import NotApplicable, Work

Progress = Callable[[float], None]

# A page and an API answer stay small; whoever wants every tensor can measure it from the two files.
MOST_MODULES_REPORTED = 500


def run(work: Work) -> dict[str, Any]:
    """Encode the weights of one revision. Running it twice gives the same bytes under the same row."""
    revision = Revision.objects.select_related("base_model").get(jobs=work.lease.job_id)
    encoded = encode(
        revision,
        Choice.of(work.lease.parameters),
        is_own=encodings.EXTRA not in work.lease.parameters,
        progress=lambda share: work.progress(share, "Encoding"),
    )
    report = encoded.report
    sizes = {"bytes": report["bytes"], "original_bytes": report["original_bytes"]}
    return {"preset": encoded.preset, "density": encoded.density, **sizes, "sha256": encoded.blob_id}


def encode(revision: Revision, choice: Choice, *, is_own: bool, progress: Progress) -> Encoded:
    """The chosen form, made and kept. Raises NotApplicable where there is nothing to compress."""
    form = encodings.form_of(revision, choice)
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
                preset=form.preset,
                density=None if form.preset == compression.INT4 else form.density,
                scale_rule=choice.scale_rule,
                alpha=choice.alpha,
                arithmetic=devices.arithmetic(settings.HUB_DEVICE),
                progress=progress,
            )
        if not report.size:
            raise NotApplicable("This adapter has no LoRA factor large enough to be made ternary.")
        return encodings.record(
            revision=revision,
            form=form,
            is_own=is_own,
            staged=blobs.stage_file(out),
            original_bytes=report.ternary_original_bytes,
            report=summary(report),
        )
    finally:
        out.unlink(missing_ok=True)


def summary(report: Report) -> dict[str, Any]:
    """What the hub keeps of a report: everything but the list of tensors; modules up to a bound."""
    kept = report.as_dict()
    del kept["tensors"]
    kept["modules"] = [asdict(module) for module in report.modules[:MOST_MODULES_REPORTED]]
    return kept
