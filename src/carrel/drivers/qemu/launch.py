"""Making one QEMU: its disk, its sockets, its descriptors, and carrel-guard as its parent."""

import os
import shutil
import signal
import socket
import subprocess  # a guard outlives this process on purpose, which carrel.process does not offer
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from carrel import paths, process
from carrel.drivers.qemu import cgroups
from carrel.drivers.qemu.command import Descriptors, Memory, command_line
from carrel.drivers.qemu.files import GuestDirectory, Record, opened
from carrel.drivers.qemu.settings import Settings
from carrel.drivers.qemu.templates import Parts
from carrel.errors import CarrelError, NodeFaultError, RefusedError
from carrel.model.guest import GuestSpec
from carrel.model.image import ImageFiles, KernelFiles
from carrel.ports import DriverContext


class Guard(subprocess.Popen[bytes]):
    """A child that outlives this process on purpose, so there is nothing to warn of when the object goes."""

    def __del__(self) -> None:
        """Say nothing."""


SPARE_BYTES = 64 * 2**20  # what a disk must have left after a clone was made on it


def make_disk(directory: GuestDirectory, record: Record, image: ImageFiles, settings: Settings) -> Path:
    """Make the guest's own disk: a copy of the image, or an overlay on it.

    Raises:
        NodeFaultError: the disk of this node is full.
        RefusedError: it took longer than the user wants to wait, which is no fault of the node.
    """
    spec = record.spec
    disk = directory.path / "disk"
    disk.unlink(missing_ok=True)
    _require_space(directory, record, image.root.stat().st_blocks * 512 if record.clone == "full" else 0)
    try:
        if record.clone == "full":
            process.run(["cp", "--sparse=always", "--reflink=auto", image.root, disk], timeout_s=spec.boot_timeout_s)
        else:
            # The name of the backing file is never opened: the command line gives the image as a descriptor.
            words: list[str | Path] = [settings.img, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.root, disk]
            process.run(words, timeout_s=spec.boot_timeout_s)
    except process.CommandError as error:
        if error.status == -signal.SIGKILL:
            raise RefusedError(
                f"no {record.clone} clone of {spec.image_name} within {spec.boot_timeout_s:g} s (--guest-boot-timeout)"
            ) from error
        raise NodeFaultError(f"node {spec.node}: cannot clone {spec.image_name}: {error}") from error
    disk.chmod(0o600)
    return disk


def make_overlay(directory: GuestDirectory, record: Record, empty: int) -> Path:
    """Make an instant clone's disk: a copy of its template's empty overlay, which costs less than to make one.

    Raises:
        NodeFaultError: the disk of this node is full.
    """
    _require_space(directory, record, 0)
    disk = directory.path / "disk"
    with disk.open("wb") as file, os.fdopen(os.dup(empty), "rb") as source:
        source.seek(0)
        shutil.copyfileobj(source, file)
    disk.chmod(0o600)
    return disk


def _require_space(directory: GuestDirectory, record: Record, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory.path).free
    if free_bytes < SPARE_BYTES + needed_bytes:
        raise NodeFaultError(
            f"node {record.spec.node}: {directory.path.parent}: {free_bytes // 2**20} MiB free, a {record.clone} clone "
            f"of {record.spec.image_name} needs {(SPARE_BYTES + needed_bytes) // 2**20} MiB; see: carrel node check"
        )


def start(
    context: DriverContext,
    settings: Settings,
    directory: GuestDirectory,
    record: Record,
    *,
    image: ImageFiles,
    kernel: KernelFiles,
    template: Callable[[ExitStack], Parts] | None = None,
) -> Guard:
    """Start carrel-guard, which becomes QEMU's parent; return at once."""
    spec = record.spec
    with ExitStack() as stack:
        parts = template(stack) if template else None
        disk = make_overlay(directory, record, parts.empty) if parts else make_disk(directory, record, image, settings)

        def listening(name: str) -> int:
            sock: socket.socket = stack.enter_context(directory.listen(name))
            return sock.fileno()

        console = opened(stack, directory.console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.fchown(console, spec.uid, 0)  # theirs alone to read: others may be in the user's group
        os.fchmod(console, 0o400)
        fds = Descriptors(
            kernel=None if parts else opened(stack, kernel.kernel, os.O_RDONLY),
            initramfs=None if parts else opened(stack, kernel.initramfs, os.O_RDONLY),
            disk=opened(stack, disk, os.O_RDWR),
            base=None if record.clone == "full" else opened(stack, image.root, os.O_RDONLY),
            layer=parts.disk if parts else None,
            ram=parts.ram if parts else None,
            state=parts.state if parts else None,
            console=console,
            monitor=listening("qmp.sock"),
            control=listening("control.sock"),
        )
        qemu = command_line(
            settings=settings,
            accelerator=record.accelerator,
            name=spec.name,
            cpus=spec.cpus,
            memory=record.memory or Memory(size_bytes=spec.memory_bytes),
            ports=record.ports,
            stage=str(directory.path / "stage"),
            fds=fds,
        )
        log = stack.enter_context((directory.path / "guard.log").open("ab"))
        if fds.state is not None:  # QEMU waits to be told, perhaps by the next carreld
            directory.write(msgspec.structs.replace(record, state=fds.state))
        return Guard(
            [*_guard(context, directory, record, fds=fds), "--", *qemu],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=fds.all(),
            start_new_session=True,
            cwd="/",
        )


def _guard(context: DriverContext, directory: GuestDirectory, record: Record, *, fds: Descriptors) -> list[str]:
    spec = record.spec
    words = [str(paths.libexec() / "carrel-guard"), "--dir", str(directory.path)]
    words += ["--uid", str(spec.uid), "--gid", str(spec.gid)]
    words += ["--groups", ",".join(str(group) for group in spec.groups) or str(spec.gid)]
    words += ["--lock", str(context.lock)]
    words += ["--job-dir", spec.job_freezer] if spec.job_freezer else ["--step-sockets", _step_sockets(context, spec)]
    for cgroup in cgroups.make(spec.job_cgroups, cgroup_name(spec)):
        words += ["--cgroup", str(cgroup)]
    for index, mount in enumerate(spec.mounts):
        words += ["--bind", f"{index}:{'ro' if mount.read_only else 'rw'}:{mount.source}"]
    for descriptor in fds.all():
        words += ["--keep-fd", str(descriptor)]
    return words


def cgroup_name(spec: GuestSpec) -> str:
    """Return the name of the guest's directory below its job's."""
    return f"carrel.{spec.step}.{spec.task}" if spec.per == "task" else "carrel"


def _step_sockets(context: DriverContext, spec: GuestSpec) -> str:
    """Return the beginning of the paths of the sockets that slurmstepds of this job listen on."""
    spool = context.config.slurm.spool_dir.replace("{node}", spec.node)
    if not spool:
        raise CarrelError("slurm.spool_dir is not set; carrel-guard could not see the job end")
    return f"{spool}/{spec.node}_{spec.run.job_id}."
