"""Guests on vSphere that are Slurm nodes: real Slurm, a simulated vCenter, and a real slurmd in each guest."""

import json
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from carrel.core.guestconf import DEFAULT_TEMPLATE
from carrel.hosts.table import Facts, HostTable
from carrel.sandbox.cluster import Sandbox
from carrel.testing import vcsim as at
from carrel.testing.asnodes import not_at_rest
from carrel.testing.guests import await_end, submit, wait_for
from carrel.testing.leaks import nothing_left
from carrel.testing.lossy import Hold, LoseAnswer, LossyVcenter
from carrel.testing.sandbox import User
from carrel.testing.vcsim import Certificates, Vcsim
from carrel.testing.vguests import GuestSystems, Machine, own_address

pytestmark = [pytest.mark.vsphere, pytest.mark.slurm, pytest.mark.root, pytest.mark.timeout(180)]

HOSTS = ("DC0_C0_H0", "DC0_C0_H1")
CPUS = 2
OPTIONS = ("--guest=static", "--guest-per=node", "--mem=32")
WAIT_S = 60.0

TEMPLATES = f"""
[base]
template = "{at.SOURCE}"
cluster = "DC0_C0"
trusted = true
slurm_conf = "{{where}}/slurm.conf"

[static]
inherit = ["base"]
dhcp = false
netmask = "255.0.0.0"

[linked]
inherit = ["static"]
clone = "linked"

[dhcp]
inherit = ["base"]

[mute]
inherit = ["static"]
domain = "mute"

[strange]
inherit = ["static"]
trusted = false
"""


class Site:
    """A sandbox whose second kind of host is a vCenter's, and what a test wants to see of it."""

    def __init__(self, box: Sandbox, vcenter: LossyVcenter, systems: GuestSystems) -> None:
        self.box, self.vcenter, self.systems = box, vcenter, systems
        self.of_two_nodes: set[int] = set()
        """Jobs that shall have two machines; all others have one."""

    def machines(self) -> list[Machine]:
        return self.systems.machines()

    def rooms(self) -> int:
        return len(HostTable(self.box.layout.hosts_table).places())

    def of_job(self, job_id: int, form: str) -> str:
        return self.box.run(["squeue", "-h", "-a", "-t", "all", "-o", form, "-j", str(job_id)]).stdout.strip()

    def events(self, job_id: int) -> list[str]:
        lines = self.box.run(["carrel", "job", "events", str(job_id), "--json"]).stdout.splitlines()
        return [f"{each['what']}: {each['text']}" for each in map(json.loads, lines)]

    def listed(self, job_id: int, *, user: User | None = None) -> list[dict[str, Any]]:
        words = ["carrel", "guest", "list", "--job", str(job_id), "--json"]
        found = self.box.run(words, user=user.name if user else None)
        assert found.returncode == 0, found.stderr
        return [json.loads(line) for line in found.stdout.splitlines()]

    def reservations(self) -> list[str]:
        return re.findall(r"ReservationName=(\S+)", self.box.run(["scontrol", "-o", "show", "reservation"]).stdout)

    def restart_controller(self) -> None:
        self.box.restart("carrelctld", signal.SIGKILL)


@pytest.fixture(scope="module")
def site(
    sandbox_factory: Callable[..., Sandbox],
    vcsim: Vcsim,
    vcenter_certificates: Certificates,
) -> Iterator[Site]:
    where = Path(tempfile.mkdtemp(prefix="carrel-vg."))
    where.chmod(0o755)  # scripts of jobs lie below, and their users run them
    (where / "guests.toml").write_text(TEMPLATES.replace("{where}", str(where)))
    (where / "password").touch(0o600)
    (where / "password").write_text(at.PASSWORD)
    with LossyVcenter(vcsim.port, vcenter_certificates).serving() as vcenter:
        box = sandbox_factory(nodes=1, hosts=1, carrel_conf=carrel_conf(where, vcenter.port, vcenter_certificates))
        (where / "slurm.conf").write_text(guest_conf(box, where))
        HostTable(box.layout.hosts_table).put(Facts(name=host, cpus=CPUS, memory_bytes=2**30) for host in HOSTS)
        controller = box.pid("slurmctld")
        owner = at.owner_of(where)
        with GuestSystems(vcsim, vcenter_certificates, owner=owner, where=where).watching() as systems:
            systems.mute.add("mute")
            systems.lease = own_address()
            made = Site(box, vcenter, systems)
            yield made
            deadline_s = time.monotonic() + WAIT_S
            while left := not_at_rest(box):
                assert time.monotonic() < deadline_s, left
                time.sleep(0.5)
            assert not systems.failures
        assert box.pid("slurmctld") == controller, "slurmctld was restarted"
        box.down()
    shutil.rmtree(where)


def carrel_conf(where: Path, port: int, certificates: Certificates) -> str:
    """Return what a site with a vCenter has in its carrel.toml."""
    # The map of a job that ended under a killed controller stays until each node could report to the next: 1.5 periods.
    return f"""
[node]
report_period_s = 4.0

[guest_nodes]
join_max_s = 10.0
host_silent_s = 6.0
hosts = ""
remote = {{vsphere = "DC0_C0_H[0-1]"}}

[placement.launches]
attempts = 2
backoff_s = 0.2
rate = {{full = 1000, linked = 1000}}

[placement.addresses]
static = ["127.77.0.10-127.77.0.40"]

[drivers.vsphere]
server = "127.0.0.1"
port = {port}
user = "{at.USER}"
password_file = "{where}/password"
ca_file = "{certificates.ca}"
owner = "{at.owner_of(where)}"
datacenters = ["DC0"]
folder = "{at.FOLDER}"
template_file = "{where}/guests.toml"
request_timeout_s = 20.0
poll_period_s = 0.05
"""


def guest_conf(box: Sandbox, where: Path) -> str:
    """Return the site's template: the built-in one, for guests that share one disk and the sandbox's own munge."""
    munge = next(line for line in box.layout.slurm_conf.read_text().splitlines() if line.startswith("AuthInfo="))
    own = DEFAULT_TEMPLATE.replace("/var/spool/slurmd", f"{where}/$node/spool")
    own = own.replace("/run/", f"{where}/$node/").replace("/var/log/", f"{where}/$node/")
    return f"{own}{munge}\nPlugStackConfig=/dev/null\n"


@pytest.fixture(autouse=True)
def _nothing_is_left(site: Site) -> Iterator[None]:
    """See after each test that machines, rooms and reservations are gone, and that all names rest."""
    yield
    site.vcenter.gone = False
    wait_for(lambda: not site.machines(), WAIT_S)
    wait_for(lambda: not site.rooms(), WAIT_S)
    wait_for(lambda: not site.reservations(), WAIT_S)
    nothing_left(site.box, within_s=WAIT_S)
    wide = {run for run, count in site.systems.most_of_run.items() if count > 1}
    assert {int(run.partition(".")[0]) for run in wide} <= site.of_two_nodes, "a run had two machines at once"
    for host, cpus in site.systems.most.items():
        assert cpus <= CPUS, f"{host} carried {cpus} CPUs of guests"


def test_a_job_runs_in_a_machine_that_is_its_own_node_and_both_are_gone_afterwards(site: Site, user: User) -> None:
    if not own_address():
        pytest.skip("this machine has loopback addresses only, and such a one is no guest's own")
    script = "#!/bin/sh\ncat /proc/1/comm\nid -un\necho $SLURMD_NODENAME\nsrun echo a step\n"
    job_id, place = submit(site.box, script, *OPTIONS, "--guest=dhcp", "--guest-driver=vsphere", user=user)
    assert await_end(site.box, job_id) == "COMPLETED", site.events(job_id)
    first, who, name, step = (place / "out").read_text().splitlines()
    assert (first, who, step) == ("slurmd", user.name, "a step"), "it ran outside of its guest"
    assert name in site.box.facts().pool
    words = [line.partition(":")[0] for line in site.events(job_id)]
    wanted = ["guest-placed", "guest-starting", "guest-ready", "job-released"]
    assert [word for word in words if word in wanted] == wanted


def test_a_guest_is_listed_and_shown_as_any_other_but_for_its_console(site: Site, user: User) -> None:
    job_id, _ = submit(site.box, "#!/bin/sh\nsleep 300\n", *OPTIONS, user=user)
    wait_for(lambda: site.of_job(job_id, "%T") == "RUNNING")
    (machine,) = site.machines()
    (guest,) = site.listed(job_id, user=user)
    words = ("job_id", "node", "host", "state", "user", "image_name", "clone", "driver", "address", "cpus", "reason")
    node = site.of_job(job_id, "%N")
    known = (job_id, node, machine.host, "ready", user.name, "static", "full", "vsphere", machine.address, 1, "")
    assert tuple(guest[word] for word in words) == known
    shown = site.box.run(["carrel", "guest", "show", str(job_id)], user=user.name).stdout
    assert re.search(rf"^host +{machine.host}$", shown, re.MULTILINE)
    assert f"ready after {guest['boot_s']:.1f} s" in shown
    assert guest["name"] in site.box.run(["carrel", "guest", "list"]).stdout
    for verb, next_step in (("console", f"carrel job events {job_id}"), ("destroy", f"scancel {job_id}")):
        refused = site.box.run(["carrel", "guest", verb, str(job_id)], user=user.name)
        assert refused.returncode == 4
        assert f"is a machine on host {machine.host}" in refused.stderr
        assert refused.stderr.endswith(f": {next_step}\n")
    assert "its console" not in site.box.run(["carrel", "job", "show", str(job_id)]).stdout
    site.vcenter.gone = True
    wait_for(lambda: "as last seen: vCenter 127.0.0.1 did not answer" in site.listed(job_id)[0]["reason"])
    site.vcenter.gone = False
    site.box.run(["scancel", str(job_id)])
    wait_for(lambda: not site.listed(job_id))


def test_a_job_of_several_nodes_gets_several_machines(site: Site, user: User) -> None:
    words = [*OPTIONS, "--nodes=2", "--ntasks=2", "--cpus-per-task=2"]
    job_id, place = submit(site.box, "#!/bin/sh\nsrun printenv SLURMD_NODENAME\n", *words, user=user)
    site.of_two_nodes.add(job_id)
    assert await_end(site.box, job_id) == "COMPLETED", (place / "out").read_text()
    assert len(set((place / "out").read_text().split())) == 2


def test_a_burst_beyond_what_the_hosts_carry_runs_to_its_end_and_never_above_it(site: Site, user: User) -> None:
    site.box.kill("carrelctld")  # they are to come at once, and an sbatch takes its time
    try:
        jobs = [submit(site.box, "#!/bin/sh\nsleep 1\n", *OPTIONS, "--guest=linked", user=user)[0] for _ in range(6)]
    finally:
        site.box.start("carrelctld")
    wait_for(lambda: any("no room for 1 CPU" in site.of_job(job_id, "%k") for job_id in jobs))
    assert {await_end(site.box, job_id) for job_id in jobs} == {"COMPLETED"}
    assert sum(site.systems.most.values()) == 2 * CPUS, "two hosts of two CPUs carry four guests of one"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--guest=strange",), "nobody has said that users cannot become root in guests of strange"),
        (("--guest-root",), "root in a guest that is a node could read the munge key"),
        (("--guest=nosuch",), "no guest template 'nosuch'"),
    ],
    ids=["untrusted image", "root for the user", "no such image"],
)
def test_a_request_that_may_have_no_guest_is_cancelled_with_the_sentence_and_nothing_is_cloned(
    site: Site, user: User, options: tuple[str, ...], sentence: str
) -> None:
    before = len(site.vcenter.bodies("CloneVM_Task"))
    job_id, _ = submit(site.box, "#!/bin/sh\ntrue\n", *OPTIONS, *options, user=user)
    assert await_end(site.box, job_id) == "CANCELLED"
    assert sentence in site.of_job(job_id, "%k")
    assert sentence in site.box.run(["carrel", "job", "show", str(job_id)]).stdout
    assert len(site.vcenter.bodies("CloneVM_Task")) == before


def test_a_job_that_is_cancelled_while_its_guest_is_cloned_leaves_nothing(site: Site, user: User) -> None:
    arrived, release = Event(), Event()
    site.vcenter.once("CloneVM_Task", Hold(arrived, release))
    job_id, _ = submit(site.box, "#!/bin/sh\nsleep 300\n", *OPTIONS, user=user)
    assert arrived.wait(WAIT_S)
    site.box.run(["scancel", str(job_id)])
    assert await_end(site.box, job_id) == "CANCELLED"
    release.set()
    wait_for(lambda: any(line.startswith("guest-gone") for line in site.events(job_id)))


def test_a_guest_that_dies_is_a_node_failure_and_its_job_runs_again_in_another(site: Site, user: User) -> None:
    script = '#!/bin/sh\n[ "$SLURM_RESTART_COUNT" ] || sleep 300\n'
    job_id, _ = submit(site.box, script, *OPTIONS, "--requeue", user=user)
    wait_for(lambda: site.of_job(job_id, "%T") == "RUNNING")
    (machine,) = site.machines()
    site.systems.switch_off(machine.name)
    assert await_end(site.box, job_id) == "COMPLETED"
    why = "its guest is gone: its virtual machine is switched off"
    wait_for(lambda: any(line.startswith("node-down") and why in line for line in site.events(job_id)))
    wait_for(lambda: sum(line.startswith("guest-ready") for line in site.events(job_id)) == 2)


def test_a_guest_whose_slurmd_never_registers_is_given_back_and_the_job_waits_with_the_reason(
    site: Site, user: User
) -> None:
    job_id, _ = submit(site.box, "#!/bin/sh\ntrue\n", *OPTIONS, "--guest=mute", user=user)
    wait_for(lambda: "no guest after 2 attempts" in site.of_job(job_id, "%k"))
    assert "its slurmd did not come within 10 s (guest_nodes.join_max_s)" in site.of_job(job_id, "%k")
    wait_for(lambda: not site.rooms(), WAIT_S)
    assert site.of_job(job_id, "%r") == "JobHeldAdmin"
    site.box.run(["scancel", str(job_id)])


def test_while_vcenter_is_away_jobs_wait_with_the_reason_and_those_that_run_go_on(site: Site, user: User) -> None:
    running, _ = submit(site.box, "#!/bin/sh\nsleep 6\n", *OPTIONS, user=user)
    wait_for(lambda: site.of_job(running, "%T") == "RUNNING")
    site.vcenter.gone = True
    why = "vCenter 127.0.0.1 did not answer"
    waiting, _ = submit(site.box, "#!/bin/sh\ntrue\n", *OPTIONS, user=user)
    wait_for(lambda: why in site.of_job(waiting, "%k"))
    assert why in site.box.run(["carrel", "job", "show", str(waiting)]).stdout
    assert await_end(site.box, running) == "COMPLETED"
    site.vcenter.gone = False
    assert await_end(site.box, waiting) == "COMPLETED"


DEEDS = ("CloneVM_Task", "CustomizeVM_Task", "PowerOnVM_Task", "ReconfigVM_Task", "PowerOffVM_Task", "Destroy_Task")


def test_a_controller_that_is_killed_at_each_of_its_deeds_finishes_every_job_with_one_guest(
    site: Site, user: User
) -> None:
    kills: list[str] = []

    def kill(deed: str) -> Callable[[], None]:
        def now() -> None:
            kills.append(deed)
            site.restart_controller()

        return now

    for deed in DEEDS:
        site.vcenter.once(deed, LoseAnswer(done=kill(deed)))
    clones = len(site.vcenter.bodies("CloneVM_Task"))
    job_id, _ = submit(site.box, "#!/bin/sh\nsleep 1\n", *OPTIONS, user=user)
    assert await_end(site.box, job_id) == "COMPLETED"
    wait_for(lambda: not site.machines(), WAIT_S)
    assert kills == list(DEEDS)
    assert len(site.vcenter.bodies("CloneVM_Task")) == clones + 1
