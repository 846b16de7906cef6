"""Making a template: boot the pristine image as a service user, let it warm up, and stop it for good.

Nothing of any user is in it: it has no name, no user, no directory of the host, and its randomness is replaced in every
clone before the first command (``carrel-agent``'s verb ``identity``).
"""

import asyncio
import contextlib
import os
import pwd
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

from carrel import process
from carrel.drivers.qemu.command import Descriptors, Memory, command_line
from carrel.drivers.qemu.control import Control, kernel_of
from carrel.drivers.qemu.files import GuestDirectory, opened
from carrel.drivers.qemu.monitor import Monitor
from carrel.drivers.qemu.settings import Settings
from carrel.drivers.qemu.templates import Conditions, Template, Templates, new_ram
from carrel.errors import CarrelError, UnreachableError
from carrel.model.image import ImageFiles, KernelFiles

NICE = "10"
ANSWER_TIMEOUT_S = 60.0


async def make(
    templates: Templates,
    conditions: Conditions,
    *,
    settings: Settings,
    user: str,
    image: ImageFiles,
    kernel: KernelFiles,
    timeout_s: float,
) -> Template | None:
    """Make the template for ``conditions``, and return it; None: another process is making it.

    One that is there already is replaced.

    Raises:
        CarrelError: it cannot be made; nothing of the attempt is left.
    """
    try:
        with templates.making(conditions) as new:
            if new is None:
                return None
            async with asyncio.timeout(timeout_s):
                return await _make(templates, conditions, new, settings=settings, user=user, image=image, kernel=kernel)
    except TimeoutError as error:
        raise CarrelError(f"its guest was not ready after {timeout_s:g} s") from error
    except OSError as error:
        raise CarrelError(f"{templates.path}: {error.strerror or error}") from error


async def _make(
    templates: Templates,
    conditions: Conditions,
    new: Path,
    *,
    settings: Settings,
    user: str,
    image: ImageFiles,
    kernel: KernelFiles,
) -> Template:
    began_s = time.time()
    directory = GuestDirectory(new / "guest")
    directory.make()
    for name, below, kind in (("disk", image.root, "raw"), ("empty", new / "disk", "qcow2")):
        words: list[str | Path] = [settings.img, "create", "-q", "-f", "qcow2", "-F", kind, "-b", below, new / name]
        await asyncio.to_thread(process.run, words, timeout_s=ANSWER_TIMEOUT_S)
    with ExitStack() as stack:
        ram = new_ram(conditions.memory_bytes)
        stack.callback(os.close, ram)
        state = os.open(new / "state", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, state)
        os.fchmod(state, 0o444)  # a clone's QEMU, its user's, may open it anew; only carreld gets at its name
        async with _guest(
            conditions, directory, new, settings=settings, user=user, image=image, kernel=kernel, ram=ram
        ):
            version = await _boot_and_stop(directory, state)
        await asyncio.to_thread(directory.remove)
        template = Template(
            conditions=conditions,
            image_name=image.name,
            kernel_version=version,
            created_s=time.time(),
            boot_s=round(time.time() - began_s, 3),
        )
        return await asyncio.to_thread(templates.add, template, new, ram=ram)


@contextlib.asynccontextmanager
async def _guest(
    conditions: Conditions,
    directory: GuestDirectory,
    new: Path,
    *,
    settings: Settings,
    user: str,
    image: ImageFiles,
    kernel: KernelFiles,
    ram: int,
) -> AsyncIterator[None]:
    """Run the template's QEMU; it is gone afterwards, also where this process was killed."""
    with ExitStack() as stack:

        def listening(name: str) -> int:
            return stack.enter_context(directory.listen(name)).fileno()

        fds = Descriptors(
            kernel=opened(stack, kernel.kernel, os.O_RDONLY),
            initramfs=opened(stack, kernel.initramfs, os.O_RDONLY),
            disk=opened(stack, new / "disk", os.O_RDWR),
            base=opened(stack, image.root, os.O_RDONLY),
            ram=ram,
            console=opened(stack, directory.console, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            monitor=listening("qmp.sock"),
            control=listening("control.sock"),
        )
        stage = opened(stack, directory.path / "stage", os.O_RDONLY | os.O_DIRECTORY)
        qemu = command_line(
            settings=settings,
            accelerator=conditions.accelerator,
            name="carrel-template",
            cpus=conditions.cpus,
            memory=Memory(size_bytes=conditions.memory_bytes, growth_bytes=conditions.growth_bytes, shared=True),
            ports=conditions.ports,
            stage=f"/proc/self/fd/{stage}",  # a checkout may lie in a home that only its owner may enter
            fds=fds,
        )
        child = await asyncio.create_subprocess_exec(
            *("nice", "-n", NICE, "setpriv", "--no-new-privs", "--pdeathsig=KILL"),
            *_as_user(user),
            # Where this process ended before the kernel was told to end its child with it, nobody would.
            *("--", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid()), *qemu),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=opened(stack, directory.path / "guard.log", os.O_WRONLY | os.O_CREAT),
            pass_fds=[*fds.all(), stage],
            cwd="/",
        )
    # Its sockets are its own now: they close when it ends.
    try:
        yield
    except UnreachableError as error:
        raise CarrelError(directory.panic() or directory.guard_log() or str(error)) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def _as_user(user: str) -> list[str]:
    """Return setpriv's words to be the service user; carreld is root, and whoever is not can only be who they are."""
    if os.geteuid() != 0:
        return []
    try:
        entry = pwd.getpwnam(user)
    except KeyError as error:
        raise CarrelError(f"no user {user!r} for templates to boot as; see: guests.templates.user") from error
    return [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]


async def _boot_and_stop(directory: GuestDirectory, state: int) -> str:
    """Have the guest run a shell once, so that clones find it in their memory, stop it, and return its kernel."""
    with directory.short() as short:
        control = await Control.connect(short / "control.sock")
        monitor = await Monitor.connect(short / "qmp.sock")
    try:
        hello = await control.hello()
        await control.ask({"verb": "warm"}, answer="warm", timeout_s=ANSWER_TIMEOUT_S)
        # Stopped in the middle of the conversation, which its clones go on with: no news of an end is under way.
        await monitor.freeze(state)
    finally:
        control.close()
        await monitor.close()
    return kernel_of(hello)
