"""``carrel guest``: the virtual machines and containers of running jobs."""

import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from carrel import config
from carrel.cli import api, output
from carrel.cli.guesttemplates import templates
from carrel.config import Config
from carrel.daemons import maps, views
from carrel.errors import NotFoundError, RefusedError, UnreachableError, UsageError

app = App(name="guest", help="Guests: the virtual machines and containers of running jobs.")
app.command(templates)

Json = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON: one object per line.")
]
GuestOrJob = Annotated[str, Parameter(help="Name of the guest, or id of its job.")]
JobId = Annotated[int, Parameter(help="Id of the job.")]
OnNode = Annotated[str, Parameter(name=["--node", "-w"], show_default=False, help="Only the guest on this node.")]
Timing = Annotated[
    bool, Parameter(negative="", show_default=False, help="Show what the start of each guest consisted of.")
]
Follow = Annotated[
    bool,
    Parameter(name=["--follow", "-f"], negative="", show_default=False, help="Go on until the guest is gone."),
]

_LOOK_PERIOD_S = 0.2
_TITLES = ("GUEST", "NODE", "STATE", "JOB", "USER", "IMAGE", "ACCEL", "CPUS", "MEMORY", "AGE", "TASKS")


@app.command(name="list")
def list_(*, job: Annotated[int | None, Parameter(help="Only this job's.")] = None, json: Json = False) -> None:
    """List guests: your own; all of them for root."""
    found = api.guests(config.load(), job_id=job)
    if json:
        output.objects(found)
        return
    output.table(
        _TITLES,
        [
            (
                *(g.name, g.node, g.state, g.job_id, g.user, g.image_name, g.accelerator, g.cpus),
                *(output.size(g.memory_bytes), output.ago(g.started), g.tasks),
            )
            for g in found
        ],
    )


@app.command
def show(guest: GuestOrJob, /, *, node: OnNode = "", timing: Timing = False, json: Json = False) -> None:
    """Show everything about a guest, by its name or its job's id."""
    settings = config.load()
    found = api.measured(settings, _find(settings, guest, node))
    if json:
        output.objects(found)
        return
    for at, one in enumerate(found):
        if at:
            print()
        describe(one, timing=timing)


@app.command
def console(
    guest: GuestOrJob,
    /,
    *,
    node: OnNode = "",
    follow: Follow = False,
) -> None:
    """Print what a guest wrote to its console: its kernel's messages, and why it did not start."""
    settings = config.load()
    try:
        one = _one(_find(settings, guest, node), guest)
    except NotFoundError:
        _print_held(settings, _last_name(settings, guest), node)
        return
    if is_remote(settings, one):
        raise RefusedError(
            f"guest {one.name} is a machine on host {one.host}, and {one.driver} alone has its console; "
            f"what carrel did for it: carrel job events {one.job_id}"
        )
    path = Path(one.console)
    if one.console and _readable(path):
        output.say(f"console of {one.name} on {one.node}: {path}")
        _print_file(path, follow=follow)
        return
    if follow:
        raise RefusedError(
            f"{one.console or 'its console'} is not readable here; on node {one.node}, as its user, it is"
        )
    _print_held(settings, one.name, one.node)


@app.command(name="map")
def map_(
    job: JobId,
    /,
    *,
    json: Json = False,
    step: Annotated[str, Parameter(show_default=False, help="Only this step's.")] = "",
    xml: Annotated[bool, Parameter(negative="", show_default=False, help="Print VINO-Slurm's XML.")] = False,
) -> None:
    """Show which guest of a job has which slot on which node."""
    found = [slot for slot in api.slot_map(config.load(), job) if step in ("", slot.step)]
    if xml:
        print(maps.xml(found), end="")
    elif json:
        output.objects(found)
    else:
        titles = ("STEP", "TASK", "NODE", "SLOT", "ADDRESS", "CORES", "MEMORY", "ARCH", "GUEST")
        rows = [
            (s.step, s.task if s.task >= 0 else "", s.node, s.id, s.hm, s.cores, f"{s.mem_mb}M", s.arch, s.guest)
            for s in found
        ]
        output.table(titles, rows)


@app.command
def destroy(guest: GuestOrJob, /, *, node: OnNode = "") -> None:
    """Destroy a guest, with everything that runs in it. Its job goes on without, and usually fails."""
    settings = config.load()
    one = _one(_find(settings, guest, node), guest)
    if is_remote(settings, one):
        raise RefusedError(
            f"guest {one.name} is a machine on host {one.host}, where no carreld is; it goes with its job: "
            f"scancel {one.job_id}"
        )
    if one.node not in api.local_nodes(settings):
        raise RefusedError(f"guest {one.name} is on {_place(one)}; run there: carrel guest destroy {one.name}")
    api.ask_node(settings, one.node, "destroy", guest=one.name)


def describe(guest: views.GuestView, *, indent: str = "", timing: bool = False) -> None:
    """Print a guest for a person, with ``timing`` also the phases of its start."""
    accelerator = f"{guest.accelerator} ({guest.accelerator_why})" if guest.accelerator_why else guest.accelerator
    started = f"{output.clock(guest.started)}, ready after {guest.boot_s:.1f} s" if guest.boot_s else None
    output.fields(
        [
            ("guest", guest.name),
            ("node", guest.node),
            ("host", guest.host),
            ("address", guest.address),
            ("state", guest.state),
            ("reason", guest.reason),
            ("job", guest.job_id),
            ("step", guest.step),
            ("task", guest.task if guest.task >= 0 else ""),
            ("user", guest.user),
            ("image", " ".join(dict.fromkeys([guest.image_name, guest.image[:19]])).strip()),
            ("clone", f"{guest.clone} ({guest.clone_why})" if guest.clone_why else guest.clone),
            ("driver", guest.driver),
            ("accelerator", accelerator),
            ("kernel", guest.kernel),
            ("cpus", guest.cpus),
            ("memory", output.size(guest.memory_bytes)),
            ("memory used", _used(guest)),
            ("slot", guest.slot if guest.per == "task" else ""),
            ("started", started or output.clock(guest.started)),
            ("tasks inside", guest.tasks),
            ("console", guest.console),
        ],
        indent=indent,
    )
    if timing:
        print()
        output.bars(_phases(guest), unit="ms", indent=indent)


def is_remote(settings: Config, guest: views.GuestView) -> bool:
    """Tell whether a guest was made from carrelctld, on a host that carries no carreld."""
    return guest.driver in settings.guest_nodes.remote


def _place(guest: views.GuestView) -> str:
    """Return where a guest's carreld is, in words."""
    return f"host {guest.host}" if guest.host else f"node {guest.node}"


def _used(guest: views.GuestView) -> str:
    """Return the guest's part of the node's memory, in words."""
    if guest.memory_pss_bytes is None:
        return ""
    shared = output.size(guest.memory_shared_bytes or 0) or "nothing"
    return f"{output.size(guest.memory_pss_bytes)}, its part of {shared} shared with others counted"


def _phases(guest: views.GuestView) -> list[tuple[str, float]]:
    """Return the phases of a guest's start and their sum, in ms."""
    phases = [(phase, seconds * 1000) for phase, seconds in guest.phases.items()]
    return [*phases, ("total", sum(took_ms for _, took_ms in phases))] if phases else []


def _find(settings: Config, name: str, node: str) -> list[views.GuestView]:
    job_id = int(name) if name.isdigit() else None
    found = api.guests(settings, job_id=job_id)
    mine = [g for g in found if (job_id is not None or g.name == name) and node in ("", g.node)]
    if not mine:
        where = f" on node {node}" if node else ""
        raise NotFoundError(f"no guest or job {name!r} with a guest{where}; see: carrel guest list")
    return mine


def _last_name(settings: Config, name: str) -> str:
    """Return the guest that a job had last, so that its console is found after its end; a name stays as it is."""
    if not name.isdigit():
        return name
    names = [event.guest for event in api.events(settings, int(name)) if event.guest]
    if not names:
        raise NotFoundError(f"job {name} has no guest; see: carrel job show {name}")
    return names[-1]


def _one(found: list[views.GuestView], name: str) -> views.GuestView:
    if len(found) == 1:
        return found[0]
    if len({g.node for g in found}) == len(found):
        raise UsageError(f"{name} means {len(found)} guests; add --node: {', '.join(g.node for g in found)}")
    raise UsageError(f"{name} means {len(found)} guests; name one: {', '.join(g.name for g in found)}")


def _print_held(settings: Config, name: str, node: str) -> None:
    try:
        held = api.consoles(settings, name, node)
    except UnreachableError as error:
        raise UnreachableError(f"the console is not a file of this machine, and {error}") from error
    for one in held:
        output.say(f"end of the console of {one.guest} on {one.node}, as last reported to carrelctld")
        text = output.printable(one.text)
        print(text, end="" if text.endswith("\n") or not text else "\n")


def _readable(path: Path) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def _print_file(path: Path, *, follow: bool) -> None:
    with path.open(errors="replace") as file:
        while True:
            # A log that was cut back at its bound begins anew.
            if file.tell() > path_size(path):
                file.seek(0)
            for line in file:
                sys.stdout.write(output.printable(line))
            sys.stdout.flush()
            if not follow or not path.exists():
                return
            time.sleep(_LOOK_PERIOD_S)


def path_size(path: Path) -> int:
    """Return the size of a file; a file that is gone never shrank."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return sys.maxsize
