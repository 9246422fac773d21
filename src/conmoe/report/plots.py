"""What is drawn, as numbers: places on a canvas, ticks, colours. Nothing here knows HTML or files."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conmoe.portrait import LayerPortrait
from conmoe.report.runs import Run, comparable

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 34, 16, 54


@dataclass(frozen=True, slots=True)
class Point:
    """A run: its place, the ends of its error bar, and whether nothing is both smaller and closer."""

    number: int
    name: str
    x: float
    y: float
    low: float
    high: float
    best: bool


@dataclass(frozen=True, slots=True)
class Scatter:
    """Quality against size. Ticks are (place, label)."""

    points: tuple[Point, ...]
    frontier: tuple[tuple[float, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def frontier(runs: Sequence[Run]) -> tuple[int, ...]:
    """The runs, by index, than which no other is at most as large and at most as far, ordered by size.

    None where the runs were not measured alike.
    """
    if not comparable(runs):
        return ()
    known = [(run.share or 0.0, run.numbers["kl"].value, index) for index, run in enumerate(runs) if drawable(run)]
    found: list[int] = []
    lowest = math.inf
    for _, kl, index in sorted(known):
        if kl < lowest:
            found.append(index)
            lowest = kl
    return tuple(found)


def drawable(run: Run) -> bool:
    """Whether a run has a size and a distance that a logarithmic axis can show."""
    return run.share is not None and "kl" in run.numbers and 0 < run.numbers["kl"].value < math.inf


def scatter(runs: Sequence[Run]) -> Scatter | None:
    """KL against the share of the source's size, for all runs that have both; None if none has."""
    chosen = [(index, run) for index, run in enumerate(runs) if drawable(run)]
    if not chosen:
        return None
    shares = [100 * (run.share or 0.0) for _, run in chosen]
    values = [run.numbers["kl"].value for _, run in chosen]
    x_low, x_high = max(0.0, min(shares) - 6), max(shares) + 6
    y_low, y_high = math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15
    if y_high - y_low < 0.7:
        middle = (y_high + y_low) / 2
        y_low, y_high = middle - 0.35, middle + 0.35

    def x(share: float) -> float:
        return LEFT + (share - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        place = (math.log10(max(value, 10**y_low)) - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - min(place, 1.0) * (HEIGHT - TOP - BOTTOM)

    best = frontier(runs)
    points = []
    for (index, run), share, value in zip(chosen, shares, values, strict=True):
        error = run.numbers["kl"].stderr or 0.0
        points.append(Point(index + 1, run.name, x(share), y(value), y(value - error), y(value + error), index in best))
    by_index = {point.number - 1: point for point in points}
    line = tuple((by_index[index].x, by_index[index].y) for index in best)
    return Scatter(tuple(points), line, _linear(x_low, x_high, x), _logarithmic(y_low, y_high, y))


def _linear(low: float, high: float, place: Callable[[float], float]) -> tuple[tuple[float, str], ...]:
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if (high - low) / step <= 8), 1000)
    first = math.ceil(low / step)
    return tuple((place(step * n), f"{step * n}%") for n in range(first, math.floor(high / step) + 1))


def _logarithmic(low: float, high: float, place: Callable[[float], float]) -> tuple[tuple[float, str], ...]:
    wide = high - low > 2.2
    ticks = [
        digit * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for digit in ((1, 3) if wide else (1, 2, 5))
    ]
    return tuple((place(value), f"{value:g}") for value in ticks if low <= math.log10(value) <= high)


@dataclass(frozen=True, slots=True)
class Bar:
    """An expert: how often it is chosen, of the most chosen, what becomes of it, and what is said of it."""

    height: float
    fate: str
    contribution: float  # to the output of the layer, of the expert that contributes most
    label: str


@dataclass(frozen=True, slots=True)
class Map:
    """The experts of a scope, and lines (from, to) to those that answer for them."""

    bars: tuple[Bar, ...]
    lines: tuple[tuple[int, int], ...]
    kept: int
    redirected: int
    dropped: int
    constant: int


def expert_map(scope: LayerPortrait) -> Map:
    """Who answers for whom, and how often each expert was chosen in calibration."""
    most, largest = max(scope.tokens, default=0) or 1, max(scope.contribution, default=0.0) or 1.0
    K, total = len(scope.made_of), sum(scope.tokens) or 1
    bars, lines, counts = [], [], {"kept": 0, "redirected": 0, "dropped": 0, "constant": 0}
    for expert, (prototype, tokens) in enumerate(zip(scope.assignment, scope.tokens, strict=True)):
        if scope.condensed and expert in scope.made_of:
            fate, to = "kept", "always on"
        elif prototype < 0:
            fate, to = "dropped", "dropped"
        elif prototype >= K:
            fate, to = "constant", "answered for by a constant"
        elif scope.made_of[prototype] == expert:
            fate, to = "kept", "kept"
        else:
            fate, to = "redirected", f"answered for by {scope.made_of[prototype]}"
            lines.append((expert, scope.made_of[prototype]))
        counts[fate] += 1
        share = f"{tokens / total:.1%} of choices, {scope.contribution[expert]:.1%} of the output"
        bars.append(Bar(tokens / most, fate, scope.contribution[expert] / largest, f"expert {expert}: {to}; {share}"))
    return Map(tuple(bars), tuple(lines), **counts)


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """A scope in the plot of all: shares of the height, None where nothing is known."""

    label: str
    kept: float
    predicted: float | None
    measured: float | None


def layers_plot(scopes: Sequence[LayerPortrait]) -> tuple[tuple[LayerPlace, ...], float]:
    """Experts kept, and the share of the output that is lost, of every scope; and the share at the top."""
    told = [(scope.planned.predicted, scope.planned.sample) for scope in scopes]
    known = [predicted for predicted, _ in told if predicted is not None]
    known += [sample.value for _, sample in told if sample is not None]
    top = max(known, default=0.0) or 1.0
    places = tuple(
        LayerPlace(
            ",".join(map(str, scope.layers)),
            len(scope.made_of) / (len(scope.assignment) or 1),
            None if predicted is None else predicted / top,
            None if sample is None else sample.value / top,
        )
        for scope, (predicted, sample) in zip(scopes, told, strict=True)
    )
    return places, top


def similarity_range(scope: LayerPortrait) -> tuple[float, float]:
    """The smallest and the largest cosine of two different experts: the ends of the picture's scale."""
    rows = scope.similarity
    values = [value for i, row in enumerate(rows) for j, value in enumerate(row) if i != j]
    return min(values, default=0.0), max(values, default=1.0)


def similarity_picture(scope: LayerPortrait) -> str:
    """The matrix as a PNG in a data address: clear at the smallest cosine of two experts, dark at the largest."""
    low, high = similarity_range(scope)
    width = high - low or 1.0
    rows = [[round(255 * max(0.0, min(1.0, (value - low) / width))) for value in row] for row in scope.similarity]
    size = len(rows)
    raw = b"".join(b"\0" + bytes(row) for row in rows)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes((23, 74, 139)) * 256),
        (b"tRNS", bytes(range(256))),  # one ink, more or less of it, on whatever the page is
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    )
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()
