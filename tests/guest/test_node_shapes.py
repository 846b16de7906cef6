"""Guests that are Slurm nodes, for every shape of job and what becomes of it: real Slurm, real guests."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.asnodes import (
    OPTIONS,
    await_running,
    events,
    names_rest,
    nothing_of_nodes_is_left,
    of_job,
    reservations,
    rooms,
    slurmd,
)
from carrel.testing.guests import await_end, job_state, submit, wait_for
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]

CONF = """
[placement.launches]
attempts = 2
backoff_s = 0.2

[guest_nodes]
configuring_max_s = 6.0
start_max_s = 8.0

[metrics]
enabled = false
"""


SLURM = """
Licenses=tape:1
SlurmdTimeout=600
MessageTimeout=100
"""
"""What Slurm would put right by itself takes longer than a test waits."""


@pytest.fixture(scope="module")
def box(sandbox_factory: Callable[..., Sandbox]) -> Iterator[Sandbox]:
    """One ordinary node, a licence, and two hosts for guests, by whose names no answer shall be taken for another."""
    made = sandbox_factory(nodes=1, hosts=2, host_prefix="node-no", carrel_conf=CONF, extra_conf=SLURM)
    controller = made.pid("slurmctld")
    yield made
    names_rest(made)
    assert made.pid("slurmctld") == controller, "slurmctld was restarted"
    made.down()


@pytest.fixture(autouse=True)
def _nothing_is_left(box: Sandbox) -> Iterator[None]:
    """See after each test that guests, reservations and rooms are gone."""
    yield
    nothing_of_nodes_is_left(box)


@contextmanager
def the_licence_is_taken(box: Sandbox) -> Iterator[None]:
    """Have a job on the ordinary node that uses the only licence."""
    done = box.run(["sbatch", "--parsable", "-pmain", "-Ltape:1", "-o/dev/null", "--wrap=sleep 300"])
    job_id = int(done.stdout)
    wait_for(lambda: job_state(box, job_id) == "RUNNING")
    try:
        yield
    finally:
        box.run(["scancel", str(job_id)])


def tasks(box: Sandbox, array: int) -> dict[int, tuple[str, str]]:
    """Return the state and the id of each task of an array."""
    text = box.run(["squeue", "-h", "-a", "-r", "-t", "all", "-o", "%K %T %A", "-j", str(array)]).stdout
    return {int(task): (state, job_id) for task, state, job_id in map(str.split, text.splitlines())}


# -- arrays ----------------------------------------------------------------------------------------------------------


def test_each_task_of_an_array_has_a_guest_of_its_own_and_no_more_at_once_than_its_owner_allows(
    box: Sandbox, user: User
) -> None:
    script = '#!/bin/sh\necho "$SLURM_ARRAY_TASK_ID $(hostname)" >> "tasks.$SLURM_ARRAY_TASK_ID"\nsleep 1\n'
    array, place = submit(box, script, *OPTIONS, "--array=1-4,7%2", user=user)
    most, running = 0, 0

    def ended() -> bool:
        nonlocal most, running
        found = [state for state, _ in tasks(box, array).values()]
        most, running = max(most, rooms(box)), max(running, found.count("RUNNING"))
        return set(found) == {"COMPLETED"}

    wait_for(lambda: rooms(box) > 0)
    box.restart("carrelctld", signal.SIGKILL)
    wait_for(ended)
    assert running <= 2
    assert most <= 4, "the room of tasks that have ended is given back while the next ones begin"
    said = [path.read_text().split() for path in place.glob("tasks.*")]
    assert sorted(task for task, _ in said) == ["1", "2", "3", "4", "7"], "each ran once"
    assert {name for _, name in said} <= set(box.facts().pool)


def test_of_an_array_one_task_may_be_cancelled_and_then_all_of_it(box: Sandbox, user: User) -> None:
    array, _ = submit(box, "#!/bin/sh\nsleep 300\n", *OPTIONS, "--array=0-11", "--cpus-per-task=2", user=user)
    wait_for(lambda: [state for state, _ in tasks(box, array).values()].count("RUNNING") == 4)
    box.run(["scancel", f"{array}_1", f"{array}_11"])
    wait_for(lambda: [tasks(box, array)[task][0] for task in (1, 11)] == ["CANCELLED"] * 2)
    # Its room is for the next one; that of others is theirs.
    wait_for(lambda: [tasks(box, array)[task][0] for task in (0, 2, 3, 4)] == ["RUNNING"] * 4)
    box.run(["scancel", str(array)])
    wait_for(lambda: {state for state, _ in tasks(box, array).values()} == {"CANCELLED"})


def test_a_task_waits_for_the_one_that_it_depends_on_and_a_job_for_the_whole(box: Sandbox, user: User) -> None:
    script = '#!/bin/sh\ndate +%s.%N > "$1.$SLURM_ARRAY_TASK_ID.began"\ndate +%s.%N > "$1.$SLURM_ARRAY_TASK_ID.ended"\n'
    first, place = submit(box, script, *OPTIONS, "--array=0-1", user=user, arguments=("first",))
    tasks_too = (*OPTIONS, "--array=0-1", f"--dependency=aftercorr:{first}")
    second, place_2 = submit(box, script, *tasks_too, user=user, arguments=("second",))
    last, place_3 = submit(box, script, *OPTIONS, f"--dependency=afterok:{first}", user=user, arguments=("last",))
    assert {await_end(box, job_id) for job_id in (first, second, last)} == {"COMPLETED"}
    places = (place, place_2, place_3)
    times = {path.name: float(path.read_text()) for place in places for path in place.glob("*.*.*")}
    for task in ("0", "1"):
        assert times[f"first.{task}.ended"] < times[f"second.{task}.began"]
        assert times[f"first.{task}.ended"] < times["last..began"]


# -- what Slurm does not start ---------------------------------------------------------------------------------------


def test_a_job_that_slurm_does_not_start_gives_its_guest_back_and_runs_when_it_may(box: Sandbox, user: User) -> None:
    with the_licence_is_taken(box):
        job_id, _ = submit(box, "#!/bin/sh\ntrue\n", *OPTIONS, "-Ltape:1", user=user)
        wait_for(lambda: "slurm did not start it within 8 s: Licenses" in of_job(box, job_id, "%k"))
        wait_for(lambda: not rooms(box) and not reservations(box))
        assert of_job(box, job_id, "%r") == "JobHeldAdmin"
    assert await_end(box, job_id) == "COMPLETED"
    assert sum(line.startswith("guest-ready") for line in events(box, job_id)) >= 2


def test_no_guest_is_made_while_the_partition_is_down(box: Sandbox, user: User) -> None:
    box.run(["scontrol", "update", "PartitionName=guests", "State=DOWN"])
    try:
        job_id, _ = submit(box, "#!/bin/sh\ntrue\n", *OPTIONS, user=user)
        wait_for(lambda: "waits for its partition, which is DOWN" in of_job(box, job_id, "%k"))
        wait_for(lambda: not rooms(box))
    finally:
        box.run(["scontrol", "update", "PartitionName=guests", "State=UP"])
    assert await_end(box, job_id) == "COMPLETED"


def test_a_job_that_is_configuring_for_too_long_is_given_back_and_runs_elsewhere(box: Sandbox, user: User) -> None:
    with the_licence_is_taken(box):
        job_id, _ = submit(box, "#!/bin/sh\ntrue\n", *OPTIONS, "-Ltape:1", "--requeue", user=user)
        wait_for(lambda: of_job(box, job_id, "%r") == "Licenses")
        box.kill("carrelctld")  # or it would take the guest back before it is used
        (note,) = box.dir.glob("nodes/*/slurmd")
        os.kill(int(note.read_text().split()[0]), signal.SIGSTOP)
    wait_for(lambda: of_job(box, job_id, "%T %r") in {"CONFIGURING Prolog", "RUNNING Prolog"})
    box.start("carrelctld")
    assert await_end(box, job_id) == "COMPLETED"
    assert "job-requeued: its nodes do not answer" in events(box, job_id)


def test_a_job_that_is_requeued_runs_again_in_another_guest(box: Sandbox, user: User) -> None:
    script = '#!/bin/sh\necho run >> runs\n[ "$SLURM_RESTART_COUNT" ] || sleep 300\n'
    job_id, place = submit(box, script, *OPTIONS, "--requeue", user=user)
    await_running(box, job_id)
    wait_for((place / "runs").exists)
    assert box.run(["scontrol", "requeue", str(job_id)], user=user.name).returncode == 0
    assert await_end(box, job_id) == "COMPLETED"
    assert (place / "runs").read_text() == "run\nrun\n"

    def told(what: str) -> int:
        return sum(line.startswith(what) for line in events(box, job_id))

    wait_for(lambda: told("guest-gone") == 2)  # carrelctld hears of it a moment after the job's end
    assert (told("guest-ready"), told("node-down")) == (2, 0)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--nodelist=node-no1",), "leave --nodelist and --exclude out"),
        (("--exclude=node-no1",), "leave --nodelist and --exclude out"),
        (("--reservation=none",), "leave --reservation out"),
        ((":", *OPTIONS), "not for the components of a heterogeneous job"),
    ],
    ids=["nodelist", "exclude", "reservation", "heterogeneous"],
)
def test_what_a_guest_that_is_a_node_cannot_be_is_refused_at_submit(
    box: Sandbox, options: tuple[str, ...], sentence: str
) -> None:
    done = box.run(["sbatch", *OPTIONS, *options, "--wrap=true"])
    assert done.returncode != 0
    assert sentence in done.stderr


# -- odd ones --------------------------------------------------------------------------------------------------------


def test_a_job_may_have_any_name(box: Sandbox, user: User, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    name = f"a'b\"c; touch {trap} `touch {trap}` $(touch {trap})\nAdminComment=carrel:image=nosuch | x\\"
    job_id, place = submit(box, "#!/bin/sh\nhostname\n", *OPTIONS, f"--job-name={name}", user=user)
    assert await_end(box, job_id) == "COMPLETED"
    assert of_job(box, job_id, "%j") == name
    assert (place / "out").read_text().strip() in box.facts().pool
    assert not trap.exists()


def test_a_second_slurmd_under_a_name_in_use_takes_no_job_and_harms_none(box: Sandbox, user: User) -> None:
    script = "#!/bin/sh\nwhile [ ! -e go ]; do sleep 0.2; done\nsrun hostname\n"
    job_id, place = submit(box, script, *OPTIONS, user=user)
    name = await_running(box, job_id)
    with slurmd(box, name):
        other, elsewhere = submit(box, "#!/bin/sh\nhostname\n", *OPTIONS, user=user)
        assert await_end(box, other) == "COMPLETED"
        assert (elsewhere / "out").read_text().strip() != name
        (place / "go").touch()
        assert await_end(box, job_id) == "COMPLETED"
    assert (place / "out").read_text().strip() == name
