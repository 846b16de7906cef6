"""What a sandbox consists of and in which order it starts.

slurmctld comes before the nodes: a slurmd that finds no controller tries again only a second later.
"""

import getpass
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from carrel import paths
from carrel.errors import CarrelError, NodeFaultError, RefusedError
from carrel.hosts import table
from carrel.process import CommandError, run
from carrel.sandbox import bank, database, netns, slurmconf, teardown
from carrel.sandbox.children import POLL_S, Children, Recipe, accepts, listens
from carrel.sandbox.layout import Layout
from carrel.sandbox.slurmconf import NODE_CPUS, Place
from carrel.sandbox.spec import Daemon, Facts, Spec

_SUBMIT_SCRIPT = "job_submit.lua"
_PORT_BLOCKS = range(20000, 32000, 64)
"""Below the kernel's ephemeral ports, so that no outgoing connection sits on ours."""
_LIBEXEC_FILES = ("carrel-enter", "carrel-agent", "carrel-guard", "carrel-hook", "spank_carrel.so")
_SBIN = "/usr/sbin:/sbin"


class Assembly:
    """Makes the files and starts the daemons of one sandbox, through ``children``."""

    def __init__(self, spec: Spec, children: Children, *, say: Callable[[str], None]) -> None:
        """Claim a block of ports and the directory.

        Raises:
            CarrelError: the directory is not empty, or a program is missing; nothing was made.
        """
        self._spec, self._children, self._say = spec, children, say
        self.layout = Layout(Path(spec.dir))
        os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"
        os.environ["SLURM_CONF"] = str(self.layout.slurm_conf)
        os.environ["CARREL_CONFIG"] = str(self.layout.carrel_conf)
        self._refuse_what_cannot_work()
        base_port, self._claim = _claim_ports()
        self.place = Place(
            layout=self.layout,
            spec=spec,
            user=getpass.getuser(),
            host=socket.gethostname().partition(".")[0],
            base_port=base_port,
            addresses=tuple(netns.address(index) for index in range(spec.nodes + spec.hosts)) if spec.netns else (),
            controller_address=netns.CONTROLLER_ADDRESS if spec.netns else "127.0.0.1",
        )
        self._network = netns.Network(f"cr{base_port}", (*self.place.nodes, *self.place.hosts)) if spec.netns else None

    def start(self, *, timeout_s: float) -> None:
        """Start all; return when every node is idle and every carreld answers."""
        self._write()
        if self._network:
            self._network.make()
            netns.join(self._network.controller)
        first = self._start_and_wait
        first(self._munged(), timeout_s)
        if self._spec.slurmdbd:
            self._say("making a database for slurmdbd, about five seconds")
            database.install(self.place)
            first(database.server(self.place), timeout_s)
            database.create(self.place)
            first(database.daemon(self.place), timeout_s)
            database.register(self.place)
        if self._spec.guests:
            hosts = [
                table.Facts(name=name, cpus=NODE_CPUS, memory_bytes=self._spec.node_memory_mb * 2**20, reports=True)
                for name in self.place.hosts
            ]
            with closing(table.HostTable(self.layout.hosts_table)) as opened:
                opened.put(hosts)
        if self._spec.guests or self._spec.bank:
            self._children.spawn(self._carrelctld())
        if self._spec.guests:
            for node in (*self.place.nodes, *self.place.hosts):
                self._children.spawn(self._carreld(node))
        first(self._slurmctld(fresh=True), timeout_s)
        for node in self.place.nodes:
            self._children.spawn(self._slurmd(node))
        for node in self.place.nodes:
            self._children.wait_ready(f"slurmd@{node}", timeout_s=timeout_s)
        self._wait_idle(timeout_s)
        self._wait_ours(timeout_s)

    def start_one(self, name: str, *, timeout_s: float) -> None:
        """Start a daemon again after it ended; one that runs is left alone. slurmctld keeps its state."""
        recipe = self._slurmctld(fresh=False) if name == "slurmctld" else self._children.recipe(name)
        self._start_and_wait(recipe, timeout_s)

    def facts(self, daemons: tuple[Daemon, ...]) -> Facts:
        return Facts(
            dir=str(self.layout.root),
            cluster=self.place.cluster,
            nodes=self.place.nodes,
            hosts=self.place.hosts,
            pool=self.place.pool,
            pid=os.getpid(),
            netns=self._network.controller if self._network else "",
            guests=self._spec.guests,
            slurmdbd=self._spec.slurmdbd,
            cgroups=self._spec.proctrack == "cgroup",
            daemons=daemons,
        )

    def thaw(self) -> None:
        """Let suspended jobs be killed."""
        if self._spec.proctrack == "cgroup":
            teardown.thaw((*self.place.nodes, *self.place.pool))

    def remove(self) -> None:
        """Remove what lies outside the directory: namespaces and cgroups."""
        if self._network:
            self._network.remove()
        if self._spec.proctrack == "cgroup":
            teardown.remove_cgroups((*self.place.nodes, *self.place.pool))

    def _refuse_what_cannot_work(self) -> None:
        self.layout.check(guests=self._spec.guests)
        needed = ["munged", "slurmctld", "slurmd", "sinfo"]
        needed += ["mariadb-install-db", "mariadbd", "slurmdbd", "sacctmgr"] if self._spec.slurmdbd else []
        needed += ["ip", "nsenter", "unshare"] if self._spec.netns else []
        if missing := [name for name in needed if shutil.which(name) is None]:
            raise NodeFaultError(f"not installed: {', '.join(missing)}; see: make setup")
        if os.getuid() != 0:
            if self._spec.netns:
                raise RefusedError("--netns needs root: only root makes network namespaces")
            if self._spec.guests:
                raise RefusedError("guests need root: carreld runs guests as other users; see: --no-guests")
            if self._spec.proctrack == "cgroup":
                raise RefusedError("--proctrack cgroup needs root: only root writes to the cgroup tree")
        if self._spec.bank and not (paths.libexec() / _SUBMIT_SCRIPT).exists():
            raise NodeFaultError(f"{paths.libexec()}: no {_SUBMIT_SCRIPT}; see: make native")
        if self._spec.guests and (absent := [name for name in _LIBEXEC_FILES if not (paths.libexec() / name).exists()]):
            raise NodeFaultError(
                f"{paths.libexec()}: no {', '.join(absent)}; see: make native, or start without guests: --no-guests"
            )

    def _write(self) -> None:
        layout, place = self.layout, self.place
        layout.make(place.nodes, hosts=place.hosts, pool=place.pool)
        layout.munge_key.write_bytes(os.urandom(128))
        layout.munge_key.chmod(0o600)
        files = {
            "slurm.conf": slurmconf.slurm_conf(place),
            "cgroup.conf": slurmconf.cgroup_conf(self._spec),
            "plugstack.conf": slurmconf.plugstack_conf(layout) if self._spec.guests else "",
            "carrel.toml": slurmconf.carrel_toml(place, paths.image_store()),
        }
        if place.pool or self._spec.bank:
            files[_SUBMIT_SCRIPT] = (paths.libexec() / _SUBMIT_SCRIPT).read_text()
        if self._network:
            files["hosts"] = self._network.hosts(place.host)
        for name, text in files.items():
            (layout.etc / name).write_text(text)
        if self._spec.bank:
            bank.install(place)
        if self._spec.slurmdbd:
            (layout.etc / "slurmdbd.conf").touch(mode=0o600)
            (layout.etc / "slurmdbd.conf").write_text(slurmconf.slurmdbd_conf(place))
        if self._spec.guests:
            self._copy_programs()

    def _copy_programs(self) -> None:
        """Copy what tasks run: a checkout may lie in a home that only its owner may enter, and be rebuilt meanwhile."""
        for program in paths.libexec().iterdir():
            if program.is_file():
                shutil.copyfile(program, self.layout.libexec / program.name)
                (self.layout.libexec / program.name).chmod(0o755)
        for role in ("prolog", "epilog"):
            script = self.layout.etc / role
            script.write_text(slurmconf.hook_script(self.layout, role))
            script.chmod(0o755)

    def _start_and_wait(self, recipe: Recipe, timeout_s: float) -> None:
        self._children.spawn(recipe)
        self._children.wait_ready(recipe.name, timeout_s=timeout_s)

    def _munged(self) -> Recipe:
        layout = self.layout
        return Recipe(
            name="munged",
            command=(
                "munged",
                "--foreground",
                f"--socket={layout.munge_socket}",
                f"--key-file={layout.munge_key}",
                f"--pid-file={layout.run}/munged.pid",
                f"--log-file={layout.log}/munged.log",
                f"--seed-file={layout.root}/state/munge.seed",
            ),
            log=layout.log / "munged.stderr",
            ready=listens(layout.munge_socket),
        )

    def _slurmctld(self, *, fresh: bool) -> Recipe:
        return Recipe(
            name="slurmctld",
            command=("slurmctld", "-D", *(["-c"] if fresh else [])),
            log=self.layout.log / "slurmctld.stderr",
            env={"CARREL_LIBEXEC": str(paths.libexec())},
            ready=accepts(self.place.controller_address, self.place.base_port),
        )

    def _slurmd(self, node: str) -> Recipe:
        return Recipe(
            name=f"slurmd@{node}",
            command=self._on(node, "slurmd", "-D", "-N", node),
            log=self.layout.log / f"slurmd.{node}.stderr",
            ready=accepts(*self.place.node_endpoint(node)),
        )

    def _carreld(self, node: str) -> Recipe:
        return Recipe(
            name=f"carreld@{node}",
            command=self._on(node, sys.executable, "-m", "carrel.cli.main", "serve", "node", "--node", node),
            log=self.layout.log / f"carreld.{node}.log",
            ready=listens(self.layout.node_socket(node)),
            env={"CARREL_LIBEXEC": str(self.layout.libexec)},
        )

    def _carrelctld(self) -> Recipe:
        return Recipe(
            name="carrelctld",
            command=(sys.executable, "-m", "carrel.cli.main", "serve", "controller"),
            log=self.layout.log / "carrelctld.log",
            ready=listens(self.layout.controller_socket),
        )

    def _on(self, node: str, *command: str) -> tuple[str, ...]:
        return self._network.in_node(node, command, hosts=self.layout.etc / "hosts") if self._network else command

    def _wait_ours(self, timeout_s: float) -> None:
        """Wait for our own daemons; the bank is ready when Slurm has described its cluster to it."""
        if self._spec.guests:
            for node in (*self.place.nodes, *self.place.hosts):
                self._children.wait_ready(f"carreld@{node}", timeout_s=timeout_s)
        # Jobs can wait for it, and what a person types first may be a question to it.
        if self._spec.bank or (self._spec.guests and (self._spec.hosts or self._spec.detached)):
            self._children.wait_ready("carrelctld", timeout_s=timeout_s)
        if self._spec.bank:
            deadline = time.monotonic() + timeout_s
            while not bank.ready(self.place):
                if time.monotonic() > deadline:
                    raise CarrelError(
                        f"the bank is not ready after {timeout_s:g} s; see {self.layout.log}/carrelctld.log"
                    )
                time.sleep(POLL_S)

    def _wait_idle(self, timeout_s: float) -> None:
        """Wait for Slurm's own word: before it, the first job waits for a scheduling cycle of three seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                lines = run(["sinfo", "--noheader", "--Node", "--format=%N %T"], timeout_s=timeout_s).splitlines()
            except CommandError as error:
                lines = [str(error)]
            names = {*self.place.nodes}
            seen = sorted({line for line in lines if line.split()[0] in names})  # a line for each of its partitions
            if len(seen) == self._spec.nodes and all(line.endswith(" idle") for line in seen):
                return
            if time.monotonic() > deadline:
                raise CarrelError(f"nodes not idle after {timeout_s:g} s but {', '.join(seen)}; see {self.layout.log}")
            time.sleep(POLL_S)


def _claim_ports() -> tuple[int, socket.socket]:
    """Return the first port of a block and what claims it against other sandboxes: a name that dies with us."""
    blocks = list(_PORT_BLOCKS)
    random.shuffle(blocks)
    for base in blocks:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            claim.bind(f"\0carrel-sandbox-{base}")
        except OSError:
            claim.close()
            continue
        if all(_free(port) for port in range(base, base + _PORT_BLOCKS.step)):
            return base, claim
        claim.close()
    raise NodeFaultError(f"no free block of {_PORT_BLOCKS.step} ports between {_PORT_BLOCKS[0]} and {_PORT_BLOCKS[-1]}")


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
        return True
