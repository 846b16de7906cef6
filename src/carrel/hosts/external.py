"""Placement by a site's own command, for rules that no policy has: licences, racks, maintenance windows.

The question goes to its standard input and the answer comes from its standard output, both JSON (see
``docs/reference/hosts.md``). A command that dies, says nothing or takes too long has told nothing: the job waits.
"""

from collections.abc import Collection, Iterable, Sequence

import msgspec

from carrel import process
from carrel.errors import CarrelError
from carrel.model.host import Answer, Demand, Host, NotNow, Overcommit


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What the command reads."""

    run: str
    demand: Demand
    hosts: Sequence[Host]
    overcommit: Overcommit
    without: tuple[str, ...]
    """Hosts that get no guest now: silent, or resting after failures."""


def ask(
    command: Sequence[str],
    run: str,
    demand: Demand,
    hosts: Iterable[Host],
    *,
    overcommit: Overcommit,
    without: Collection[str],
    timeout_s: float,
) -> Answer:
    """Return what the command says, not yet compared with what the hosts have."""
    question = Question(
        run=run, demand=demand, hosts=tuple(hosts), overcommit=overcommit, without=tuple(sorted(without))
    )
    try:
        said = process.run(command, stdin=msgspec.json.encode(question).decode(), timeout_s=timeout_s)
    except (CarrelError, OSError) as error:
        return NotNow(f"the site's placement command told nothing: {error}")
    try:
        answer: Answer = msgspec.json.decode(said, type=Answer)
    except msgspec.DecodeError as error:
        return NotNow(f"the site's placement command {command[0]} gave no answer: {str(error).replace('`', '')}")
    return answer
