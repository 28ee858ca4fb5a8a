"""The line before the encoders of a router process: what waits is encoded together, queries before cards.

While one step is computed, the next gathers; nobody waits for a batch to fill up. A card is encoded a few texts at a
time, so that a query waits for a step and never for a card.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from registry.errors import RouterBusy

# A step of so many of the longest texts takes about half a second, and 0.15 s for cards; more at once are not faster.
_QUERIES_AT_ONCE = 16
_CARD_TEXTS_AT_ONCE = 4
# The share of the latest step in the measured time per text.
_LATEST = 0.25


class Encoder(Protocol):
    """What the queue needs of an encoder."""

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]: ...

    def remembered(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32] | None: ...


@dataclass(eq=False)
class _Asked:
    """One caller's texts and the rows that are there so far."""

    encoder: Encoder
    texts: Sequence[str]
    taken: int = 0
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    is_spoilt: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def spoil(self) -> None:
        """Let the caller go on without rows."""
        self.is_spoilt = True
        self.over.set()


class _Line:
    """Those who wait for texts of one kind, in the order in which they came."""

    def __init__(self, *, query: bool, texts_at_once: int) -> None:
        self.query = query
        self.texts_at_once = texts_at_once
        self.waiting: deque[_Asked] = deque()
        self.seconds_per_text = 0.0

    def count(self) -> int:
        """How many texts no step has taken yet."""
        return sum(len(asked.texts) - asked.taken for asked in self.waiting)

    def take(self) -> list[tuple[_Asked, Sequence[str]]]:
        """The texts of the next step, all for one encoder."""
        step: list[tuple[_Asked, Sequence[str]]] = []
        room = self.texts_at_once
        while self.waiting and room and (not step or self.waiting[0].encoder is step[0][0].encoder):
            asked = self.waiting[0]
            texts = asked.texts[asked.taken : asked.taken + room]
            step.append((asked, texts))
            asked.taken += len(texts)
            room -= len(texts)
            if asked.taken == len(asked.texts):
                self.waiting.popleft()
        return step

    def timed(self, seconds: float, texts: int) -> None:
        """Learn from a step how long a text takes."""
        latest = seconds / texts
        is_first = not self.seconds_per_text
        self.seconds_per_text = latest if is_first else (1 - _LATEST) * self.seconds_per_text + _LATEST * latest


class EncodingQueue:
    """Encodes for many threads; one thread of its own computes, step by step."""

    def __init__(self, *, max_waiting_texts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_waiting_texts = max_waiting_texts
        self._clock = clock
        self._queries = _Line(query=True, texts_at_once=_QUERIES_AT_ONCE)
        self._cards = _Line(query=False, texts_at_once=_CARD_TEXTS_AT_ONCE)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")
        self._is_closed = False

    def encode(self, encoder: Encoder, texts: Sequence[str], *, query: bool, seconds: float) -> NDArray[np.float32]:
        """The caller's rows, (n, dimension) in its order, as `encoder.encode` gives them to a lone caller.

        Raises RouterBusy at once when more texts wait than `max_waiting_texts`, or than `seconds` are enough for, and
        after `seconds` in any case; beside that what the encoder raises, and only for the caller whose texts cause it.
        """
        known = encoder.remembered(texts, query=query)
        if known is not None:
            return known
        asked = _Asked(encoder, texts)
        line = self._queries if query else self._cards
        with self._lock:
            self._check_room(line, len(texts), seconds)
            line.waiting.append(asked)
            self._pool.submit(self._step)
        if not asked.over.wait(seconds):
            self._give_up(line, asked)
        if asked.is_spoilt:
            self._check_open()
            # The step it shared broke. Alone it meets its own trouble, or none when that was another's.
            return encoder.encode(texts, query=query)
        return np.concatenate(asked.rows)

    def close(self) -> None:
        """Send away those who wait and whoever comes; the step at work ends first."""
        with self._lock:
            self._is_closed = True
            for line in (self._queries, self._cards):
                while line.waiting:
                    line.waiting.popleft().spoil()
        self._pool.shutdown(cancel_futures=True)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RouterBusy("The router is about to stop.", retry_after_seconds=2)

    def _check_room(self, line: _Line, count: int, seconds: float) -> None:
        """Who finds nobody waiting is let in with any number of texts."""
        self._check_open()
        waiting = line.count()
        is_too_long = (waiting + count) * line.seconds_per_text > seconds
        if waiting and (is_too_long or waiting + count > self._max_waiting_texts):
            raise _busy(f"{waiting} texts wait to be encoded before yours.", waiting * line.seconds_per_text)

    def _give_up(self, line: _Line, asked: _Asked) -> None:
        with self._lock:
            if asked in line.waiting:
                line.waiting.remove(asked)
            waiting = line.count()
        raise _busy("The texts could not be encoded in time.", waiting * line.seconds_per_text)

    def _step(self) -> None:
        """Encode what stands first. Every caller asks for one step, and a step that leaves something for another."""
        with self._lock:
            line = self._queries if self._queries.waiting else self._cards
            step = line.take()
        if not step:
            return
        texts = [text for _, own in step for text in own]
        started = self._clock()
        rows: NDArray[np.float32] | None = None
        try:
            rows = step[0][0].encoder.encode(texts, query=line.query)
            line.timed(self._clock() - started, len(texts))
        finally:
            self._deliver(line, step, rows)

    def _deliver(
        self, line: _Line, step: Sequence[tuple[_Asked, Sequence[str]]], rows: NDArray[np.float32] | None
    ) -> None:
        """Hand out the rows of a step, or tell its callers that there are none."""
        start = 0
        with self._lock:
            for asked, own in step:
                if rows is None:
                    if asked in line.waiting:
                        line.waiting.remove(asked)
                    asked.spoil()
                    continue
                asked.rows.append(rows[start : start + len(own)])
                start += len(own)
                if asked.taken == len(asked.texts):
                    asked.over.set()
            if not self._is_closed and (self._queries.waiting or self._cards.waiting):
                self._pool.submit(self._step)


def _busy(detail: str, seconds: float) -> RouterBusy:
    return RouterBusy(detail, retry_after_seconds=max(1, math.ceil(seconds)))
