"""Lists of unequal length in flat arrays, which a file mapped into memory can hold: texts, and ranges of numbers."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


class Strings(Sequence[str]):
    """Text i is the UTF-8 in `blob` from `offsets[i]` to `offsets[i + 1]`; neither is ever written to."""

    def __init__(self, *, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.blob = blob
        self.offsets = offsets
        # One item of a view takes a third of the time of one of an array.
        self._bytes = blob.data
        self._ends = offsets.data

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Strings":
        """Pack texts, in the order given."""
        encoded = [_bytes(text) for text in texts]
        offsets = np.fromiter(accumulate(map(len, encoded), initial=0), dtype=np.int64, count=len(encoded) + 1)
        return cls(blob=np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets=offsets)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> str:  # type: ignore[override]  # No slices.
        return self._at(place).decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))

    def place(self, text: str) -> int:
        """How many of these texts, which must be ascending, come before one."""
        # The bytes of UTF-8 are in the order of the code points, as strings are in Python.
        return bisect.bisect_left(range(len(self)), _bytes(text), key=self._at)

    def find(self, text: str) -> int:
        """Where a text stands among these, which must be ascending; -1 where it does not."""
        place = self.place(text)
        return place if place < len(self) and self._at(place) == _bytes(text) else -1

    def _at(self, place: int) -> bytes:
        return bytes(self._bytes[self._ends[place] : self._ends[place + 1]])


def ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of all half-open ranges, one range after the other: (n,), (n,) -> (sum of lengths,)."""
    lengths = ends - starts
    shifts: NDArray[np.int64] = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return shifts + np.arange(len(shifts))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
