"""How answers look: aligned text for people, JSON for programs.

What a guest or another user wrote (consoles, job names) reaches the terminal without its control characters.
"""

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import get_origin

import msgspec

_BAR_CELLS = 40
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]")


def say(text: str) -> None:
    """Tell the user something beside the answer; programs that read the answer do not see it."""
    print(f"carrel: {text}", file=sys.stderr)


def objects(found: Iterable[object]) -> None:
    """Print one JSON object per line."""
    for item in found:
        print(msgspec.json.encode(item).decode())


def csv(found: Sequence[msgspec.Struct], kind: type[msgspec.Struct]) -> None:
    """Print objects as CSV, a title for each field; what is a list of its own is left out."""
    # Only who asks for it pays for it.
    import csv as comma_separated  # noqa: PLC0415

    names = [field.name for field in msgspec.structs.fields(kind) if get_origin(field.type) is not list]
    writer = comma_separated.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for item in found:
        plain = msgspec.to_builtins(item)
        values = (plain[name] for name in names)
        writer.writerow([" ".join(map(str, value)) if isinstance(value, list | tuple) else value for value in values])


def table(
    titles: Sequence[str], rows: Iterable[Sequence[object]], *, right: Collection[str] = (), whole: Collection[str] = ()
) -> None:
    """Print a table: with rich for a terminal, plainly aligned for a pipe.

    Args:
        titles: Of its columns.
        rows: As many cells each.
        right: Titles of the columns that are numbers, and end below each other.
        whole: Titles of the columns that are not broken either where the terminal is narrow.
    """
    cells = [[_cell(item) for item in row] for row in rows]
    if not sys.stdout.isatty():
        _plain([list(titles), *cells], right={titles.index(title) for title in right})
        return
    # Only a terminal pays for it.
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in titles:
        # A number that is broken in two is read as another one.
        unbroken = title in right or title in whole
        shown.add_column(title, overflow="fold", justify="right" if title in right else "left", no_wrap=unbroken)
    for row in cells:
        shown.add_row(*(Text(cell) for cell in row))
    Console().print(shown)


def fields(pairs: Iterable[tuple[str, object]], *, indent: str = "") -> None:
    """Print ``name  value`` lines; empty values are left out."""
    shown = [(name, _cell(value)) for name, value in pairs if value not in (None, "", ())]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{indent}{name:<{width}}  {value}")


def bars(amounts: Sequence[tuple[str, float]], *, unit: str, indent: str = "") -> None:
    """Print a line for each amount, with a bar against the largest of them."""
    most = max((amount for _, amount in amounts), default=0.0)
    width = max((len(name) for name, _ in amounts), default=0)
    for name, amount in amounts:
        print(f"{indent}{name:<{width}}  {amount:>6.0f} {unit}  {_bar(amount / most if most else 0.0)}".rstrip())


def printable(text: str) -> str:
    """Return text that cannot steer a terminal; lines and tabs stay."""
    return _CONTROL.sub("", _ESCAPE.sub("", text.replace("\r\n", "\n")))


def size(amount_bytes: int) -> str:
    """Return an amount of memory for people: ``512M``, ``1.5G``."""
    if amount_bytes >= 2**30:
        return f"{amount_bytes / 2**30:.1f}G".replace(".0G", "G")
    return f"{amount_bytes // 2**20}M" if amount_bytes else ""


def clock(moment: datetime | None) -> str:
    """Return a time as JSON has it, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if moment else ""


def ago(moment: datetime | None) -> str:
    """Return how long ago something was: ``12s``, ``3m``, ``5h``, ``2d``."""
    if moment is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return printable(str(value)).replace("\n", " ").replace("\t", " ")


def _bar(share: float) -> str:
    can = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return ("█" if can else "#") * round(share * _BAR_CELLS)


def _plain(rows: list[list[str]], *, right: Collection[int]) -> None:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (
            f"{cell:{'>' if at in right else '<'}{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
