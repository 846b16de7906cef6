"""Which lien belongs to which run. By the run itself where the lien has one, else by the token it was placed under.

Job id and submission name a run: a requeue submits anew, and ids that come back do so at another time. Of two runs of
one job in one second the earlier cost nothing, so nothing is lost by taking them for one.
"""

from collections.abc import Iterable

from carrel.core.billing import CHARGED, OPEN
from carrel.model.job import JobKey
from carrel.model.ledger import LienView
from carrel.model.run import Seen, Used

Name = tuple[int, int]
"""Job id, and the second of its submission."""


class Folio:
    """Liens of one cluster, to be found by run and by token."""

    def __init__(self, liens: Iterable[LienView]) -> None:
        """Take them in; of several for one run, the one that counts is open, or the latest that was charged."""
        self.open: dict[int, LienView] = {}
        self._of_run: dict[Name, list[LienView]] = {}
        self._of_token: dict[str, LienView] = {}
        self._of_array: dict[int, LienView] = {}
        self._given: dict[Name, LienView] = {}
        for lien in liens:
            self.add(lien)

    def give(self, run: Seen, lien: LienView) -> None:
        """Take in a lien that was just placed for this run."""
        self.open[lien.id] = lien
        self._given[run.key.job_id, run.key.submit_s] = lien

    def add(self, lien: LienView) -> None:
        """Take in a lien as the ledger has it."""
        if lien.state in OPEN:
            self.open[lien.id] = lien
        if lien.run and (name := name_of(lien.run)):
            self._of_run.setdefault(name, []).append(lien)
        elif lien.token and lien.state in {"unbound", "bound"}:
            self._of_token[lien.token] = lien
            if lien.job_id:
                self._of_array[lien.job_id] = lien

    def of(self, run: Seen | Used) -> LienView | None:
        """Return the lien of a run; None: it has none that is open or charged."""
        job_id, submit_s, restart = _identity(run)
        if found := self._given.get((job_id, submit_s)):
            return found
        mine = self._of_run.get((job_id, submit_s), ())
        for states in (OPEN, CHARGED):
            if found := next((lien for lien in reversed(mine) if lien.state in states), None):
                return found
        # A requeued task has its array's token, and its unit was split off long ago.
        return None if restart else self._of_token.get(run.token) or self._of_array.get(run.array_job_id)

    def arrays(self) -> dict[int, LienView]:
        """Return the liens that tasks of arrays still take their units from, by the array's job id."""
        return self._of_array

    def ref(self, run: Seen | Used) -> str:
        """Return the run's key in the ledger; another one where a lien of this run came to nothing before."""
        job_id, submit_s, restart = _identity(run)
        used = len(self._of_run.get((job_id, submit_s), ()))
        key = str(JobKey(cluster="", job_id=job_id, submit_s=submit_s, restart=restart))
        return f"{key}+{used}" if used else key


def name_of(ref: str) -> Name | None:
    """Return which run a key of the ledger means; None: it is none of ours.

    >>> name_of("4711.1731000000.0+1")
    (4711, 1731000000)
    """
    parts = ref.split(".")
    if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    return int(parts[0]), int(parts[1])


def _identity(run: Seen | Used) -> tuple[int, int, int]:
    if isinstance(run, Seen):
        return run.key.job_id, run.key.submit_s, run.key.restart
    return run.job_id, run.submit_s, run.restart
