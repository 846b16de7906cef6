"""Parts of a whole over time: a line of blocks each for a terminal, an SVG file for elsewhere."""

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import msgspec

from carrel.errors import CarrelError, UsageError

_CELLS = 60
_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN = " .:-=+*#@"
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
"""With the colours, two dozen lines that can be told apart, also by those who do not see colours."""
_WIDTH, _HEIGHT, _LEFT, _TOP = 900, 420, 60, 40


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Values from 0 to 1, one for each ``step`` seconds."""

    name: str
    step: float
    values: Sequence[float]

    def end_s(self) -> float:
        return self.step * len(self.values)

    def mean(self, begin_s: float, end_s: float) -> float:
        """Return the mean within a part of the time; after the last value all are 0."""
        first, last = int(begin_s / self.step), max(int(end_s / self.step), int(begin_s / self.step) + 1)
        return sum(self.values[first:last]) / (last - first)


def sparks(found: Sequence[Series]) -> None:
    """Print a line for each series, all over the same time."""
    end_s = max((one.end_s() for one in found), default=0.0)
    blocks = _BLOCKS if (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" else _PLAIN
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        means = [one.mean(end_s * cell / _CELLS, end_s * (cell + 1) / _CELLS) for cell in range(_CELLS)]
        cells = "".join(blocks[min(round(mean * (len(blocks) - 1)), len(blocks) - 1)] for mean in means)
        print(f"{one.name:<{width}}  |{cells}|")
    print(f"{'in use over time':<{width}}  0{f'{end_s / 3600:.1f} h':>{_CELLS + 1}}")


def require_svg(path: Path) -> None:
    """Raise where ``write`` would, as far as can be told without writing.

    Raises:
        UsageError: it is to be something else, or somewhere where nothing is.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path}: {path.parent} is no directory")
    if path.suffix != ".svg":
        raise UsageError(f"{path}: only SVG is written; give a name that ends in .svg")


def write(path: Path, title: str, found: Sequence[Series]) -> None:
    """Write an SVG file.

    Raises:
        CarrelError: it cannot be written, or is to be something else.
    """
    require_svg(path)
    try:
        path.write_text(_svg(title, found))
    except OSError as error:
        raise CarrelError(f"{path}: {error.strerror}") from error


def _svg(title: str, found: Sequence[Series]) -> str:
    end_s = max((one.end_s() for one in found), default=0.0) or 1.0
    most = max((value for one in found for value in one.values), default=0.0)
    top = max(1.0, most)
    wide, high = _WIDTH - _LEFT - 20, _HEIGHT - _TOP - 40
    below = _HEIGHT + 18 * len(found)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {below}">',
        "<style>text { font: 13px sans-serif }</style>",
        f'<rect width="{_WIDTH}" height="{below}" fill="white"/>',
        f'<text x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for tenth in range(0, 11, 2):
        y = _TOP + high * (1 - tenth / 10)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{wide}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{top * tenth / 10:.0%}</text>')
    for fifth in range(6):
        x = _LEFT + wide * fifth / 5
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP + high + 20}" text-anchor="middle">{end_s * fifth / 5 / 3600:.1f} h</text>'
        )
    for number, one in enumerate(found):
        style = f'stroke="{_COLOURS[number % 6]}" stroke-dasharray="{_DASHES[number // 6 % 4]}" fill="none"'
        points = [
            f"{_LEFT + wide * one.step * (at + 0.5) / end_s:.1f},{_TOP + high * (1 - value / top):.1f}"
            for at, value in enumerate(one.values)
        ]
        y = _HEIGHT + 18 * number
        parts.append(f'<polyline {style} stroke-width="1.5" points="{" ".join(points)}"/>')
        parts.append(f'<path d="M{_LEFT} {y - 4}h40" {style} stroke-width="3"/>')
        parts.append(f'<text x="{_LEFT + 50}" y="{y}">{escape(one.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
