"""A run asks for hosts: by the site's policy or the site's command, and what is answered is taken.

The calls block for as long as a transaction or the command takes: a daemon makes them in a thread.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from random import SystemRandom

from carrel.config import Placement
from carrel.core import addresses, placement
from carrel.hosts import external
from carrel.hosts.sharedlist import SharedList
from carrel.hosts.table import HostTable
from carrel.model.host import Answer, Demand, Here, Host


class Admission:
    """The hosts of a site, as its settings have them used."""

    def __init__(self, settings: Placement) -> None:
        """Open nothing yet."""
        sort = functools.partial(
            placement.Hosts, policy=settings.policy, overcommit=settings.overcommit, random=SystemRandom()
        )
        self.table = HostTable(settings.path, sort)
        self._settings = settings
        self._sort = sort
        self._list = SharedList(Path(settings.addresses.list)) if settings.addresses.list else None

    def take(
        self, run: str, demand: Demand, *, without: Collection[str] = (), only: Callable[[str], bool] | None = None
    ) -> Answer:
        """Return where the guests of a run go, and take the places; a second call returns the same ones.

        Args:
            run: Its name.
            demand: What it asks for.
            without: Hosts that get no guest now.
            only: Whether a host could ever carry such a guest; not even *never* depends on others. None: each could.

        Raises:
            RefusedError: the run was admitted with other guests.
            UnreachableError: the table cannot be read or written.
        """

        def among(hosts: Iterable[Host]) -> list[Host]:
            return [host for host in hosts if only is None or only(host.name)]

        def place(hosts: placement.Hosts) -> Answer:
            mine = hosts if only is None else self._sort(among(hosts))  # to sort is what takes long
            return mine.place(demand, without=without)

        if not self._settings.command:
            return self.table.take(run, demand, place)
        # Nobody waits for a command within a transaction, so its answer is compared with what the hosts have by then.
        taken = self.table.places(run)
        answer: Answer = Here(tuple(place.host for place in taken))
        if not taken:
            answer = self._ask(run, demand, without, among(self.table.hosts()))
        if not isinstance(answer, Here):
            return answer
        here = answer
        return self.table.take(run, demand, lambda hosts: self._confirm(demand, without, here, among(hosts)))

    @property
    def shares_addresses(self) -> bool:
        """Tell whether other programs take and give back addresses too."""
        return self._list is not None

    @property
    def has_addresses(self) -> bool:
        """Tell whether the site has a pool of addresses."""
        return bool(self._list or self._settings.addresses.static)

    def take_addresses(self, run: str, count: int) -> tuple[str, ...] | None:
        """Return addresses of the pool for the guests of a run, the same ones each time; None: too few are free.

        Empty where the site has no pool.

        Raises:
            CarrelError: a range of the settings is none.
            UnreachableError: the table or the shared list cannot be read or written.
        """
        if self._list is not None:
            found = self._list.take(_job_id(run), count)
            # Noted here too: what an earlier attempt of the job may still use is not given to a later one.
            return None if found is None else self.table.take_addresses(run, count, found)
        if not self._settings.addresses.static:
            return ()
        return self.table.take_addresses(run, count, addresses.expand(self._settings.addresses.static))

    def give_back(self, run: str) -> None:
        """Return all places and addresses of a run, which may have none."""
        self.table.give_back(run)
        if self._list is not None:
            self._list.free({_job_id(run)})

    def listed_jobs(self) -> set[int]:
        """Return the jobs of the shared list; after this, ask Slurm which of them live, and free the others."""
        return self._list.jobs() if self._list is not None else set()

    def free_listed(self, dead: Collection[int]) -> None:
        """Return what the shared list has of jobs that Slurm does not know."""
        if self._list is not None and dead:
            self._list.free(dead)

    def query(self, demand: Demand, *, without: Collection[str] = ()) -> Answer:
        """Return where such guests would go now, and take nothing."""
        if not self._settings.command:
            return self._sort(self.table.hosts()).place(demand, without=without)
        answer = self._ask("", demand, without, self.table.hosts())
        return self._confirm(demand, without, answer, self.table.hosts()) if isinstance(answer, Here) else answer

    def _ask(self, run: str, demand: Demand, without: Collection[str], hosts: Iterable[Host]) -> Answer:
        return external.ask(
            self._settings.command,
            run,
            demand,
            hosts,
            overcommit=self._settings.overcommit,
            without=without,
            timeout_s=self._settings.command_timeout_s,
        )

    def _confirm(self, demand: Demand, without: Collection[str], here: Here, hosts: Iterable[Host]) -> Answer:
        return placement.confirm(hosts, demand, here, overcommit=self._settings.overcommit, without=without)


def _job_id(run: str) -> int:
    """The shared list has room for no more than this of a run's name."""
    return int(run.partition(".")[0])
