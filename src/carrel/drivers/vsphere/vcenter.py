"""One vCenter: a session whose server is verified, and what goes wrong with it as our own sentences.

pyVmomi blocks, so each call runs in a thread of this session's own pool: a vCenter that hangs takes no thread from
anybody else. What did not answer raises ``UnreachableError`` and never looks like *there is nothing*.
"""

import asyncio
import contextlib
import http.client
import ssl
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from xml.parsers.expat import ExpatError

import msgspec
from pyVim.connect import Disconnect, SmartStubAdapter
from pyVmomi import vim, vmodl

from carrel.drivers.vsphere.settings import Settings, password
from carrel.errors import NodeFaultError, NotFoundError, UnreachableError

_T = TypeVar("_T")
_Collector = vmodl.query.PropertyCollector
_FIRST_PAUSE_S = 0.02
_PAGE = 500
"""Virtual machines in one answer."""


class TaskError(NodeFaultError):
    """A task of vCenter failed; ``fault`` is its own word, such as ``DuplicateName``."""

    def __init__(self, fault: Any, sentence: str) -> None:
        """Keep the fault beside the sentence."""
        self.fault = fault
        super().__init__(sentence)


class GoneError(NotFoundError):
    """A machine vanished while something was done with it."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A virtual machine, with what was asked about it. What vCenter cannot say yet is absent."""

    ref: Any
    properties: dict[str, Any]

    def get(self, name: str) -> Any:
        return self.properties.get(name)


class Vcenter:
    """A session that is opened when first used, and anew when vCenter has forgotten it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(settings.connections, thread_name_prefix="vcenter")
        self._lock = threading.Lock()
        self._instance: Any = None

    async def call(self, work: Callable[[Any], _T]) -> _T:
        """Run ``work`` with the service instance, in a thread, and once more where the session had run out.

        Raises:
            UnreachableError: vCenter did not answer, is not who it should be, or does not let us in.
            NodeFaultError: vCenter's user may not do that.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, work)

    async def done(self, start: Callable[[Any], Any], what: str) -> Any:
        """Start a task, wait until vCenter has done it, and return its result.

        Raises:
            TaskError: the task failed.
        """
        return await self.follow(await self.call(lambda instance: _as_task_error(start, instance, what)), what)

    async def follow(self, task: Any, what: str) -> Any:
        """Wait for a task that was started, by anybody."""
        pause_s = _FIRST_PAUSE_S  # most tasks are done at once; a clone may take minutes
        while True:
            info = await self.call(lambda _: task.info)
            if info.state == vim.TaskInfo.State.success:
                return info.result
            if info.state == vim.TaskInfo.State.error:
                if isinstance(info.error, vmodl.fault.ManagedObjectNotFound):
                    raise GoneError(f"{what}: it is gone")
                raise TaskError(info.error, f"{what}: {sentence_of(info.error)}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._settings.poll_period_s)

    async def at(self, path: str, kind: type) -> Any:
        """Return what stands at a path of the inventory, such as ``DC/host/cluster``.

        Raises:
            NodeFaultError: nothing, or something else.
        """
        found = await self.call(lambda instance: instance.content.searchIndex.FindByInventoryPath(path))
        if not isinstance(found, kind):
            what = "nothing" if found is None else type(found).__name__.rpartition(".")[2]
            raise NodeFaultError(
                f"{self._settings.server} has {what} at {path!r}; is it its name, and may {self._settings.user} see it?"
            )
        return found

    async def look(self, ref: Any, names: Sequence[str]) -> Seen:
        """Return the named properties of one object, as of one moment.

        Raises:
            GoneError: it is not there any more.
        """
        spec = _Collector.FilterSpec(objectSet=[_Collector.ObjectSpec(obj=ref)], propSet=[_wanted(type(ref), names)])
        found = await self.call(lambda instance: _pages(instance, spec))
        return found[0] if found else Seen(ref=ref, properties={})

    async def below(self, top: Any, kind: type, names: Sequence[str]) -> list[Seen]:
        """Return all objects of a kind below another with the named properties, in as few questions as can be."""
        return await self.call(lambda instance: _below(instance, top, kind, names))

    def close(self) -> None:
        """Log out, as far as vCenter still listens; a later call logs in again."""
        with self._lock:
            instance, self._instance = self._instance, None
        if instance is not None:
            with contextlib.suppress(Exception):  # a session that cannot be ended runs out by itself
                Disconnect(instance)

    def _call(self, work: Callable[[Any], _T]) -> _T:
        try:
            try:
                return work(self._connected())
            except vim.fault.NotAuthenticated:
                self._log_in_again()
                return work(self._connected())
        except ssl.SSLCertVerificationError as error:
            raise UnreachableError(
                f"{self._settings.server} is not trusted: {error.verify_message}; "
                "set drivers.vsphere.ca_file to the certificate of who signed vCenter's"
            ) from error
        except (OSError, http.client.HTTPException, ExpatError) as error:
            raise UnreachableError(f"vCenter {self._settings.server} did not answer: {_why(error)}") from error
        except vim.fault.InvalidLogin as error:
            raise UnreachableError(
                f"vCenter {self._settings.server} refuses {self._settings.user}: is the password current?"
            ) from error
        except vim.fault.NotAuthenticated as error:
            raise UnreachableError(f"vCenter {self._settings.server} ended the session twice in a row") from error
        except vim.fault.NoPermission as error:
            raise NodeFaultError(
                f"{self._settings.user} lacks {error.privilegeId or 'a right'} at {self._settings.server}; "
                "see docs/how-to/vsphere.md for the rights it needs"
            ) from error
        except vmodl.fault.ManagedObjectNotFound as error:
            raise GoneError(f"what was asked about is gone from {self._settings.server}") from error
        except vmodl.MethodFault as error:
            raise NodeFaultError(f"vCenter {self._settings.server}: {sentence_of(error)}") from error

    def _log_in_again(self) -> None:
        """Open a new session under the same objects: what callers hold in their hands stays good."""
        with self._lock:
            content = self._instance.content
            if content.sessionManager.currentSession is None:  # another thread may have been first
                content.sessionManager.Login(self._settings.user, password(self._settings), None)

    def _connected(self) -> Any:
        with self._lock:  # one login, however many threads come first
            if self._instance is None:
                stub = SmartStubAdapter(
                    host=self._settings.server,
                    port=self._settings.port,
                    sslContext=trust(self._settings),
                    httpConnectionTimeout=self._settings.request_timeout_s,
                )
                # It keeps connections open in a pool that nobody else closes.
                weakref.finalize(self, stub.DropConnections)
                instance = vim.ServiceInstance("ServiceInstance", stub)
                instance.content.sessionManager.Login(self._settings.user, password(self._settings), None)
                self._instance = instance
            return self._instance


def trust(settings: Settings) -> ssl.SSLContext:
    """Return what a server is verified by: its chain and its name, always.

    Raises:
        NodeFaultError: ``ca_file`` cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=settings.ca_file or None)
    except OSError as error:  # also what is no certificate
        raise NodeFaultError(f"drivers.vsphere.ca_file = {settings.ca_file}: {_why(error)}") from error


def sentence_of(fault: Any) -> str:
    """Return a fault of vCenter as one line; where it says nothing, its own name."""
    said = getattr(fault, "localizedMessage", "") or getattr(fault, "msg", "") or ""
    name = type(fault).__name__.rpartition(".")[2]
    line = " ".join(said.split()).rstrip(".")
    return f"{line} ({name})" if line and name not in line else name


def _as_task_error(start: Callable[[Any], Any], instance: Any, what: str) -> Any:
    """A request may be refused at once, before there is a task; both are the task's failure."""
    try:
        return start(instance)
    except (vim.fault.NotAuthenticated, vim.fault.NoPermission, vim.fault.InvalidLogin):
        raise
    except vmodl.fault.ManagedObjectNotFound as fault:
        raise GoneError(f"{what}: it is gone") from fault
    except vmodl.MethodFault as fault:
        raise TaskError(fault, f"{what}: {sentence_of(fault)}") from fault


def key_of(ref: Any) -> str:
    """Return vCenter's own key of an object: the only name of it that nobody can change."""
    key: str = ref._moId  # noqa: SLF001  # it has no other name
    return key


def _below(instance: Any, top: Any, kind: type, names: Sequence[str]) -> list[Seen]:
    view = instance.content.viewManager.CreateContainerView(top, [kind], True)
    try:
        walk = _Collector.TraversalSpec(name="view", path="view", skip=False, type=vim.view.ContainerView)
        start = _Collector.ObjectSpec(obj=view, skip=True, selectSet=[walk])
        return _pages(instance, _Collector.FilterSpec(objectSet=[start], propSet=[_wanted(kind, names)]))
    finally:
        view.DestroyView()


def _wanted(kind: type, names: Sequence[str]) -> Any:
    return _Collector.PropertySpec(type=kind, pathSet=list(names), all=False)


def _pages(instance: Any, spec: Any) -> list[Seen]:
    ask = instance.content.propertyCollector
    page = ask.RetrievePropertiesEx([spec], _Collector.RetrieveOptions(maxObjects=_PAGE))
    found: list[Seen] = []
    while page is not None:
        found += [Seen(ref=one.obj, properties={prop.name: prop.val for prop in one.propSet}) for one in page.objects]
        page = ask.ContinueRetrievePropertiesEx(page.token) if page.token else None
    return found


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
