"""What tests of guests that are Slurm nodes share: to ask Slurm, the hosts' table and the journal what there is."""

import json
import os
import re
import subprocess  # a slurmd that runs beside the test
from collections.abc import Iterator
from contextlib import closing, contextmanager

from carrel.hosts.table import HostTable
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, wait_for
from carrel.testing.leaks import nothing_left

OPTIONS = (f"--guest={IMAGE}", "--guest-per=node", "--mem=320")
"""A guest of 160 MiB: one of the shapes that a template is there for."""
CLEAN_TIMEOUT_S = 60.0
AT_REST = "IDLE+CLOUD+DRAIN+POWERED_DOWN"


def nothing_of_nodes_is_left(box: Sandbox) -> None:
    """Return when guests, reservations and rooms are gone.

    Raises:
        AssertionError: something still was after a minute.
    """
    nothing_left(box, within_s=CLEAN_TIMEOUT_S)
    wait_for(lambda: not reservations(box), CLEAN_TIMEOUT_S)
    wait_for(lambda: not rooms(box), CLEAN_TIMEOUT_S)


def names_rest(box: Sandbox) -> None:
    """Return when every name of the pool is at rest.

    Raises:
        AssertionError: one still was not after a minute.
    """
    wait_for(lambda: not not_at_rest(box), CLEAN_TIMEOUT_S)


def not_at_rest(box: Sandbox) -> dict[str, str]:
    """Return the states of those names of the pool that are not off and waiting for a guest."""
    # A slurmd that slurmctld asked while it was on its way out: the word goes with the next one that registers.
    found = {name: of.replace("+NOT_RESPONDING", "") for name, of in states(box).items()}
    return {name: of for name, of in found.items() if of != AT_REST}


def reservations(box: Sandbox) -> list[str]:
    said = box.run(["scontrol", "-o", "show", "reservation"]).stdout
    return re.findall(r"ReservationName=(\S+)", said)


def rooms(box: Sandbox) -> int:
    """Return how many guests have room on a host."""
    with closing(HostTable(box.layout.hosts_table)) as table:
        return len(table.places())


def states(box: Sandbox) -> dict[str, str]:
    """Return the state of each name of the pool."""
    lines = box.run(["scontrol", "-o", "-a", "show", "node", ",".join(box.facts().pool)]).stdout.splitlines()
    words = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return {each["NodeName"]: each["State"] for each in words}


def of_job(box: Sandbox, job_id: int, form: str) -> str:
    """Return what ``squeue`` says of a job."""
    return box.run(["squeue", "-h", "-a", "-t", "all", "-o", form, "-j", str(job_id)]).stdout.strip()


def events(box: Sandbox, job_id: int) -> list[str]:
    """Return what happened to a job, as ``carrel job events`` tells."""
    lines = box.run(["carrel", "job", "events", str(job_id), "--json"]).stdout.splitlines()
    return [f"{each['what']}: {each['text']}" for each in map(json.loads, lines)]


def await_running(box: Sandbox, job_id: int) -> str:
    """Return the name of the node that a job runs on, once its script is in its guest."""
    wait_for(lambda: any(line.startswith("task-entered") for line in events(box, job_id)))
    return of_job(box, job_id, "%N")


@contextmanager
def slurmd(box: Sandbox, name: str) -> Iterator[None]:
    """Have a slurmd that nobody asked for."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    child = subprocess.Popen(["slurmd", "-D", "-N", name], env={**os.environ, **box.env, "PATH": path})
    try:
        yield
    finally:
        child.kill()
        child.wait()
