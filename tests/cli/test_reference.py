"""The generated pages are those that the code would write now, and say everything."""

import json
import re
from pathlib import Path

import pytest

from carrel.cli import reference

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["docs/reference/cli.md", "docs/reference/openapi.json"])
def test_a_page_made_from_the_code_is_not_stale(name: str) -> None:
    wanted = reference.pages(CHECKOUT)[CHECKOUT / name]
    assert (CHECKOUT / name).read_text() == wanted, "run: python -m carrel.cli.reference"


def test_every_command_and_option_of_the_page_is_explained() -> None:
    items = re.findall(r"^\* (`.*)$", reference.commands(), re.MULTILINE)
    assert len(items) > 40
    assert [item for item in items if not re.fullmatch(r"`[^`]+`: \S.*", item)] == []


def test_the_manual_has_the_sections_that_people_look_for() -> None:
    sections = re.findall(r"^\.SH (.*)$", reference.manual(), re.MULTILINE)
    assert sections == ["NAME", "SYNOPSIS", "COMMANDS", "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"]


def test_the_manual_holds_no_markdown() -> None:
    assert not re.search(r"`|\*\*|^#|\]\(#", reference.manual(), re.MULTILINE)


def test_every_route_says_what_it_is_for() -> None:
    paths = json.loads(reference.rest())["paths"]
    assert "/v1/jobs/{job_id}/map" in paths
    assert all(verb["summary"] for route in paths.values() for verb in route.values())
