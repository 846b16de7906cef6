"""``carrel job``: Slurm's jobs and the guests that they run in."""

import asyncio
import os
import pwd
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from carrel import config
from carrel.cli import api, guestnodes, output, samples
from carrel.cli.guest import JobId, Json, Timing, describe, is_remote
from carrel.cli.plot import plot
from carrel.cli.report import array_lines, lines
from carrel.cli.samples import JobName
from carrel.cli.watch import watch
from carrel.config import Config
from carrel.core import arrays, report
from carrel.daemons import views
from carrel.errors import CarrelError, NotFoundError, UnreachableError
from carrel.model.job import Job, JobState
from carrel.sampling import reading
from carrel.slurm.client import SlurmClient

app = App(name="job", help="Slurm's jobs and the guests that they run in.")
app.command(plot)
app.command(watch)


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as Slurm describes it, with its guests."""

    job_id: int
    run: str
    cluster: str
    name: str
    user: str
    account: str
    partition: str
    state: JobState
    slurm_state: str
    nodes: tuple[str, ...]
    submitted: datetime | None
    time_limit_s: int | None
    guests: list[views.GuestView] | None
    """null: nobody could tell."""
    why: str = ""
    """Why it waits for guests that are nodes, or was cancelled; only of a single job."""


@app.command(name="list")
def list_(
    *,
    mine: Annotated[bool, Parameter(negative="", show_default=False, help="Only your own jobs.")] = False,
    json: Json = False,
) -> None:
    """List the jobs that Slurm has not finished with, and the guests of those that have any."""
    settings = config.load()
    jobs = asyncio.run(_jobs(settings))
    if mine:
        jobs = [job for job in jobs if job.uid == os.geteuid()]
    guests = _guests(settings, None)
    found = [_view(job, guests) for job in jobs]
    if json:
        output.objects(found)
        return
    output.table(
        ("JOB", "USER", "STATE", "NODES", "GUESTS", "IMAGE", "NAME"),
        [(j.job_id, j.user, _state(j), ",".join(j.nodes), _states(j), _images(j), j.name) for j in found],
    )


@app.command
def show(job: JobId, /, *, timing: Timing = False, json: Json = False) -> None:
    """Show a job, its guest on each node, and what to do next."""
    settings = config.load()
    known = asyncio.run(_job(settings, job))
    if known is None:
        raise NotFoundError(f"slurm has no job {job}; see: carrel job list, and carrel job events {job}")
    guests = _guests(settings, job)
    view = _view(known, api.measured(settings, guests) if guests else guests)
    why = _why(api.events(settings, job)) if view.state in {"held", "ended"} and guests is not None else ""
    if view.state == "held" and view.partition == settings.guest_nodes.partition:
        why = guestnodes.why_not(settings) or why
    view = msgspec.structs.replace(view, why=why)
    if json:
        output.objects([view])
        return
    output.fields(
        [
            ("job", f"{view.job_id} {view.name}".strip()),
            ("state", _state(view)),
            ("user", view.user),
            ("account", view.account),
            ("partition", view.partition),
            ("nodes", " ".join(view.nodes)),
            ("submitted", output.clock(view.submitted)),
            ("why", view.why),
        ]
    )
    for guest in view.guests or ():
        print()
        describe(guest, indent="  ", timing=timing)
    print()
    consoles = not any(is_remote(settings, guest) for guest in view.guests or ())
    for line in advice(view, consoles=consoles):
        print(f"next: {line}")


@app.command
def events(job: JobId, /, *, json: Json = False) -> None:
    """Show what happened to a job's guests, oldest first. Job 0: the nodes themselves."""
    found = api.events(config.load(), job)
    if json:
        output.objects(found)
        return
    rows = [(output.clock(event.time), event.node, event.what, event.guest, event.text) for event in found]
    output.table(("TIME", "NODE", "EVENT", "GUEST", "WHAT"), rows)


@app.command(name="report")
def report_(job: JobName, /, *, json: Json = False) -> None:
    """Show how well a job, or an array of them, used its CPUs, memory, GPUs and time limit, and what to ask for."""
    settings = config.load()
    found = samples.find(settings, job)
    if found.directory is not None:
        made = report.report(reading.summary(found.directory), settings.guests)
        _tell(made, lines(made), json=json)
    else:
        tasks = [reading.summary(path) for path in found.tasks.values()]
        whole = arrays.array_report(found.job_id, tasks, settings.guests)
        _tell(whole, array_lines(whole), json=json)


def _tell(made: object, shown: Iterator[str], *, json: bool) -> None:
    if json:
        output.objects([made])
        return
    for line in shown:
        print(output.printable(line))


@app.command
def sample(
    job: JobId,
    /,
    *,
    every: Annotated[float, Parameter(help="Seconds between two samples, from now on.")],
) -> None:
    """Change how often a running job is sampled: at once on this machine, elsewhere with a node's next report."""
    settings = config.load()
    nodes = api.local_nodes(settings)
    done = [node for node in nodes if api.ask_node(settings, node, "sample", job=str(job), every_s=str(every))]
    here = f"job {job} is sampled every {every:g} s on {', '.join(done)}" if done else ""
    try:
        api.sample_every(settings, job, every)
    except UnreachableError as error:
        if not done:
            raise
        print(f"{here}; on no other node, for {error}")
        return
    others = f"nodes elsewhere hear of it within {settings.node.report_period_s:g} s"
    print(f"{here}; {others}" if done else f"job {job}: {others}; what they refuse: carrel job events {job}")


@app.command
def enter(
    job: JobId,
    /,
    *command: Annotated[
        str, Parameter(allow_leading_hyphen=True, help="Command and arguments, after --; else a login shell.")
    ],
    node: Annotated[
        str, Parameter(name=["--node", "-w"], show_default=False, help="Enter on this node; else on the job's first.")
    ] = "",
) -> None:
    """Open a shell, or run COMMAND, in the guest of one of your running jobs."""
    settings = config.load()
    srun = Path(settings.slurm.bin_dir) / "srun"
    words = [str(srun), f"--jobid={job}", "--overlap", "-N1", "-n1"]
    if sys.stdin.isatty():
        words.append("--pty")
    if node:
        words += ["-w", node]
    words += command or ("bash", "-l")
    if settings.slurm.conf:
        os.environ["SLURM_CONF"] = settings.slurm.conf
    try:
        # srun takes our place: its exit status, its terminal and its signals are then the command's own.
        os.execv(srun, words)  # noqa: S606  # a list, no shell
    except OSError as error:
        raise CarrelError(f"{srun}: {error.strerror}; is slurm.bin_dir right? see: carrel config show") from error


def advice(job: JobView, *, consoles: bool = True) -> list[str]:
    """Return what a person may want to do next, as sentences; ``consoles``: those of its guests can be read here."""
    if job.guests is None:
        return ["whether it has guests cannot be told now; on a node: carrel node check"]
    happened = f"carrel job events {job.job_id}"
    if down := [guest for guest in job.guests if guest.state == "down"]:
        name, node = down[0].name, down[0].node
        end = [f"see why the guest on {node} ended: carrel guest console {name} --node {node}"] if consoles else []
        return [*end, f"see what happened before: {happened}"]
    if any(guest.state == "starting" for guest in job.guests):
        return [f"watch it start: {f'carrel guest console {job.job_id} --follow' if consoles else happened}"]
    if job.guests:
        enter = f"enter it: carrel job enter {job.job_id}"
        return [enter, f"its console: carrel guest console {job.job_id}"] if consoles else [enter]
    match job.state:
        case "pending":
            return [f"it waits for Slurm: squeue --start -j {job.job_id}"]
        case "held" if job.why:
            return [f"carrel holds it until its guests are there; to give up: scancel {job.job_id}"]
        case "held":
            return [f"it is held; to let it go: scontrol release {job.job_id}"]
        case "running" | "suspended":
            return [f"it has no guest: it asked for none, or none has started; see: carrel job events {job.job_id}"]
        case _:
            return [
                f"it has ended; what happened: carrel job events {job.job_id}",
                f"what it used: carrel job report {job.job_id}; what it cost: carrel charge show {job.job_id}",
            ]


def _why(events: Sequence[views.EventView]) -> str:
    """Return why a job waits for guests that are nodes, or was cancelled; empty where that is not so, or past."""
    last = next((event for event in reversed(events) if event.what.startswith(("job-", "guest-placed"))), None)
    return last.text if last and last.what in {"job-waits", "job-cancelled"} else ""


async def _jobs(settings: Config) -> Sequence[Job]:
    slurm = SlurmClient(settings.slurm)
    return await slurm.described(await slurm.jobs())


async def _job(settings: Config, job_id: int) -> Job | None:
    slurm = SlurmClient(settings.slurm)
    found = await slurm.job(job_id)
    return None if found is None else (await slurm.described([found]))[0]


def _guests(settings: Config, job_id: int | None) -> list[views.GuestView] | None:
    """Return the guests, or None where nobody can tell: Slurm's half of the answer is still worth having."""
    try:
        return api.guests(settings, job_id=job_id)
    except UnreachableError as error:
        output.say(f"guests unknown: {error}")
        return None


def _view(job: Job, guests: list[views.GuestView] | None) -> JobView:
    run = str(job.key)
    return JobView(
        job_id=job.key.job_id,
        run=run,
        cluster=job.key.cluster,
        name=job.name,
        user=job.user or _user(job.uid),
        account=job.account,
        partition=job.partition,
        state=job.state,
        slurm_state=job.slurm_state,
        nodes=job.nodes,
        submitted=views.moment(job.key.submit_s),
        time_limit_s=job.time_limit_s,
        guests=None if guests is None else [guest for guest in guests if guest.run == run],
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def _state(job: JobView) -> str:
    """Return Slurm's word, and ours where Slurm's hides that nothing will happen."""
    return "held" if job.state == "held" else job.slurm_state.lower()


def _states(job: JobView) -> str:
    if job.guests is None:
        return "?"
    states = [guest.state for guest in job.guests]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "-"


def _images(job: JobView) -> str:
    return ",".join(dict.fromkeys(guest.image_name for guest in job.guests or ()))
