"""Why things happened, for people. Nothing is decided from it; deleting it changes nothing."""

import time
from collections import deque
from collections.abc import Callable

from carrel.model.report import Event

KEPT = 2000
TEXT_MAX = 1000


def one_line(text: str) -> str:
    """Return it as one line, of bounded length, without terminal codes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:TEXT_MAX])


class Journal:
    """The last events of this node; each is told to ``tell`` as it happens."""

    def __init__(self, node: str, tell: Callable[[Event], None]) -> None:
        """Start empty: what happened before a restart is with the controller."""
        self._node = node
        self._tell = tell
        self._events: deque[Event] = deque(maxlen=KEPT)

    def add(self, what: str, text: str, *, job_id: int = 0, guest: str = "", uid: int = -1) -> None:
        """Note an event; ``uid`` may read it, beside root.

        Users write parts of ``text`` (names of images, paths): it stays one line, without terminal codes.
        """
        text = one_line(text)
        event = Event(time_s=time.time(), node=self._node, what=what, text=text, job_id=job_id, guest=guest, uid=uid)
        self._events.append(event)
        self._tell(event)
        print(f"{what}: {text} job={job_id} guest={guest or '-'}", flush=True)  # noqa: T201  # the service's log

    def all(self) -> tuple[Event, ...]:
        return tuple(self._events)
