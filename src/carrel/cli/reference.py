"""The reference pages that are made from the code: the command line, carrel(1), the REST API.

``python -m carrel.cli.reference`` writes them; a test says when they are stale.
"""

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from carrel import __version__, errors
from carrel.cli.main import app
from carrel.errors import CarrelError

_MARK = "<!-- Made by python -m carrel.cli.reference: edit the commands' own words instead. -->"
_CHECKOUT = Path(__file__).resolve().parents[3]

_STATUS = {
    0: "Done.",
    errors.CarrelError.exit_code: "Failed; the sentence on standard error says what to do.",
    errors.UsageError.exit_code: "The command line is wrong.",
    errors.NotFoundError.exit_code: "There is no such job, guest, image or node.",
    errors.RefusedError.exit_code: "Understood, and not allowed or not possible here.",
    errors.UnreachableError.exit_code: "A daemon or Slurm did not answer: nothing is known.",
    130: "Interrupted.",
}
_ENVIRONMENT = {
    "CARREL_CONFIG": "The configuration file.",
    "SLURM_CONF": "Slurm's configuration; a carrel.toml beside it is ours.",
    "CARREL_TOKEN_FILE": "A file with a token, by which the bank is asked in place of munge or the socket.",
    "CARREL_IMAGE_STORE": "The image store, where the configuration names none.",
    "CARREL_TEMPLATE_STORE": "The directory of templates, where the configuration names none.",
    "CARREL_LIBEXEC": "Directory of the programs that Slurm and guests run.",
}
_FILES = {
    "/etc/carrel/carrel.toml": "The settings, the same on every node.",
    "/run/carrel/carrelctld.sock": "Where carrelctld listens.",
    "/var/spool/carrel/<node>/carreld.sock": "Where the node's carreld listens.",
}


def pages(root: Path) -> dict[Path, str]:
    """Return each generated page and what shall stand in it."""
    return {
        root / "docs/reference/cli.md": commands(),
        root / "docs/reference/openapi.json": rest(),
        root / "build/man/carrel.1": manual(),
    }


def commands() -> str:
    """Return docs/reference/cli.md."""
    text = _described().strip()
    return f"{_MARK}\n\n{text}\n\n## Exit status\n\n{_markdown(_STATUS)}\n## Environment\n\n{_markdown(_ENVIRONMENT)}"


def manual() -> str:
    """Return carrel(1), from the same text as the page for the web."""
    body = _described().partition("**Commands**:")[2]
    parts = [
        f'.TH CARREL 1 "" "Carrel {__version__}" "User Commands"',
        ".SH NAME",
        r"carrel \- gives every Slurm job its own virtual machine",
        ".SH SYNOPSIS",
        ".B carrel",
        r".I NOUN VERB",
        "[OPTIONS] [ARGUMENTS]",
        ".SH COMMANDS",
        *_roff(body),
        ".SH EXIT STATUS",
        *_list(_STATUS),
        ".SH ENVIRONMENT",
        *_list(_ENVIRONMENT),
        ".SH FILES",
        *_list(_FILES),
        ".SH SEE ALSO",
        ".BR srun (1),",
        ".BR sbatch (1),",
        ".BR squeue (1)",
    ]
    return "\n".join(parts) + "\n"


def rest() -> str:
    """Return the OpenAPI description of carrelctld, from its handlers."""
    from carrel.config import Placement  # noqa: PLC0415
    from carrel.daemons.api import Service, create  # noqa: PLC0415  # heavy, and absent on a node
    from carrel.daemons.board import Board  # noqa: PLC0415
    from carrel.daemons.hosts import HostDesk  # noqa: PLC0415

    async def nowhere() -> dict[str, str]:
        return await asyncio.sleep(0, {})

    board = Board()
    service = Service(
        board=board,
        trusted=frozenset(),
        addresses=nowhere,
        changed=lambda: None,
        silent_after_s=0,
        munge_socket="",
        hosts=HostDesk(Placement(), board, silent_after_s=0),
    )
    return json.dumps(create(service).openapi_schema.to_schema(), indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write all pages into this checkout."""
    if not (_CHECKOUT / "Makefile").exists():
        raise CarrelError(f"{_CHECKOUT}: not a source checkout; the pages are written into one")
    for path, text in pages(_CHECKOUT).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(_CHECKOUT))


def _described() -> str:
    """Return all commands as Markdown, whatever program is running.

    cyclopts 5.4 takes the first word off each usage line, as the program's name; ``python -m x`` has three.
    """
    program = sys.argv[0]
    sys.argv[0] = "carrel"
    try:
        return app.generate_docs(output_format="markdown")
    finally:
        sys.argv[0] = program


def _markdown(words: dict[int, str] | dict[str, str]) -> str:
    return "".join(f"* `{name}`: {text}\n" for name, text in words.items())


def _roff(markdown: str) -> Iterator[str]:
    """Turn what cyclopts writes into man's macros: headings, item lists, command lines, paragraphs."""
    fenced = False
    for line in markdown.splitlines():
        item = re.fullmatch(r"\* `(.+?)`:? ?(.*)", line)
        linked = re.fullmatch(r"\* \[`(.+?)`\]\(.*?\): (.*)", line)
        if line.startswith("```"):
            fenced = not fenced
            yield ".PP\n.nf\n.RS" if fenced else ".RE\n.fi"
        elif fenced:
            yield f".B {_escaped(line)}"
        elif line.startswith("#"):
            yield f'.SS "{_escaped(line.lstrip("# "))}"'
        elif found := item or linked:
            yield f".TP\n.B {_escaped(found[1])}\n{_escaped(found[2])}"
        elif re.fullmatch(r"\*\*\w+\*\*:", line):
            yield ".PP"
        elif line:
            yield _escaped(line)


def _list(words: dict[int, str] | dict[str, str]) -> Iterator[str]:
    for name, text in words.items():
        yield f".TP\n.B {_escaped(str(name))}\n{_escaped(text)}"


def _escaped(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*|`(.+?)`", lambda match: match[1] or match[2], text)
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    main()
