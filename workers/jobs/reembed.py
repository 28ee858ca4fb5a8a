"""reembed: the vectors of all cards by the encoder that is to replace the active one."""

import time
from typing import Any

from registry.errors import Unavailable
from registry.services import encoder_change, encoders
from workers.runner import Work

# The router loads the encoder first, and may be started again in between; what is stored stays.
PATIENCE_SECONDS = 600
RETRY_SECONDS = 1.0


def run(work: Work) -> dict[str, Any]:
    """Embed what lacks vectors by the encoder, however often the router is away for a while."""
    encoder = encoders.find(work.lease.parameters["encoder"])
    last_at = time.monotonic()
    total = 0
    while True:
        try:
            for done, total in encoder_change.embed_missing(encoder):
                last_at = time.monotonic()
                work.progress(done / total, f"{done} of {total} cards")
        except Unavailable:
            if time.monotonic() - last_at > PATIENCE_SECONDS:
                raise
            work.stopped.wait(RETRY_SECONDS)
            work.progress(0.0)
        else:
            return {"encoder": encoder.pk, "cards": total}
