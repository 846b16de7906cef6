"""Random histories of runs, liens and guests, with power cuts, a second controller and an impatient user.

Safety holds after every step; liveness once the controller may work in peace. ``CARREL_MODEL_EXAMPLES`` asks for
more histories than ``make check`` has time for.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, assert_never

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from carrel.core.lifecycle import (
    UNKNOWN_SETTLED_AFTER_S,
    Action,
    DestroyGuest,
    EnsureGuest,
    PlaceLien,
    ReleaseJob,
    SettleLien,
    TopUpLien,
    next_actions,
)
from carrel.drivers.fake import FakeDriver
from carrel.errors import RefusedError, UnreachableError
from carrel.model.guest import Guest, GuestSpec
from carrel.model.job import Job, JobKey
from carrel.slurm.fake import FakeSlurm
from carrel.testing.bank import FakeBank
from carrel.testing.fuse import Fuse, PowerCut

SLURM_WRITES = ("release", "cancel")
BANK_WRITES = ("place", "top_up", "settle")
DRIVER_WRITES = ("ensure", "destroy")


class World:
    """Slurm, a bank, a driver, and a controller that forgets everything when its power goes."""

    def __init__(self, where: Path, loop: asyncio.Runner) -> None:
        self.slurm = FakeSlurm()
        self.bank = FakeBank()
        self.driver = FakeDriver(where)
        self.loop = loop
        self.now_s = 0.0
        self.unknown_since: dict[JobKey, float] = {}
        self.last_seen_micro_su: dict[JobKey, int] = {}

    def guests(self) -> dict[JobKey, Guest]:
        return {guest.run: guest for guest in self.loop.run(self.driver.guests()) if guest.run}

    def plan(self) -> list[Action]:
        """Look at everything that anybody knows of, and decide; one micro-SU is one second."""
        guests = self.guests()
        try:
            listed = self.loop.run(self.slurm.jobs())
            runs = {*(job.key for job in listed), *self.bank.runs(), *guests}
            return [action for run in sorted(runs) for action in self._decide(run, guests.get(run))]
        except UnreachableError:
            return []

    def _decide(self, run: JobKey, guest: Guest | None) -> Sequence[Action]:
        job = self.slurm.run(run)
        if job.state == "unknown":
            unknown_for_s = self.now_s - self.unknown_since.setdefault(run, self.now_s)
        else:
            unknown_for_s = 0.0
            self.last_seen_micro_su[run] = self.slurm.elapsed_s(run)
        return next_actions(
            job,
            self.bank.lien(run),
            guest,
            required_micro_su=job.time_limit_s or 0,
            used_micro_su=self.last_seen_micro_su.get(run, 0),
            unknown_for_s=unknown_for_s,
        )

    def act(self, plan: Sequence[Action], fuse: Fuse) -> None:
        """Do the plan until the power goes."""
        slurm, bank, driver = (
            fuse(self.slurm, SLURM_WRITES),
            fuse(self.bank, BANK_WRITES),
            fuse(self.driver, DRIVER_WRITES),
        )
        with suppress(PowerCut):
            for action in plan:
                self._do(action, slurm, bank, driver)
        if fuse.blown:
            self.unknown_since.clear()

    def _do(self, action: Action, slurm: Any, bank: Any, driver: Any) -> None:
        match action:
            case PlaceLien() | TopUpLien():
                self._pay(action, slurm, bank)
            case ReleaseJob():
                slurm.release(action.run)
            case EnsureGuest():
                self.loop.run(driver.ensure(spec_of(action.run)))
            case DestroyGuest():
                self.loop.run(driver.destroy(action.guest))
            case SettleLien():
                bank.settle(action.run, action.amount_micro_su)
            case _:
                assert_never(action)

    def _pay(self, action: PlaceLien | TopUpLien, slurm: Any, bank: Any) -> None:
        pay = bank.place if isinstance(action, PlaceLien) else bank.top_up
        try:
            pay(action.run, action.amount_micro_su)
        except RefusedError:
            # This site's policy for a job that is past its gate and cannot be paid for.
            with suppress(UnreachableError):
                if self.slurm.run(action.run).state in {"pending", "running", "suspended"}:
                    slurm.cancel(action.run)

    def rest(self) -> None:
        """Give the controller what it needs to finish: an answer, power, and an hour."""
        self.slurm.answers = True
        for wait_s in (0.0, UNKNOWN_SETTLED_AFTER_S + 1):
            self.now_s += wait_s
            plan: list[Action] = []
            for _ in range(10):
                done, plan = plan, self.plan()
                if plan == done:
                    break
                self.act(plan, Fuse(None))
            else:
                pytest.fail(f"no rest after ten rounds; still to do: {plan}")

    def paid(self, job: Job) -> bool:
        return self.bank.lien(job.key).state == "open"


def spec_of(run: JobKey) -> GuestSpec:
    return GuestSpec(
        name=str(run),
        run=run,
        node="c1",
        host_name="c1",
        image="sha256:0",
        image_name="debian12",
        per="job",
        clone="linked",
        cpus=1,
        memory_bytes=2**28,
        uid=1000,
        gid=1000,
    )


def assert_safe(world: World, *, impatient: set[JobKey], raised: set[JobKey], had_guest: set[JobKey]) -> None:
    """Whatever happened, and in the middle of it."""
    lien_of: dict[JobKey, int] = {}
    charge_of: dict[JobKey, int] = {}
    for what, run, amount in world.bank.journal:
        if what == "settle":
            assert run not in charge_of, f"{run} was charged twice"
            charge_of[run] = amount
        else:
            assert run not in charge_of, f"{run} has a lien after its charge"
            lien_of[run] = amount
    truth = {job.key: job for job in world.slurm.runs()}
    beyond = {run: max(0, charge - lien_of[run]) for run, charge in charge_of.items()}
    assert not any(amount for run, amount in beyond.items() if run not in raised), f"charged beyond the lien: {beyond}"
    # Who raises the time limit of a running job may use more than was set aside before anybody could look.
    assert world.bank.available_micro_su >= -sum(beyond.values()), "somebody overspends"
    for run, charge in charge_of.items():
        assert truth[run].state == "ended", f"{run} was charged before its end"
        assert charge == world.last_seen_micro_su.get(run, 0), f"{run} was not charged its price"
    guests = world.guests()
    for run in guests:
        assert world.bank.lien(run).state != "none", f"{run} has a guest and no lien"
        assert truth[run].wants_guest, f"{run} has a guest and wants none"
    for job in truth.values():
        if job.state == "running" and job.key in had_guest:
            assert job.key in guests, f"{job.key} runs and lost its guest"
        if job.state == "running" and job.key not in impatient and job.key.restart == 0:
            assert world.bank.lien(job.key).state != "none", f"{job.key} was let through unpaid"


def assert_finished(world: World) -> None:
    """What is true once the controller has had its time."""
    truth = {job.key: job for job in world.slurm.runs()}
    up = {run for run, guest in world.guests().items() if guest.state != "down"}
    due = {job.key for job in truth.values() if job.state == "running" and job.wants_guest and world.paid(job)}
    suspended = {job.key for job in truth.values() if job.state == "suspended"}
    assert due <= up <= due | suspended, "the guests are not those of the paid running jobs"
    for job in truth.values():
        lien = world.bank.lien(job.key)
        if job.state == "ended":
            assert lien.state != "open", f"{job.key} has ended and its lien is open"
        elif job.state == "held":
            missing = (job.time_limit_s or 0) - lien.amount_micro_su
            assert missing > world.bank.available_micro_su, f"{job.key} is held and could be paid for"
        else:
            assert lien.state == "open", f"{job.key} is {job.state} and not paid for"
    left = [action for action in world.plan() if truth[action.run].state != "held"]
    assert not left, f"still to do: {left}"


def assert_priced(world: World, *, forgotten: set[JobKey]) -> None:
    """Each charge is what the run used, unless Slurm lost the run before anybody saw its end."""
    for what, run, amount in world.bank.journal:
        if what == "settle" and run not in forgotten:
            assert amount == world.slurm.elapsed_s(run), f"{run} was not charged what it used"


cuts = st.builds(Fuse, st.none() | st.integers(0, 6), late=st.booleans())


class Histories(RuleBasedStateMachine):
    """Users, Slurm, two controllers and the power company, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.where = Path(tempfile.mkdtemp(prefix="model."))
        self.loop = asyncio.Runner()
        self.world = World(self.where, self.loop)
        self.old_plan: list[Action] = []
        self.impatient: set[JobKey] = set()
        self.raised: set[JobKey] = set()
        self.forgotten: set[JobKey] = set()
        self.had_guest: set[JobKey] = set()

    @initialize(amount=st.sampled_from([0, 60, 100, 1000]))
    def an_account_is_opened(self, amount: int) -> None:
        self.world.bank.deposit(amount)

    def runs(self) -> tuple[Job, ...]:
        return self.world.slurm.runs()

    def pick(self, data: st.DataObject, *states: str) -> JobKey | None:
        fit = [job.key for job in self.runs() if job.state in states]
        return data.draw(st.sampled_from(fit)) if fit else None

    @precondition(lambda self: len(self.runs()) < 8)
    @rule(limit_s=st.sampled_from([1, 40, 60, 100]), wants_guest=st.booleans(), again=st.booleans())
    def a_job_is_submitted(self, limit_s: int, wants_guest: bool, again: bool) -> None:
        ended = [job.key.job_id for job in self.runs() if job.state == "ended"]
        self.world.slurm.submit(
            time_limit_s=limit_s, wants_guest=wants_guest, job_id=ended[0] if again and ended else None
        )

    @precondition(lambda self: len(self.runs()) < 8 and self.world.bank.available_micro_su > 0)
    @rule(more=st.integers(0, 1))
    def a_job_asks_for_the_exact_balance_or_one_more(self, more: int) -> None:
        self.world.slurm.submit(time_limit_s=self.world.bank.available_micro_su + more)

    @rule(data=st.data())
    def a_user_is_impatient(self, data: st.DataObject) -> None:
        if run := self.pick(data, "held"):
            self.impatient.add(run)
            self.world.slurm.release(run)

    @rule(data=st.data(), much=st.booleans())
    def a_user_raises_a_limit(self, data: st.DataObject, much: bool) -> None:
        if run := self.pick(data, "held", "pending", "running", "suspended"):
            self.raised.add(run)
            self.world.slurm.raise_limit(run, 2000 if much else 120)

    @rule(data=st.data())
    def a_user_cancels(self, data: st.DataObject) -> None:
        if run := self.pick(data, "held", "pending", "running", "suspended"):
            self.world.slurm.cancel(run)

    @rule()
    def slurm_starts_what_it_can(self) -> None:
        for job in self.runs():
            self.world.slurm.start(job.key)

    @rule(data=st.data())
    def a_job_ends(self, data: st.DataObject) -> None:
        if run := self.pick(data, "running"):
            self.world.slurm.end(run)

    @rule(data=st.data())
    def a_job_is_suspended_or_resumed(self, data: st.DataObject) -> None:
        if run := self.pick(data, "running", "suspended"):
            if run in {job.key for job in self.runs() if job.state == "running"}:
                self.world.slurm.suspend(run)
            else:
                self.world.slurm.resume(run)

    @precondition(lambda self: self.world.slurm.answers and len(self.runs()) < 8)
    @rule(data=st.data())
    def a_node_fails_and_slurm_requeues(self, data: st.DataObject) -> None:
        if run := self.pick(data, "running"):
            self.loop.run(self.world.slurm.requeue(run.job_id))

    @rule(seconds=st.sampled_from([1, 20, 60]))
    def time_passes(self, seconds: int) -> None:
        self.world.now_s += seconds
        self.world.slurm.advance(seconds)

    @rule(seconds=st.sampled_from([UNKNOWN_SETTLED_AFTER_S, 1.0]))
    def a_long_time_passes_for_nobody(self, seconds: float) -> None:
        self.world.now_s += seconds

    @rule(data=st.data())
    def slurm_forgets_a_run(self, data: st.DataObject) -> None:
        if run := self.pick(data, "ended"):
            self.forgotten.add(run)
            self.world.slurm.forget(run)

    @rule(answers=st.booleans())
    def slurm_answers_or_not(self, answers: bool) -> None:
        self.world.slurm.answers = answers

    @rule(amount=st.sampled_from([1, 50]))
    def money_comes(self, amount: int) -> None:
        self.world.bank.deposit(amount)

    @rule(data=st.data())
    def a_guest_crashes(self, data: st.DataObject) -> None:
        if guests := self.world.guests():
            self.world.driver.fail(guests[data.draw(st.sampled_from(sorted(guests)))].name, "kernel panic")

    @rule(fuse=cuts)
    def the_controller_acts_and_may_lose_power(self, fuse: Fuse) -> None:
        self.world.act(self.world.plan(), fuse)
        self.note_guests()

    @rule()
    def a_second_controller_looks(self) -> None:
        self.old_plan = self.world.plan()

    @rule(fuse=cuts)
    def the_second_controller_acts_on_its_old_plan(self, fuse: Fuse) -> None:
        self.world.act(self.old_plan, fuse)
        self.note_guests()

    @rule()
    def all_comes_to_rest(self) -> None:
        self.world.rest()
        self.note_guests()
        assert_finished(self.world)
        assert_priced(self.world, forgotten=self.forgotten)

    def note_guests(self) -> None:
        self.had_guest |= set(self.world.guests())

    @invariant()
    def nothing_unsafe_happened(self) -> None:
        assert_safe(self.world, impatient=self.impatient, raised=self.raised, had_guest=self.had_guest)

    @invariant()
    def a_look_that_failed_yields_no_plan(self) -> None:
        if not self.world.slurm.answers:
            assert self.world.plan() == []

    def teardown(self) -> None:
        try:
            self.all_comes_to_rest()
            self.nothing_unsafe_happened()
        finally:
            self.loop.close()
            shutil.rmtree(self.where)


def test_a_power_cut_before_and_after_each_write_changes_no_outcome(tmp_path: Path) -> None:
    for late in (False, True):
        for calls in range(100):
            with asyncio.Runner() as loop:
                world = World(tmp_path / f"{calls}{late}", loop)
                fuse = Fuse(calls, late=late)
                one_history(world, fuse)
                world.rest()
                assert_finished(world)
                assert_priced(world, forgotten=set())
            if not fuse.blown:
                break
        assert not fuse.blown, "the history has more writes than were cut"
        assert calls > 8, "the history has too few writes to tell anything"


def one_history(world: World, fuse: Fuse) -> None:
    """A job from gate to charge, one that nobody can pay, one that raises its limit; the power goes once."""

    def act() -> None:
        # The first controller dies with its power; a second one, with power of its own, goes on.
        world.act(world.plan(), Fuse(None) if fuse.blown else fuse)

    world.bank.deposit(100)
    first = world.slurm.submit(time_limit_s=60)
    world.slurm.submit(time_limit_s=200)
    second = world.slurm.submit(time_limit_s=10)
    for _ in range(3):
        act()
    for run in (first, second):
        world.slurm.start(run)
    act()
    world.slurm.raise_limit(second, 40)
    act()
    world.slurm.advance(30)
    for _ in range(2):
        act()
    world.slurm.end(first)
    act()
    world.slurm.advance(10)
    act()


EXAMPLES = os.environ.get("CARREL_MODEL_EXAMPLES", "")
"""How many histories instead of those that ``make check`` has time for; a failure is then not made smaller."""

TestHistories = pytest.mark.timeout(0 if EXAMPLES else 120)(Histories.TestCase)
TestHistories.settings = settings(
    max_examples=int(EXAMPLES or 60),
    stateful_step_count=40,
    deadline=None,
    database=None,
    phases=[Phase.generate] if EXAMPLES else list(Phase),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
