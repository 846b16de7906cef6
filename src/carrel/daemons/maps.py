"""Slot maps: which guest of a job is where, in the XML of VINO-Slurm too, for programs that knew it.

``vm_map<jobid>.conf`` is the job's latest step, ``vm_map<jobid>.<step>.conf`` each step; the files go with the guests.
"""

import contextlib
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.sax.saxutils import quoteattr

from carrel.daemons.views import Slot
from carrel.model.guest import Guest

_STEP = re.compile(r"[A-Za-z0-9_-]{1,32}")
_FILE = re.compile(r"vm_map\d+(\.[A-Za-z0-9_-]+)?\.conf|\.vm_map.*")
"""Ours, finished or cut off by a power cut."""


def slots(guests: Iterable[Guest], addresses: Mapping[str, str]) -> list[Slot]:
    """Return the map of ``guests``, by step, task, node and slot; a node whose address is unknown is named instead."""
    found = [
        Slot(
            id=guest.slot,
            hm=addresses.get(guest.node, guest.node),
            mem_mb=guest.memory_bytes // 2**20,
            cores=guest.cpus,
            arch=platform.machine(),
            node=guest.node,
            step=guest.step,
            task=guest.task,
            guest=guest.name,
        )
        for guest in guests
        if guest.state != "down"
    ]
    return sorted(found, key=lambda slot: (slot.step, slot.task, slot.node, slot.id))


def xml(found: Iterable[Slot]) -> str:
    """Return a slot map as VINO-Slurm wrote it."""
    items = (
        "<item "
        + " ".join(f"{name}={quoteattr(str(getattr(slot, name)))}" for name in ("id", "hm", "mem_mb", "cores", "arch"))
        + "></item>\n"
        for slot in found
    )
    return f"<VM_LIST>\n<VM>\n{''.join(items)}</VM>\n</VM_LIST>\n"


def files(guests: Iterable[Guest], addresses: Mapping[str, str]) -> dict[str, str]:
    """Return what shall stand in the map directory: file name to text."""
    jobs: dict[int, dict[str, list[Guest]]] = {}
    for guest in guests:
        if guest.run is not None and guest.state != "down":
            jobs.setdefault(guest.run.job_id, {}).setdefault(guest.step, []).append(guest)
    wanted: dict[str, str] = {}
    for job_id, steps in jobs.items():
        for step, members in steps.items():
            if _STEP.fullmatch(step):
                wanted[f"vm_map{job_id}.{step}.conf"] = xml(slots(members, addresses))
        latest = max(steps.values(), key=lambda members: max(guest.started_s for guest in members))
        wanted[f"vm_map{job_id}.conf"] = xml(slots(latest, addresses))
    return wanted


class MapDirectory:
    """The directory of map files, made to hold exactly what is wanted. Blocking: meant for a thread."""

    def __init__(self, directory: Path) -> None:
        """Take over what an earlier process left; it is removed by ``sweep``."""
        self._directory = directory
        self._written: dict[str, str] = {}

    def put(self, wanted: Mapping[str, str]) -> None:
        """Write what is new or has changed, remove what we wrote and is wanted no more."""
        for name, text in wanted.items():
            if self._written.get(name) != text:
                self._write(name, text)
                self._written[name] = text
        for name in [name for name in self._written if name not in wanted]:
            (self._directory / name).unlink(missing_ok=True)
            del self._written[name]

    def sweep(self) -> None:
        """Remove the maps of an earlier process that no report has claimed."""
        if not self._directory.is_dir():
            return
        for path in self._directory.iterdir():
            if _FILE.fullmatch(path.name) and path.name not in self._written:
                path.unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._directory, prefix=f".{name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            Path(temporary).rename(self._directory / name)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()
            raise
