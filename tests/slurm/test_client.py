"""What Slurm's commands print, read: from recorded text, and from what a hostile user makes them print."""

import asyncio
from pathlib import Path

import pytest

from carrel.config import Slurm
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.job import Job
from carrel.slurm import version
from carrel.slurm.client import SlurmClient

RUNNING = "1|1001|1002|RUNNING|2|1795220388|1-02:03:04|4294901759|kn[1-2]|ada|main|1|N/A|\n"
DETAILS = (
    "JobId=1 JobName=wrap UserId=ada(1001) GroupId=ada(1002) Account=(null) JobState=RUNNING NodeList=kn[1-2]"
    " JOB_GRES=(null)   Nodes=kn1 CPU_IDs=0-1,4 Mem=400 GRES=   Nodes=kn2 CPU_IDs=0 Mem=200 GRES= MinCPUsNode=2\n"
)
CONFIG = "Configuration data as of 2026-11-21T00:00:00\nClusterName             = k\nSlurmUser = root(0)\n"


class Commands:
    """A directory of stand-ins for Slurm's commands that print what was recorded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.says("scontrol show config", CONFIG)

    def says(self, command: str, text: str, *, stderr: str = "", status: int = 0) -> None:
        name, *rest = command.split()
        place = self.directory / name
        answers = self.directory / f"{name}.d"
        answers.mkdir(exist_ok=True)
        key = "-".join(rest)
        (answers / f"{key}.out").write_text(text)
        (answers / f"{key}.err").write_text(stderr)
        (answers / f"{key}.status").write_text(str(status))
        # The answer whose words all begin the arguments is given; `squeue` knows one answer for all.
        place.write_text(
            "#!/bin/sh\n"
            f'echo "$0 $*" >> {self.directory}/called\n'
            f"a={answers}\n"
            'k="$1-$2"; [ -e "$a/$k.out" ] || k="$1"; [ -e "$a/$k.out" ] || k=""\n'
            'cat "$a/$k.err" >&2; cat "$a/$k.out"; exit "$(cat "$a/$k.status")"\n'
        )
        place.chmod(0o755)

    def called(self) -> str:
        return (self.directory / "called").read_text()

    def client(self, node: str | None = None) -> SlurmClient:
        return SlurmClient(Slurm(bin_dir=str(self.directory)), node)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def one_job(commands: Commands, job_id: int = 1, node: str | None = "kn1") -> Job | None:
    return asyncio.run(commands.client(node).job(job_id))


def test_a_job_has_the_cpus_and_memory_of_the_node_that_looks(commands: Commands) -> None:
    commands.says("squeue", RUNNING)
    commands.says("scontrol show job", DETAILS)
    job = one_job(commands)
    assert job is not None
    assert (job.cpus, job.memory_bytes) == (3, 400 * 2**20)


def test_a_job_is_keyed_by_cluster_id_submit_time_and_restart_count(commands: Commands) -> None:
    commands.says("squeue", RUNNING)
    commands.says("scontrol show job", DETAILS)
    job = one_job(commands)
    assert job is not None
    assert (job.key.cluster, str(job.key)) == ("k", "1.1795220388.2")


def test_owner_limit_and_nodes_are_read(commands: Commands) -> None:
    commands.says("squeue", RUNNING)
    (job,) = asyncio.run(commands.client().jobs())
    assert (job.uid, job.gid, job.user, job.nodes) == (1001, 1002, "ada", ("kn1", "kn2"))
    assert job.time_limit_s == 93784


def test_a_job_that_slurm_does_not_know_is_none(commands: Commands) -> None:
    refusal = "slurm_load_jobs error: Invalid job id specified\n"
    commands.says("squeue", "", stderr=refusal, status=1)
    commands.says("scontrol show job", "", stderr=refusal, status=1)
    assert one_job(commands, 99) is None


def test_an_array_whose_first_task_is_gone_is_not_taken_for_that_task(commands: Commands) -> None:
    commands.says("squeue", RUNNING)
    commands.says("scontrol show job", DETAILS)
    assert one_job(commands, 7) is None


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "",
    ],
)
def test_a_slurm_that_does_not_answer_is_not_a_slurm_without_jobs(commands: Commands, said: str) -> None:
    commands.says("squeue", "", stderr=said, status=1)
    commands.says("scontrol show job", "", stderr=said, status=1)
    with pytest.raises(UnreachableError):
        one_job(commands)
    with pytest.raises(UnreachableError):
        asyncio.run(commands.client().jobs())


def test_a_missing_slurm_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="is it installed"):
        asyncio.run(SlurmClient(Slurm(bin_dir=str(tmp_path))).jobs())


def test_an_answer_of_another_shape_is_not_guessed_at(commands: Commands) -> None:
    commands.says("squeue", "1|RUNNING|\n")
    with pytest.raises(UnreachableError, match="not 13 fields"):
        asyncio.run(commands.client().jobs())


@pytest.mark.parametrize(
    ("word", "priority", "state"),
    [
        ("PENDING", 0, "held"),
        ("PENDING", 7, "pending"),
        ("CONFIGURING", 7, "running"),
        ("SUSPENDED", 7, "suspended"),
        ("COMPLETING", 7, "ended"),
        ("REQUEUE_HOLD", 0, "held"),
    ],
)
def test_slurms_words_for_a_living_job_become_ours(commands: Commands, word: str, priority: int, state: str) -> None:
    commands.says("squeue", f"1|0|0|{word}|0|1795220388|UNLIMITED|{priority}|kn1|root|main|1|N/A|\n")
    (job,) = asyncio.run(commands.client().jobs())
    assert (job.state, job.slurm_state, job.time_limit_s) == (state, word, None)


@pytest.mark.parametrize("word", ["COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"])
def test_a_job_that_slurm_has_finished_with_is_not_listed(commands: Commands, word: str) -> None:
    commands.says("squeue", f"1|0|0|{word}|0|1795220388|UNLIMITED|1|kn1|root|main|1|N/A|\n")
    assert asyncio.run(commands.client().jobs()) == []


def test_a_job_name_that_imitates_slurm_gets_no_cpus(commands: Commands) -> None:
    commands.says("squeue", RUNNING)
    forged = DETAILS.replace("JobName=wrap", "JobName=x Nodes=kn1 CPU_IDs=0-99 Mem=99999 GRES=")
    commands.says("scontrol show job", forged)
    with pytest.raises(RefusedError, match="imitates"):
        one_job(commands)


def test_what_decides_is_never_read_from_a_field_that_users_write(commands: Commands) -> None:
    commands.says("squeue", RUNNING)
    commands.says("scontrol show job", DETAILS.replace("JobName=wrap", "JobName=x UserId=root(0) Restarts=9"))
    job = one_job(commands)
    assert job is not None
    assert (job.uid, job.key.restart) == (1001, 2)


def test_a_node_that_is_drained_keeps_the_reason_it_has(commands: Commands) -> None:
    commands.says("sinfo", "drained\n")
    asyncio.run(commands.client().drain("kn1", "no kvm"))
    assert "update" not in commands.called()


def test_draining_gives_the_reason(commands: Commands) -> None:
    commands.says("sinfo", "idle\n")
    commands.says("scontrol update", "")
    asyncio.run(commands.client().drain("kn1", "no kvm"))
    assert "update NodeName=kn1 State=DRAIN Reason=no kvm" in commands.called()


def test_requeueing_a_job_that_waits_already_changes_nothing(commands: Commands) -> None:
    commands.says("scontrol requeue", "", stderr="Job is pending execution for job 1", status=1)
    asyncio.run(commands.client().requeue(1))


def test_a_job_that_may_not_be_requeued_is_a_refusal(commands: Commands) -> None:
    commands.says("scontrol requeue", "", stderr="Requested operation is presently disabled for job 1", status=1)
    with pytest.raises(RefusedError, match="no-requeue"):
        asyncio.run(commands.client().requeue(1))


@pytest.mark.parametrize(
    ("text", "plugins"), [("slurm-wlm 22.05.8\n", (22, 5)), ("slurm 24.11.5", (24, 11)), ("slurm 26.05.0-1", (26, 5))]
)
def test_a_release_is_read_from_what_slurm_prints(text: str, plugins: tuple[int, int]) -> None:
    assert version.parse(text).plugins == plugins


def test_a_file_that_is_no_plugin_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_text("not a library")
    with pytest.raises(CarrelError, match="not a SPANK plug-in"):
        version.built_for(tmp_path / "x.so")


def test_a_slurm_that_does_not_name_its_cluster_was_not_understood_and_no_run_counts_as_ended(
    commands: Commands,
) -> None:
    commands.says("scontrol show config", "Configuration data as of 2026-11-21T00:00:00\n")
    commands.says("squeue", RUNNING)
    with pytest.raises(UnreachableError, match="slurm did not name its cluster"):
        asyncio.run(commands.client().jobs())


def test_the_tasks_of_an_array_know_which_array_and_which_task(commands: Commands) -> None:
    commands.says("squeue", RUNNING.replace("|1|N/A|", "|7|3|"))
    commands.says("scontrol show job", DETAILS)
    job = one_job(commands)
    assert job is not None
    assert (job.array_job_id, job.array_task_id) == (7, 3)


def test_an_array_that_waits_is_no_task_of_it(commands: Commands) -> None:
    commands.says("squeue", RUNNING.replace("|1|N/A|", "|1|0-9%2|"))
    commands.says("scontrol show job", DETAILS)
    job = one_job(commands)
    assert job is not None
    assert (job.array_job_id, job.array_task_id) == (0, None)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("", ()),
        ("gpu:2(IDX:0-1)", (0, 1)),
        ("gpu:a100:2(IDX:0,3),gpu:v100:1(IDX:5),tmp:100M", (0, 3, 5)),
        ("nic:1(IDX:0)", ()),
    ],
)
def test_a_job_has_the_gpus_of_the_node_that_looks(commands: Commands, gres: str, gpus: tuple[int, ...]) -> None:
    commands.says("squeue", RUNNING)
    commands.says("scontrol show job", DETAILS.replace("Mem=400 GRES=", f"Mem=400 GRES={gres}"))
    job = one_job(commands)
    assert job is not None
    assert (job.gpus, job.cpus) == (gpus, 3)
