"""The GPUs of a job, by NVML, NVIDIA's library of its driver, through nvidia-ml-py (the extra ``gpu``).

Without the library, the driver, or a GPU there are no such metrics, and that is no error. A driver that is in trouble
may not answer for minutes, so a thread of its own asks, once for all jobs; the sampler takes what it last got.

Which GPUs are a job's is what Slurm says; else what the job's control group may open; else what its processes were
told in their environment. A GPU that a job has and does not use is seen too.
"""

import contextlib
import importlib
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from carrel.model.sample import Column, Schema
from carrel.sampling.blocks import Block, Layout
from carrel.sampling.cgroup import JobGroups

PERIOD_S = 1.0
"""NVML itself averages over up to a second."""
_FRESH_S = 3.0
_MAJOR = 195
"""Of the devices /dev/nvidia0 … /dev/nvidia253; the others are the driver's own."""
_MINORS = 254
_SM_CLOCK = 1
_CORE_SENSOR = 0
_VARIABLES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")
"""The first two have the node's own numbers; the last one counts from 0 in a job that sees only its own GPUs."""


def _pair(found: Any, one: str, other: str) -> tuple[int, int]:
    return getattr(found, one), getattr(found, other)


_READINGS: tuple[tuple[tuple[Column, ...], Callable[[Any, Any], tuple[int, ...]]], ...] = (
    (
        (Column("busy_percent", "percent"), Column("memory_busy_percent", "percent")),
        lambda nvml, gpu: _pair(nvml.nvmlDeviceGetUtilizationRates(gpu), "gpu", "memory"),
    ),
    (
        (Column("memory_used_bytes", "bytes"), Column("memory_bytes", "bytes")),
        lambda nvml, gpu: _pair(nvml.nvmlDeviceGetMemoryInfo(gpu), "used", "total"),
    ),
    ((Column("power_mw", "mW"),), lambda nvml, gpu: (nvml.nvmlDeviceGetPowerUsage(gpu),)),
    ((Column("energy_mj", "mJ", "counter"),), lambda nvml, gpu: (nvml.nvmlDeviceGetTotalEnergyConsumption(gpu),)),
    (
        (Column("temperature_celsius", "celsius"),),
        lambda nvml, gpu: (nvml.nvmlDeviceGetTemperature(gpu, _CORE_SENSOR),),
    ),
    ((Column("sm_mhz", "MHz"),), lambda nvml, gpu: (nvml.nvmlDeviceGetClockInfo(gpu, _SM_CLOCK),)),
)
COLUMNS = tuple(column for columns, _ in _READINGS for column in columns)
"""Of each GPU: ``gpu.0.busy_percent`` … A GPU that cannot tell something has no such metric."""


class _Gpu(NamedTuple):
    minor: int
    uuid: str
    handle: Any


class _Look(NamedTuple):
    """What all GPUs of the node said at one moment."""

    at_s: float
    values: Mapping[int, Mapping[Column, int]]
    uuids: Mapping[str, int]


class Watcher:
    """Asks the GPUs of a node for as long as some job wants to know."""

    def __init__(self, *, period_s: float = PERIOD_S) -> None:
        """Ask nothing yet: most nodes have no GPU, and nvidia-ml-py takes 17 MB."""
        self.fault = ""
        """Why nothing is known of GPUs; empty: something is, or nobody asked."""
        self.look: _Look | None = None
        self.cost_us = 0.0
        self._period_s = period_s
        self._wanted = 0
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()

    def source(self, gpus: Collection[int | str]) -> "GpuSource":
        """Return what reads these GPUs, by minor number or UUID; a thread begins to ask for them."""
        with self._wake:
            self._wanted += 1
            if self._thread is None:
                # Nobody waits for it at the end: it may be inside a driver that never answers.
                self._thread = threading.Thread(target=self._run, name="carrel-gpu", daemon=True)
                self._thread.start()
        return GpuSource(self, gpus)

    def let_go(self) -> None:
        with self._wake:
            self._wanted -= 1
            self._wake.notify()

    def _run(self) -> None:
        opened = self._opened()
        if opened is None:
            return  # until carreld starts anew: a driver does not come by itself
        nvml, gpus = opened
        while True:
            with self._wake:
                if not self._wanted:
                    self._thread = None
                    break
            began_ns = time.thread_time_ns()
            values = {gpu.minor: _read(nvml, gpu.handle) for gpu in gpus}
            self.look = _Look(time.monotonic(), values, {gpu.uuid: gpu.minor for gpu in gpus})
            self.cost_us = (time.thread_time_ns() - began_ns) / 1000
            with self._wake:
                self._wake.wait_for(lambda: not self._wanted, timeout=self._period_s)
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()

    def _opened(self) -> tuple[Any, list[_Gpu]] | None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            self.fault = "nvidia-ml-py is not installed; see: pip install carrel[gpu]"
            return None
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(at) for at in range(nvml.nvmlDeviceGetCount())]
            gpus = [_Gpu(nvml.nvmlDeviceGetMinorNumber(one), nvml.nvmlDeviceGetUUID(one), one) for one in handles]
        except nvml.NVMLError as error:
            self.fault = f"the NVIDIA driver does not answer: {error}; see: nvidia-smi"
            return None
        return nvml, gpus


def _read(nvml: Any, handle: Any) -> dict[Column, int]:
    found: dict[Column, int] = {}
    for columns, read in _READINGS:
        # Not counted by this kind of GPU, or not of a part of one, or the GPU has fallen off its bus.
        with contextlib.suppress(nvml.NVMLError):
            found |= zip(columns, map(int, read(nvml, handle)), strict=True)
    return found


class GpuSource:
    """The GPUs of one job."""

    def __init__(self, watcher: Watcher, gpus: Collection[int | str]) -> None:
        """Read what the watcher sees of these, by minor number or UUID."""
        self.name = "gpu"
        self.period_s = 0.0
        self.gpus = frozenset(gpus)
        self._watcher = watcher
        self._layout: Layout | None = None
        self._shape: tuple[tuple[int, Column], ...] = ()

    def read(self) -> list[Block]:
        look = self._watcher.look
        if look is None or time.monotonic() - look.at_s > _FRESH_S:
            return []
        shape: list[tuple[int, Column]] = []
        values: list[int] = []
        for minor in sorted(self._minors(look)):
            for column, value in look.values.get(minor, {}).items():
                shape.append((minor, column))
                values.append(value)
        if not shape:
            return []
        if self._layout is None or tuple(shape) != self._shape:
            columns = tuple(Column(f"{minor}.{column.name}", column.unit, column.kind) for minor, column in shape)
            self._layout, self._shape = Layout(Schema(set="gpu", columns=columns, source="NVML")), tuple(shape)
        return [self._layout.block(values)]

    def _minors(self, look: _Look) -> Iterator[int]:
        for gpu in self.gpus:
            if isinstance(gpu, int):
                yield gpu
            else:  # CUDA takes the beginning of a UUID too
                yield from (minor for uuid, minor in look.uuids.items() if uuid.startswith(gpu))

    def close(self) -> None:
        self._watcher.let_go()


def of_job(
    told: Sequence[int] | None, groups: JobGroups, pids: Collection[int], *, proc: Path = Path("/proc")
) -> frozenset[int | str]:
    """Return the GPUs of a job, by minor number or UUID.

    Args:
        told: What Slurm says, the numbers of its gres on this node; None: it was not asked.
        groups: The job's control groups.
        pids: Processes of the job.
        proc: Where processes are.
    """
    if told is not None:
        return frozenset(told)
    allowed = _allowed(groups.v1.get("devices", ""))
    if allowed is not None:
        return frozenset(allowed)
    for pid in pids:
        if found := _environment(pid, proc):
            return frozenset(found)
    return frozenset()


def _allowed(group: str) -> set[int] | None:
    """Return the GPUs that a v1 control group may open; None: it does not say, or may open all."""
    if not group:
        return None
    try:
        rules = Path(group, "devices.list").read_text().split("\n")
    except OSError:
        return None
    found: set[int] = set()
    for rule in rules:
        match = re.fullmatch(r"([ac]) (\d+|\*):(\d+|\*) r?w?m?", rule.strip())
        if match is None:
            continue
        kind, major, minor = match.groups()
        if kind == "a" or (major in ("*", str(_MAJOR)) and minor == "*"):
            return None
        if major == str(_MAJOR) and int(minor) < _MINORS:
            found.add(int(minor))
    return found


def _environment(pid: int, proc: Path) -> set[int | str]:
    try:
        raw = (proc / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return set()
    known = dict(entry.decode(errors="replace").partition("=")[::2] for entry in raw if entry)
    for name in _VARIABLES:
        words = [word.strip() for word in known.get(name, "").split(",")]
        if found := {int(word) if word.isdecimal() else word for word in words if _is_gpu(word)}:
            return found
    return set()


def _is_gpu(word: str) -> bool:
    return word.isdecimal() or re.fullmatch(r"GPU-[0-9a-f-]+", word) is not None
