"""carrelctld: collects what the nodes report and answers for the cluster. It owns nothing.

What it knows lies in memory and comes back with the next reports, so it may be killed at any moment.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from carrel import config
from carrel.config import Config
from carrel.daemons import maps, transport, views
from carrel.daemons.banking import Bank
from carrel.daemons.board import Board
from carrel.daemons.branch import Branch
from carrel.daemons.deputy import Deputy
from carrel.daemons.hosts import HostDesk
from carrel.daemons.knock import Knock
from carrel.daemons.peers import share
from carrel.daemons.reconcile import Reconciler
from carrel.daemons.unserved import Unserved
from carrel.errors import CarrelError
from carrel.model.guest import Guest
from carrel.slurm.client import SlurmClient

_LOG = logging.getLogger("carrelctld")
_ADDRESSES_KEPT_S = 60.0
_MISSED_REPORTS_MAX = 3
_FIRST_REPORTS = 1.5
"""Periods after which every node that lives has reported to a new controller: it tries again once a period at least."""
_BACKLOG = 128


def main() -> None:
    """Run until SIGTERM or SIGINT. The configuration is that of the environment."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    asyncio.run(Controller(config.load()).run())


class Controller:
    """The daemon: a board, the map files, and the API over them."""

    def __init__(self, settings: Config) -> None:
        """Open nothing yet."""
        self.board = Board()
        self._settings = settings
        self._slurm = SlurmClient(settings.slurm)
        self._addresses: dict[str, str] = {}
        self._addresses_at_s = 0.0
        self._maps = maps.MapDirectory(Path(settings.guests.map_dir))
        self._changed = asyncio.Event()
        self._branch = Branch(settings, Bank(settings), self.board) if settings.bank.enabled else None
        self._silent_after_s = _MISSED_REPORTS_MAX * settings.node.report_period_s
        self.desk = HostDesk(settings.placement, self.board, silent_after_s=self._silent_after_s)
        self._reconciler: Reconciler | None = None
        remote = settings.guest_nodes.remote
        self._deputies = {
            name: Deputy(name, hosts, settings, tell=self.board.note, show=partial(self._see, name))
            for name, hosts in remote.items()
        }
        if settings.guest_nodes.hosts or remote:
            self._reconciler = Reconciler(settings, self.desk.admission, tell=self.board.note, remotes=self._deputies)

    async def run(self) -> None:
        """Serve until a signal ends it."""
        began_s = time.perf_counter()
        where = transport.address(self._settings.controller.listen)
        server = self._server()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, setattr, server, "should_exit", True)
        # Only now: whoever finds the socket may also end us.
        listening = listen(where)
        works = [asyncio.create_task(self._keep_maps())]
        if self._reconciler:
            works.append(asyncio.create_task(self._reconciler.run()))
            works.append(asyncio.create_task(self._hear_knocks(self._reconciler)))
            works += [
                asyncio.create_task(each.run(self._reconciler.hosts.exchange)) for each in self._deputies.values()
            ]
        else:
            works.append(asyncio.create_task(Unserved(self._settings, tell=self.board.note).run()))
        if self._branch is not None:
            await self._branch.start(listen(transport.Address(path=self._settings.bank.socket)))
        _LOG.info("listening on %s elapsed_s=%.2f", where, time.perf_counter() - began_s)
        try:
            await server.serve(sockets=[listening])
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            if self._branch is not None:
                await self._branch.close()
                _remove_socket(Path(self._settings.bank.socket))
            listening.close()
            if where.path:
                _remove_socket(Path(where.path))

    def _server(self) -> Any:
        # Litestar and uvicorn take half a second to import: nobody but a running controller pays for them.
        import uvicorn  # noqa: PLC0415

        from carrel.daemons import api  # noqa: PLC0415
        from carrel.daemons.visitors import SHARE_MAX, visitors  # noqa: PLC0415

        class Server(uvicorn.Server):
            """Leaves the signals to us: uvicorn's way is to raise them once more at its end."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        trusted = frozenset({0, os.geteuid()})
        service = api.Service(
            board=self.board,
            trusted=trusted,
            addresses=self.addresses,
            changed=self._changed.set,
            silent_after_s=self._silent_after_s,
            munge_socket=self._settings.controller.munge_socket,
            hosts=self.desk,
            exchange=self._reconciler.hosts.exchange if self._reconciler else None,
            bank=self._branch.bank if self._branch else None,
            branch=self._branch,
            guest_nodes=self._guest_nodes,
        )
        return Server(
            uvicorn.Config(
                api.create(service),
                http=visitors(limit=min(share(), SHARE_MAX), trusted=trusted),
                lifespan="off",
                # Of whom the socket says that they call; a header would make anybody on this host root.
                proxy_headers=False,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )

    def _guest_nodes(self) -> views.GuestNodesHealth | None:
        if self._reconciler is None:
            return None
        name = self._settings.guest_nodes.partition
        return views.GuestNodesHealth(partition=name, trouble=self._reconciler.trouble, silent=self._reconciler.silent)

    async def addresses(self) -> dict[str, str]:
        """Return node name to IP address, kept for a minute; what was known last where Slurm does not answer."""
        now_s = time.monotonic()
        known = set(self.board.nodes) <= set(self._addresses)
        if not self._addresses_at_s or not known or now_s - self._addresses_at_s > _ADDRESSES_KEPT_S:
            self._addresses_at_s = now_s
            try:
                named = await self._slurm.addresses()
            except CarrelError as error:
                _LOG.warning("node addresses unknown: %s", error)
            else:
                self._addresses = {node: await _resolved(address) for node, address in named.items()}
        return self._addresses

    async def _hear_knocks(self, reconciler: Reconciler) -> None:
        """Have the queue looked at when somebody knocks, until cancelled."""
        path = self._settings.guest_nodes.knock
        knock = Knock(Path(path), reconciler.knocked)
        try:
            if path:
                knock.begin()
            await asyncio.Event().wait()
        except OSError as error:
            _LOG.warning("guest_nodes.knock: %s; jobs are seen at the next look", error)
        finally:
            knock.end()

    def _see(self, driver: str, guests: tuple[Guest, ...]) -> None:
        if self.board.see(driver, guests):
            self._changed.set()

    async def _keep_maps(self) -> None:
        """Write maps as guests change. What an earlier controller wrote waits until each node could report."""
        loop = asyncio.get_running_loop()
        sweep_at_s: float | None = loop.time() + _FIRST_REPORTS * self._settings.node.report_period_s
        while True:
            try:
                async with asyncio.timeout_at(sweep_at_s):
                    await self._changed.wait()
            except TimeoutError:
                sweep_at_s = None
                await self._on_disk(self._maps.sweep)
                continue
            self._changed.clear()
            wanted = maps.files(self.board.guests(), await self.addresses())
            await self._on_disk(self._maps.put, wanted)

    async def _on_disk(self, deed: Any, *words: Any) -> None:
        try:
            await asyncio.to_thread(deed, *words)
        except OSError as error:
            # Maps are for others to read: no guest may suffer from a full disk here.
            _LOG.warning("slot maps not written: %s", error)


def listen(where: transport.Address) -> socket.socket:
    """Return a listening socket; a unix socket that nobody answers any more is replaced.

    Raises:
        CarrelError: another daemon answers there, or the address cannot be had.
    """
    try:
        if not where.path:
            return socket.create_server((where.host, where.port), backlog=_BACKLOG)
        path = Path(where.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if _answers(path):
            raise CarrelError(f"{path}: another carrelctld answers there; stop it first")
        _remove_socket(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(path))
        # Everybody may connect: each peer is known by the kernel's word.
        path.chmod(0o666)
        sock.listen(_BACKLOG)
    except OSError as error:
        raise CarrelError(f"carrelctld cannot listen on {where}: {error.strerror or error}") from error
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def _remove_socket(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


async def _resolved(address: str) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address, None, family=socket.AF_INET)
    except OSError:
        return address
    return str(found[0][4][0])
