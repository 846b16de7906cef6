"""Charts for a terminal, of dots: each letter is a grid of two by four (Unicode's braille).

They stand for themselves without colour, in a pipe or a log: each curve then has a chart of its own.
"""

import math
from collections.abc import Iterator

from rich.text import Text

from carrel.cli.report import duration, size
from carrel.core.curves import Chart, Curve

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
"""One for each curve; a chart has no more (see ``carrel.core.curves.gathered``)."""
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
_LABEL = 7
"""Letters to the left of the axis."""
_CEILING_SHOWN = 0.4
"""Where this part of what there was to have was reached, the axis goes up to it."""
_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def shown(value: float, unit: str) -> str:
    """Return a value with its unit, short.

    >>> shown(3.984, "CPUs"), shown(300 * 2**20, "B"), shown(1536, "B/s"), shown(12.3, "%"), shown(250, "W")
    ('3.98', '300M', '1.5K/s', '12%', '250 W')
    """
    match unit:
        case "B":
            return size(value)
        case "B/s":
            return f"{size(value)}/s"
        case "%":
            return f"{value:.0f}%" if value >= 10 or value == int(value) else f"{value:.1f}%"
        case "CPUs" | "":
            return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        case "/s":
            return f"{_short(value)}/s"
        case _:
            return f"{value:.3g} {unit}"


def _short(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def step(top: float, unit: str, parts: int) -> float:
    """Return a round distance of ticks, so that about ``parts`` of them reach ``top``.

    >>> step(4, "CPUs", 4), step(700 * 2**20, "B", 3) / 2**20, step(0.7, "%", 3)
    (1.0, 256.0, 0.5)
    """
    raw = (top or 1.0) / parts
    if unit in ("B", "B/s"):
        return float(2 ** max(0, math.ceil(math.log2(raw) - 0.01)))
    scale = 10.0 ** math.floor(math.log10(raw))
    return next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= raw * 0.999)


def drawn(chart: Chart, *, width: int, height: int, colour: bool, unicode: bool = True) -> Iterator[Text]:
    """Yield a chart, line by line.

    Args:
        chart: Of at most as many curves as there are colours.
        width: Letters in a line.
        height: Lines of the plot itself.
        colour: Curves can be told apart by it.
        unicode: The terminal has braille.
    """
    if not colour and len(chart.curves) > 1:
        for curve in chart.curves:
            yield from _one(chart, (curve,), width=width, height=height, colour=False, unicode=unicode)
        return
    yield from _one(chart, chart.curves, width=width, height=height, colour=colour, unicode=unicode)


def _one(
    chart: Chart, curves: tuple[Curve, ...], *, width: int, height: int, colour: bool, unicode: bool
) -> Iterator[Text]:
    peak = max((curve.peak or 0.0 for curve in curves), default=0.0)
    yield from _title(chart, curves, width=width, colour=colour)
    if peak == 0:
        return
    ceiling = chart.ceiling if chart.ceiling and peak >= _CEILING_SHOWN * chart.ceiling else None
    tick = step(max(peak, ceiling or 0.0), chart.unit, max(2, height // 2))
    top = tick * math.ceil(max(peak, ceiling or 0.0) / tick - 1e-9)
    columns = width - _LABEL - 2
    canvas = _Canvas(columns, height, chart, top)
    for at, curve in enumerate(curves):
        canvas.curve(curve, COLOURS[at % len(COLOURS)] if colour else "")
    labels = {round((1 - n * tick / top) * (height - 1)): n * tick for n in range(round(top / tick) + 1)}
    limit = None if ceiling is None else round((1 - ceiling / top) * (height - 1))
    for row in range(height):
        left = shown(labels[row], chart.unit) if row in labels else ""
        line = Text(f"{left:>{_LABEL}} {'┤' if row in labels else '│'}" if unicode else f"{left:>{_LABEL}} |")
        yield line + canvas.line(row, ceiling=row == limit, unicode=unicode)
    yield from _time_axis(chart, columns, unicode=unicode)


def _title(chart: Chart, curves: tuple[Curve, ...], *, width: int, colour: bool) -> Iterator[Text]:
    """Yield what is drawn and how far each curve went, in as many lines as that takes."""
    line = Text(chart.title, style="bold" if colour else "")
    if chart.ceiling:
        line.append(f" of {shown(chart.ceiling, chart.unit)}", style="not bold")
    for at, curve in enumerate(curves):
        words = Text("━━ " if len(curves) > 1 else "", style=COLOURS[at % len(COLOURS)] if len(curves) > 1 else "")
        words.append(_reach(curve, chart.unit), style="default" if colour else "")
        if line.cell_len + 3 + words.cell_len > width:
            yield line
            line = Text(" " * _LABEL)
        line += Text("   ") + words
    yield line


def _reach(curve: Curve, unit: str) -> str:
    if curve.peak is None:
        return f"{curve.label}: nothing was read"
    if curve.peak == 0:
        return f"{curve.label}: none"
    last = "" if curve.last is None else f", last {shown(curve.last, unit)}"
    return f"{curve.label}: peak {shown(curve.peak, unit)}{last}"


def _time_axis(chart: Chart, columns: int, *, unicode: bool) -> Iterator[Text]:
    span_s = chart.to_s - chart.from_s
    days = max(1, math.ceil(span_s / 86400 / (columns // 12 or 1)))
    tick_s = next((tick for tick in _TIME_STEPS_S if span_s / tick <= max(1, columns // 12)), days * 86400)
    axis = ["─" if unicode else "-"] * columns
    labels = [" "] * columns
    free = 0
    for n in range(int(span_s / tick_s) + 1):
        at = min(columns - 1, round(n * tick_s / (span_s or 1) * (columns - 1)))
        axis[at] = "┬" if unicode else "+"
        text = "0" if n == 0 else duration(n * tick_s)
        start = max(free, min(at - len(text) // 2, len(labels) - len(text)))
        if start + len(text) <= len(labels):
            labels[start : start + len(text)] = text
            free = start + len(text) + 1
    corner = "└" if unicode else "+"
    yield Text(f"{'':>{_LABEL}} {corner}{''.join(axis)}")
    yield Text(f"{'':>{_LABEL + 2}}{''.join(labels)}".rstrip())


class _Canvas:
    """A grid of dots, each letter in the colour of the curve that was there last."""

    def __init__(self, columns: int, rows: int, chart: Chart, top: float) -> None:
        self._columns = columns
        self._rows = rows
        self._from_s = chart.from_s
        self._span_s = chart.to_s - chart.from_s or 1.0
        self._top = top
        self._bits: dict[tuple[int, int], int] = {}
        self._styles: dict[tuple[int, int], str] = {}

    def curve(self, curve: Curve, style: str) -> None:
        before: tuple[int, int] | None = None
        for time_s, value in zip(curve.times_s, curve.values, strict=True):
            if value is None:
                before = None
                continue
            x = round((time_s - self._from_s) / self._span_s * (self._columns * 2 - 1))
            y = round((1 - min(max(value, 0.0), self._top) / self._top) * (self._rows * 4 - 1))
            self._stroke(before or (x, y), (x, y), style)
            before = (x, y)

    def _stroke(self, start: tuple[int, int], end: tuple[int, int], style: str) -> None:
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for n in range(length + 1):
            x = start[0] + round((end[0] - start[0]) * n / length)
            y = start[1] + round((end[1] - start[1]) * n / length)
            cell = (y // 4, x // 2)
            self._bits[cell] = self._bits.get(cell, 0) | _DOTS[x % 2][y % 4]
            self._styles[cell] = style

    def line(self, row: int, *, ceiling: bool, unicode: bool) -> Text:
        found = Text()
        for column in range(self._columns):
            bits = self._bits.get((row, column))
            if bits:
                found.append(chr(_BLANK + bits) if unicode else "*", style=self._styles[row, column])
            elif ceiling:
                found.append("╌" if unicode else ".", style="dim")
            else:
                found.append(" ")
        return found
