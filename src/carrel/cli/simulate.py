"""``carrel simulate``: what a workload would see of a site of guests-as-nodes, per policy and kind of clone."""

import gzip
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, get_args

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from carrel import config
from carrel.cli import output, shares
from carrel.cli.guest import Json
from carrel.cli.progress import progress
from carrel.config import Launches
from carrel.core.simulation import Setting, Simulation, Summary
from carrel.core.sizes import memory_bytes
from carrel.core.workload import Arrival, Bursts, Sizes, generate, read_swf
from carrel.errors import CarrelError, UsageError
from carrel.model.guest import Clone
from carrel.model.host import Host, Overcommit, Policy

_CLONES = {"instant": 1.0, "linked": 4.0, "full": 20.0}
"""Seconds until guests are there, where nothing else is said."""
_TITLES = (
    *("POLICY", "CLONE", "TAKES S", "A MIN", "IN USE", "CLONING", "JOBS/H", "VS FULL"),
    *("WAIT S", "P95 S", "SLOWDOWN", "DONE", "NOT RUN"),
)
_HOSTS = re.compile(r"(\d+)x(\d+):(\S+)")
_TOLD_EVERY = 20_000
"""Jobs between two lines of progress, or two changes of the one line."""

_SECONDS_MAX = 10**9
_JOBS_MAX = 10**8
_HOSTS_MAX = 10**6
_ONE_OR_MORE = Number(gte=1, lte=_JOBS_MAX)
_NOT_BELOW_0 = Number(gte=0, lte=_SECONDS_MAX)

app = App(name="simulate", help="What a workload would see of a site of guests-as-nodes.")


@app.default
def simulate(
    *,
    trace: Annotated[
        Path | None,
        Parameter(show_default=False, help="Jobs in the Standard Workload Format, also as .gz; without, bursts."),
    ] = None,
    hosts: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            show_default=False,
            help="Hosts as COUNTxCPUS:MEMORY; repeat for other kinds; without, 10x32:128G.",
        ),
    ] = ("10x32:128G",),
    policy: Annotated[
        tuple[Policy, ...], Parameter(negative="", show_default=False, help="Policies to compare; without, all.")
    ] = (),
    clone: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            show_default=False,
            help="Kinds of clone to compare, and the seconds that one takes; without, instant=1 linked=4 full=20.",
        ),
    ] = (),
    jobs: Annotated[int, Parameter(validator=_ONE_OR_MORE, help="Bursts: how many jobs in all.")] = 1000,
    burst: Annotated[int, Parameter(validator=_ONE_OR_MORE, help="Bursts: how many come together.")] = 100,
    every: Annotated[float, Parameter(validator=_NOT_BELOW_0, help="Bursts: seconds from one to the next.")] = 300.0,
    run: Annotated[
        float, Parameter(validator=_NOT_BELOW_0, help="Bursts: mean run time in seconds; times are log-normal.")
    ] = 300.0,
    cpus: Annotated[str, Parameter(help="Bursts: sizes of jobs, each as likely as another.")] = "1,2,4,8",
    guest_cpus: Annotated[
        int, Parameter(validator=_NOT_BELOW_0, help="CPUs of the largest guest; 0: those of the smallest host.")
    ] = 0,
    memory_per_cpu: Annotated[
        str, Parameter(help="Memory of a guest for each CPU, where a trace does not say.")
    ] = "2G",
    cpu_overcommit: Annotated[float, Parameter(help="How often a CPU may be promised; it costs no speed here.")] = 1.0,
    failures: Annotated[float, Parameter(validator=Number(gte=0, lt=1), help="The part of clones that fail.")] = 0.0,
    patience: Annotated[
        float | None,
        Parameter(
            validator=_NOT_BELOW_0, help="Seconds before a job is not passed by others; 0: nobody is ever passed."
        ),
    ] = None,
    seed: Annotated[int, Parameter(help="Another seed is another history of the same kind.")] = 1,
    plot: Annotated[
        Path | None, Parameter(show_default=False, help="Write the utilisation over time to this SVG file.")
    ] = None,
    json: Json = False,
) -> None:
    """Let a workload come and go on a site, with the queue and the placement of the controller.

    Limits, retries and rests are those of [placement.launches] in the configuration.
    """
    if plot is not None:
        shares.require_svg(plot)  # before the minutes that the rest may take
    site = _hosts(hosts)
    sizes = Sizes(
        cpus_max=guest_cpus or min(host.cpus for host in site), memory_per_cpu_bytes=memory_bytes(memory_per_cpu)
    )
    if trace is not None:
        workload = _read(trace, sizes)
    else:
        bursts = Bursts(jobs=jobs, burst=burst, every_s=every, run_s=run, cpus=_numbers(cpus))
        workload = list(generate(bursts, sizes, seed=seed))
    launches = config.load().placement.launches
    if patience is not None:
        launches = msgspec.structs.replace(launches, patience_s=patience)
    settings = [
        Setting(
            hosts=site,
            policy=each,
            clone=kind,
            clone_s=seconds,
            launches=launches,
            overcommit=_overcommit(cpu_overcommit),
            failures=failures,
            seed=seed,
        )
        for each in policy or get_args(Policy)
        for kind, seconds in _clones(clone)
    ]
    found = _run(settings, workload)
    if plot is not None:
        shares.write(plot, "CPUs of the site in use by jobs", [_series(one) for one in found])
    if json:
        output.objects(found)
        return
    _show(found, launches)


def _run(settings: Sequence[Setting], workload: Sequence[Arrival]) -> list[Summary]:
    found = []
    with progress("carrel simulate") as tell:
        for number, setting in enumerate(settings, 1):
            what = f"{setting.policy}, {setting.clone} ({number} of {len(settings)})"
            tell(what)
            simulation = Simulation(setting)
            found.append(simulation.run(workload, tell=_teller(tell, what, len(workload)), tell_every=_TOLD_EVERY))
    return found


def _teller(tell: Callable[[str], None], what: str, jobs: int) -> Callable[[int], None]:
    return lambda ended: tell(f"{what}: {ended} of {jobs} jobs")


def _show(found: Sequence[Summary], launches: Launches) -> None:
    full = {one.policy: one for one in found if one.clone == "full"}
    rates = msgspec.structs.asdict(launches.rate)
    output.table(
        _TITLES,
        [
            (
                *(one.policy, one.clone, f"{one.clone_s:g}", f"{rates[one.clone] * 60 / launches.window_s:g}"),
                *(f"{one.utilisation:.1%}", f"{one.cloning:.1%}", f"{one.throughput_per_h:.0f}"),
                f"{one.throughput_per_h / full[one.policy].throughput_per_h:.2f}x" if one.policy in full else "",
                *(f"{one.wait_s.mean:.0f}", f"{one.wait_s.p95:.0f}", f"{one.slowdown.mean:.1f}", one.done),
                one.cancelled + one.held,
            )
            for one in found
        ],
    )
    print()
    shares.sparks([_series(one) for one in found])


def _series(one: Summary) -> shares.Series:
    return shares.Series(name=f"{one.policy}, {one.clone}", step=one.bin_s, values=one.busy)


def _read(trace: Path, sizes: Sizes) -> list[Arrival]:
    try:
        with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as lines:
            found = list(read_swf(lines, sizes))
    except OSError as error:
        raise CarrelError(
            f"{trace}: {error.strerror or error}; give a trace in the Standard Workload Format"
        ) from error
    except (CarrelError, UnicodeDecodeError, EOFError) as error:
        raise CarrelError(f"{trace}: {error}") from error
    if not found:
        raise CarrelError(f"{trace}: no job in it ever ran")
    return sorted(found, key=lambda arrival: arrival.at_s)


def _hosts(kinds: Sequence[str]) -> tuple[Host, ...]:
    found: list[Host] = []
    for kind in kinds:
        match = _HOSTS.fullmatch(kind)
        if match is None or not int(match[1]) or not int(match[2]):
            raise UsageError(f"--hosts {kind!r}: give COUNTxCPUS:MEMORY, like 10x32:128G")
        if len(found) + int(match[1]) > _HOSTS_MAX:
            raise UsageError(f"--hosts {kind!r}: more than {_HOSTS_MAX} hosts are none that this can place on")
        size = memory_bytes(match[3])
        found += [
            Host(name=f"h{len(found) + number}", cpus=int(match[2]), memory_bytes=size)
            for number in range(int(match[1]))
        ]
    return tuple(found)


def _clones(kinds: Sequence[str]) -> list[tuple[Clone, float]]:
    found: list[tuple[Clone, float]] = []
    for kind in kinds or _CLONES:
        name, _, seconds = kind.partition("=")
        try:
            found.append((msgspec.convert(name, Clone), _seconds(seconds or _CLONES[name])))
        except (KeyError, ValueError) as error:
            raise UsageError(f"--clone {kind!r}: give instant, linked or full, and the seconds like full=50") from error
    return found


def _seconds(text: str | float) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError(seconds)
    return seconds


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UsageError(f"--cpus {text!r}: give sizes of jobs like 1,2,4")
    return tuple(int(number) for number in text.split(","))


def _overcommit(cpus: float) -> Overcommit:
    try:
        return Overcommit(cpus=cpus)
    except ValueError as error:
        raise UsageError(str(error)) from error
