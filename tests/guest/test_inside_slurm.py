"""Slurm's commands called inside a guest: they act for the job's user, and the guest holds nothing to act with."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from carrel.process import children
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, await_end, job_state, submit, wait_for
from carrel.testing.leaks import pid_of
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

SCRIPT = """\
#!/bin/bash
#SBATCH --nodes=1
#SBATCH --ntasks=2
cat /proc/sys/kernel/random/boot_id > boot
touch sacct
squeue -h -o '%A %u %T' -j "$SLURM_JOB_ID" > squeue; echo "$?" >> squeue
sinfo -h -o '%P %D' > sinfo; echo "$?" >> sinfo
scontrol show job "$SLURM_JOB_ID" | grep -o 'JobId=[0-9]*' > scontrol
scontrol update job "$SLURM_JOB_ID" comment='said inside'; echo "$?" >> scontrol
scontrol show job "$SLURM_JOB_ID" | grep -o 'Comment=said inside' >> scontrol
scontrol update node=c1 state=drain reason=no 2> not-allowed; echo "$?" >> not-allowed
squeue -j 987654 2> no-job; echo "$?" >> no-job
until [[ $(< sacct) = *RUNNING* ]] || ((++looks > 300)); do  # the accounting lags behind
    sacct -n -X -P -j "$SLURM_JOB_ID" -o JobID,User,State > sacct; status=$?
done; echo "$status" >> sacct

child=$(sbatch --parsable --ntasks=1 -o child --wrap 'cat /proc/sys/kernel/random/boot_id')
echo "$?" > sbatch; echo "$child" > child-id
held=$(sbatch --parsable --hold --wrap true)
scancel "$held"; echo "$?" > scancel
squeue -h --states=all -j "$held" -o %T >> scancel
sbatch --parsable --ntasks=1 -o from-stdin <<'EOF' > from-stdin-id
#!/bin/sh
echo "from stdin in $(uname -n)"
EOF
sbatch --no-such-option x 2> bad-option; echo "$?" >> bad-option

ready=$(mktemp -u); mkfifo "$ready"
srun -n1 sh -c 'echo > "$0"; sleep 60' "$ready" 2> term & inner=$!
read -r _ < "$ready"
kill -TERM "$inner"; wait "$inner"; echo "$?" > term-status

id=/proc/sys/kernel/random/boot_id
env -i /usr/bin/srun --jobid="$SLURM_JOB_ID" -n1 --overlap /bin/cat $id > lost-step
env -i /usr/bin/srun -n1 --mem=500 /bin/cat $id > lost-job
env -i /usr/bin/sbatch --parsable -n1 --mem=500 -o lost-batch --wrap "/bin/cat $id" > lost-batch-id

find / -xdev -iname '*munge*' 2> /dev/null > munge-files
tr ' ' '\\n' < /proc/net/unix | grep -i -e munge -e slurm > munge-sockets
echo finished > finished
"""


class Ran(msgspec.Struct, frozen=True):
    """A batch job that has ended, and the files that it wrote."""

    job_id: int
    place: Path

    def __getitem__(self, name: str) -> list[str]:
        return (self.place / name).read_text().splitlines()


@pytest.fixture(scope="module")
def accounted(sandbox_factory: Callable[..., Sandbox], user: User) -> Iterator[Sandbox]:
    """Give a cluster with slurmdbd, for sacct."""
    box = sandbox_factory(slurmdbd=True, users=(user.name,))
    yield box
    box.down()


@pytest.fixture(scope="module")
def inside(accounted: Sandbox, user: User) -> Ran:
    job_id, place = submit(accounted, SCRIPT, f"--guest={IMAGE}", user=user)
    await_end(accounted, job_id)
    ran = Ran(job_id, place)
    for name in ("child-id", "from-stdin-id", "lost-batch-id"):
        await_end(accounted, int(ran[name][0]))
    return ran


def test_squeue_shows_the_users_job(inside: Ran, user: User) -> None:
    assert inside["squeue"] == [f"{inside.job_id} {user.name} RUNNING", "0"]


def test_sinfo_shows_the_cluster(inside: Ran) -> None:
    assert inside["sinfo"] == ["main* 3", "0"]


def test_sacct_shows_the_users_job(inside: Ran, user: User) -> None:
    assert inside["sacct"] == [f"{inside.job_id}|{user.name}|RUNNING", "0"]


def test_scontrol_changes_what_is_the_users(inside: Ran) -> None:
    assert inside["scontrol"] == [f"JobId={inside.job_id}", "0", "Comment=said inside"]


def test_scontrol_changes_nothing_that_is_not_the_users(inside: Ran) -> None:
    assert "Invalid user id" in inside["not-allowed"][0]
    assert inside["not-allowed"][-1] == "1"


def test_a_command_that_fails_tells_why_and_ends_as_on_the_host(accounted: Sandbox, inside: Ran) -> None:
    for name, words in (
        ("no-job", ["squeue", "-j", "987654"]),
        ("bad-option", ["sbatch", "--no-such-option", "x"]),
    ):
        done = accounted.run(words)
        assert inside[name] == [*done.stderr.splitlines(), str(done.returncode)]


def test_sbatch_inside_submits_a_job_with_a_guest_of_its_own(inside: Ran) -> None:
    assert inside["sbatch"] == ["0"]
    assert inside["child"] != inside["boot"]
    assert inside["child"] != BOOT_ID.read_text().splitlines()


def test_sbatch_inside_reads_a_script_from_its_stdin(inside: Ran) -> None:
    assert re.fullmatch(r"from stdin in c\d", inside["from-stdin"][0])


def test_scancel_inside_cancels_the_users_job(inside: Ran) -> None:
    assert inside["scancel"] == ["0", "CANCELLED"]


def test_term_to_an_inner_srun_ends_its_step_and_not_the_script(inside: Ran) -> None:
    assert inside["term-status"] == ["137"]
    assert any("STEP" in line and "CANCELLED" in line for line in inside["term"])
    assert inside["finished"] == ["finished"]


def test_a_step_that_lost_its_environment_is_in_the_jobs_guest(inside: Ran) -> None:
    assert inside["lost-step"] == inside["boot"]


@pytest.mark.parametrize("name", ["lost-job", "lost-batch"])
def test_a_job_submitted_inside_without_any_environment_has_a_guest_too(inside: Ran, name: str) -> None:
    assert len(inside[name]) == 1
    assert inside[name] != BOOT_ID.read_text().splitlines()
    assert inside[name] != inside["boot"]


def test_a_guest_holds_no_munge_key_and_reaches_no_daemon_of_slurm(inside: Ran) -> None:
    assert inside["munge-files"] == []
    assert inside["munge-sockets"] == []


def test_no_byte_of_an_answer_is_lost_where_the_guest_reads_it_late(accounted: Sandbox, user: User) -> None:
    calls, names = 6, 15_000
    script = (
        "#!/bin/sh\nuntil [ -e go ]; do sleep 0.1; done\n"
        f"for i in $(seq {calls}); do scontrol show hostnames 'n[10001-{10000 + names}]' | wc -l; done\n"
    )
    job_id, place = submit(accounted, script, f"--guest={IMAGE}", user=user)
    wait_for(lambda: pid_of(accounted, job_id, "enter") is not None)
    enter, qemu = pid_of(accounted, job_id, "enter"), pid_of(accounted, job_id, "qemu")
    assert enter
    assert qemu
    (place / "go").touch()
    late = 0
    while job_state(accounted, job_id) == "RUNNING":
        until = time.monotonic() + 1
        while enter.alive and time.monotonic() < until:
            if "scontrol" in {_name(pid) for runner in children(enter.number) for pid in children(runner)}:
                qemu.kill(signal.SIGSTOP)
                time.sleep(0.3)
                qemu.kill(signal.SIGCONT)
                late += 1
    assert await_end(accounted, job_id) == "COMPLETED"
    assert late, "no call was met while it was answered"
    assert (place / "out").read_text().split() == [str(names)] * calls


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
