"""Which of the site's hosts a job's guests may go to, and how they are made there: by the driver that it asked for.

A host carries a carreld, which has any driver that is installed there; or one driver reaches it from the controller.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from carrel.config import Config
from carrel.errors import RefusedError
from carrel.model.guest import Clone, GuestRequest
from carrel.model.template import Recipe
from carrel.slurm import hostlist


class Remote(Protocol):
    """Hosts that one driver reaches from here."""

    @property
    def hosts(self) -> frozenset[str]:
        """Return their names."""
        ...

    @property
    def why_silent(self) -> str:
        """Return why nothing is known of them just now, as a sentence; empty: it is."""
        ...

    def recipe(self, request: GuestRequest) -> Recipe:
        """Return how a guest of this request is made there; raises a sentence where it is not."""
        ...


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """How the guests of one job are made."""

    driver: str
    """Of the hosts without a carreld; empty: its hosts have one."""
    clone: Clone
    pooled: bool = False
    """They need addresses of the site's pool."""


class Kinds:
    """The hosts of a site, by who makes guests there."""

    def __init__(self, settings: Config, remotes: Mapping[str, Remote], *, has_addresses: bool) -> None:
        """Ask nobody yet."""
        self._own = frozenset(hostlist.expand(settings.guest_nodes.hosts))
        self._remotes = remotes
        self._driver, self._clone = settings.guests.driver, settings.guests.clone
        self._has_addresses = has_addresses

    @property
    def hosts(self) -> frozenset[str]:
        """Return all hosts that somebody should speak for."""
        return self._own.union(*(remote.hosts for remote in self._remotes.values()))

    def of(self, request: GuestRequest | None) -> Kind:
        """Return how such guests are made.

        Raises:
            CarrelError: they are not; the job's owner reads the sentence.
        """
        asked = request.clone if request else None
        driver = self.driver(request)
        if request and not driver and not self._own and self._remotes:
            known = ", ".join(sorted(self._remotes))
            raise RefusedError(f"no host makes guests with driver '{request.driver}'; known: {known}")
        if request is None or not driver:
            wish = asked or self._clone
            return Kind(driver=driver, clone="instant" if wish == "auto" else wish)
        recipe = self._remotes[driver].recipe(request)
        if recipe.pooled and not self._has_addresses:
            raise RefusedError(
                f"guests of {request.image} have no address of their own, and the site has no pool of them; "
                "see placement.addresses"
            )
        return Kind(driver=driver, clone=recipe.clone, pooled=recipe.pooled)

    def driver(self, request: GuestRequest | None) -> str:
        """Return the driver of the hosts that such guests go to; empty: those with a carreld."""
        asked = (request.driver if request else "") or self._driver
        if not self._own and not (request and request.driver) and self._remotes:
            asked = asked if asked in self._remotes else next(iter(self._remotes))
        return asked if asked in self._remotes else ""

    def only(self, driver: str) -> Callable[[str], bool] | None:
        """Return what tells whether guests of this driver may be on a host; None: on any."""
        if not self._remotes:
            return None
        if driver:
            return self._remotes[driver].hosts.__contains__
        others = frozenset().union(*(remote.hosts for remote in self._remotes.values()))
        return lambda host: host not in others

    def silent(self) -> frozenset[str]:
        """Return the hosts of which nothing is known just now, whatever was known a moment ago."""
        return frozenset().union(*(remote.hosts for remote in self._remotes.values() if remote.why_silent))

    def why_silent(self, driver: str) -> str:
        """Return why nothing is known of a driver's hosts; empty: it is, or each host speaks for itself."""
        return self._remotes[driver].why_silent if driver else ""
