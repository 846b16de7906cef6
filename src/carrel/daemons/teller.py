"""The way to the ledger for the rounds: commands in batches, and a list of what a person should look at.

What that list has of runs that ended is on disk before the accounting counts as compared: such a run is in no queue any
more and may have no lien, so that nothing else remembers that it is owed.
"""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from carrel.bank.ledger import Ledger
from carrel.core.folio import Name, name_of
from carrel.model.ledger import Answer, AnyCommand, Backfill, Correct, Receipt, Refund, Refusal, Settle

_LOG = logging.getLogger("carrelctld.bank")
_BATCH = 200
_PARKED_MAX = 10_000
_REPEATED = frozenset({"state", "exists"})
"""Why the ledger refuses what an old plan, or another controller, has done before."""
_AT_THE_END = Settle | Backfill | Correct | Refund


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """What could not be charged or set aside, and why. It is tried again; a person may be needed."""

    what: str
    why: str
    since_s: float
    run: Name = (0, 0)
    """Job id and submission of a run that ended and is owed; without a job id: the next round finds it by itself."""


class Teller:
    """Does commands; what is refused is logged once and kept until it succeeds."""

    def __init__(self, ledger: Ledger, file: Path) -> None:
        """Begin with what an earlier daemon had parked in this file."""
        self._ledger, self._file = ledger, file
        self._parked: OrderedDict[str, Parked] = OrderedDict((each.what, each) for each in _read(file))
        self._on_disk = self._lasting()

    def parked(self) -> list[Parked]:
        return list(self._parked.values())

    def owed(self) -> set[Name]:
        """Return the runs that have ended and are not charged; the submission is 0 where it is not known."""
        return {each.run for each in self._lasting()}

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
                name = name_of(command.run) if isinstance(command, _AT_THE_END) else None
                self.park(what, answer.sentence, run=name or (0, 0))
        return answers

    def park(self, what: str, why: str, *, run: Name = (0, 0)) -> None:
        """Keep something for a person to see; the second time changes nothing."""
        if what not in self._parked:
            _LOG.warning("%s: %s", what, why)
            self._parked[what] = Parked(what=what, why=why, since_s=time.time(), run=run)
            if len(self._parked) > _PARKED_MAX:
                self._parked.popitem(last=False)

    def paid(self, names: Collection[Name]) -> None:
        """Forget what was parked of these runs."""
        if any(each.run in names for each in self._lasting()):
            self._parked = OrderedDict((what, each) for what, each in self._parked.items() if each.run not in names)

    def keep(self) -> None:
        """Have on disk what is owed. What did not change is not written again."""
        if (lasting := self._lasting()) == self._on_disk:
            return
        new = self._file.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(lasting))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._file)
        self._on_disk = lasting

    def _lasting(self) -> list[Parked]:
        return [each for each in self._parked.values() if each.run[0]]

    @staticmethod
    def all_done(answers: Sequence[Answer]) -> bool:
        """Tell whether all were done, by us or before us."""
        return all(not isinstance(answer, Refusal) or answer.why in _REPEATED for answer in answers)


def _read(file: Path) -> list[Parked]:
    """Return what a daemon has left here; a file that cannot be read is kept, for a person, and begun anew."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Parked])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        _LOG.warning("what was parked is not known any more: %s: %s; see there", file, error)
        file.replace(file.with_suffix(".unread"))
        return []
