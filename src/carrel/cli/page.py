"""A job's curves and figures as one page that asks nothing of a network: for a mail, a ticket, a paper's supplement.

The library that draws (uPlot, MIT licence, see ``pages/uPlot.LICENSE``) is in the page, and a policy in its head keeps
the browser from loading anything. Names that users chose go in as text and never as markup.
"""

import html
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from carrel import __version__
from carrel.cli import output
from carrel.cli.report import Figure, cells, figures, headline
from carrel.core.curves import Chart, Curve
from carrel.core.report import Report
from carrel.errors import CarrelError

_PAGES = Path(__file__).with_name("pages")
_DIGITS = 6


def write(path: Path, report: Report, charts: Sequence[Chart]) -> None:
    """Write the page; a file that is there is replaced whole.

    Raises:
        CarrelError: it cannot be written.
    """
    try:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(page(report, charts), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise CarrelError(f"{path}: {error.strerror}; choose another file with --html") from error


def page(report: Report, charts: Sequence[Chart]) -> str:
    """Return the page."""
    text = (_PAGES / "page.html").read_text(encoding="utf-8")
    holes = {
        "title": html.escape(headline(report)),
        "about": html.escape(_about(report)),
        "figures": _figures(list(figures(report))),
        "advice": "".join(_advice(report)),
        "nodes": "".join(_nodes(report)),
        "version": html.escape(__version__),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "data": _data(charts),
        "css": _file("page.css"),
        "js": _file("page.js"),
        "library_css": _file("uPlot.min.css"),
        "library_js": _file("uPlot.iife.min.js"),
    }
    parts = text.split("{{")
    # What fills a hole may itself hold braces, so it is never looked at again.
    filled = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition("}}")
        filled += (holes[name], rest)
    return "".join(filled)


def _file(name: str) -> str:
    return (_PAGES / name).read_text(encoding="utf-8")


def _data(charts: Sequence[Chart]) -> str:
    rounded = [
        msgspec.structs.replace(chart, curves=tuple(map(_rounded, chart.curves)))
        for chart in charts
        if any(curve.times_s for curve in chart.curves)
    ]
    # ``</script>`` in a name would end the element.
    return msgspec.json.encode(rounded).decode().replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _rounded(curve: Curve) -> Curve:
    values = tuple(None if value is None else float(f"{value:.{_DIGITS}g}") for value in curve.values)
    times_s = tuple(round(time_s, 3) for time_s in curve.times_s)
    return msgspec.structs.replace(curve, label=output.printable(curve.label), values=values, times_s=times_s)


def _about(report: Report) -> str:
    began = min((node.first_s for node in report.nodes), default=0.0)
    words = [
        datetime.fromtimestamp(began, UTC).strftime("began %Y-%m-%d %H:%M:%S UTC"),
        f"user {report.user}" if report.user else "",
        f"account {report.account}" if report.account else "",
        " ".join(node.node for node in report.nodes[:8]) + (" …" if len(report.nodes) > 8 else ""),
    ]
    return output.printable(" · ".join(word for word in words if word))


def _figures(found: Sequence[Figure]) -> str:
    items = (
        f"<div><dt>{html.escape(one.what)}</dt><dd>"
        f"{'' if one.part is None else f'<b>{one.part:.0%}</b><br>'}{html.escape(one.text)}</dd></div>\n"
        for one in found
    )
    return f'<dl class="figures">\n{"".join(items)}</dl>'


def _advice(report: Report) -> Iterator[str]:
    for advice in report.advice:
        line = f"<p><code>{html.escape(advice.directive)}</code></p>" if advice.directive else ""
        yield f'<div class="advice"><p>Next time: {html.escape(output.printable(advice.text))}</p>{line}</div>\n'


def _nodes(report: Report) -> Iterator[str]:
    if len(report.nodes) < 2:
        return
    titles, rows = cells(report)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    yield f'<table class="nodes"><thead><tr>{head}</tr></thead><tbody>'
    for row in rows:
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
    yield "</tbody></table>"
