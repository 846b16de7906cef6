"""What slurmdbd keeps of runs that ended: the truth about what they used.

Each run of a job has a record of its own (``-D``): a requeue submits anew, so job id and submission name a run. Of two
that were submitted in one second the earlier did not run for a second, and costs nothing.
"""

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from carrel import process
from carrel.config import Slurm
from carrel.errors import UnreachableError
from carrel.model.run import Used
from carrel.process import CommandError
from carrel.slurm.queue import environment, resources

_FIELDS = (
    *("JobIDRaw", "JobID", "State", "User", "Partition", "QOS", "Submit", "Start", "End", "ElapsedRaw", "AllocTRES"),
    *("AdminComment", "Account"),
)
_ANSWER_TIMEOUT_S = 60.0
_IDS_AT_ONCE = 400
FINAL = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("REQUEUED", "REVOKED", "TIMEOUT"),
    }
)


class Records(NamedTuple):
    """An answer of slurmdbd."""

    ended: list[Used]
    going: set[tuple[int, int]]
    """(job id, submission) of runs that have no end there; one that slurmctld does not know is a runaway."""
    broken: list[str]
    """Lines that could not be read."""


async def of_jobs(slurm: Slurm, job_ids: Iterable[int]) -> Records:
    """Return the records of all runs of these jobs.

    Raises:
        UnreachableError: slurmdbd did not answer.
    """
    found = Records([], set(), [])
    wanted = sorted(set(job_ids))
    for at in range(0, len(wanted), _IDS_AT_ONCE):
        part = await _ask(slurm, "-j", ",".join(map(str, wanted[at : at + _IDS_AT_ONCE])), "-S", _stamp(86400))
        found.ended.extend(part.ended)
        found.going.update(part.going)
        found.broken.extend(part.broken)
    return found


async def since(slurm: Slurm, start_s: int) -> Records:
    """Return the records of all runs that had not ended at this time.

    Raises:
        UnreachableError: slurmdbd did not answer.
    """
    return await _ask(slurm, "-a", "-S", _stamp(start_s))


async def _ask(slurm: Slurm, *which: str) -> Records:
    part = f"|{secrets.token_hex(6)}|"
    command = [f"{slurm.bin_dir}/sacct", "-X", "-D", "-P", "-n", "--noconvert", f"--delimiter={part}"]
    try:
        text = await process.run_async(
            [*command, "-o", ",".join(_FIELDS), *which],
            timeout_s=_ANSWER_TIMEOUT_S,
            env=environment(slurm) | {"TZ": "UTC"},
        )
    except CommandError as error:
        raise UnreachableError(f"slurm's accounting did not answer: {error}") from error
    return read(text, part=part)


def _stamp(time_s: int) -> str:
    """Return a time as sacct reads it; it knows local time alone, and is told that this is UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def read(text: str, *, part: str) -> Records:
    """Read what sacct printed. A line that does not have all fields was broken in two by a user's word in it."""
    found = Records([], set(), [])
    runs: Counter[int] = Counter()
    for row in sorted(_rows(text, part, found.broken), key=lambda row: int(row["Submit"])):
        job_id, submit_s = int(row["JobIDRaw"]), int(row["Submit"])
        state = row["State"].split()[0]
        if state in FINAL and row["End"].isdigit() and _whole(row):
            try:
                found.ended.append(_used(row, state, runs[job_id]))
            except ValueError as error:
                found.broken.append(f"job {job_id}: {error}")
        else:
            found.going.add((job_id, submit_s))
        runs[job_id] += 1
    return found


def _rows(text: str, part: str, broken: list[str]) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        row = dict(zip(_FIELDS, words, strict=True)) if len(words := line.split(part)) == len(_FIELDS) else {}
        if row and row["JobIDRaw"].isdigit() and row["Submit"].isdigit() and row["State"]:
            yield row
        else:
            broken.append(line[:200].replace(part, "|"))


def _whole(row: dict[str, str]) -> bool:
    """Tell whether slurmdbd has all of a run: for a moment it may know the end of one, and not yet its beginning."""
    return bool(row["Partition"]) and (bool(row["AllocTRES"]) or row["ElapsedRaw"] == "0")


def _used(row: dict[str, str], state: str, restart: int) -> Used:
    begun = row["Start"].isdigit()
    return Used(
        job_id=int(row["JobIDRaw"]),
        submit_s=int(row["Submit"]),
        restart=restart,
        array_job_id=int(row["JobID"].partition("_")[0]) if "_" in row["JobID"] else 0,
        state=state,
        user=row["User"],
        account=row["Account"],
        partition=row["Partition"],
        qos=row["QOS"],
        resources=resources(row["AllocTRES"]) if begun else {},
        start_s=int(row["Start"]) if begun else 0,
        end_s=int(row["End"]),
        elapsed_s=int(row["ElapsedRaw"] or 0) if begun else 0,
        mark=row["AdminComment"],
    )
