"""The sampling of a guest-node's job as its door and its hooks know sampling; the work is its host's."""

from typing import TYPE_CHECKING

from carrel.daemons.hints import Hints
from carrel.daemons.metrics import JobMetrics
from carrel.model.guest import Guest

if TYPE_CHECKING:
    from carrel.daemons.guestnode import Carried


class CarriedMetrics(JobMetrics):
    """The sampling of a guest-node's job, which its host does; see ``CarriedJobs``."""

    def __init__(self, carried: "Carried") -> None:  # its base would look for what an earlier carreld sampled
        """Speak of the job of ``carried``."""
        self._carried = carried
        Hints(carried.directory / "hints").prepare(wanted=carried.config.metrics.enabled)

    def begin(self, job_id: int, *, anew: bool = False) -> None:
        """Sample the job, if it is that which the guest was made for."""
        del anew
        carried, guest = self._carried, self._carried.seen
        if job_id == carried.order.run.job_id and guest:
            carried.host.metrics.carried.begin(carried.order, guest, carried.facts)

    def end(self, job_id: int) -> None:
        """Do nothing: what ends the guest ends its sampling."""

    def guest_ready(self, guest: Guest) -> None:
        """Sample the job: a task is in its guest, so it has begun."""
        del guest
        self.begin(self._carried.order.run.job_id)

    async def sample_every(self, job_id: int, seconds: float, *, uid: int) -> bool:
        """Have the host do it."""
        return await self._carried.host.metrics.sample_every(job_id, seconds, uid=uid)
