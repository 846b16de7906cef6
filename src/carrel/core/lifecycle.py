"""What a run needs next: one pure function over three facts, so that a daemon that starts just looks and goes on.

::

    slurm says                lien       guest        ->  action
    held by us                none       -                PlaceLien     refused: tell the user, leave it held
    held by us                paid       -                ReleaseJob
    pending|running|suspended none       -                PlaceLien     refused: the site's policy decides
    not yet ended             too small  -                TopUpLien     the user raised the time limit
    running, wants a guest    paid       none | down      EnsureGuest
    ended | unknown           any        any              DestroyGuest
    ended                     open       -                SettleLien    the price of what was used
    unknown for an hour       open       -                SettleLien    the price of what was last seen, flagged

*Paid* is ``open``, or ``waived`` where the site runs no bank. A held job whose lien is too small is topped up before
it is released; a running one keeps its guest meanwhile, as its nodes are occupied either way. A ``resolved`` lien
of a run that has not ended asks for nothing: a person was told when it was resolved.

No phase is stored: *booting*, *running* and *settled* are labels of the same three facts. Every action may be done
twice and by two controllers, since each is named by its run.

A look that failed cannot be passed: there is no ``Job``, so there is no plan, and nothing is destroyed or settled.
``unknown`` is not that: Slurm answered, and has no such run.
"""

import msgspec

from carrel.model.guest import Guest
from carrel.model.job import Job, JobKey
from carrel.model.lien import Lien

UNKNOWN_SETTLED_AFTER_S = 3600.0
"""Slurm may take this long to remember a run, after a crash of its controller or of its database."""


class PlaceLien(msgspec.Struct, frozen=True):
    """Set money aside. A second one for the same run changes nothing."""

    run: JobKey
    amount_micro_su: int
    reason: str


class TopUpLien(msgspec.Struct, frozen=True):
    """Raise an open lien *to* this amount, never *by* it, so that doing it twice is doing it once."""

    run: JobKey
    amount_micro_su: int
    reason: str


class ReleaseJob(msgspec.Struct, frozen=True):
    """Let Slurm schedule the job; a released one stays so."""

    run: JobKey
    reason: str


class EnsureGuest(msgspec.Struct, frozen=True):
    """Make the run's guest, unless it is there."""

    run: JobKey
    reason: str


class DestroyGuest(msgspec.Struct, frozen=True):
    """Leave nothing of this guest; one that is already absent is fine."""

    run: JobKey
    guest: str
    reason: str


class SettleLien(msgspec.Struct, frozen=True):
    """Charge the run and so resolve its lien; a resolved lien is never charged again."""

    run: JobKey
    amount_micro_su: int
    reason: str
    flagged: bool = False
    """A person should look: the amount is the best that is known, and not what Slurm accounted."""


Action = PlaceLien | TopUpLien | ReleaseJob | EnsureGuest | DestroyGuest | SettleLien


def next_actions(
    job: Job,
    lien: Lien,
    guest: Guest | None,
    *,
    required_micro_su: int = 0,
    used_micro_su: int | None = None,
    unknown_for_s: float = 0.0,
) -> tuple[Action, ...]:
    """Return what the run needs now, in the order to do it; nothing where all is as it should be.

    Args:
        job: What Slurm says of the run.
        lien: What the bank says of it.
        guest: What the driver says of it.
        required_micro_su: The price of the most that Slurm may still give the run.
        used_micro_su: The price of what an ended run used, or of what was last seen of an unknown one;
            None: the accounting did not answer, so it cannot be settled yet.
        unknown_for_s: How long Slurm has answered that it has no such run.
    """
    if job.state in {"ended", "unknown"}:
        return (
            *_unmake(job, guest),
            *_settle(job, lien, used_micro_su=used_micro_su, unknown_for_s=unknown_for_s),
        )
    return (
        *_pay(job, lien, required_micro_su=required_micro_su),
        *_make(job, lien, guest),
    )


def _pay(job: Job, lien: Lien, *, required_micro_su: int) -> tuple[Action, ...]:
    if lien.state == "none":
        return (PlaceLien(job.key, required_micro_su, f"job is {job.state} and has no lien"),)
    if lien.state == "open" and lien.amount_micro_su < required_micro_su:
        return (TopUpLien(job.key, required_micro_su, "job may now need more than its lien"),)
    if job.state == "held" and lien.paid:
        return (ReleaseJob(job.key, f"lien is {lien.state}"),)
    return ()


def _make(job: Job, lien: Lien, guest: Guest | None) -> tuple[Action, ...]:
    if job.state != "running" or not job.wants_guest or not lien.paid:
        return ()
    if guest is None:
        return (EnsureGuest(job.key, "job runs and has no guest"),)
    if guest.state == "down":
        return (EnsureGuest(job.key, f"job runs and its guest is down: {guest.reason or 'no reason known'}"),)
    return ()


def _unmake(job: Job, guest: Guest | None) -> tuple[Action, ...]:
    if guest is None:
        return ()
    why = "job has ended" if job.state == "ended" else "slurm knows no such run"
    return (DestroyGuest(job.key, guest.name, why),)


def _settle(job: Job, lien: Lien, *, used_micro_su: int | None, unknown_for_s: float) -> tuple[Action, ...]:
    if lien.state != "open" or used_micro_su is None:
        return ()
    if job.state == "ended":
        return (SettleLien(job.key, used_micro_su, "job has ended"),)
    if unknown_for_s > UNKNOWN_SETTLED_AFTER_S:
        why = f"slurm has not known the run for {unknown_for_s:.0f} s; charged as last seen"
        return (SettleLien(job.key, used_micro_su, why, flagged=True),)
    return ()
