"""The way to the ledger for the rounds: commands in batches, and a list of what a person should look at."""

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from carrel.bank.ledger import Ledger
from carrel.model.ledger import Answer, AnyCommand, Receipt, Refusal

_LOG = logging.getLogger("carrelctld.bank")
_BATCH = 200
_PARKED_MAX = 10_000
_REPEATED = frozenset({"state", "exists"})
"""Why the ledger refuses what an old plan, or another controller, has done before."""


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """What could not be charged or set aside, and why. It is tried again; a person may be needed."""

    what: str
    why: str
    since_s: float


class Teller:
    """Does commands; what is refused is logged once and kept until it succeeds."""

    def __init__(self, ledger: Ledger) -> None:
        """Begin with nothing parked."""
        self._ledger = ledger
        self._parked: OrderedDict[str, Parked] = OrderedDict()

    def parked(self) -> list[Parked]:
        return list(self._parked.values())

    async def do(self, commands: Sequence[AnyCommand]) -> list[Answer]:
        """Do commands in order and return their answers.

        Raises:
            UnreachableError: the ledger did not answer; the next round sees what became of them.
        """
        answers: list[Answer] = []
        for at in range(0, len(commands), _BATCH):
            answers += await self._ledger.do_all(commands[at : at + _BATCH])
        for command, answer in zip(commands, answers, strict=True):
            what = f"{type(command).__name__.lower()} {getattr(command, 'run', '') or getattr(command, 'token', '')}"
            if isinstance(answer, Receipt):
                self._parked.pop(what, None)
            elif answer.why not in _REPEATED:
                self.park(what, answer.sentence)
        return answers

    def park(self, what: str, why: str) -> None:
        """Keep something for a person to see; the second time changes nothing."""
        if what not in self._parked:
            _LOG.warning("%s: %s", what, why)
            self._parked[what] = Parked(what=what, why=why, since_s=time.time())
            if len(self._parked) > _PARKED_MAX:
                self._parked.popitem(last=False)

    @staticmethod
    def all_done(answers: Sequence[Answer]) -> bool:
        """Tell whether all were done, by us or before us."""
        return all(not isinstance(answer, Refusal) or answer.why in _REPEATED for answer in answers)
