"""What went wrong and how often, for those who look after a node: no job waits for it, and none fails by it."""

from collections import Counter
from collections.abc import Callable

import msgspec

from carrel.model.sample import SamplerStatus


class Failures:
    """Counts by kind, and the last sentence."""

    def __init__(self) -> None:
        """Nothing has gone wrong."""
        self.fault = ""
        """What keeps on being wrong."""
        self._counts: Counter[str] = Counter()
        self._last = ""
        self._told: set[str] = set()

    def add(self, what: str, error: BaseException) -> None:
        """Count one more; any thread may."""
        self._counts[what] += 1
        self._last = f"{what}: {error}"

    def with_those_of(self, sampler: SamplerStatus) -> SamplerStatus:
        """Return a sampler's status with what went wrong around it."""
        counts = Counter(sampler.failures)
        counts.update(self._counts)
        last = self._last or sampler.last_failure
        return msgspec.structs.replace(
            sampler, failures=dict(counts), last_failure=last, fault=sampler.fault or self.fault
        )

    def tell(self, status: SamplerStatus, say: Callable[[str, str], None]) -> None:
        """Say so once for each kind: it may come again each second."""
        if status.failures.keys() - self._told:
            say("sampling-failed", status.last_failure)
        self._told |= status.failures.keys()
