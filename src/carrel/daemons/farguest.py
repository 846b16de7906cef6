"""A guest on a host that carries no carreld, made from here; a slurmd inside it is the node.

Nothing of it is on this machine's disk: what there is, its driver finds again, with whose it is and what it is for.
"""

import asyncio
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from carrel.core.guestconf import DEFAULT_TEMPLATE, NodeShape, slurm_conf
from carrel.daemons.guestlogs import GuestLog, GuestLogs, LogOf
from carrel.errors import CarrelError, NoAddressError, NodeFaultError, UnreachableError
from carrel.model.guest import Guest, GuestRequest, GuestSpec
from carrel.model.guestnode import GuestNode, GuestNodeState, NodeOrder

if TYPE_CHECKING:
    from carrel.daemons.deputy import Deputy

RETRY_S = 1.0

_LOG = logging.getLogger("carrelctld")
_MIB = 2**20


class FarGuest:
    """One guest: ordered, or found there and not asked for yet."""

    def __init__(self, deputy: "Deputy", order: NodeOrder, seen: Guest | None = None) -> None:
        """Describe it; ``begin`` makes it.

        Args:
            deputy: Who speaks for its host.
            order: What it shall be.
            seen: What an earlier controller left there; nobody has said yet that it stays.
        """
        self.order = order
        self._deputy = deputy
        self._ordered = seen is None
        self._seen = seen
        self._making: asyncio.Task[None] | None = None
        self._made_s = -math.inf
        """When we learned last what became of it, by the loop's clock: a look that began earlier knows less."""
        self._failure: tuple[GuestNodeState, str] | None = None
        self._waits = ""
        of = LogOf(user=order.user, uid=order.uid, run=str(order.run), guest=order.node)
        self._log = GuestLog(GuestLogs(deputy.settings.guests.logs), of)

    @property
    def name(self) -> str:
        return self.order.node

    @property
    def guest_name(self) -> str:
        return far_name(self.order)

    @property
    def seen(self) -> Guest | None:
        """Return it as it was seen last; None: it is not there, or is being made."""
        return self._seen

    @property
    def why(self) -> str:
        """Return why it is not ready, or has failed, as a sentence; empty: nothing is known to be wrong."""
        return self._failure[1] if self._failure else self._waits

    def begin(self) -> None:
        """Make it. One whose job has its nodes is there, or lost: the next look tells."""
        self._ordered = True
        if not self.order.started:
            self._making = self._deputy.spawn(self._make())

    def update(self, order: NodeOrder) -> None:
        """Take a newer order for the same run."""
        self.order = order
        if order.started:
            self._log.mark("first_task")
        if not self._ordered:
            self.begin()

    def saw(self, guest: Guest | None, *, began_s: float) -> None:
        """Take what a look found of it; None: it is not there.

        Args:
            guest: As its driver says.
            began_s: When the look began, by the loop's clock.
        """
        making = self._making is not None and not self._making.done()
        if making or began_s <= self._made_s:
            return
        self._seen = guest
        if not self._ordered:
            return
        if guest is None:
            self._fail("failed", "its guest is gone", what="guest-down")
        elif guest.state == "down":
            self._fail("failed", f"its guest is gone: {guest.reason}", what="guest-down")

    def facts_for_controller(self) -> GuestNode:
        """Return how it does."""
        guest = self._seen
        state, reason = self._failure or (("starting", self._waits) if not _is_there(guest) else ("ready", ""))
        return GuestNode(
            node=self.name,
            run=self.order.run,
            state=state,
            reason=reason,
            started_s=guest.started_s if guest else 0.0,
            ready_s=(guest.ready_s or 0.0) if guest else 0.0,
            address=guest.address if guest else "",
        )

    async def unmake(self) -> None:
        """Destroy it. What is absent already is fine.

        Raises:
            UnreachableError: nobody can tell whether it is gone.
        """
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        await self._deputy.destroy(self.guest_name)
        self._log.mark("destroyed")
        where = self._log.kept_on("carrelctld's host")
        self._say("guest-gone", f"destroyed: its node is not wanted any more{where}")

    async def _make(self) -> None:
        while True:
            try:
                await self._ensure()
            except UnreachableError as error:  # nothing is known, so nothing has failed
                if self._waits != str(error):
                    self._log.say(str(error))
                self._waits = str(error)
                self._deputy.changed(self)
                await asyncio.sleep(RETRY_S)
            except (CarrelError, OSError) as error:
                self._fail("refused" if isinstance(error, NoAddressError) else "failed", str(error))
                return
            except Exception:  # noqa: BLE001  # else it would be starting for ever
                _LOG.exception("node %s is not made", self.name)
                self._fail("failed", f"node {self.name} is not made; see the log of carrelctld")
                return
            else:
                return

    async def _ensure(self) -> None:
        driver = self._deputy.driver
        spec = await self._spec()
        known = {guest.name: guest.state for guest in await driver.guests()}.get(spec.name)
        if known is None:
            self._say("guest-starting", f"{spec.clone} clone of {spec.image_name} as node {self.name}")
        guest = await driver.ensure(spec)
        self._seen, self._waits = guest, ""
        self._made_s = asyncio.get_running_loop().time()
        phases = dict(guest.phases)
        self._log.mark("clone_start", now_s=guest.started_s)
        self._log.mark("clone_end", now_s=guest.started_s + phases.get("clone", 0.0))
        self._log.mark("customised", now_s=guest.ready_s)
        if known != "ready":
            took_s = (guest.ready_s or guest.started_s) - guest.started_s
            self._say("guest-ready", f"{guest.clone} clone at {guest.address}, {took_s:.2f} s after its start")
        self._deputy.changed(self)

    async def _spec(self) -> GuestSpec:
        order, request, settings = self.order, self.order.request, self._deputy.settings.guests
        recipe = await asyncio.to_thread(self._deputy.recipe, request)
        cluster = await self._deputy.cluster()
        shape = NodeShape(name=order.node, cpus=order.cpus, memory_mib=order.memory_bytes // _MIB, port=order.port)
        peers = [msgspec.structs.replace(shape, name=name, port=port) for name, port in order.peers]
        template = await asyncio.to_thread(_text, recipe.slurm_conf) if recipe.slurm_conf else DEFAULT_TEMPLATE
        conf = slurm_conf(cluster, shape, peers=peers, template=template)
        return GuestSpec(
            name=self.guest_name,
            run=order.run,
            node=order.host,
            host_name=order.node,
            image=request.image,
            image_name=request.image,
            per="node",
            clone=recipe.clone,
            cpus=order.cpus,
            memory_bytes=order.memory_bytes,
            uid=order.uid,
            gid=order.gid,
            user=order.user,
            root=request.root,
            boot_timeout_s=request.boot_timeout_s or settings.boot_timeout_s,
            address=order.address,
            facts={"slurm_conf": conf},
        )

    def _fail(self, state: GuestNodeState, why: str, *, what: str = "guest-failed") -> None:
        if self._failure is None:
            self._failure = (state, why)
            self._say(what, why)
            self._deputy.changed(self)

    def _say(self, what: str, text: str) -> None:
        self._log.say(f"{what}: {text}")
        self._deputy.say(self.order, what, text)


def far_name(order: NodeOrder) -> str:
    """Return the name of an order's guest: that of no other run's, on whatever host."""
    return f"{order.run}.{order.node}"


def order_of(guest: Guest) -> NodeOrder | None:
    """Return the order that a guest was made by, as far as the guest says; None: it is of no run."""
    if guest.run is None:
        return None
    return NodeOrder(
        node=guest.host_name,
        host=guest.node,
        run=guest.run,
        uid=guest.uid,
        gid=-1,
        user=guest.user,
        cpus=guest.cpus,
        memory_bytes=guest.memory_bytes,
        request=GuestRequest(image=guest.image_name, per="node"),
    )


def _is_there(guest: Guest | None) -> bool:
    return guest is not None and guest.state in {"ready", "suspended"}


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise NodeFaultError(f"slurm_conf = {path!r} of the template cannot be read: {error}") from error
