"""A simulated vCenter (govmomi's vcsim) with a certificate of its own, and a stand-in before it that loses answers.

``scripts/setup`` installs vcsim where there is a Go that can build it; elsewhere these tests are skipped with the
reason. What vcsim has no idea of (instant clones, devices that are passed through, what a guest does when it boots) is
tested up to the request that it would get.
"""

import os
import re
import select
import shutil
import ssl
import subprocess  # a server that outlives the call
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from carrel.drivers.vsphere import settings as vsphere
from carrel.model.guest import GuestSpec
from carrel.process import run
from carrel.testing.drivers import DriverContract

VCSIM = Path(__file__).parents[3] / "build" / "go" / "vcsim"
USER, PASSWORD = "carrel@vsphere.local", "vcenter's own"
FOLDER = "carrel"
SOURCE = "DC0_C0_RP0_VM0"
HOST = "DC0_C0_H0"
_T = TypeVar("_T")
_LOOK_EVERY_S = 0.02
_START_TIMEOUT_S = 60.0
_URL = re.compile(r"https://\S*@127\.0\.0\.1:(\d+)")

TEMPLATES = f"""
[base]
template = "{SOURCE}"
cluster = "DC0_C0"
trusted = true
datastore = "LocalDS_0"
port_group = "VM Network"
domain = "example.org"
dns = ["10.9.0.1"]

[static]
inherit = ["base"]
dhcp = false
netmask = "255.255.0.0"
gateway = "10.9.0.1"

[dhcp]
inherit = ["base"]

[linked]
inherit = ["static"]
clone = "linked"

[instant]
inherit = ["base"]
clone = "instant"
"""


class Certificates:
    """An authority of our own, what it signed for 127.0.0.1, and an authority that signed nothing of it."""

    def __init__(self, where: Path) -> None:
        self.ca, self.other_ca = where / "ca.pem", where / "other.pem"
        self.cert, self.key = where / "vcenter.pem", where / "vcenter.key"
        for ca, subject in ((self.ca, "/CN=carrel tests"), (self.other_ca, "/CN=somebody else")):
            _openssl(
                "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2",
                "-keyout",
                f"{ca}.key",
                "-out",
                ca,
                "-subj",
                subject,
            )
        request, names = where / "vcenter.csr", where / "names"
        names.write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
        _openssl(
            "req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=vcenter",
            "-keyout",
            self.key,
            "-out",
            request,
        )
        signed = ("-in", request, "-CA", self.ca, "-CAkey", f"{self.ca}.key", "-extfile", names, "-out", self.cert)
        _openssl("x509 -req -days 2 -CAcreateserial", *signed)


class Vcsim:
    """A running vcsim: one datacenter, one cluster of two hosts, one host outside it, a machine on each."""

    def __init__(self, certificates: Certificates, *words: str) -> None:
        listen = ["-l", "127.0.0.1:0", "-tlscert", str(certificates.cert), "-tlskey", str(certificates.key)]
        command = [str(VCSIM), *listen, "-api-version", "8.0.2.0", "-host", "2", "-vm", "1", *words]
        died_with_us = ["setpriv", "--pdeathsig", "KILL"]
        self.process = subprocess.Popen([*died_with_us, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.port = self._port()

    def _port(self) -> int:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], _START_TIMEOUT_S)
        line = os.read(self.process.stdout.fileno(), 4096).decode() if ready else "(nothing)"
        match = _URL.search(line)
        if not match:
            self.kill()
            pytest.fail(f"vcsim did not start; it said: {line}")
        return int(match[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@pytest.fixture(scope="session")
def vcenter_certificates() -> Iterator[Certificates]:
    where = Path(tempfile.mkdtemp(prefix="carrel-tls."))
    yield Certificates(where)
    shutil.rmtree(where)


@pytest.fixture(scope="session")
def vcsim(vcenter_certificates: Certificates) -> Iterator[Vcsim]:
    """A vCenter for the session; tests are kept apart by the owner of their guests."""
    need_vcsim()
    server = Vcsim(vcenter_certificates)
    try:
        make_folder(server, vcenter_certificates)
        yield server
    finally:
        server.kill()


def need_vcsim() -> None:
    """Skip a test where there is no vCenter to talk to."""
    pytest.importorskip("pyVmomi", reason="not installed: pyvmomi (carrel's extra vsphere)")
    if not VCSIM.exists():
        pytest.skip(f"not installed: {VCSIM.name}; make setup builds it where there is a Go of 1.19 or later")


def make_folder(server: Vcsim, certificates: Certificates) -> None:
    """Make the folder of guests, and a snapshot of the source, as the administrator of vCenter would."""
    with_admin(server.port, certificates, _prepare)


def with_admin(port: int, certificates: Certificates, work: Callable[[Any], _T]) -> _T:
    """Do something at vCenter beside the driver."""
    from pyVim.connect import Disconnect  # noqa: PLC0415  # an extra

    instance = connect(port, certificates)
    try:
        return work(instance)
    finally:
        Disconnect(instance)
        instance._stub.DropConnections()  # noqa: SLF001  # nothing else closes them


def connect(port: int, certificates: Certificates) -> Any:
    """Return a session of vCenter's administrator."""
    from pyVim.connect import SmartConnect  # noqa: PLC0415  # an extra

    context = ssl.create_default_context(cafile=certificates.ca)
    return SmartConnect(host="127.0.0.1", port=port, user=USER, pwd=PASSWORD, sslContext=context)


def set_address(instance: Any, path: str, address: str) -> None:
    """Say what VMware's tools in a guest would say; vcsim takes it from this key."""
    from pyVmomi import vim, vmodl  # noqa: PLC0415  # an extra

    told = vim.option.OptionValue(key="SET.guest.ipAddress", value=address)
    machine = instance.content.searchIndex.FindByInventoryPath(path)
    if machine is None:  # it was destroyed since somebody saw it
        raise vmodl.fault.ManagedObjectNotFound(msg=path)
    done(machine.ReconfigVM_Task(vim.vm.ConfigSpec(extraConfig=[told])))


def done(task: Any) -> Any:
    """Wait for a task of vCenter, as far as the test's own time goes, and return its result."""
    while (info := task.info).state not in {"success", "error"}:
        time.sleep(_LOOK_EVERY_S)
    if info.state == "error":
        raise info.error
    return info.result


def _prepare(instance: Any) -> None:
    find = instance.content.searchIndex.FindByInventoryPath
    find("DC0/vm").CreateFolder(FOLDER)
    done(find(f"DC0/vm/{SOURCE}").CreateSnapshot_Task(name="base", memory=False, quiesce=False))


def settings(where: Path, port: int, certificates: Certificates, **changes: Any) -> vsphere.Settings:
    """Return settings for a driver at ``port``; its files, and the owner of its guests, are of ``where``."""
    password, file = where / "password", where / "guests.toml"
    if not file.exists():
        file.write_text(TEMPLATES)
        password.touch(0o600)
        password.write_text(PASSWORD + "\n")
    plain = vsphere.Settings(
        server="127.0.0.1",
        port=port,
        user=USER,
        password_file=str(password),
        ca_file=str(certificates.ca),
        owner=owner_of(where),
        datacenters=("DC0",),
        folder=FOLDER,
        template_file=str(file),
        request_timeout_s=20.0,
        poll_period_s=0.02,
    )
    return msgspec.structs.replace(plain, **changes)


def owner_of(where: Path) -> str:
    """Return whose guests those of this directory are."""
    return f"o{zlib.crc32(str(where).encode()):08x}"


def spec(name: str, **changes: Any) -> GuestSpec:
    """Return the spec of a guest with an address of its own."""
    number = int(re.sub(r"\D", "", name)) % 60000
    plain = msgspec.structs.replace(
        DriverContract().spec(name),
        node=HOST,
        host_name=f"vm{number}",
        image="static",
        image_name="static",
        address=f"10.9.{number // 250}.{number % 250 + 1}",
        memory_bytes=32 * 2**20,
        boot_timeout_s=60.0,
    )
    return msgspec.structs.replace(plain, **changes)


def _openssl(words: str, *more: object) -> None:
    run(["openssl", *words.split(), *(str(word) for word in more)])
