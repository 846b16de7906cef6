"""What carrelctld remembers of runs that Slurm did not start."""

from carrel.daemons.patience import Patience
from carrel.model.job import Job, JobKey, JobState
from carrel.model.pool import Look, PoolJob

RUN = JobKey(cluster="k", job_id=7, submit_s=100)


def look(state: JobState = "held", *, run: JobKey = RUN, slurm_state: str = "PENDING") -> Look:
    job = PoolJob(job=Job(key=run, state=state, slurm_state=slurm_state), nodes=1, cpus=1, memory_bytes=1)
    return Look(cluster="k", jobs=(job,), nodes={}, reservations={})


def patience() -> Patience:
    return Patience(attempts=2, rest_s=10.0, rest_max_s=30.0)


def test_since_when_a_run_is_ready_does_not_move_while_it_is() -> None:
    one = patience()
    one.see(look("pending"), {RUN}, 1.0)
    one.see(look("pending"), {RUN}, 5.0)
    assert one.ready_since_s == {RUN: 1.0}
    one.see(look("pending"), set(), 6.0)
    one.see(look("pending"), {RUN}, 7.0)
    assert one.ready_since_s == {RUN: 7.0}


def test_a_run_rests_twice_as_long_each_time_up_to_the_bound() -> None:
    one, now_s = patience(), 100.0
    for rest_s in (10.0, 20.0, 30.0, 30.0):
        assert one.recall(RUN, "no licence", now_s) == f"no licence; its guests begin anew in {rest_s:g} s"
        one.see(look(), set(), now_s)
        assert RUN in one.resting(now_s + rest_s - 0.1)
        now_s += rest_s
        assert RUN not in one.resting(now_s)


def test_a_run_that_started_after_all_rests_no_more() -> None:
    one = patience()
    one.recall(RUN, "no licence", 100.0)
    one.see(look("running", slurm_state="RUNNING"), set(), 101.0)
    assert one.resting(101.0) == {}


def test_a_job_that_had_its_nodes_in_vain_too_often_is_not_tried_again_until_it_starts() -> None:
    one = patience()
    for restart in (0, 1):
        one.give_back(JobKey(cluster="k", job_id=7, submit_s=100, restart=restart))
    third = JobKey(cluster="k", job_id=7, submit_s=100, restart=2)
    one.see(look(run=third), set(), 1.0)
    assert one.never_started(look(run=third)) == {
        third: "it had its nodes 2 times and did not start on them; see the log of slurmctld"
    }
    one.see(look("running", run=third, slurm_state="RUNNING"), set(), 2.0)
    assert one.never_started(look(run=third)) == {}
