"""How fast guests are made, and when what failed is tried again.

A limit holds in every window of its length, wherever one begins to count: a bucket that fills steadily would let twice
as many through around the end of a pause.
"""

from collections import deque


class Pace:
    """At most so many launches in any ``window_s``. What is asked for later than ``now_s`` went before is a bug."""

    def __init__(self, most: int, window_s: float) -> None:
        """Begin with nothing launched."""
        self._most = most
        self._window_s = window_s
        self._launched: deque[tuple[float, int]] = deque()
        self._count = 0

    def wait_s(self, count: int, now_s: float) -> float:
        """Return how long ``count`` launches have to wait; 0: they may go. More than the limit go when all is quiet."""
        self._forget(now_s)
        over = self._count + count - max(self._most, count)
        free_s = now_s
        for launched_s, launches in self._launched:
            if over <= 0:
                break
            over -= launches
            free_s = launched_s + self._window_s
        return free_s - now_s

    def note(self, count: int, now_s: float) -> None:
        """Count launches."""
        self._launched.append((now_s, count))
        self._count += count

    def _forget(self, now_s: float) -> None:
        while self._launched and self._launched[0][0] + self._window_s <= now_s:
            self._count -= self._launched.popleft()[1]


def backoff_s(attempts: int, *, first_s: float, most_s: float) -> float:
    """Return how long to wait after the ``attempts``-th failure in a row: each time twice as long.

    >>> [backoff_s(attempts, first_s=2, most_s=10) for attempts in (1, 2, 3, 4, 5000)]
    [2, 4, 8, 10, 10]
    """
    # Above 2**60 any first wait is beyond any bound, and a float would overflow.
    return min(first_s * (1 << min(attempts - 1, 60)), most_s)
