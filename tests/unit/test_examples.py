"""What the documentation shows can be used as it stands."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from carrel import config
from carrel.config import Config
from carrel.core import pricebook
from carrel.sinks.prometheus import PrometheusSettings

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
SETTINGS = {field.name for field in msgspec.structs.fields(Config)}


@pytest.mark.parametrize("name", ["etc/carrel.toml", "etc/examples/carrel.toml"])
def test_a_configuration_that_we_ship_is_one(name: str) -> None:
    settings = config.load(CHECKOUT / name)
    config.sink_settings(settings, "prometheus", PrometheusSettings)


def test_the_price_book_that_we_ship_is_one() -> None:
    path = CHECKOUT / "etc/examples/prices.toml"
    (version,) = pricebook.parse(path.read_text(), where=path.name).versions
    assert version.list_of("test") is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_settings_on_a_page_exist(page: Path, tmp_path: Path) -> None:
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if "…" in block or not tomllib.loads(block).keys() <= SETTINGS:
            continue  # a template file, prices, or only the beginning of one
        (tmp_path / "page.toml").write_text(block)
        config.load(tmp_path / "page.toml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_a_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_found_from_the_index() -> None:
    index = (CHECKOUT / "docs/README.md").read_text()
    listed = {(CHECKOUT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#:]+)\)", index)}
    pages = {page for page in PAGES if page.parent.name in {"how-to", "reference", "explanation"}}
    assert pages - listed == set()


def test_a_sentence_that_is_explained_is_said_somewhere() -> None:
    sources = [*(CHECKOUT / "src").rglob("*.py"), *CHECKOUT.glob("guest/*.[ch]"), *CHECKOUT.glob("slurm/*.*")]
    joined = re.compile(r'"\s*\n\s*f?"')  # a sentence may go on in the next line
    said = "\n".join(joined.sub("", path.read_text()) for path in sources)
    slurms = (
        "Invalid --guest",
        "unrecognized option",
        "Job violates",
        "JobHeldAdmin",
        "CONFIGURING",
        "Permission denied",
    )
    page = (CHECKOUT / "docs/how-to/troubleshoot.md").read_text().partition("## Jobs")[2]
    rows = re.findall(r"^\| (.*?`.*?) \|", page, re.MULTILINE)
    parts = [part.strip(" ;:'") for row in rows for words in re.findall(r"`([^`]+)`", row) for part in words.split("…")]
    wanted = [part for part in parts if len(part) > 12 and not part.startswith(("carrel ", *slurms))]
    assert len(wanted) > 25
    assert [part for part in wanted if part not in said] == []
