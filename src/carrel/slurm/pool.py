"""Guests that are nodes, as Slurm sees them: looked at as text, changed by ``scontrol``.

Slurm's answer to a change is not believed: of a job in a partition without a usable node, every change is refused in
words and made in fact (22.05). What a deed did, the next look shows.
"""

import re
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from carrel import process
from carrel.config import Slurm
from carrel.errors import UnreachableError
from carrel.model.guest import GuestRequest
from carrel.model.job import Job, JobKey
from carrel.model.pool import Look, PoolJob, PoolNode, Reservation, Wish, run_of_reservation
from carrel.process import CommandError
from carrel.slurm import client, hostlist
from carrel.slurm.client import ANSWER_TIMEOUT_S, SlurmClient

_FIELDS = ("tres", "Dependency", "Reservation", "Reason", "StartTime")
"""Beside the client's own: no user writes into these either, a reservation's name must exist."""
_NODES_KEPT_S = 60.0

_WISH = re.compile(r"\bAdminComment=(?:bank=[^;\s]*;(?:held;)?)?carrel:(\S+)")
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


class SlurmPool:
    """One partition whose nodes are guests."""

    def __init__(self, slurm: Slurm, partition: str) -> None:
        """Ask nothing yet."""
        self._slurm = slurm
        self._partition = partition
        self._client = SlurmClient(slurm)
        self._names: tuple[str, ...] = ()
        self._names_at_s = 0.0
        self._wishes: dict[JobKey, Wish | None] = {}

    async def look(self) -> Look:
        """See everything.

        Raises:
            UnreachableError: Slurm did not answer: nothing is known, and nothing may be concluded.
        """
        jobs = await self._jobs()
        nodes = await self._nodes()
        text = await self._client.ask("scontrol", "-a", "-o", "show", "reservation")
        cluster = await self._client.cluster()
        reservations = {}
        for line in text.splitlines():
            words = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if run_of_reservation(words.get("ReservationName", ""), cluster):
                name = words["ReservationName"]
                found = Reservation(name=name, nodes=hostlist.expand(words["Nodes"]), users=words["Users"])
                reservations[name] = found
        return Look(cluster=cluster, jobs=jobs, nodes=nodes, reservations=reservations)

    async def living(self) -> frozenset[int]:
        """Return the jobs that Slurm has not finished with, in whatever partition.

        Raises:
            UnreachableError: Slurm did not answer.
        """
        jobs = await self._client.jobs()
        return frozenset(number for job in jobs for number in (job.key.job_id, job.array_job_id) if number)

    async def _jobs(self) -> tuple[PoolJob, ...]:
        fields = client.field_format((*client.SAFE_FIELDS, *_FIELDS))
        text = await self._client.ask("squeue", "-h", "-a", "-t", "all", "-p", self._partition, "-O", fields)
        cluster = await self._client.cluster()
        found = []
        for line in text.splitlines():
            words = line.split(client.SEPARATOR)
            split = len(client.SAFE_FIELDS)
            job = client.parsed(client.SEPARATOR.join([*words[:split], ""]), cluster)
            found.append(await self._job(job, words[split:]))
        alive = {job.key for job in found}
        self._wishes = {key: wish for key, wish in self._wishes.items() if key in alive}
        return tuple(found)

    async def _job(self, job: Job, words: Sequence[str]) -> PoolJob:
        tres, dependency, reservation, reason, start = words[: len(_FIELDS)]
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
            wish=await self._wish(job) if job.state != "ended" else self._wishes.get(job.key),
        )

    async def _wish(self, job: Job) -> Wish | None:
        """Return what the job asked for; asked once, as nobody changes it. None: it says nothing."""
        if job.key not in self._wishes:
            text = await self._client.ask("scontrol", "-o", "show", "job", str(job.key.job_id))
            self._wishes[job.key] = parsed_wish(text)
        return self._wishes[job.key]

    async def _nodes(self) -> dict[str, PoolNode]:
        if not self._names or time.monotonic() - self._names_at_s > _NODES_KEPT_S:
            text = await self._client.ask("scontrol", "-a", "-o", "show", "partition", self._partition)
            match = re.search(r" Nodes=(\S+)", text)
            self._names = hostlist.expand(match[1]) if match and match[1] != "(null)" else ()
            self._names_at_s = time.monotonic()
        if not self._names:
            return {}
        text = await self._client.ask("scontrol", "-a", "-o", "show", "node", ",".join(self._names))
        found = (_node(line) for line in text.splitlines() if line.startswith("NodeName="))
        return {node.name: node for node in found}

    # -- deeds: each may be done twice, and what became of it is seen at the next look ---------------------------

    async def hold(self, job_id: int) -> str:
        """Hold the job so that only an administrator can release it."""
        return await self._do("hold", str(job_id))

    async def release(self, job_id: int) -> str:
        return await self._do("release", str(job_id))

    async def start_now(self, job_id: int) -> str:
        """Let a requeued job start at once: Slurm would have it wait for two minutes."""
        return await self._do("update", f"JobId={job_id}", "StartTime=now")

    async def cancel(self, job_id: int) -> str:
        try:
            await self._client.ask("scancel", str(job_id))
        except UnreachableError as error:
            return str(error)
        return ""

    async def tell(self, job_id: int, text: str) -> str:
        """Say why the job waits, where ``squeue -o %k`` shows it; empty: no more. A comment of its owner's stays."""
        try:
            now = await self._client.ask("squeue", "-h", "-a", "-j", str(job_id), "-o", "%k")
        except UnreachableError as error:
            return str(error)
        ours = now.startswith("carrel: ")
        if (now.strip() not in {"", "(null)"} and not ours) or (not text and not ours):
            return ""
        return await self._do("update", f"JobId={job_id}", f"Comment=carrel: {text}" if text else "Comment=")

    async def pin(self, job_id: int, reservation: str) -> str:
        """Let the job run in this reservation and nowhere else; empty: in none."""
        return await self._do("update", f"JobId={job_id}", f"Reservation={reservation}")

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


def parsed_wish(text: str) -> Wish | None:
    """Read the ``admin_comment`` of a job out of ``scontrol show job``; None: it has none of ours.

    A job's name can imitate it: that asks for another guest, which its owner could have asked for anyway.
    """
    match = _WISH.search(text)
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
