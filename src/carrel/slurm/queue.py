"""Slurm's queue as the bank needs it: every run, with what it was given, how long it ran, and who pays.

The account is a word that a user may choose freely where Slurm checks no accounts. So the fields are parted by a word
made anew for each question, which nobody can have written into an answer.
"""

import re
import secrets
from collections.abc import Sequence

from carrel import process
from carrel.config import Slurm
from carrel.errors import UnreachableError
from carrel.model.job import JobKey
from carrel.model.run import Seen
from carrel.process import CommandError
from carrel.slurm import client, sbatch
from carrel.slurm.facts import tres

_FIELDS = (
    *("JobID", "ArrayJobID", "ArrayTaskID", "UserName", "State", "RestartCnt", "SubmitTime", "StartTime", "EndTime"),
    *(
        "TimeUsed",
        "TimeLimit",
        "Partition",
        "QOS",
        "tres-alloc",
        "PriorityLong",
        "NodeList",
        "NumTasks",
        "admin_comment",
    ),
    "Account",
)
_ANSWER_TIMEOUT_S = 10.0


async def look(slurm: Slurm, *, cluster: str) -> list[Seen]:
    """Return all runs that slurmctld knows, those that ended among them while it keeps them (``MinJobAge``).

    Raises:
        UnreachableError: it did not answer, or not in words that we know.
    """
    part = f"|{secrets.token_hex(6)}|"
    form = ",".join(f"{field}:{part}" for field in _FIELDS)
    try:
        text = await process.run_async(
            [f"{slurm.bin_dir}/squeue", "-h", "-a", "-t", "all", "-O", form],
            timeout_s=_ANSWER_TIMEOUT_S,
            env=environment(slurm),
        )
    except CommandError as error:
        raise UnreachableError(f"slurm did not answer: {error}") from error
    return read(text, part=part, cluster=cluster)


def environment(slurm: Slurm) -> dict[str, str]:
    """Return the variables for Slurm's commands: times as seconds since the epoch, whatever the time zone."""
    return {"SLURM_TIME_FORMAT": "%s"} | ({"SLURM_CONF": slurm.conf} if slurm.conf else {})


def read(text: str, *, part: str, cluster: str) -> list[Seen]:
    """Read what squeue printed; a line that does not have all fields is left out, since a user broke it in two."""
    rows = (line.split(part) for line in text.splitlines())
    return [_seen(row, cluster) for row in rows if len(row) == len(_FIELDS) + 1]


def _seen(row: Sequence[str], cluster: str) -> Seen:
    field = dict(zip(_FIELDS, row, strict=False))
    state = client.state(field["State"], int(field["PriorityLong"]))
    tasks = field["ArrayTaskID"]
    restart = int(field["RestartCnt"])
    waits = tasks != "N/A" and state in {"pending", "held"} and restart == 0
    begun = state not in {"pending", "held"}
    return Seen(
        key=JobKey(cluster=cluster, job_id=int(field["JobID"]), submit_s=int(field["SubmitTime"]), restart=restart),
        state=state,
        slurm_state=field["State"],
        user=field["UserName"],
        account=field["Account"].removeprefix("(null)"),
        array_job_id=int(field["ArrayJobID"]) if tasks != "N/A" else 0,
        waiting_tasks=_count(tasks) if waits else 0,
        partitions=tuple(field["Partition"].split(",")),
        qos=field["QOS"].replace("(null)", "").removeprefix("N/A"),
        resources=resources(field["tres-alloc"]),
        limit_s=client.seconds(field["TimeLimit"]),
        start_s=_epoch(field["StartTime"]) if begun else 0,
        end_s=_epoch(field["EndTime"]) if begun else 0,
        elapsed_s=client.seconds(field["TimeUsed"]) or 0,
        placed=field["NodeList"] not in {"", "(null)"},
        tasks=int(field["NumTasks"]) if field["NumTasks"].isdigit() else 1,
        mark=field["admin_comment"].replace("(null)", ""),
    )


def resources(text: str) -> dict[str, int]:
    """Return TRES that may have a price; what cannot be counted is left out.

    >>> resources("cpu=2,mem=1G,node=1,billing=2,energy=18446744073709551614")
    {'cpu': 2, 'mem': 1024, 'node': 1}
    """
    if text in {"", "(null)", "N/A"}:
        return {}
    words = [word for word in text.split(",") if not word.startswith(("billing=", "energy=", "vmem=", "pages=", "fs/"))]
    return tres(",".join(words))


def _count(tasks: str) -> int:
    """Count the tasks of ``1-3,7%2``; squeue shortens a long list with ``...``, which then counts as one each."""
    spec = re.sub(r",?\.\.\.", "", tasks)
    return sbatch.array(spec)[0] if spec else 1


def _epoch(text: str) -> int:
    return int(text) if text.isdigit() else 0
