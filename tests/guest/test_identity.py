"""Row 6: a task in a guest is who, where and with what limits it would be without one."""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel.process import run
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, allocation, outcome, same_as_bare
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.clones("instant", "linked")]

SRUN = ["srun", "--overlap", "-n1"]
GUEST = [f"--guest={IMAGE}"]

DIFFERS_FROM_STEP_TO_STEP = re.compile(
    r"(SLURM_(STEP_ID|STEPID|TASK_PID|GTIDS|SRUN_COMM_PORT|STEP_LAUNCHER_PORT|SPANK_CARREL_JOB_\w+)|CARREL_JOB_\w+)="
)


@pytest.fixture(scope="module")
def roots(sandbox: Sandbox) -> Iterator[list[str]]:
    """Options of a step in a job of root; the job has no guest of its own, so its steps can be compared."""
    with allocation(sandbox, "-N1", "-n1", "--mem=1024") as job_id:
        yield [f"--jobid={job_id}", *SRUN[1:]]


@pytest.fixture(scope="module")
def users(sandbox: Sandbox, user: User) -> Iterator[list[str]]:
    """The same of the ordinary user."""
    with allocation(sandbox, "-N1", "-n1", "--mem=1024", user=user.name) as job_id:
        yield [f"--jobid={job_id}", *SRUN[1:]]


@pytest.fixture
def elsewhere(user: User) -> Iterator[Path]:
    """A directory that the user can enter and that no guest has by itself: the image lacks it, no mount holds it."""
    place = Path(f"/etc/carrel-test-{secrets.token_hex(4)}")
    place.mkdir(mode=0o755)
    yield place
    place.rmdir()


def test_the_user_is_not_only_in_a_group_of_their_own(user: User) -> None:
    assert len(os.getgrouplist(user.name, user.gid)) > 1


def test_what_is_compared_here_did_run_in_a_guest(sandbox: Sandbox, users: list[str], user: User) -> None:
    guest = outcome(sandbox, ["srun", *users, *GUEST, "uname", "-r"], user=user.name)
    assert guest.status == 0
    assert guest.stdout.strip() not in {"", os.uname().release}


def test_a_user_has_the_same_ids_and_groups_by_number_and_by_name(
    sandbox: Sandbox, users: list[str], user: User
) -> None:
    seen = same_as_bare(sandbox, ["id"], options=users, user=user.name)
    assert f"uid={user.uid}({user.name})" in seen.stdout
    assert len(re.findall(r"\d+\(", seen.stdout.partition("groups=")[2])) > 1


def test_root_has_the_same_ids_and_groups_by_number_and_by_name(sandbox: Sandbox, roots: list[str]) -> None:
    assert same_as_bare(sandbox, ["id"], options=roots).stdout.startswith("uid=0(root) gid=0(root)")


def test_a_job_submitted_under_another_group_keeps_it(sandbox: Sandbox, user: User) -> None:
    other = max(gid for gid in os.getgrouplist(user.name, user.gid) if gid != user.gid)
    as_other = ["setpriv", f"--reuid={user.uid}", f"--regid={other}", "--init-groups", "--"]
    options = ["-N1", "-n1", "--mem=1024"]
    bare = outcome(sandbox, [*as_other, "srun", *options, "id"], cwd=user.home)
    guest = outcome(sandbox, [*as_other, "srun", *options, *GUEST, "id"], cwd=user.home)
    assert guest == bare
    assert f"gid={other}(" in guest.stdout


def test_names_home_and_shell_are_known_in_the_guest(sandbox: Sandbox, users: list[str], user: User) -> None:
    script = """
        id -un; id -gn; eval echo ~ ~$(id -un) $HOME
        getent passwd $(id -u) | cut -d: -f1,3,4,6,7; getent group $(id -G)
    """
    seen = same_as_bare(sandbox, ["bash", "-c", script], options=users, user=user.name)
    assert seen.stdout.splitlines()[2] == f"{user.home} {user.home} {user.home}"


def test_roots_name_and_home_are_known_in_the_guest(sandbox: Sandbox, roots: list[str]) -> None:
    script = "id -un; id -gn; echo ~ ~root; getent passwd 0 | cut -d: -f1,3,4,6"
    same_as_bare(sandbox, ["bash", "-c", script], options=roots)


def test_the_environment_is_the_same_byte_for_byte(sandbox: Sandbox, users: list[str], user: User) -> None:
    odd = {
        "ODD_BLANKS": "  two  words  ",
        "ODD_LINES": "one\ntwo\n",
        "ODD_SIGNS": "\"'`$(id)\\;&|<>*?~#!=",
        "ODD_BYTES": "Grüße\udcff",
        "ODD_EMPTY": "",
        "BASH_FUNC_greet%%": "() {  echo hello\n}",
        "LD_LIBRARY_PATH": "/nonexistent/lib",
    }
    seen = [
        sorted(
            entry
            for entry in outcome(sandbox, [*command, "env", "-0"], user=user.name, env=odd).stdout.split("\0")
            if not DIFFERS_FROM_STEP_TO_STEP.match(entry)
        )
        for command in (["srun", *users], ["srun", *users, *GUEST])
    ]
    assert seen[0] == seen[1]
    assert {f"{name}={value}" for name, value in odd.items() if name != "ODD_BYTES"} <= set(seen[0])


def test_a_step_that_exports_only_what_it_names_exports_nothing_else(
    sandbox: Sandbox, users: list[str], user: User
) -> None:
    script = 'echo "$WANTED/$UNWANTED"'
    seen = same_as_bare(
        sandbox,
        ["bash", "-c", script],
        options=[*users, "--export=WANTED,PATH"],
        user=user.name,
        env={"WANTED": "here", "UNWANTED": "gone"},
    )
    assert seen.stdout == "here/\n"


def test_the_working_directory_is_there_with_its_files(
    sandbox: Sandbox, user: User, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = Path(f"/srv/carrel-test-{secrets.token_hex(4)}/a b/ü")
    place.mkdir(parents=True)
    os.chown(place, user.uid, user.gid)
    try:
        (place / "given").write_text("from the host\n")
        script = "pwd; cat given; echo from the task > made; stat -c '%u %g %a' made"
        seen = same_as_bare(
            sandbox, ["sh", "-c", script], options=["-N1", "-n1", "--mem=1024"], user=user.name, cwd=place
        )
        assert seen.stdout.splitlines() == [str(place), "from the host", f"{user.uid} {user.gid} 644"]
        assert (place / "made").read_text() == "from the task\n"
    finally:
        run(["rm", "-r", str(place.parents[1])])


def test_a_directory_that_the_guest_lacks_is_said_in_slurms_own_sentence(
    sandbox: Sandbox, users: list[str], user: User, elsewhere: Path
) -> None:
    sentence = f"couldn't chdir to `{elsewhere}': No such file or directory: going to /tmp instead"
    guest = outcome(sandbox, ["srun", *users, *GUEST, f"--chdir={elsewhere}", "pwd"], user=user.name)
    elsewhere.rmdir()
    bare = outcome(sandbox, ["srun", *users, f"--chdir={elsewhere}", "pwd"], user=user.name)
    elsewhere.mkdir()
    assert (guest.status, guest.stdout) == (bare.status, bare.stdout) == (0, "/tmp\n")
    # slurmstepd says it once for itself and once for the task; here only the task has the directory not.
    assert guest.stderr.splitlines() == bare.stderr.splitlines()[:1]
    assert sentence in guest.stderr


@pytest.mark.parametrize("mask", [0o000, 0o027, 0o077])
def test_the_umask_is_the_callers(sandbox: Sandbox, users: list[str], user: User, mask: int) -> None:
    script = "umask; cd $(mktemp -d) && touch file && stat -c %a file"
    command = ["sh", "-c", f'umask {mask:o}; exec srun "$@"', "sh", *users]
    bare = outcome(sandbox, [*command, "sh", "-c", script], user=user.name)
    guest = outcome(sandbox, [*command, *GUEST, "sh", "-c", script], user=user.name)
    assert guest == bare
    assert guest.stdout.split() == [f"{mask:04o}", f"{0o666 & ~mask:o}"]


def test_limits_are_those_of_the_node(sandbox: Sandbox, users: list[str], user: User) -> None:
    same_as_bare(sandbox, ["bash", "-c", "ulimit -Sa; ulimit -Ha"], options=users, user=user.name)


def test_limits_that_the_caller_lowered_are_lower_in_the_guest(sandbox: Sandbox, users: list[str], user: User) -> None:
    lower = "ulimit -Sn 1234; ulimit -Sc 0; ulimit -Sf 2048; ulimit -Ss 4096; ulimit -Su 500"
    options = [*users, "--propagate=NOFILE,CORE,FSIZE,STACK,NPROC"]
    command = ["bash", "-c", f'{lower}; exec srun "$@"', "bash", *options]
    show = ["bash", "-c", "ulimit -Sn -Sc -Sf -Ss -Su"]
    bare = outcome(sandbox, [*command, *show], user=user.name)
    guest = outcome(sandbox, [*command, *GUEST, *show], user=user.name)
    assert guest == bare
    assert [line.split()[-1] for line in guest.stdout.splitlines()] == ["1234", "0", "2048", "4096", "500"]
