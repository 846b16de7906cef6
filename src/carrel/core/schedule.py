"""When to sample, and which sources to leave out when that costs too much.

Samples fall on multiples of the interval in wall-clock time, so that those of all nodes are of the same moments.
"""

from collections.abc import Mapping

STRETCH_MAX = 64
"""A source is read at least at each so many-th sample, however dear it is."""
_RELAXED = 0.5
"""A source is read more often again when all would then take less than this part of the budget."""


def next_due_us(now_us: int, interval_us: int) -> int:
    """Return the first multiple of the interval after ``now_us``.

    >>> next_due_us(1_000_000, 1_000_000), next_due_us(1_999_999, 1_000_000)
    (2000000, 2000000)
    """
    return (now_us // interval_us + 1) * interval_us


def allowed_s(chosen_s: float | None, low_s: float, high_s: float) -> float | None:
    """Return the interval that was chosen for a job, as far as the site still allows it; None: none was.

    >>> allowed_s(0.1, 1.0, 60.0), allowed_s(None, 1.0, 60.0)
    (1.0, None)
    """
    return None if chosen_s is None else min(max(chosen_s, low_s), high_s)


def missed(due_us: int, now_us: int, interval_us: int) -> int:
    """Return how many samples that were due will never be, when the one due at ``due_us`` is taken now.

    >>> missed(1_000_000, 1_000_900, 1_000_000), missed(1_000_000, 4_100_000, 1_000_000)
    (0, 3)
    """
    return max(0, (now_us - due_us) // interval_us)


def due_after_change_us(due_us: int, now_us: int, interval_us: int) -> int:
    """Return when to sample next after a change of the interval: in time by the old one and by the new one."""
    return min(due_us, next_due_us(now_us, interval_us))


def load(
    costs_us: Mapping[str, float], stretches: Mapping[str, int], *, interval_s: float, periods_s: Mapping[str, float]
) -> dict[str, float]:
    """Return the part of a core that each source takes.

    Args:
        costs_us: CPU time of one reading.
        stretches: Sources read only every so many samples.
        interval_s: Time between two samples.
        periods_s: Sources that are read more rarely than each sample anyway.
    """
    return {
        name: cost / 1e6 / max(interval_s * stretches.get(name, 1), periods_s.get(name, 0.0), 1e-6)
        for name, cost in costs_us.items()
    }


def stretched(
    costs_us: Mapping[str, float],
    stretches: Mapping[str, int],
    *,
    interval_s: float,
    periods_s: Mapping[str, float],
    budget: float,
) -> dict[str, int]:
    """Return how often to read each source from now on: one step from what is, towards the budget.

    Beyond the budget (a part of a core), the source that takes most of it is read half as often. Well within it, the
    one that was stretched most is read twice as often. Sources that cost nothing yet are left as they are.
    """
    taken = load(costs_us, stretches, interval_s=interval_s, periods_s=periods_s)
    found = {name: factor for name, factor in stretches.items() if factor > 1}
    if sum(taken.values()) > budget:
        able = [name for name in taken if found.get(name) != STRETCH_MAX]
        if able:
            worst = max(able, key=taken.__getitem__)
            # Below its own period a longer stretch saves nothing: begin where it does.
            factor = stretches.get(worst, 1) * 2
            while interval_s * factor <= periods_s.get(worst, 0.0):
                factor *= 2
            found[worst] = min(factor, STRETCH_MAX)
        return found
    if found:
        longest = max(found, key=found.__getitem__)
        trial = {**found, longest: found[longest] // 2}
        if sum(load(costs_us, trial, interval_s=interval_s, periods_s=periods_s).values()) < budget * _RELAXED:
            found = {name: factor for name, factor in trial.items() if factor > 1}
    return found
