"""Shares as horizontal bars: the numbers that an SVG of the page is written from."""

from collections.abc import Iterable
from dataclasses import dataclass

WIDTH = 460
LEFT, RIGHT = 62, 48
ROW = 30
THICK = 16


@dataclass(frozen=True)
class Bar:
    """One share: its bar begins at `LEFT`; `y` is the upper edge, `middle` where its words stand."""

    label: str
    text: str
    length: float
    y: int
    middle: int

    @property
    def end(self) -> float:
        """Where the figure stands."""
        return LEFT + self.length + 6


@dataclass(frozen=True)
class Chart:
    """Everything in drawing units, from the upper left corner."""

    bars: tuple[Bar, ...]
    height: int
    description: str
    width: int = WIDTH
    left: int = LEFT
    thick: int = THICK
    label_at: int = LEFT - 8


def chart(shares: Iterable[tuple[str, float | None]]) -> Chart | None:
    """Bars of shares, 0 to 1, in the order given; what is None was not measured and has none."""
    known = [(label, share) for label, share in shares if share is not None]
    if not known:
        return None
    full = WIDTH - LEFT - RIGHT
    made = tuple(
        Bar(label, f"{share:.3f}", round(full * share, 1), place * ROW + (ROW - THICK) // 2, place * ROW + ROW // 2)
        for place, (label, share) in enumerate(known)
    )
    return Chart(made, ROW * len(made), ", ".join(f"{bar.label} {bar.text}" for bar in made))
