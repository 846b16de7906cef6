"""What carreld makes of hints, of Slurm's word, and of its own failures, without a Slurm."""

import asyncio
import grp
import os
import pwd
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from carrel import config
from carrel.daemons import metrics, sampler_thread
from carrel.daemons.held import HeldGroups
from carrel.daemons.journal import Journal
from carrel.daemons.metrics import JobMetrics
from carrel.daemons.records import Sampled
from carrel.errors import NotFoundError, RefusedError
from carrel.model.job import Job, JobKey
from carrel.model.report import SamplingWish
from carrel.model.sample import JobFile, JobSummary, SamplerStatus
from carrel.sampling.cgroup import JobGroups
from carrel.sampling.loop import Sampler
from carrel.sampling.tables import Survey
from carrel.testing.sandbox import let_enter

ME = pwd.getpwuid(os.getuid())


def a_job(job_id: int = 7, **changes: object) -> Job:
    key = JobKey(cluster="k", job_id=job_id, submit_s=int(changes.pop("submit_s", 1795220388)))  # type: ignore[call-overload]
    job = Job(key=key, state="running", user=ME.pw_name, uid=ME.pw_uid, gid=ME.pw_gid, cpus=2, nodes=("c1",))
    return msgspec.structs.replace(job, **changes)


class ANode:
    """A node as its sampling sees it; Slurm knows the jobs in ``jobs``."""

    def __init__(self, where: Path, **settings: Any) -> None:
        self.name = "c1"
        self.directory = where / "node"
        self.root = where / "root"
        (where / "spool").mkdir(exist_ok=True)
        self.config = config.Config(
            node=config.Node(sweep_period_s=0.05),
            slurm=config.Slurm(spool_dir=str(where / "spool")),
            metrics=config.Metrics(**{"root": str(self.root), "period_s": 0.05, **settings}),
        )
        self.jobs: dict[int, Job] = {}
        self.facts = SimpleNamespace(forget=lambda _: None, job=self._job)
        self.driver = lambda _: None
        self.journal = Journal("c1", lambda _: None)
        self.scheduler = SimpleNamespace(described=self._described)

    async def _job(self, job_id: int, *, timeout_s: float) -> Job:
        assert timeout_s > 0
        if job_id not in self.jobs:
            raise RefusedError(f"slurm knows no job {job_id}")
        return self.jobs[job_id]

    async def _described(self, jobs: list[Job]) -> list[Job]:
        return [msgspec.structs.replace(job, name="it's mine", account="physics") for job in jobs]

    def hint(self, text: str) -> None:
        (self.directory / "hints" / text).touch()

    def folder(self, name: str = "7") -> Path:
        return self.root / ME.pw_name / name

    def segment(self, name: str = "7") -> Path:
        return self.folder(name) / "samples.c1.seg"


@asynccontextmanager
async def carreld(node: ANode) -> AsyncIterator[JobMetrics]:
    made = JobMetrics(node)  # type: ignore[arg-type]  # as far as it looks
    running = asyncio.ensure_future(made.run())
    try:
        await until((node.directory / "hints").is_dir)
        yield made
    finally:
        running.cancel()
        await asyncio.wait([running])


async def until(fact: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not fact():  # noqa: ASYNC110  # a thread or a process brings it about
            await asyncio.sleep(0.01)


def status_of(sampling: JobMetrics) -> SamplerStatus:
    status = sampling.status()
    assert status is not None
    return status


def rows(path: Path) -> int:
    return Survey(path, node="c1", view="host").rows if path.exists() else 0


def finished(folder: Path) -> bool:
    return (folder / "summary.json").exists() and not list(folder.glob("*.seg"))


def test_hints_begin_and_end_the_sampling_of_a_job(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node) as sampling:
            node.hint("begin.7")
            await until(lambda: rows(node.segment()) > 2)
            node.hint("end.7")
            await until(lambda: finished(node.folder()))
            await until(lambda: not list((node.directory / "sampled").iterdir()))
            assert not list((node.directory / "hints").iterdir())
            assert (status_of(sampling).failures, status_of(sampling).fault) == ({}, "")

    asyncio.run(scenario())
    assert msgspec.json.decode((node.folder() / "summary.json").read_bytes(), type=JobSummary).complete


def test_its_name_and_account_are_added_when_slurm_has_told_them(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            await until(lambda: rows(node.segment()) and b"physics" in node.segment().read_bytes())
            node.hint("end.7")
            await until(lambda: finished(node.folder()))

    asyncio.run(scenario())
    job = msgspec.json.decode((node.folder() / "job.json").read_bytes(), type=JobFile).job
    assert (job.name, job.account, job.cpus) == ("it's mine", "physics", 2)


def test_its_owner_changes_how_often_it_is_sampled_and_nobody_else_may(tmp_path: Path) -> None:
    node = ANode(tmp_path, period_s=10.0)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node) as sampling:
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
            with pytest.raises(RefusedError, match="belongs to"):
                await sampling.sample_every(7, 0.05, uid=ME.pw_uid + 1)
            with pytest.raises(RefusedError, match=r"every 0\.001 s"):
                await sampling.sample_every(7, 0.001, uid=ME.pw_uid)
            assert not await sampling.sample_every(8, 0.05, uid=ME.pw_uid)
            assert await sampling.sample_every(7, 0.05, uid=ME.pw_uid)
            await until(lambda: rows(node.segment()) > 5)
        async with carreld(node) as sampling:  # and a later carreld remembers
            sampling.compare([a_job()])
            before = rows(node.segment())
            await until(lambda: rows(node.segment()) > before + 3)

    asyncio.run(scenario())


def test_members_of_the_group_of_operators_may_change_it_too(tmp_path: Path) -> None:
    node = ANode(tmp_path, operators="nogroup")
    node.jobs = {7: a_job(uid=4711)}
    nobody = pwd.getpwnam("nobody").pw_uid

    async def scenario() -> None:
        sampling = JobMetrics(node)  # type: ignore[arg-type]  # as far as it looks
        sampling._sampling.mind()
        sampling._jobs = {node.jobs[7].key: Sampled(job=node.jobs[7])}
        with pytest.raises(RefusedError, match="belongs to"):
            await sampling.sample_every(7, 0.5, uid=pwd.getpwnam("daemon").pw_uid)
        with pytest.raises(NotFoundError):  # it would have been done
            await sampling.sample_every(7, 0.5, uid=nobody)
        await sampling._sampling.stop()

    asyncio.run(scenario())


@pytest.mark.root
def test_a_group_may_read_the_samples_of_all_and_the_users_own_group_then_not(tmp_path: Path) -> None:
    node = ANode(tmp_path, readers="daemon")
    user = pwd.getpwnam("nobody")
    node.jobs = {7: a_job(user=user.pw_name, uid=user.pw_uid, gid=user.pw_gid)}
    folder = node.root / user.pw_name / "7"
    let_enter(tmp_path)

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            await until(lambda: rows(folder / "samples.c1.seg"))
            node.hint("end.7")
            await until(lambda: finished(folder))

    asyncio.run(scenario())
    daemon = grp.getgrnam("daemon").gr_gid
    found = {(path.stat().st_uid, path.stat().st_gid) for path in (folder.parent, folder, *folder.iterdir())}
    assert found == {(user.pw_uid, daemon)}


def test_a_wish_that_came_through_the_controller_is_granted_once_and_only_to_who_may(tmp_path: Path) -> None:
    node = ANode(tmp_path, period_s=10.0)
    node.jobs = {7: a_job()}
    theirs = SamplingWish(job_id=7, every_s=0.05, uid=ME.pw_uid + 1, asked_s=time.time() - 2)
    mine = SamplingWish(job_id=7, every_s=0.05, uid=ME.pw_uid, asked_s=time.time() - 1)

    async def scenario() -> None:
        async with carreld(node) as sampling:
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
            sampling.grant([theirs])
            await until(node.journal.all)
            assert "belongs to" in node.journal.all()[0].text
            sampling.grant([theirs, mine])
            await until(lambda: rows(node.segment()) > 5)
            await sampling.sample_every(7, 20.0, uid=0)
            sampling.grant([theirs, mine])
            assert not [task for task in asyncio.all_tasks() if "JobMetrics._grant" in repr(task.get_coro())]

    asyncio.run(scenario())


def test_groups_that_were_kept_before_a_run_had_a_name_are_counted_though_its_tasks_are_gone(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}
    counted = tmp_path / "cg" / "job_7"
    counted.mkdir(parents=True)
    (counted / "cpuacct.usage").write_text("123456789\n")
    (tmp_path / "node").mkdir()
    HeldGroups(tmp_path / "node" / "held").hold(7, JobGroups(v1={"cpuacct": str(counted)}))
    assert (counted / "carrel.sampler").is_dir()
    (tmp_path / "spool").rmdir()  # nothing is known of steps, so what is kept stays

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            await until(lambda: rows(node.segment()) and b'"set":"job"' in node.segment().read_bytes())
            node.hint("end.7")
            await until(lambda: finished(node.folder()))

    asyncio.run(scenario())
    (host,) = msgspec.json.decode((node.folder() / "summary.json").read_bytes(), type=JobSummary).nodes
    assert host.cpu_s == pytest.approx(0.123457)
    assert not list((tmp_path / "node" / "held").iterdir())


def test_groups_of_a_job_that_nobody_knows_are_let_go(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    counted = tmp_path / "cg" / "job_7"
    counted.mkdir(parents=True)
    (tmp_path / "node").mkdir()
    HeldGroups(tmp_path / "node" / "held").hold(7, JobGroups(v1={"memory": str(counted)}))

    async def scenario() -> None:
        async with carreld(node):
            await until(lambda: not (counted / "carrel.sampler").exists())

    asyncio.run(scenario())
    assert not list((tmp_path / "node" / "held").iterdir())


@pytest.mark.parametrize("word", ["COMPLETING", "COMPLETED"])
def test_a_job_that_ends_while_slurm_is_asked_whose_it_is_has_its_two_samples(tmp_path: Path, word: str) -> None:
    node = ANode(tmp_path, period_s=3600.0)
    node.jobs = {7: a_job(state="ended", slurm_state=word)}

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            node.hint("end.7")
            await until(lambda: finished(node.folder()))

    asyncio.run(scenario())
    (host,) = msgspec.json.decode((node.folder() / "summary.json").read_bytes(), type=JobSummary).nodes
    assert host.samples == 2


def test_a_later_run_of_the_same_id_ends_the_one_before_and_has_a_folder_of_its_own(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    later = f"7.{1795220400}.0"

    async def scenario() -> None:
        async with carreld(node):
            node.jobs = {7: a_job()}
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
            node.jobs = {7: a_job(submit_s=1795220400)}
            node.hint("begin.7")
            await until(lambda: finished(node.folder()) and rows(node.segment(later)))

    asyncio.run(scenario())


def test_the_next_carreld_goes_on_with_the_same_job_once_slurm_says_that_it_lives(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            await until(lambda: rows(node.segment()) > 2)
        before = rows(node.segment())
        async with carreld(node) as sampling:
            assert sampling.suspicious()
            sampling.compare([a_job()])
            await until(lambda: rows(node.segment()) > before + 2)
            node.hint("end.7")
            await until(lambda: finished(node.folder()))

    asyncio.run(scenario())
    (series,) = msgspec.json.decode((node.folder() / "job.json").read_bytes(), type=JobFile).series
    assert [note.what for note in series.notes].count("start") == 2


def test_a_job_that_ended_while_no_carreld_lived_is_finished_by_the_next_one(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
        async with carreld(node) as sampling:
            sampling.compare([])
            await until(lambda: finished(node.folder()))

    asyncio.run(scenario())


def test_samples_that_nobody_remembers_become_tables(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
        for record in (node.directory / "sampled").iterdir():
            record.unlink()
        async with carreld(node):
            await until(lambda: finished(node.folder()))

    asyncio.run(scenario())
    assert not msgspec.json.decode((node.folder() / "summary.json").read_bytes(), type=JobSummary).complete


def test_what_began_after_slurm_was_looked_at_is_not_taken_for_ended(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node) as sampling:
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
            sampling.compare([])
            before = rows(node.segment())
            await until(lambda: rows(node.segment()) > before + 2)

    asyncio.run(scenario())


def test_a_job_that_no_hook_and_no_step_told_of_is_found_by_the_sweep(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node) as sampling:
            sampling.compare([a_job()])
            await until(lambda: rows(node.segment()))

    asyncio.run(scenario())


def test_a_root_that_cannot_be_written_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RETRY_S", 0.1)
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}
    node.root.write_text("in the way")

    async def scenario() -> None:
        async with carreld(node) as sampling:
            node.hint("begin.7")
            await until(lambda: status_of(sampling).failures.get("begin"))
            assert str(node.root) in status_of(sampling).last_failure
            node.root.unlink()
            await until(lambda: rows(node.segment()))

    asyncio.run(scenario())


def test_a_sampler_that_dies_is_told_and_replaced_and_the_same_samples_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_thread, "RETRY_S", 0.1)
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}
    fatal = threading.Event()
    sample = Sampler._sample_due

    def sample_or_die(self: Sampler) -> None:
        if fatal.is_set():
            fatal.clear()
            raise MemoryError("for this test")
        sample(self)

    monkeypatch.setattr(Sampler, "_sample_due", sample_or_die)

    async def scenario() -> None:
        async with carreld(node) as sampling:
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
            fatal.set()
            await until(lambda: status_of(sampling).failures.get("sampler") == 1)
            before = rows(node.segment())
            await until(lambda: rows(node.segment()) > before + 2)

    asyncio.run(scenario())


def test_a_sampler_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_thread, "STUCK_S", 0.1)
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}
    hangs = threading.Event()
    monkeypatch.setattr(Sampler, "_sample", lambda *_, **__: hangs.wait(60))

    async def scenario() -> None:
        async with carreld(node) as sampling:
            node.hint("begin.7")
            await until(lambda: "hangs" in status_of(sampling).fault)
            hangs.set()

    asyncio.run(scenario())


def test_a_node_whose_steps_cannot_be_seen_says_so(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    (tmp_path / "spool").rmdir()

    async def scenario() -> None:
        async with carreld(node) as sampling:
            await until(lambda: "slurm.spool_dir" in status_of(sampling).fault)

    asyncio.run(scenario())


def test_where_sampling_is_off_hooks_are_told_so_and_what_was_begun_is_finished(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.jobs = {7: a_job()}

    async def scenario() -> None:
        async with carreld(node):
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
        off = ANode(tmp_path, enabled=False)
        sampling = JobMetrics(off)  # type: ignore[arg-type]  # as far as it looks
        running = asyncio.ensure_future(sampling.run())
        await until(lambda: finished(node.folder()))
        assert not (off.directory / "hints").exists()
        assert sampling.status() is None
        sampling.begin(8)
        assert not sampling.suspicious()
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(scenario())


def test_a_hint_tells_within_a_blink_though_nobody_polls_for_it(tmp_path: Path) -> None:
    node = ANode(tmp_path)
    node.config = msgspec.structs.replace(node.config, node=config.Node(sweep_period_s=3600.0))
    node.jobs = {7: a_job()}

    async def scenario() -> float:
        async with carreld(node):
            began_s = time.monotonic()
            node.hint("begin.7")
            await until(lambda: rows(node.segment()))
            return time.monotonic() - began_s

    assert asyncio.run(scenario()) < 60
