"""Charts as geometry: lines and bands become SVG paths in a square of 1000 by 1000, which the page stretches to fit.

Only the paths are stretched (their strokes are not); labels are text of the page beside them, of one size everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SIZE = 1000
MARGIN = 0.06  # of the range, above and below

Point = tuple[float, float]  # (iteration, value)


@dataclass(frozen=True)
class Line:
    """Values over iterations; one that is not finite leaves a gap."""

    label: str
    points: Sequence[Point]
    color: int  # of the page's palette
    style: str = "line"  # line, dots, or unseen: there for the pointer alone


@dataclass(frozen=True)
class Band:
    """(iteration, low, high)."""

    points: Sequence[tuple[float, float, float]]
    color: int
    style: str = "band"  # band or faint


@dataclass(frozen=True)
class Rule:
    """A level that is drawn across, such as a budget."""

    label: str
    value: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at an iteration."""

    step: int
    level: str
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: list[Line]
    bands: list[Band] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    from_zero: bool = False
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """A chart as the page shows it: positions in % of the plot, from its left and its top."""

    chart: Chart
    paths: list[tuple[str, str, int]]  # path, style, color: bands first
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    rules: list[tuple[float, str]]
    marks: list[tuple[float, Mark]]
    readout: dict[str, object]  # what a pointer over the chart reads


def draw(chart: Chart, x_range: tuple[float, float]) -> Drawing:
    """Paths and labels of a chart whose iterations span `x_range`."""
    low, high = _value_range(chart)

    def x(step: float) -> float:
        return (step - x_range[0]) / (x_range[1] - x_range[0])

    def y(value: float) -> float:
        return 1 - (value - low) / (high - low)

    def at(step: float, value: float) -> str:
        return f"{x(step) * SIZE:.1f} {y(value) * SIZE:.1f}"

    bands = [(_area(band.points, at), band.style, band.color) for band in chart.bands]
    lines = [(_path(line, at), line.style, line.color) for line in chart.lines]
    digits = max(0, -math.floor(math.log10(tick_step(low, high, 4))))
    return Drawing(
        chart=chart,
        paths=[path for path in [*bands, *lines] if path[0]],
        x_ticks=[(100 * x(t), f"{t:g}") for t in ticks(*x_range, 6) if t == int(t)],
        y_ticks=[(100 * y(t), f"{t:.{digits}f}".replace("-", "−")) for t in ticks(low, high, 4)],
        rules=[(100 * y(rule.value), rule.label) for rule in chart.rules if low <= rule.value <= high],
        marks=[(100 * x(mark.step), mark) for mark in chart.marks if x_range[0] <= mark.step <= x_range[1]],
        readout=_readout(chart, x_range),
    )


def tick_step(low: float, high: float, count: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that cuts a range into at most `count` steps."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within a range."""
    step = tick_step(low, high, count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _value_range(chart: Chart) -> tuple[float, float]:
    """Of everything finite that is drawn, and of rules not far above it; never empty."""
    values = [value for line in chart.lines for _, value in line.points]
    values += [value for band in chart.bands for _, *ends in band.points for value in ends]
    values = [value for value in values if math.isfinite(value)] or [0.0]
    top = max(values)
    values += [rule.value for rule in chart.rules if 0 < rule.value <= 2 * top]
    low, high = min(values), max(values)
    if chart.from_zero:
        low = min(low, 0.0)
    room = MARGIN * (high - low) or max(abs(high), 1.0) / 2
    return low if chart.from_zero and low == 0 else low - room, high + room


def _path(line: Line, at) -> str:
    parts, pen_down = [], False
    if line.style == "unseen":
        return ""
    for i, (step, value) in enumerate(line.points):
        if not math.isfinite(value):
            pen_down = False
            continue
        last_of_its_stretch = i + 1 == len(line.points) or not math.isfinite(line.points[i + 1][1])
        alone = line.style == "dots" or (not pen_down and last_of_its_stretch)
        # A stroke of no length with round ends is a dot.
        parts.append(f"{'L' if pen_down and not alone else 'M'}{at(step, value)}{'h0' if alone else ''}")
        pen_down = not alone
    return "".join(parts)


def _area(points: Sequence[tuple[float, float, float]], at) -> str:
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for point in points:
        if all(map(math.isfinite, point)):
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    outlines = []
    for stretch in stretches:
        there = [at(step, high) for step, _, high in stretch]
        back = [at(step, low) for step, low, _ in reversed(stretch)]
        outlines += ["M" + "L".join([*there, *back]) + "Z"] if len(stretch) > 1 else []
    return "".join(outlines)


def _readout(chart: Chart, x_range: tuple[float, float]) -> dict[str, object]:
    return {
        "range": list(x_range),
        "lines": [
            {
                "label": line.label,
                "color": line.color,
                "points": [[step, f"{value:.4g}"] for step, value in line.points],
            }
            for line in chart.lines
        ],
    }
