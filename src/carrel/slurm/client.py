"""Slurm through its own commands, as text: cheap for a cluster of any size, and the same in every release.

A user chooses a job's name, account and comment, line ends included, so a line of ``squeue`` or a word of
``scontrol`` can be forged by whoever submits. What decides anything is therefore read only from fields that no
user writes (numbers, states, node names); what users write is fetched apart and only shown.

Every question has three answers: here it is, Slurm has none, and ``UnreachableError``: cannot tell.
"""

import asyncio
import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import msgspec

from carrel import process
from carrel.config import Slurm
from carrel.errors import CarrelError, RefusedError, UnreachableError
from carrel.model.access import Associations
from carrel.model.job import Job, JobKey, JobState
from carrel.process import CommandError
from carrel.slurm import hostlist, people

ANSWER_TIMEOUT_S = 10.0
"""How long Slurm may take; slurmctld answers in milliseconds, or is busy, or is gone."""

SEPARATOR = "|"
SAFE_FIELDS = (
    *("JobID", "UserID", "GroupID", "State", "RestartCnt", "SubmitTime", "TimeLimit", "PriorityLong"),
    *("NodeList", "UserName", "Partition", "ArrayJobID", "ArrayTaskID"),
)
"""No user can write into these, so a line of them cannot be forged."""

_EPOCH = {"SLURM_TIME_FORMAT": "%s"}
"""Times as seconds since the epoch, whatever the time zone (squeue and scontrol, since 2.6)."""

_NO_SUCH_JOB = "Invalid job id specified"
_LIVING: dict[str, JobState] = {
    "PENDING": "pending",
    "CONFIGURING": "running",
    "RUNNING": "running",
    "RESIZING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "STOPPED": "suspended",
    "SUSPENDED": "suspended",
    "REQUEUED": "pending",
    "REQUEUE_FED": "pending",
    "REQUEUE_HOLD": "held",
    "RESV_DEL_HOLD": "held",
    "SPECIAL_EXIT": "held",
}
"""Slurm's states in which a run goes on or will. All others mean that it has ended, COMPLETING among them."""

_HERE = re.compile(r"\bNodes=(\S+) CPU_IDs=([\d,-]*) Mem=(\d+) GRES=(\S*)")
_STDOUT = re.compile(r" StdOut=(.*?)(?= [A-Za-z/]+[=:]|\s*$)", re.MULTILINE)
_GPUS = re.compile(r"\bgpu(?::[^:,()]+)?(?::\d+)?\(IDX:([\d,-]+)\)")


class SlurmClient:
    """``ports.Scheduler`` on a real Slurm, seen from ``node``, or from the whole cluster where that is None."""

    def __init__(self, slurm: Slurm, node: str | None = None, *, cluster: str = "") -> None:
        """Ask nothing yet: Slurm may come up after us. The cluster's name is asked for where it is not given."""
        self._slurm = slurm
        self._node = node
        self._cluster = cluster

    async def jobs(self) -> Sequence[Job]:
        """Return the jobs that Slurm has not finished with: pending to completing; on this node, where one is given.

        A job that is completing is ``ended`` with ``slurm_state`` COMPLETING: its processes may still be running,
        until the epilog of this node has run.
        """
        where = ["-w", self._node] if self._node else []
        text = await self.ask("squeue", "-h", "-a", "-t", "all", *where, "-O", field_format(SAFE_FIELDS))
        cluster = await self.cluster()
        jobs = (parsed(line, cluster) for line in text.splitlines())
        return [job for job in jobs if job.state != "ended" or job.slurm_state == "COMPLETING"]

    async def job(self, job_id: int) -> Job | None:
        """Return one job, an ended one while Slurm keeps it; with a node, also its CPUs and memory there."""
        cluster = await self.cluster()
        answers = await asyncio.gather(
            self.ask("squeue", "-h", "-a", "-t", "all", "-j", str(job_id), "-O", field_format(SAFE_FIELDS)),
            self.ask("scontrol", "show", "job", "-d", "-o", str(job_id)),
            return_exceptions=True,  # both are let end: a cancelled one would leave its process behind
        )
        if any(isinstance(answer, _NoSuchJobError) for answer in answers):
            return None
        lines, details = (_text(answer) for answer in answers)
        jobs = [parsed(line, cluster) for line in lines.splitlines()]
        found = next((job for job in jobs if job.key.job_id == job_id), None)
        if found is None or self._node is None or found.state not in ("running", "suspended"):
            return found
        if len(jobs) > 1:
            details = await self._details_of_one(job_id)
        cpus, memory_bytes, gpus = _allocated(details, self._node, job_id)
        return msgspec.structs.replace(found, cpus=cpus, memory_bytes=memory_bytes, gpus=gpus)

    async def _details_of_one(self, job_id: int) -> str:
        """Return what Slurm says of this job alone: an array's last task has the id that all are listed under."""
        fields = field_format(("JobID", "ArrayTaskID", "HetJobOffset"))
        text = await self.ask("squeue", "-h", "-a", "-t", "all", "-j", str(job_id), "-O", fields)
        name = str(job_id)
        for line in text.splitlines():
            listed, task, component, *_ = f"{line}{SEPARATOR * 3}".split(SEPARATOR)
            if listed == str(job_id):
                name += f"_{task}" if task.isdigit() else f"+{component}" if component.isdigit() else ""
        return await self.ask("scontrol", "show", "job", "-d", "-o", name)

    async def output(self, job_id: int) -> str:
        """Return the file that a batch job's output goes to; empty: it is no batch job, or Slurm has forgotten it.

        Its owner chose it, and may have forged more than its name: it is for a process with the owner's rights only.

        Raises:
            UnreachableError: Slurm did not answer.
        """
        try:
            details = await self._details_of_one(job_id)
        except _NoSuchJobError:
            return ""
        found = _STDOUT.findall(details)
        return found[-1] if found and " BatchFlag=1 " in details else ""

    async def described(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """Return ``jobs`` with names and accounts, for people: users write these, so nothing is decided on them."""
        if not jobs:
            return jobs
        ids = ",".join(str(job.key.job_id) for job in jobs) if len(jobs) <= 10 else ""
        only = ["-j", ids] if ids else []
        try:
            text = await self.ask("squeue", "-h", "-a", "-t", "all", *only, "-o", f"%A{SEPARATOR}%a{SEPARATOR}%j")
        except _NoSuchJobError:
            return jobs
        words = {int(line[0]): (line[1], line[2]) for line in _split(text) if line[0].isdigit()}
        return [
            msgspec.structs.replace(
                job, account=words[job.key.job_id][0].replace("(null)", ""), name=words[job.key.job_id][1]
            )
            if job.key.job_id in words
            else job
            for job in jobs
        ]

    async def drain(self, node: str, reason: str) -> None:
        """Take the node out of scheduling. Already out, by us or an administrator: its reason stays as it is."""
        state = await self.ask("sinfo", "-h", "-a", "-N", "-n", node, "-o", "%T")
        if "drain" not in state:
            await self.ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}")

    async def requeue(self, job_id: int) -> None:
        """Give the job back to the queue; a job that waits, or is gone, is left alone.

        Raises:
            RefusedError: it may not be requeued: interactive, or submitted with --no-requeue.
        """
        try:
            await self.ask("scontrol", "requeue", str(job_id))
        except _NoSuchJobError:
            return
        except UnreachableError as error:
            said = str(error)
            if "pending execution" in said or "already" in said:
                return
            if "disabled" in said or "batch jobs" in said:
                raise RefusedError(f"job {job_id}: Slurm does not requeue it (interactive, or --no-requeue)") from error
            raise

    async def hold(self, job_id: int, mark: str) -> None:
        """Keep a waiting job from starting; its user cannot release it. One that is gone is left alone."""
        with contextlib.suppress(_NoSuchJobError):
            await self.ask("scontrol", "update", f"JobId={job_id}", f"AdminComment={mark}", "Priority=0")

    async def release(self, job_id: int, mark: str) -> None:
        """Let a held job start; one that runs or is gone is left alone."""
        with contextlib.suppress(_NoSuchJobError):
            await self.ask("scontrol", "update", f"JobId={job_id}", f"AdminComment={mark}")
            await self.ask("scontrol", "release", str(job_id))

    async def addresses(self) -> dict[str, str]:
        """Return each node's address as Slurm uses it (``NodeAddr``)."""
        text = await self.ask("sinfo", "-h", "-a", "-N", "-O", field_format(("NodeList", "NodeAddr")))
        return dict(line.split(SEPARATOR)[:2] for line in text.splitlines() if SEPARATOR in line)

    async def settings(self) -> dict[str, str]:
        """Return Slurm's configuration in force: ``scontrol show config``."""
        text = await self.ask("scontrol", "show", "config")
        pairs = (line.partition("=") for line in text.splitlines())
        return {key.strip(): value.strip() for key, separator, value in pairs if separator}

    async def associations(self) -> Associations | None:
        """Return what Slurm's accounting says of people; None: this Slurm keeps no accounting.

        Raises:
            UnreachableError: slurmdbd did not answer.
        """
        settings = await self.settings()
        if settings.get("AccountingStorageType") != "accounting_storage/slurmdbd":
            return None
        show = ("sacctmgr", "-n", "-P", "show")
        said = await asyncio.gather(
            self.ask(*show, "assoc", f"cluster={settings.get('ClusterName', '')}", people.ASSOC_FORMAT),
            self.ask(*show, "account", "WithCoord", people.ACCOUNT_FORMAT),
            self.ask(*show, "user", people.USER_FORMAT),
        )
        return people.parse(*said)

    async def cluster(self) -> str:
        """Return the cluster's name; asked once, as it never changes while a slurmctld lives.

        Raises:
            UnreachableError: Slurm did not say. Without it no run could be told from an ended one.
        """
        if not self._cluster:
            self._cluster = (await self.settings()).get("ClusterName", "")
            if not self._cluster:
                raise UnreachableError("slurm did not name its cluster; see: scontrol show config")
        return self._cluster

    @cached_property
    def _env(self) -> dict[str, str]:
        return _EPOCH | ({"SLURM_CONF": self._slurm.conf} if self._slurm.conf else {})

    async def ask(self, *words: str) -> str:
        command = [str(Path(self._slurm.bin_dir) / words[0]), *words[1:]]
        try:
            return await process.run_async(command, timeout_s=ANSWER_TIMEOUT_S, env=self._env)
        except CommandError as error:
            if _NO_SUCH_JOB in error.stderr:
                raise _NoSuchJobError(str(error)) from error
            raise UnreachableError(f"slurm did not answer: {error}") from error


class _NoSuchJobError(CarrelError):
    """Slurm answered: it has no such job."""


def _text(answer: str | BaseException) -> str:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def field_format(fields: Sequence[str]) -> str:
    """A suffix in place of a width keeps squeue from cutting the field at 20 characters."""
    return ",".join(f"{field}:{SEPARATOR}" for field in fields)


def _split(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        words = line.split(SEPARATOR, 2)
        if len(words) == 3:
            yield words


def parsed(line: str, cluster: str) -> Job:
    words = line.split(SEPARATOR)
    if len(words) != len(SAFE_FIELDS) + 1:
        raise UnreachableError(
            f"squeue answered {line!r}, not {len(SAFE_FIELDS)} fields; is it from Slurm 22.05 or later?"
        )
    fields = dict(zip(SAFE_FIELDS, words, strict=False))
    task = fields["ArrayTaskID"]
    return Job(
        key=JobKey(
            cluster=cluster,
            job_id=int(fields["JobID"]),
            submit_s=int(fields["SubmitTime"]),
            restart=int(fields["RestartCnt"]),
        ),
        state=state(fields["State"], int(fields["PriorityLong"])),
        user=fields["UserName"],
        uid=int(fields["UserID"]),
        gid=int(fields["GroupID"]),
        partition=fields["Partition"],
        nodes=hostlist.expand(fields["NodeList"]),
        time_limit_s=seconds(fields["TimeLimit"]),
        # Tasks that wait are one job with a list of them.
        array_job_id=int(fields["ArrayJobID"]) if task.isdecimal() else 0,
        array_task_id=int(task) if task.isdecimal() else None,
        slurm_state=fields["State"],
    )


def state(word: str, priority: int) -> JobState:
    """Return what a word of squeue means; a job that waits with priority 0 is held."""
    found = _LIVING.get(word, "ended")
    if found == "pending" and priority == 0:
        return "held"
    return found


def seconds(limit: str) -> int | None:
    """Read ``days-hours:minutes:seconds``, shorter where the days or hours are 0; None: no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _allocated(details: str, node: str, job_id: int) -> tuple[int, int, tuple[int, ...]]:
    """Return (CPUs, bytes of memory, GPUs) on ``node`` from ``scontrol show job -d``; memory 0: not limited.

    Slurm names each node once. A second line for ours was written by the user, into the job's name or such, and
    which of the two is Slurm's cannot be told.
    """
    lines = [match for match in _HERE.finditer(details) if node in hostlist.expand(match[1])]
    if len(lines) > 1:
        raise RefusedError(
            f"job {job_id}: its name, account or comment imitates Slurm's output (Nodes=… CPU_IDs=…); rename it"
        )
    if not lines:
        return 0, 0, ()
    cpus = sum(len(_span(item)) for item in lines[0][2].split(",") if item)
    gpus = {gpu for numbers in _GPUS.findall(lines[0][4]) for item in numbers.split(",") if item for gpu in _span(item)}
    return cpus, int(lines[0][3]) * 2**20, tuple(sorted(gpus))


def _span(item: str) -> range:
    first, _, last = item.partition("-")
    return range(int(first), int(last or first) + 1)
