"""The chart of size against density, as the numbers that an SVG of the page is written from."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, log2, log10

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 34, 52
LEAST_SHOWN_DENSITY = 0.55
STEPS = 60


@dataclass(frozen=True)
class Point:
    """A file that exists: `x` and `y` in the drawing, what it is, and its bytes."""

    x: float
    y: float
    label: str
    size_bytes: int
    is_default: bool
    is_at_start: bool  # whether a label on its left would stand on those of the axis


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Everything in drawing units, from the upper left corner."""

    points: tuple[Point, ...]
    bound: str  # of an SVG polyline
    bound_label: tuple[float, float]
    ticks_x: tuple[Tick, ...]
    ticks_y: tuple[Tick, ...]
    unit: str
    description: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def bound_bytes(count: int, density: float) -> float:
    """Shannon's bound n·(H(k) + k)/8 for n ternary values of which the share k is kept, signs being even."""
    if not 0 < density < 1:
        return count * density / 8
    entropy = -density * log2(density) - (1 - density) * log2(1 - density)
    return count * (entropy + density) / 8


def chart(*, count: int, files: Iterable[tuple[float, int, bool]]) -> Chart | None:
    """Files as (density, bytes, whether of preset default) over the bound for `count` values; None without files."""
    found = sorted(row for row in files if row[0] < 1)
    if not found:
        return None
    most_density = min(1.0, max(LEAST_SHOWN_DENSITY, 1.1 * found[-1][0]))
    most_bytes = max(bound_bytes(count, most_density), *(1.12 * size for _, size, _ in found))
    unit, scale = _unit(most_bytes)
    step = _step(most_bytes / scale)
    top = ceil(most_bytes / scale / step) * step * scale

    def across(density: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * density / most_density, 1)

    def down(size: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * size / top, 1)

    shares = [most_density * place / STEPS for place in range(STEPS + 1)]
    line = " ".join(f"{across(share)},{down(bound_bytes(count, share))}" for share in shares)
    points = tuple(
        Point(across(density), down(size), share_text(density), size, is_default, across(density) < LEFT + 75)
        for density, size, is_default in found
    )
    told = ", ".join(f"{share_text(density)} of the values: {size:,} bytes" for density, size, _ in found)
    tenth = 0.1 if most_density <= LEAST_SHOWN_DENSITY + 0.1 else 0.2
    return Chart(
        points=points,
        bound=line,
        bound_label=(WIDTH - RIGHT, down(bound_bytes(count, most_density)) + 36),
        ticks_x=tuple(
            Tick(across(place * tenth), share_text(place * tenth)) for place in range(floor(most_density / tenth) + 1)
        ),
        ticks_y=tuple(
            Tick(down(place * step * scale), f"{place * step:g}") for place in range(round(top / scale / step) + 1)
        ),
        unit=unit,
        description=f"{told}. The line is the least that such values can take, n(H(k)+k)/8 bytes for n = {count:,}.",
    )


def share_text(density: float) -> str:
    """0.05 as 5 %."""
    return f"{100 * density:.4g} %"


def _unit(most: float) -> tuple[str, int]:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if most >= scale:
            return unit, scale
    return "bytes", 1


def _step(most: float) -> float:
    """A round step that gives four to eight marks up to `most`."""
    power = 10 ** floor(log10(most / 4))
    return float(max(step * power for step in (1, 2, 2.5, 5) if step * power <= most / 4))
