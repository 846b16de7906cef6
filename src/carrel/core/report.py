"""How well a job used what it had, and what to ask for next time.

Sums go over nodes: the memory of a job is the peak of each of its nodes beside what that node gave it, never one
process's peak times a number of tasks. Advice has the line to write; where no line would help, it says what to look at.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from carrel.config import Guests
from carrel.model.sample import JobSummary, NodeSummary

SHORT_S = 30.0
"""Of a job shorter than this, nothing is said about CPUs: starting up is most of it."""
WASTEFUL = 0.5
"""Advice to ask for less begins below this part."""
TIGHT = 0.9
"""Advice to ask for more begins above this part."""
MEMORY_MARGIN = 1.25
TIME_MARGIN = 1.3
IMBALANCE = 1.5
IDLE = 0.05
IO_BOUND = 0.2
_MEMORY_STEP_BYTES = 64 * 2**20
_TIME_MIN_S = 300


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do next time."""

    text: str
    directive: str = ""
    """A line for the batch script; empty: no line would do."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A job in a dozen numbers. What could not be measured is null; parts are of 1."""

    job_id: int
    run: str
    user: str
    name: str
    account: str
    nodes: tuple[NodeSummary, ...]
    complete: bool
    """False: the job runs, or a node has not written its last word."""
    elapsed_s: float
    time_limit_s: int | None
    time_part: float | None
    cpus: int
    cpu_s: float | None
    cpu_part: float | None
    memory_peak_bytes: int | None
    """Most on any one node, which is what ``--mem`` has to hold."""
    memory_limit_bytes: int
    """Of that node."""
    memory_part: float | None
    """Peaks of all nodes over the limits of all nodes."""
    read_bytes: int | None
    written_bytes: int | None
    io_wait_s: float | None
    imbalance: float | None
    """CPU time of the busiest node over the mean of all; null: one node."""
    gap_s: float
    gpus: int
    gpus_idle: int
    gpu_part: float | None
    """Mean over all GPUs and all time."""
    gpu_memory_peak_bytes: int | None
    """Most on any one GPU."""
    gpu_memory_bytes: int | None
    """Of that one."""
    gpu_energy_j: float | None
    guest_aside_bytes: int
    """Of a node's memory, what its guests do not get: it is their emulators'. 0: there were none."""
    guest_least_bytes: int
    """With less memory on a node its guests would not boot. 0: there were none."""
    advice: tuple[Advice, ...]


def report(summary: JobSummary, guests: Guests) -> Report:
    """Return the report of a job. Where a node was seen from outside and from inside its guest, outside counts.

    Args:
        summary: What was sampled.
        guests: What the site's guests need, which a job that runs in them must be advised to ask for.
    """
    inside = Counter(node.node.partition(":")[0] for node in summary.nodes if node.view == "guest")
    most = max(inside.values(), default=0)
    nodes = outer_views(summary.nodes)
    job = summary.job
    elapsed_s = max((n.last_s for n in nodes), default=0.0) - min((n.first_s for n in nodes), default=0.0)
    fullest = max(nodes, key=_fullness, default=None)
    gpu = max(nodes, key=lambda node: node.gpu_memory_peak_bytes or 0, default=None)
    made = Report(
        job_id=job.key.job_id,
        run=summary.run,
        user=job.user,
        name=job.name,
        account=job.account,
        nodes=nodes,
        complete=summary.complete,
        elapsed_s=elapsed_s,
        time_limit_s=job.time_limit_s,
        time_part=elapsed_s / job.time_limit_s if job.time_limit_s else None,
        cpus=sum(node.cpus for node in nodes),
        cpu_s=_sum([node.cpu_s for node in nodes]),
        cpu_part=_cpu_part(nodes),
        memory_peak_bytes=fullest.memory_peak_bytes if fullest else None,
        memory_limit_bytes=fullest.memory_limit_bytes if fullest else 0,
        memory_part=_memory_part(nodes),
        read_bytes=_whole(_sum([node.read_bytes for node in nodes])),
        written_bytes=_whole(_sum([node.written_bytes for node in nodes])),
        io_wait_s=_sum([node.io_wait_s for node in nodes]),
        imbalance=_imbalance(nodes),
        gap_s=max((node.gap_s for node in nodes), default=0.0),
        gpus=sum(node.gpus for node in nodes),
        gpus_idle=sum(node.gpus_idle for node in nodes),
        gpu_part=_gpu_part(nodes),
        gpu_memory_peak_bytes=gpu.gpu_memory_peak_bytes if gpu else None,
        gpu_memory_bytes=gpu.gpu_memory_bytes if gpu else None,
        gpu_energy_j=_sum([node.gpu_energy_j for node in nodes if node.gpus]),
        guest_aside_bytes=most * guests.memory_reserve_bytes,
        guest_least_bytes=most * (guests.memory_reserve_bytes + guests.memory_min_bytes),
        advice=(),
    )
    advice = (*cpu_advice(made), *memory_advice(made), *time_advice(made), *_gpu(made), *_other(made))
    return msgspec.structs.replace(made, advice=advice)


def outer_views(nodes: Sequence[NodeSummary]) -> tuple[NodeSummary, ...]:
    """Return what was seen from outside, and from inside where nobody was outside: ``c1``, ``c1:0.3``."""
    outside = {node.node for node in nodes if node.view == "host"}
    shown = (node for node in nodes if node.view == "host" or node.node.partition(":")[0] not in outside)
    return tuple(sorted(shown, key=lambda node: natural(node.node)))


def natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts node 2 before node 10.

    >>> sorted(["c10", "c2", "c2-ib", "login"], key=natural)
    ['c2', 'c2-ib', 'c10', 'login']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _sum(values: Sequence[float | None]) -> float | None:
    """A sum with a part missing would be wrong, and wrong without a sign of it."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _fullness(node: NodeSummary) -> float:
    return node.memory_peak_bytes or 0


def _cpu_part(nodes: Sequence[NodeSummary]) -> float | None:
    used = _sum([node.cpu_s for node in nodes])
    had = sum(node.cpus * (node.last_s - node.first_s) for node in nodes)
    if used is None or had <= 0 or not all(node.cpus for node in nodes):
        return None
    return used / had


def _memory_part(nodes: Sequence[NodeSummary]) -> float | None:
    used = _sum([node.memory_peak_bytes for node in nodes])
    if used is None or not all(node.memory_limit_bytes for node in nodes):
        return None
    return used / sum(node.memory_limit_bytes for node in nodes)


def _gpu_part(nodes: Sequence[NodeSummary]) -> float | None:
    seen = [node for node in nodes if node.gpus]
    used = _sum([None if node.gpu_part is None else node.gpu_part * node.gpus for node in seen])
    return None if used is None else used / sum(node.gpus for node in seen)


def _imbalance(nodes: Sequence[NodeSummary]) -> float | None:
    used = _sum([node.cpu_s for node in nodes])
    if len(nodes) < 2 or not used:
        return None
    return max(node.cpu_s or 0.0 for node in nodes) * len(nodes) / used


def cpu_advice(made: Report) -> list[Advice]:
    """Return what to ask for where CPUs rested."""
    if made.elapsed_s < SHORT_S or made.cpu_part is None:
        return []
    idle = [node for node in made.nodes if (node.cpu_s or 0.0) < IDLE * node.cpus * (node.last_s - node.first_s)]
    if idle and len(idle) < len(made.nodes):
        names = ", ".join(node.node for node in idle[:8])
        text = f"{len(idle)} of {len(made.nodes)} nodes did next to nothing: {names}"
        return [Advice(text=text, directive=f"#SBATCH --nodes={len(made.nodes) - len(idle)}")]
    if made.cpu_part >= WASTEFUL:
        return []
    text = f"{made.cpu_part:.0%} of the CPU time was used"
    peaks = [node.cpu_peak for node in made.nodes if node.cpu_peak is not None]
    needed = max(1, math.ceil(max(peaks) - 0.1)) if peaks else 0
    had = max(node.cpus for node in made.nodes)
    if len(made.nodes) == 1 and 0 < needed < had:
        return [Advice(text=f"{text}, never more than {needed} at once", directive=f"#SBATCH --cpus-per-task={needed}")]
    return [Advice(text=f"{text}: is the program told how many CPUs it has, and does it wait for something?")]


def memory_advice(made: Report) -> list[Advice]:
    """Return what to ask for so that the fullest node has enough, and not far more."""
    peak, limit = made.memory_peak_bytes, made.memory_limit_bytes
    killed = sum(node.oom_kills or 0 for node in made.nodes)
    if not peak or not limit:
        return []
    if killed:
        return [Advice(text=f"{killed} processes were killed for memory", directive=_mem(max(peak, limit) * 1.5))]
    if peak > TIGHT * limit:
        return [Advice(text=f"memory was {peak / limit:.0%} full", directive=_mem(peak * MEMORY_MARGIN))]
    # Seen from outside, a guest's memory is its emulator's: so much of it, and room for the emulator itself.
    wanted_bytes = max(peak * MEMORY_MARGIN + made.guest_aside_bytes, made.guest_least_bytes)
    if peak < WASTEFUL * limit and _mem_bytes(wanted_bytes) < limit:
        return [
            Advice(text=f"at most {peak / limit:.0%} of the memory of a node was used", directive=_mem(wanted_bytes))
        ]
    return []


def _mem_bytes(need_bytes: float) -> int:
    return max(1, math.ceil(need_bytes / _MEMORY_STEP_BYTES)) * _MEMORY_STEP_BYTES


def _mem(need_bytes: float) -> str:
    return f"#SBATCH --mem={_mem_bytes(need_bytes) // 2**20}M"


def time_advice(made: Report) -> list[Advice]:
    """Return what to ask for so that a job that takes as long has time enough, and not far more."""
    if not made.complete or made.time_part is None:
        return []
    wanted_s = max(_TIME_MIN_S, math.ceil(made.elapsed_s * TIME_MARGIN / 60) * 60)
    if made.time_part > TIGHT:
        text = f"{made.time_part:.0%} of the time limit was used"
        return [Advice(text=text, directive=_limit(wanted_s))]
    if made.time_part < WASTEFUL and made.time_limit_s is not None and wanted_s < made.time_limit_s:
        text = f"{made.time_part:.0%} of the time limit was used: a shorter job starts sooner"
        return [Advice(text=text, directive=_limit(wanted_s))]
    return []


def _limit(seconds: int) -> str:
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:00"
    return f"#SBATCH --time={days}-{clock}" if days else f"#SBATCH --time={clock}"


def _gpu(made: Report) -> list[Advice]:
    if not made.gpus or made.gpu_part is None or made.elapsed_s < SHORT_S:
        return []
    if made.gpus_idle == made.gpus:
        return [Advice(text=f"{_all_of(made.gpus)} was never busy: leave out the line that asks for it")]
    if made.gpus_idle:
        busiest = max(node.gpus - node.gpus_idle for node in made.nodes)
        line = f"#SBATCH --gpus-per-node={busiest}"
        enough = busiest < max(node.gpus for node in made.nodes)
        text = f"{made.gpus_idle} of {made.gpus} GPUs {'was' if made.gpus_idle == 1 else 'were'} never busy"
        return [Advice(text=text, directive=line if enough else "")]
    if made.gpu_part < WASTEFUL:
        text = f"GPUs were busy {made.gpu_part:.0%} of the time"
        return [Advice(text=f"{text}: do they wait for input, and would fewer of them, or a part of one, do?")]
    return []


def _all_of(gpus: int) -> str:
    return "the GPU" if gpus == 1 else f"each of the {gpus} GPUs"


def _other(made: Report) -> list[Advice]:
    found = []
    if made.imbalance is not None and made.imbalance > IMBALANCE and made.elapsed_s >= SHORT_S:
        busiest = max(made.nodes, key=lambda node: node.cpu_s or 0.0)
        text = f"node {busiest.node} used {made.imbalance:.1f} times the CPU time of the mean node"
        found.append(Advice(text=f"{text}: is the work shared out evenly?"))
    if made.io_wait_s is not None and made.elapsed_s >= SHORT_S and made.io_wait_s > IO_BOUND * made.elapsed_s:
        found.append(Advice(text=f"processes waited {made.io_wait_s:.0f} s for disks: would node-local storage do?"))
    throttled = [node for node in made.nodes if (node.throttled_s or 0.0) > IO_BOUND * made.elapsed_s]
    if throttled and made.elapsed_s >= SHORT_S:
        text = f"threads were held back for {throttled[0].throttled_s:.0f} s on {throttled[0].node}"
        found.append(Advice(text=f"{text}: more of them than CPUs?"))
    return found
