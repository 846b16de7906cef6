"""A run asks for hosts: by the site's policy or the site's command, and what is answered is taken.

The calls block for as long as a transaction or the command takes: a daemon makes them in a thread.
"""

import functools
from collections.abc import Collection, Sequence
from random import SystemRandom

from carrel.config import Placement
from carrel.core import placement
from carrel.hosts import external
from carrel.hosts.table import HostTable
from carrel.model.host import Answer, Demand, Here, Host


class Admission:
    """The hosts of a site, as its settings have them used."""

    def __init__(self, settings: Placement) -> None:
        """Open nothing yet."""
        self.table = HostTable(settings.path)
        self._settings = settings
        self._random = SystemRandom()

    def take(self, run: str, demand: Demand, *, without: Collection[str] = ()) -> Answer:
        """Return where the guests of a run go, and take the places; a second call returns the same ones.

        Raises:
            RefusedError: the run was admitted with other guests.
            UnreachableError: the table cannot be read or written.
        """
        if not self._settings.command:
            return self.table.take(run, demand, functools.partial(self._place, demand, without))
        # Nobody waits for a command within a transaction, so its answer is compared with what the hosts have by then.
        taken = self.table.places(run)
        answer = Here(tuple(place.host for place in taken)) if taken else self._ask(run, demand, without)
        if not isinstance(answer, Here):
            return answer
        return self.table.take(run, demand, functools.partial(self._confirm, demand, without, answer))

    def query(self, demand: Demand, *, without: Collection[str] = ()) -> Answer:
        """Return where such guests would go now, and take nothing."""
        if not self._settings.command:
            return self._place(demand, without, self.table.hosts())
        answer = self._ask("", demand, without)
        return self._confirm(demand, without, answer, self.table.hosts()) if isinstance(answer, Here) else answer

    def _ask(self, run: str, demand: Demand, without: Collection[str]) -> Answer:
        return external.ask(
            self._settings.command,
            run,
            demand,
            self.table.hosts(),
            overcommit=self._settings.overcommit,
            without=without,
            timeout_s=self._settings.command_timeout_s,
        )

    def _place(self, demand: Demand, without: Collection[str], hosts: Sequence[Host]) -> Answer:
        return placement.place(
            hosts,
            demand,
            policy=self._settings.policy,
            overcommit=self._settings.overcommit,
            without=without,
            random=self._random,
        )

    def _confirm(self, demand: Demand, without: Collection[str], here: Here, hosts: Sequence[Host]) -> Answer:
        return placement.confirm(hosts, demand, here, overcommit=self._settings.overcommit, without=without)
