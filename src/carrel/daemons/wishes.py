"""What users ask of nodes that carrelctld cannot call: it waits here, and goes out with the answers to their reports.

Nothing is owned: a restart forgets it, and who asked may ask again.
"""

import math
from collections import deque

from carrel.errors import RefusedError
from carrel.model.report import SamplingWish

KEPT_S = 600.0
"""Each node has reported many times by then."""
WISHES_MAX = 1000


class Wishes:
    """The last wishes, oldest first."""

    def __init__(self) -> None:
        """Know of none."""
        self._wishes: deque[SamplingWish] = deque(maxlen=WISHES_MAX)

    def add(self, *, job_id: int, every_s: float, uid: int, now_s: float) -> None:
        """Take one.

        Raises:
            RefusedError: that is no interval.
        """
        if not math.isfinite(every_s) or every_s <= 0:
            raise RefusedError(f"every_s={every_s}: must be seconds above 0")
        self._wishes.append(SamplingWish(job_id=job_id, every_s=every_s, uid=uid, asked_s=now_s))

    def all(self, now_s: float) -> tuple[SamplingWish, ...]:
        """Return those that some node may not have heard of."""
        while self._wishes and now_s - self._wishes[0].asked_s > KEPT_S:
            self._wishes.popleft()
        return tuple(self._wishes)
