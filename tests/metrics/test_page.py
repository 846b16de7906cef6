"""The page of a job, in a real browser: it draws, in light and in dark, and asks nothing of anybody."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carrel.cli import main
from carrel.model.sample import Column
from carrel.testing import browser, samples

pytestmark = pytest.mark.browser

OWNER: dict[str, Any] = {"uid": os.geteuid(), "gid": os.getegid()}
EVIL = "</script><script>document.title='owned'</script><img src=http://192.0.2.1/x>"
INKED = """(() => [...document.querySelectorAll("canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const seen = new Set();
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 200) seen.add(data.slice(at, at + 3).join());
  return seen.size;
}))()"""
CURVES_COLOUR = """(() => [...document.querySelectorAll("canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const [r, g, b] = COLOUR;
  let count = 0;
  for (let at = 0; at < data.length; at += 4)
    if (data[at] === r && data[at + 1] === g && data[at + 2] === b && data[at + 3] === 255) count++;
  return count;
}))()"""
CONTRAST = """(() => {
  const light = (colour) => {
    const linear = (part) => (part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/\\d+/g).map((part) => linear(part / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const style = getComputedStyle(document.body);
  const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
})()"""
FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nodes and a GPU, of a job whose name would break a page that trusts it."""
    where = tmp_path_factory.mktemp("page")
    gpu = {
        Column("gpu.0.busy_percent", "percent"): lambda at: at % 100,
        Column("gpu.0.memory_used_bytes", "bytes"): lambda at: at * 2**20,
    }
    for node in ("c1", "c2"):
        of = samples.job(name=EVIL)
        metrics = samples.steady(cpus=1.5 if node == "c1" else 3) | gpu
        samples.record(where / "m", of, metrics, node=node, formats=["csv"], **OWNER)
    (where / "carrel.toml").write_text(f'[metrics]\nroot = "{where}/m"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARREL_CONFIG", str(where / "carrel.toml"))
        assert main.run(["job", "plot", "7", "--html", str(where / "job.html")]) == 0
    return where / "job.html"


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.COMMAND is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with browser.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize(("dark", "colour"), [(False, (0xB3, 0x59, 0x00)), (True, (0xF0, 0x88, 0x3E))])
def test_every_chart_is_drawn_and_nothing_is_asked_of_anybody(
    page: Path, screen: browser.Browser, dark: bool, colour: tuple[int, int, int]
) -> None:
    screen.open(page, width=1280, height=900, dark=dark)
    assert screen.complaints() == []
    assert screen.requests() == [page.as_uri()]
    # CPU, memory, read, written, GPU, its memory; axes, letters and a curve have more colours than an empty box.
    inked = screen.value(INKED)
    assert len(inked) == 6
    assert min(inked) > 5
    # The second node is drawn last, so its colour is seen also where both curves are one.
    assert min(screen.value(CURVES_COLOUR.replace("COLOUR", str(list(colour))))) > 50
    assert screen.value(CONTRAST) > 7
    assert screen.value("document.querySelectorAll('.u-legend .u-series').length") == 6 * 3
    screen.screenshot(page.with_name("dark.png" if dark else "light.png"))


def test_a_name_is_text_in_the_page_and_never_part_of_it(page: Path, screen: browser.Browser) -> None:
    screen.open(page, width=1280, height=900, dark=False)
    assert screen.value("document.title").startswith(f"job 7 {EVIL}")
    assert screen.value("document.querySelectorAll('img').length") == 0


def test_a_narrow_window_is_enough(page: Path, screen: browser.Browser) -> None:
    screen.open(page, width=400, height=800, dark=False)
    assert screen.value(FITS)
    assert screen.complaints() == []


def test_a_chart_can_be_looked_at_closer(page: Path, screen: browser.Browser) -> None:
    screen.open(page, width=1280, height=900, dark=False)
    box = screen.value(
        "(() => { const r = document.querySelector('.u-over').getBoundingClientRect();"
        " return [r.left, r.top, r.width, r.height] })()"
    )
    left, top, width, height = box
    before = screen.value(INKED)
    for kind, at in (("mousePressed", 0.3), ("mouseMoved", 0.4), ("mouseReleased", 0.4)):
        place = {"x": left + width * at, "y": top + height / 2}
        screen.tell("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
    assert screen.complaints() == []
    assert screen.value(INKED) != before


def test_the_library_is_the_one_that_was_published() -> None:
    text = (Path(main.__file__).with_name("pages") / "uPlot.iife.min.js").read_text()
    assert text.startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")
