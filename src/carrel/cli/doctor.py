"""Why a node cannot run guests, in sentences: each check looks at one thing, and a problem names the next step.

It changes nothing, and it boots nothing: whether KVM really boots a guest is carreld's to find out and tell.
"""

import asyncio
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from carrel import paths, process
from carrel.cli import api, guestnodes, output
from carrel.cli.check import Check, ok, problem
from carrel.config import Config
from carrel.daemons import transport, views
from carrel.errors import CarrelError
from carrel.images.kernel import kernels
from carrel.images.store import Store
from carrel.model.report import NodeReport
from carrel.model.sample import SamplerStatus
from carrel.model.shipping import SinkStatus
from carrel.slurm import version
from carrel.slurm.client import SlurmClient

FREE_MIN_BYTES = 2 * 2**30
"""Less room than this, and the next image or the overlays of a few guests fill the disk."""

_PROGRAMS = ("carrel-enter", "carrel-agent", "carrel-guard", "carrel-hook")
_PLUGIN = "spank_carrel.so"
_INCLUDES_MAX = 8


def examine(settings: Config, nodes: list[str]) -> list[Check]:
    """Look at what all nodes of this machine share, then at each carreld. Every check runs, whatever others found."""
    slurm = _slurm_settings(settings)
    health = _health(settings)
    shared: tuple[Callable[[], Iterator[Check]], ...] = (
        _qemu,
        lambda: _accelerator(settings),
        lambda: _images(settings),
        lambda: _guest_kernel(settings),
        _programs,
        lambda: _slurm(settings, slurm),
        lambda: _plugstack(settings, slurm),
        lambda: _hooks(slurm),
        lambda: _job_submit(settings, slurm),
        lambda: guestnodes.checks(settings, slurm, health),
        lambda: _controller(settings, health),
        lambda: _cgroups(slurm),
    )
    found = [check for look in shared for check in look()]
    for node in nodes:
        own = [*_carreld(settings, node), *_spool(settings, slurm, node)]
        found += [msgspec.structs.replace(check, node=node) for check in own]
    return found


def _carreld(settings: Config, node: str) -> Iterator[Check]:
    where = settings.node.path(node) / "carreld.sock"
    try:
        report = transport.converted(api.ask_node(settings, node, "status"), NodeReport, whose="carreld")
    except CarrelError as error:
        yield problem(
            f"node {node}: {str(error).partition(';')[0]}",
            f"systemctl start carreld; by hand, as root: carrel serve node --node {node}",
        )
        return
    yield ok(f"node {node}: carreld {report.facts.version} answers at {where}")
    for fault in report.facts.faults:
        what = fault if fault.startswith(f"node {node} ") else f"node {node}: {fault}"
        yield problem(what.removesuffix(", see: carrel node check"), f"repair it, then: carrel node check {node}")
    if report.facts.accelerator:
        yield ok(
            f"node {node}: guests run with {report.facts.accelerator}: {report.facts.accelerator_why}".rstrip(": ")
        )
    yield from _sampler(settings, node, report.sampler)
    for sink in report.sinks:
        yield from _sink(node, sink)


def _sampler(settings: Config, node: str, status: SamplerStatus | None) -> Iterator[Check]:
    root = settings.metrics.root
    if status is None:
        yield ok(f"node {node}: jobs are not sampled (metrics.enabled = false)")
        return
    if status.fault:
        yield problem(f"node {node}: {output.printable(status.fault)}", "repair it: no job waits for that")
    if status.failures:
        counts = ", ".join(f"{what} {count} times" for what, count in sorted(status.failures.items()))
        last = output.printable(status.last_failure)
        yield problem(
            f"node {node}: sampling failed since carreld began ({counts}); last: {last}",
            f"is there room below {root}, and may root write there? what failed is tried again by itself",
        )
    if not status.fault and not status.failures:
        yield ok(f"node {node}: samples {status.jobs} jobs, into {root}")


def _spool(settings: Config, slurm: dict[str, str] | CarrelError, node: str) -> Iterator[Check]:
    """Compare where slurmd has the sockets of its steps with where carreld looks for them."""
    theirs = "" if isinstance(slurm, CarrelError) else slurm.get("SlurmdSpoolDir", "")
    host = socket.gethostname().partition(".")[0]
    theirs = theirs.replace("%n", node).replace("%h", host)
    ours = settings.slurm.spool_dir.replace("{node}", node)
    if theirs and Path(theirs) != Path(ours):
        yield problem(
            f"node {node}: slurm.spool_dir is {ours}, and Slurm's SlurmdSpoolDir {theirs}: no step is seen there",
            f'spool_dir = "{theirs.replace(node, "{node}")}" in [slurm] of carrel.toml, then restart carreld',
        )


def _sink(node: str, sink: SinkStatus) -> Iterator[Check]:
    if sink.error:
        yield problem(
            f"node {node}: sink {sink.name} takes nothing: {output.printable(sink.error)}",
            f"its rows wait on the node, and go when it answers; see: [sinks.{sink.name}]",
        )
    if sink.dropped or sink.series_lost:
        counts = ", ".join(f"{why} {count}" for why, count in sorted(sink.rows_dropped.items()) if count)
        lost = f"; {sink.series_lost} jobs' samples were removed by their owners" if sink.series_lost else ""
        yield problem(
            f"node {node}: {sink.dropped} rows were dropped and never reach sink {sink.name} ({counts}){lost}",
            "was it down for longer than metrics.spool_bytes_max and spool_age_max_s allow?",
        )
    if not sink.error and not sink.dropped and not sink.series_lost:
        yield ok(f"node {node}: sink {sink.name} has taken {sink.rows_written} rows")


def _qemu() -> Iterator[Check]:
    for name, package in (("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")):
        path = shutil.which(name)
        if path is None:
            yield problem(f"{name} is not installed", f"apt-get install {package}")
            continue
        try:
            first = process.run([path, "--version"], timeout_s=10).partition("\n")[0]
        except CarrelError as error:
            yield problem(str(error), f"apt-get install --reinstall {package}")
        else:
            yield ok(f"{path}: {first}")


def _accelerator(settings: Config) -> Iterator[Check]:
    chosen = settings.guests.accelerator
    kvm = Path("/dev/kvm")
    if chosen == "tcg":
        yield ok("guests.accelerator = tcg: guests are emulated, by choice")
    elif os.access(kvm, os.R_OK | os.W_OK):
        yield ok(f"guests.accelerator = {chosen}: {kvm} opens; whether a guest boots with it, carreld finds out")
    elif chosen == "auto":
        yield ok(f"guests.accelerator = auto: {kvm} cannot be opened here, so guests are emulated")
    else:
        why = "cannot be opened by you" if kvm.exists() else "does not exist"
        yield problem(
            f"guests.accelerator = kvm, and {kvm} {why}",
            'modprobe kvm_intel or kvm_amd, or choose emulation: accelerator = "tcg" in [guests]',
        )


def _images(settings: Config) -> Iterator[Check]:
    store = settings.images.path
    try:
        names = Store(store).names()
        free_bytes = shutil.disk_usage(store).free
    except (OSError, CarrelError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        yield problem(f"image store {store}: {why}", "carrel image build debian12, or set images.store")
        return
    if names:
        yield ok(f"image store {store}: {', '.join(names)}")
    else:
        yield problem(f"image store {store} has no image", "carrel image build debian12")
    if free_bytes < FREE_MIN_BYTES:
        yield problem(f"image store {store}: {output.size(free_bytes)} free", "carrel image prune")
    else:
        yield ok(f"image store {store}: {output.size(free_bytes)} free")


def _guest_kernel(settings: Config) -> Iterator[Check]:
    store = settings.images.path
    found = kernels(store)
    if not found:
        yield problem(f"no kernel for guests in {store / 'kernels'}", "carrel image build debian12")
        return
    yield ok(f"guests boot kernel {found[-1].name}")
    if any((store / "initramfs").glob("*.cpio")):
        yield ok(f"initramfs in {store / 'initramfs'}")
    else:
        yield problem(f"no initramfs in {store / 'initramfs'}", "carrel image build debian12")


def _programs() -> Iterator[Check]:
    where = paths.libexec()
    missing = [name for name in _PROGRAMS if not os.access(where / name, os.X_OK)]
    if missing:
        yield problem(f"not in {where}, or not executable: {', '.join(missing)}", "make native, or make install")
    else:
        yield ok(f"{where}: {', '.join(_PROGRAMS)}")


def _slurm_settings(settings: Config) -> dict[str, str] | CarrelError:
    try:
        return asyncio.run(SlurmClient(settings.slurm).settings())
    except CarrelError as error:
        return error


def _health(settings: Config) -> views.Health | CarrelError:
    try:
        return api.health(settings)
    except CarrelError as error:
        return error


def _slurm(settings: Config, slurm: dict[str, str] | CarrelError) -> Iterator[Check]:
    if isinstance(slurm, CarrelError):
        yield problem(
            str(slurm), "is slurmctld up? scontrol ping; set slurm.bin_dir and slurm.conf if they are elsewhere"
        )
        return
    try:
        release = version.installed(settings.slurm)
    except CarrelError as error:
        yield problem(str(error), "set slurm.bin_dir")
        return
    if release.plugins < version.OLDEST:
        yield problem(f"Slurm {release} is older than 22.05", "upgrade Slurm")
    else:
        yield ok(f"Slurm {release}, cluster {slurm.get('ClusterName', '?')}")


def _plugstack(settings: Config, slurm: dict[str, str] | CarrelError) -> Iterator[Check]:
    """Find the line that Slurm would load, and compare what it was built for with what is installed."""
    conf = "" if isinstance(slurm, CarrelError) else slurm.get("PlugStackConfig", "")
    beside = settings.slurm.conf or os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")
    path = Path(conf) if conf.startswith("/") else Path(beside).with_name("plugstack.conf")
    arguments = {"socket=": settings.node.path("%n") / "carreld.sock", "enter=": paths.libexec() / "carrel-enter"}
    line = " ".join(
        ["required", str(paths.libexec() / _PLUGIN), *(f"{key}{value}" for key, value in arguments.items())]
    )
    words = next(_plugins(path), None)
    if words is None:
        yield problem(f"{path} loads no {_PLUGIN}", f"add this line to it: {line}")
        return
    loaded = Path(words[0])
    if missing := [key for key in arguments if not any(word.startswith(key) for word in words[1:])]:
        yield problem(f"{path} gives {loaded} no {' and no '.join(missing)}", f"make the line: {line}")
        return
    try:
        built = version.built_for(loaded)
        runs = version.installed(settings.slurm)
    except CarrelError as error:
        yield problem(str(error), f"make native; then in {path}: {line}")
        return
    if built.plugins != runs.plugins:
        yield problem(
            f"{loaded} was built for Slurm {built}, and {runs} is installed", "make clean native, or make install"
        )
    else:
        yield ok(f"{path} loads {loaded}, built for Slurm {built}")


def _plugins(path: Path, depth: int = 0) -> Iterator[list[str]]:
    """Yield our plug-in's path and its arguments, as in a plugstack.conf and what it includes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for words in (line.partition("#")[0].split() for line in lines):
        if len(words) >= 2 and words[0] == "include" and depth < _INCLUDES_MAX:
            pattern = Path(words[1])
            for other in sorted(pattern.parent.glob(pattern.name)):
                yield from _plugins(other, depth + 1)
        elif len(words) >= 2 and words[0] in {"required", "optional"} and Path(words[1]).name == _PLUGIN:
            yield words[1:]


def _hooks(slurm: dict[str, str] | CarrelError) -> Iterator[Check]:
    if isinstance(slurm, CarrelError):
        return
    hook = paths.libexec() / "carrel-hook"
    for name, late in (("Prolog", "guests start late"), ("Epilog", "the node is handed on before its guest is gone")):
        # Releases in which a site may have several number them: Prolog[0].
        given = [value for key, value in slurm.items() if key.partition("[")[0] == name and value != "(null)"]
        value = ",".join(given) or "(null)"
        if any(_calls_hook(path) for path in _scripts(value)):
            yield ok(f"{name} = {value} calls carrel-hook")
        else:
            call, ours = f"{hook} {name.lower()}", hook.with_name(name.lower())  # a checkout has no script of its own
            new = (
                f"{name}={ours} in slurm.conf"
                if ours.exists()
                else f"{name}=SCRIPT in slurm.conf, one that runs {call}"
            )
            then = f"call {call} in it" if given else new
            yield problem(f"{name} = {value} does not call carrel-hook: {late}", then)


def _scripts(value: str) -> list[Path]:
    """Slurm takes a path, a pattern, or (later releases) several with commas between."""
    found: list[Path] = []
    for item in value.split(","):
        path = Path(item.strip())
        if path.is_absolute():
            found += sorted(path.parent.glob(path.name))
    return found


def _calls_hook(script: Path) -> bool:
    if script.resolve().name == "carrel-hook":
        return True
    try:
        return "carrel-hook" in script.read_text(errors="replace")
    except OSError:
        return False


def _job_submit(settings: Config, slurm: dict[str, str] | CarrelError) -> Iterator[Check]:
    """Find what asks the bank, and holds jobs of guests that are nodes; the script itself is on slurmctld's host."""
    nodes = settings.guest_nodes
    uses = {"bank.enabled": settings.bank.enabled, "guest_nodes.hosts": nodes.hosts, "guest_nodes.remote": nodes.remote}
    wanted = [name for name, used in uses.items() if used]
    if not wanted or isinstance(slurm, CarrelError):
        return
    plugins = slurm.get("JobSubmitPlugins", "(null)")
    page = "bank" if settings.bank.enabled else guestnodes.PAGE
    if "lua" not in plugins.split(","):
        yield problem(
            f"{' and '.join(wanted)} set, and JobSubmitPlugins = {plugins}: no job is asked about",
            f"JobSubmitPlugins=lua in slurm.conf; see docs/how-to/{page}.md",
        )
        return
    beside = Path(settings.slurm.conf or os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf"))
    script = beside.with_name("job_submit.lua")
    controllers = slurm.get("SlurmctldHost[0]", "").partition("(")[0]
    if controllers == socket.gethostname().partition(".")[0] and not script.exists():
        yield problem(f"JobSubmitPlugins = {plugins}, and no {script}", f"cp {paths.libexec() / script.name} {script}")
    else:
        yield ok(f"JobSubmitPlugins = {plugins}, for {' and '.join(wanted)}")


def _controller(settings: Config, health: views.Health | CarrelError) -> Iterator[Check]:
    listen = settings.controller.listen
    if isinstance(health, CarrelError):
        yield problem(
            f"{str(health).partition(';')[0]}: guests run all the same, the cluster does not hear of them",
            "systemctl start carrelctld on its host; where that is another one: controller.listen = tcp:HOST:PORT",
        )
    else:
        yield ok(f"carrelctld {health.version} answers at {listen}: nodes that have reported: {health.nodes}")


def _cgroups(slurm: dict[str, str] | CarrelError) -> Iterator[Check]:
    root = Path("/sys/fs/cgroup")
    kind = "" if isinstance(slurm, CarrelError) else slurm.get("ProctrackType", "")
    if kind == "proctrack/linuxproc":
        yield ok("ProctrackType = proctrack/linuxproc: it works, but Slurm does not bound a job's memory")
        return
    unified = root / "cgroup.controllers"
    try:
        have = set(unified.read_text().split()) if unified.exists() else {path.name for path in root.iterdir()}
    except OSError as error:
        yield problem(f"{root}: {error.strerror}", f"mount it: mount -t cgroup2 none {root}")
        return
    wanted = {"memory", "cpuset"} | (set() if unified.exists() else {"freezer"})
    if missing := wanted - have:
        yield problem(f"cgroup controllers missing in {root}: {', '.join(sorted(missing))}", "boot with them enabled")
    else:
        yield ok(f"cgroup v{2 if unified.exists() else 1} with {', '.join(sorted(wanted))}")
