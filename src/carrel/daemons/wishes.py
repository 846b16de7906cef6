"""What users ask of nodes that carrelctld cannot call: it waits here, and goes out with the answers to their reports.

Nothing is owned: a restart forgets it, and who asked may ask again.
"""

import math
from collections import Counter, OrderedDict

from carrel.errors import RefusedError
from carrel.model.report import SamplingWish

KEPT_S = 600.0
"""Each node has reported many times by then."""
WISHES_MAX = 1000
WISHES_PER_USER_MAX = 100
"""Or one user could push out those of all others, and make every answer to a report longer."""


class Wishes:
    """The last wishes, oldest first."""

    def __init__(self) -> None:
        """Know of none."""
        self._wishes: OrderedDict[tuple[int, int], SamplingWish] = OrderedDict()
        """By user and job: the last one counts."""

    def add(self, *, job_id: int, every_s: float, uid: int, now_s: float) -> None:
        """Take one.

        Raises:
            RefusedError: that is no interval, or the user has asked for too many jobs.
        """
        if not math.isfinite(every_s) or every_s <= 0:
            raise RefusedError(f"every_s={every_s}: must be seconds above 0")
        self._forget_old(now_s)
        self._wishes.pop((uid, job_id), None)
        if uid and Counter(whose for whose, _ in self._wishes)[uid] >= WISHES_PER_USER_MAX:
            raise RefusedError(
                f"uid {uid} has asked for {WISHES_PER_USER_MAX} jobs in {KEPT_S / 60:g} minutes; wait, or ask on a node"
            )
        self._wishes[uid, job_id] = SamplingWish(job_id=job_id, every_s=every_s, uid=uid, asked_s=now_s)
        while len(self._wishes) > WISHES_MAX:
            self._wishes.popitem(last=False)

    def all(self, now_s: float) -> tuple[SamplingWish, ...]:
        """Return those that some node may not have heard of."""
        self._forget_old(now_s)
        return tuple(self._wishes.values())

    def _forget_old(self, now_s: float) -> None:
        while self._wishes and now_s - next(iter(self._wishes.values())).asked_s > KEPT_S:
            self._wishes.popitem(last=False)
