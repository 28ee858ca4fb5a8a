"""snapshot: the whole routing index as files, so that routers need not replay the log."""

from typing import Any

from registry.errors import IndexNotReady
from registry.services import encoder_change, encoders, snapshots
from workers.runner import NotApplicable, Work


def run(work: Work) -> dict[str, Any]:
    """Build a snapshot; as the last step of a change of encoder, answer by the new one from then on.

    It tells no progress: the database is read at one moment, in a transaction that writes nothing.
    """
    encoder = encoders.find(work.lease.parameters["encoder"])
    is_change = bool(work.lease.parameters.get("activate"))
    if is_change:
        # What was published since the job before this one found all cards embedded.
        for _ in encoder_change.embed_missing(encoder):
            work.progress(0.0)
    elif encoder != encoders.active():
        raise NotApplicable("Another encoder answers now.")
    row = snapshots.build(encoder)
    result = {"encoder": encoder.pk, "index_seq": row.seq, **row.counts}
    if not is_change:
        return result
    if row.counts["left_out"]:
        snapshots.forget(row)
        raise IndexNotReady("Cards changed while the snapshot was built.", retry_after_seconds=1)
    return {**result, "activated_seq": encoder_change.activate(encoder, embedded_to=row.seq)}
