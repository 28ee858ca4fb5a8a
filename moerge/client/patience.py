"""How long a caller waits for a hub that says "not yet", and how the caller hears of it."""

import time
from collections.abc import Callable

from moerge.client.errors import ClientError, WaitedTooLong

# Hears what is going on and the share of it that is done, 0 to 1, or None where that is not known.
Progress = Callable[[str, float | None], None]


def silent(what: str, share: float | None) -> None:
    """For callers who do not watch."""


class Patience:
    """One stretch of time for everything that a call has to wait for."""

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._sleep = sleep
        self._end = clock() + seconds

    @property
    def left_seconds(self) -> float:
        return max(0.0, self._end - self._clock())

    def wait(self, seconds: float, reason: ClientError) -> None:
        """Sleep; raises WaitedTooLong, telling the reason, at once when the time would be over before."""
        if seconds > self.left_seconds:
            raise WaitedTooLong(
                f"{reason.detail} Waited {self.seconds:.0f} s in all.", pointer=reason.pointer, met=reason.met,
                wanted=f"an answer within {self.seconds:.0f} s",
                remedy="Try again later, or allow more time with --timeout.",
            ) from reason  # fmt: skip
        self._sleep(seconds)
