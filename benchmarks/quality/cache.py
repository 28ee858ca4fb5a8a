"""Outcomes on disk, so that a run that was stopped goes on where it was."""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality.outcomes import Outcome


@dataclass(frozen=True)
class Cache:
    """A folder of outcomes, each named by the digest of everything it was computed from."""

    folder: Path

    def outcome(self, parts: tuple[str, ...], compute: Callable[[], Outcome]) -> Outcome:
        """The outcome that belongs to `parts`, computed if it is not there."""
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        path = self.folder / f"{name}.npz"
        if path.is_file():
            with np.load(path) as found:
                return Outcome(found["correct"], found["nll"])
        outcome = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a run may be stopped at any time.
        part = path.with_name(f".{name}.{secrets.token_hex(4)}.npz")
        np.savez_compressed(part, correct=outcome.correct, nll=outcome.nll)
        part.replace(path)
        return outcome
