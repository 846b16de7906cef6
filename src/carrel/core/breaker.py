"""Hosts and images that fail in a row rest for a while, so that one broken host does not fail a whole queue.

A failed clone seldom says whether its host or its image was at fault. So it counts against both, and an image is
blamed only once it failed on two hosts; then its failures are taken off those hosts' accounts. One that has rested gets
a single trial: it works, and all is forgotten, or it rests twice as long.
"""

import msgspec

from carrel.core.pacing import backoff_s
from carrel.model.host import Fault


class _Account(msgspec.Struct):
    """Failures in a row of one host or one image."""

    against: list[str] = msgspec.field(default_factory=list)
    """The image of each failure of a host, the host of each failure of an image; empty where the fault is known."""
    rests: int = 0
    until_s: float = 0.0
    trial: bool = False


class Breakers:
    """All hosts and images that failed lately. Forgotten on a restart, on purpose: that is one more trial each."""

    def __init__(self, *, failures: int, rest_s: float, rest_max_s: float) -> None:
        """Begin with nothing suspected; ``failures`` in a row are too many."""
        self._failures = failures
        self._rest_s = rest_s
        self._rest_max_s = rest_max_s
        self._hosts: dict[str, _Account] = {}
        self._images: dict[str, _Account] = {}

    def resting_hosts(self, now_s: float) -> frozenset[str]:
        """Return the hosts that get no guest now."""
        return frozenset(name for name, account in self._hosts.items() if _rests(account, now_s))

    def image_rests(self, image: str, now_s: float) -> bool:
        """Return whether the image is not cloned now."""
        account = self._images.get(image)
        return account is not None and _rests(account, now_s)

    def next_s(self, now_s: float) -> float | None:
        """Return when the next host or image has rested; None: no other will, but for the end of a trial."""
        return min(
            (
                account.until_s
                for account in (*self._hosts.values(), *self._images.values())
                if account.rests and not account.trial and account.until_s > now_s
            ),
            default=None,
        )

    def tried(self, hosts: tuple[str, ...], image: str) -> None:
        """Note a launch: for what has just rested it is the trial, and nothing else is tried there before its end."""
        for account in (*map(self._hosts.get, hosts), self._images.get(image)):
            if account is not None and account.rests:
                account.trial = True

    def succeeded(self, hosts: tuple[str, ...], image: str) -> bool:
        """Forget what is held against these; return whether there was anything."""
        held = [self._hosts.pop(host, None) for host in hosts] + [self._images.pop(image, None)]
        return any(account is not None for account in held)

    def gave_up(self, hosts: tuple[str, ...], image: str) -> None:
        """Note that a launch ended without telling anything: whoever is on trial gets another."""
        for account in (*map(self._hosts.get, hosts), self._images.get(image)):
            if account is not None:
                account.trial = False

    def failed(self, host: str, image: str, *, fault: Fault, now_s: float) -> None:
        """Count a failure against whoever may be at fault; ``host`` is empty where nobody knows which it was."""
        if fault in {"image", "unknown"}:
            account = self._images.setdefault(image, _Account())
            account.against.append(host if fault == "unknown" else "")
            if fault == "image" or account.rests or len(set(account.against)) > 1:
                self._judge(account, now_s)
            if account.rests:
                self._acquit_hosts(image)
        if host and (fault == "host" or (fault == "unknown" and not self.image_rests(image, now_s))):
            account = self._hosts.setdefault(host, _Account())
            account.against.append(image if fault == "unknown" else "")
            self._judge(account, now_s)

    def _judge(self, account: _Account, now_s: float) -> None:
        account.against = account.against[-self._failures :]
        if account.trial or (not account.rests and len(account.against) >= self._failures):
            account.rests += 1
            account.until_s = now_s + backoff_s(account.rests, first_s=self._rest_s, most_s=self._rest_max_s)
            account.trial = False

    def _acquit_hosts(self, image: str) -> None:
        for name, account in self._hosts.items():
            left = [blamed for blamed in account.against if blamed != image]
            if len(left) < self._failures:
                self._hosts[name] = _Account(left)
            else:
                account.against = left


def _rests(account: _Account, now_s: float) -> bool:
    return account.trial or account.until_s > now_s
