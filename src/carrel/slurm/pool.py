"""Guests that are nodes, as Slurm sees them: looked at as text, changed by ``scontrol``.

Slurm's answer to a change is not believed: of a job in a partition without a usable node, every change is refused in
words and made in fact (22.05). What a deed did, the next look shows.
"""

import asyncio
import math
import re
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from carrel import process
from carrel.config import Slurm
from carrel.errors import UnreachableError
from carrel.model.guest import GuestRequest
from carrel.model.job import Job, JobKey
from carrel.model.pool import Look, PoolJob, PoolNode, Reservation, Wish, run_of_reservation
from carrel.process import CommandError
from carrel.slurm import client, hostlist
from carrel.slurm.client import ANSWER_TIMEOUT_S, SlurmClient

_FIELDS = ("tres", "Dependency", "Reservation", "Reason", "StartTime", "EligibleTime", "BatchFlag")
"""Beside the client's own: no user writes into these either, a reservation's name must exist."""
_KEPT_S = 5.0
"""So old may be what is known of the partition and of the limits of arrays, which people change."""

_LIMIT = re.compile(r"JobId=\d+ ArrayJobId=\d+ ArrayTaskId=\S+ ArrayTaskThrottle=(\d+) ")

_WISH = re.compile(r"(?:bank=[^;\s]*;(?:held;)?)?carrel:([^\s|]+)")
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


class SlurmPool:
    """One partition whose nodes are guests."""

    def __init__(self, slurm: Slurm, partition: str) -> None:
        """Ask nothing yet."""
        self._slurm = slurm
        self._partition = partition
        self._client = SlurmClient(slurm)
        self._names: tuple[str, ...] = ()
        self._partition_state = "UP"
        self._partition_at_s = -math.inf
        self._wishes: dict[JobKey, Wish | None] = {}
        self._limits: dict[int, tuple[float, int]] = {}
        """When it was asked how many tasks of an array may run at once, and the answer."""

    async def look(self) -> Look:
        """See everything.

        Raises:
            UnreachableError: Slurm did not answer: nothing is known, and nothing may be concluded.
        """
        cluster = await self._client.cluster()
        # Each is a process of its own, whose start takes longer than slurmctld's answer.
        jobs, nodes, text = await asyncio.gather(
            self._jobs(cluster),
            self.names(),
            self._client.ask("scontrol", "-a", "-o", "show", "reservation"),
        )
        reservations = {}
        for line in text.splitlines():
            words = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if run_of_reservation(words.get("ReservationName", ""), cluster):
                name = words["ReservationName"]
                found = Reservation(name=name, nodes=hostlist.expand(words["Nodes"]), users=words["Users"])
                reservations[name] = found
        return Look(
            cluster=cluster, jobs=jobs, nodes=nodes, reservations=reservations, partition_state=self._partition_state
        )

    async def living(self) -> frozenset[int]:
        """Return the jobs that Slurm has not finished with, in whatever partition.

        Raises:
            UnreachableError: Slurm did not answer.
        """
        jobs = await self._client.jobs()
        return frozenset(number for job in jobs for number in (job.key.job_id, job.array_job_id) if number)

    async def _jobs(self, cluster: str) -> tuple[PoolJob, ...]:
        # One line for each task: without -r, squeue shows tasks that are jobs of their own as if they were none.
        lines = await self._queue((*client.SAFE_FIELDS, *_FIELDS), "-r", "-t", "all")
        split = len(client.SAFE_FIELDS)
        tasks = _tasks(lines)
        found = []
        for line in {line[0]: line for line in reversed(lines)}.values():
            job = _run_of(client.parsed(client.SEPARATOR.join([*line[:split], ""]), cluster), line[split:])
            waiting = tuple(sorted(tasks.get(line[0], ())))
            if waiting:
                job = msgspec.structs.replace(job, array_task_id=waiting[0])
            pool_job = _described(job, line[split:], tasks=waiting)
            wish = await self._wish(pool_job) if job.state != "ended" else self._wishes.get(job.key)
            at_once = await self._at_once(pool_job) if waiting else 0
            found.append(msgspec.structs.replace(pool_job, wish=wish, at_once=at_once))
        alive = {job.key for job in found}
        self._wishes = {key: wish for key, wish in self._wishes.items() if key in alive}
        arrays = {int(array) for array in tasks}
        self._limits = {array: limit for array, limit in self._limits.items() if array in arrays}
        return tuple(found)

    async def _at_once(self, job: PoolJob) -> int:
        """Return how many tasks of this job's array may run at once; 0: all."""
        array = job.job.array_job_id
        at_s, limit = self._limits.get(array, (-math.inf, 0))
        if time.monotonic() - at_s > _KEPT_S:
            # squeue shows the limit (%) only until the first task is a job of its own.
            match = _LIMIT.match(await self._client.ask("scontrol", "-o", "show", "job", job.one))
            at_s, limit = time.monotonic(), int(match[1]) if match else 0
        self._limits[array] = (at_s, limit)
        return limit

    async def _queue(self, fields: Sequence[str], *only: str) -> list[list[str]]:
        """Return the jobs of the partition, each as its fields."""
        form = client.field_format(fields)
        text = await self._client.ask("squeue", "-h", "-a", "-p", self._partition, *only, "-O", form)
        lines = [line.split(client.SEPARATOR) for line in text.splitlines()]
        if odd := next((line for line in lines if len(line) != len(fields) + 1), None):
            raise UnreachableError(f"squeue answered {odd!r}, not {len(fields)} fields; is its release 22.05 or later?")
        return lines

    async def _wish(self, job: PoolJob) -> Wish | None:
        """Return what the job asked for; asked once, as nobody changes it. None: it says nothing."""
        if job.key not in self._wishes:
            form = client.field_format(("admin_comment",))
            text = await self._client.ask("squeue", "-h", "-a", "-r", "-t", "all", "-j", job.one, "-O", form)
            self._wishes[job.key] = parsed_wish(text)
        return self._wishes[job.key]

    async def names(self) -> dict[str, PoolNode]:
        """Return the names of the pool, which may have none.

        Raises:
            UnreachableError: Slurm did not answer, or has no such partition.
        """
        if time.monotonic() - self._partition_at_s > _KEPT_S:
            text = await self._client.ask("scontrol", "-a", "-o", "show", "partition", self._partition)
            words = dict(word.split("=", 1) for word in text.split() if "=" in word)
            self._names = hostlist.expand(words["Nodes"]) if words.get("Nodes", "(null)") != "(null)" else ()
            self._partition_state = words.get("State", "UP")
            self._partition_at_s = time.monotonic()
        if not self._names:
            return {}
        text = await self._client.ask("scontrol", "-a", "-o", "show", "node", ",".join(self._names))
        found = (_node(line) for line in text.splitlines() if line.startswith("NodeName="))
        return {node.name: node for node in found}

    # -- deeds: each may be done twice, and what became of it is seen at the next look ---------------------------

    async def hold(self, job: PoolJob) -> str:
        """Hold the job so that only an administrator can release it."""
        return await self._do("update", f"JobId={job.name}", "Priority=0")

    async def split(self, job: PoolJob, tasks: Sequence[int]) -> str:
        """Make jobs of their own of these tasks; any change does that, and held they are already."""
        each = (f"JobId={job.job.array_job_id}_{task}" for task in tasks)
        return "; ".join(filter(None, [await self._do("update", name, "Priority=0") for name in each]))

    async def release(self, job: PoolJob) -> str:
        return await self._do("release", job.name)

    async def start_now(self, job: PoolJob) -> str:
        """Let a requeued job start at once: Slurm would have it wait for two minutes."""
        return await self._do("update", f"JobId={job.one}", "StartTime=now")

    async def cancel(self, job: PoolJob) -> str:
        try:
            await self._client.ask("scancel", job.name)
        except UnreachableError as error:
            return str(error)
        return ""

    async def tell(self, job: PoolJob, text: str) -> str:
        """Say why the job waits, where ``squeue -o %k`` shows it; empty: no more. A comment of its owner's stays.

        Whoever sits before its srun or salloc reads it there: a job that was cancelled is in no squeue for long.
        """
        if text and not job.batch:  # that command may have gone meanwhile, and then nobody is to be told
            await self._do("notify", job.one, f"carrel: {''.join(filter(str.isprintable, text))}")
        try:
            now = await self._client.ask("squeue", "-h", "-a", "-r", "-j", job.one, "-o", "%k")
        except UnreachableError as error:
            return str(error)
        ours = now.startswith("carrel: ")
        if (now.strip() not in {"", "(null)"} and not ours) or (not text and not ours):
            return ""
        return await self._do("update", f"JobId={job.name}", f"Comment=carrel: {text}" if text else "Comment=")

    async def pin(self, job: PoolJob, reservation: str) -> str:
        """Let the job run in this reservation and nowhere else; empty: in none."""
        return await self._do("update", f"JobId={job.one}", f"Reservation={reservation}")

    async def assign(self, node: str, *, address: str = "", host_name: str = "") -> str:
        """Say on which host the node of this name is, and where it is reached; what is empty stays as it is."""
        words = {"NodeAddr": address, "NodeHostName": host_name}
        return await self._do("update", f"NodeName={node}", *(f"{key}={text}" for key, text in words.items() if text))

    async def reserve(self, name: str, user: str, nodes: Sequence[str]) -> str:
        """Keep these nodes for jobs of ``user`` that name the reservation."""
        return await self._do(
            *("create", "reservation", f"ReservationName={name}", f"Users={user}", f"Nodes={','.join(nodes)}"),
            *("StartTime=now", "Duration=infinite", "Flags=ignore_jobs"),
        )

    async def unreserve(self, name: str) -> str:
        return await self._do("delete", f"ReservationName={name}")

    async def node(self, node: str, state: str, reason: str) -> str:
        """Set a node's state: ``drain``, ``resume``, ``down``, ``power_down_force``."""
        return await self._do("update", f"NodeName={node}", f"State={state}", f"Reason=carrel: {reason}")

    async def _do(self, *words: str) -> str:
        """Return what Slurm said against it, or an empty string."""
        command = [str(Path(self._slurm.bin_dir) / "scontrol"), *words]
        env = {"SLURM_CONF": self._slurm.conf} if self._slurm.conf else {}
        try:
            await process.run_async(command, timeout_s=ANSWER_TIMEOUT_S, env=env)
        except CommandError as error:
            return str(error)
        return ""


def _tasks(lines: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Return, by id of the job that they still are, the tasks of arrays that wait."""
    found: dict[str, list[int]] = {}
    for line in lines:
        known = dict(zip(client.SAFE_FIELDS, line, strict=False))
        task = known["ArrayTaskID"]
        if known["State"] == "PENDING" and known["JobID"] == known["ArrayJobID"] and task.isdecimal():
            found.setdefault(known["JobID"], []).append(int(task))
    return found


def _run_of(job: Job, words: Sequence[str]) -> Job:
    """Return the job as the run that it is done with last: Slurm counts a requeue before the nodes are free."""
    past = run_of_reservation(words[_FIELDS.index("Reservation")], job.key.cluster)
    if job.slurm_state == "COMPLETING" and past is not None and past.job_id == job.key.job_id:
        return msgspec.structs.replace(job, key=past)
    return job


def _described(job: Job, words: Sequence[str], *, tasks: tuple[int, ...]) -> PoolJob:
    tres, dependency, reservation, reason, start, eligible, batch = words[: len(_FIELDS)]
    asked = dict(part.split("=", 1) for part in tres.split(",") if "=" in part)
    # Not of NumNodes: of a job that waits, that is a guess from the CPUs.
    count, cpus = max(1, int(asked.get("node", "1"))), int(asked.get("cpu", "1"))
    memory_bytes = _bytes(asked.get("mem", "0"))
    return PoolJob(
        job=job,
        nodes=count,
        cpus=-(-cpus // count),
        memory_bytes=-(-memory_bytes // count),
        reservation="" if reservation == "(null)" else reservation,
        reason=reason,
        waits_for_others=dependency not in {"", "(null)"},
        started_s=float(start) if start.isdigit() else None,
        begins_s=float(eligible) if eligible.isdigit() else 0.0,
        tasks=tasks,
        batch=batch != "0",
    )


def parsed_wish(text: str) -> Wish | None:
    """Read the ``admin_comment`` of a job, which nobody but administrators writes; None: it is none of ours."""
    match = _WISH.match(text)
    if match is None:
        return None
    words = dict(urllib.parse.parse_qsl(match[1], keep_blank_values=True))
    timeout = words.get("boot_timeout_s", "")
    clone = words.get("clone", "")
    return Wish(
        request=GuestRequest(
            image=words.get("image", ""),
            per="node",
            clone=clone if clone in {"auto", "instant", "linked", "full"} else None,
            driver=words.get("driver", ""),
            mounts=tuple(mount for mount in words.get("mount", "").split("\n") if mount),
            root=words.get("root") == "yes",
            boot_timeout_s=float(timeout) if timeout.isdigit() else None,
        ),
        cwd=words.get("cwd", "/"),
        held_by_user=words.get("held") == "user",
    )


def _bytes(text: str) -> int:
    unit = text[-1] if text[-1] in _UNITS else ""
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


def _node(line: str) -> PoolNode:
    words = dict(word.split("=", 1) for word in line.split() if "=" in word)
    try:
        return PoolNode(
            name=words["NodeName"],
            state=frozenset(words["State"].split("+")),
            address=words.get("NodeAddr", ""),
            host_name=words.get("NodeHostName", ""),
            port=int(words.get("Port", "0")),
        )
    except KeyError as error:
        raise UnreachableError(f"slurm described a node without {error.args[0]}: {line[:80]!r}") from error
