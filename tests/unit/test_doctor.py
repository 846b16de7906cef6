"""What ``carrel node check`` makes of a node's sampling, of what asks the bank, and of the controller."""

import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest

from carrel.cli import api, doctor, guestnodes
from carrel.config import Bank, Config, Controller, GuestNodes, Slurm
from carrel.daemons.hosts import HostView
from carrel.daemons.views import GuestNodesHealth, Health
from carrel.errors import UnreachableError
from carrel.model.host import HostState
from carrel.model.sample import SamplerStatus

SETTINGS = Config(slurm=Slurm(spool_dir="/var/spool/{node}/slurmd"))


def test_steps_are_looked_for_where_slurmd_has_them() -> None:
    assert not list(doctor._spool(SETTINGS, {"SlurmdSpoolDir": "/var/spool/%n/slurmd"}, "c1"))
    assert not list(doctor._spool(SETTINGS, UnreachableError("slurm did not answer"), "c1"))
    (problem,) = doctor._spool(SETTINGS, {"SlurmdSpoolDir": "/var/spool/slurm/%n"}, "c1")
    assert "slurm.spool_dir is /var/spool/c1/slurmd, and Slurm's SlurmdSpoolDir /var/spool/slurm/c1" in problem.what
    assert 'spool_dir = "/var/spool/slurm/{node}"' in problem.next


def test_what_failed_and_how_often_is_a_problem_and_so_is_a_fault() -> None:
    status = SamplerStatus(failures={"store": 3}, last_failure="store: \x1b[2J no room", fault="the sampler hangs")
    fault, failed = doctor._sampler(SETTINGS, "c1", status)
    assert (fault.ok, failed.ok) == (False, False)
    assert "store 3 times" in failed.what
    assert "\x1b" not in failed.what


def test_a_node_that_samples_and_one_that_shall_not_are_both_in_order() -> None:
    assert [check.ok for check in doctor._sampler(SETTINGS, "c1", SamplerStatus(jobs=2))] == [True]
    assert [check.ok for check in doctor._sampler(SETTINGS, "c1", None)] == [True]


def test_a_bank_that_nobody_asks_is_a_problem(tmp_path: Path) -> None:
    settings = Config(slurm=Slurm(conf=str(tmp_path / "slurm.conf")), bank=Bank(enabled=True))
    host = socket.gethostname().partition(".")[0]
    assert not list(doctor._job_submit(Config(), {"JobSubmitPlugins": "(null)"}))
    (unasked,) = doctor._job_submit(settings, {"JobSubmitPlugins": "(null)"})
    assert (unasked.ok, "bank.enabled set" in unasked.what) == (False, True)
    (missing,) = doctor._job_submit(settings, {"JobSubmitPlugins": "lua", "SlurmctldHost[0]": f"{host}(10.0.0.1)"})
    assert (missing.ok, missing.next.endswith("job_submit.lua")) == (False, True)
    (elsewhere,) = doctor._job_submit(settings, {"JobSubmitPlugins": "lua,throttle", "SlurmctldHost[0]": "head"})
    assert elsewhere.ok


def test_hosts_of_guests_that_are_nodes_want_the_plug_in(tmp_path: Path) -> None:
    slurm = Slurm(bin_dir=str(tmp_path), conf=str(tmp_path / "slurm.conf"))
    settings = Config(slurm=slurm, guest_nodes=GuestNodes(remote={"vsphere": "esx-1"}))
    (unasked,) = doctor._job_submit(settings, {"JobSubmitPlugins": "(null)"})
    assert "guest_nodes.remote set" in unasked.what
    assert unasked.next.endswith("guests-as-nodes.md")


def scontrol(tmp_path: Path, *, nodes: str, states: tuple[str, ...] = ()) -> Slurm:
    """Return a Slurm whose partition has these nodes; none of that name: it has no such partition."""
    lines = [f"NodeName=v{at} State={state}" for at, state in enumerate(states, 1)]
    script = f"""#!/bin/sh
case "$*" in
*partition*) [ -n "{nodes}" ] || exit 1; echo "PartitionName=guests Nodes={nodes} State=UP" ;;
*) echo "{chr(10).join(lines)}" ;;
esac
"""
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    return Slurm(bin_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("nodes", "states", "ok", "said"),
    [
        ("", (), False, "partition guests (guest_nodes.partition), whose nodes are guests, cannot be seen"),
        ("(null)", (), False, "has no nodes: no guest gets a name"),
        ("v[1-2]", ("IDLE+CLOUD+POWERED_DOWN", "IDLE"), False, "partition guests: v2 not State=CLOUD"),
        (
            "v[1-2]",
            ("IDLE+CLOUD", "IDLE+CLOUD"),
            True,
            "partition guests is there for guests that are nodes, with 2 names",
        ),
    ],
)
def test_the_partition_of_guests_has_names_that_guests_can_have(
    tmp_path: Path, nodes: str, states: tuple[str, ...], said: str, *, ok: bool
) -> None:
    settings = Config(slurm=scontrol(tmp_path, nodes=nodes, states=states), guest_nodes=GuestNodes(hosts="h1"))
    (found,) = guestnodes.partition(settings)
    assert (found.ok, said in found.what) == (ok, True)


@pytest.mark.parametrize(("state", "found"), [("IDLE+CLOUD", [False]), ("IDLE", [])])
def test_nodes_for_guests_without_hosts_are_a_problem_and_a_sites_own_partition_is_none(
    tmp_path: Path, state: str, found: list[bool]
) -> None:
    settings = Config(slurm=scontrol(tmp_path, nodes="v1", states=(state,)))
    assert [check.ok for check in guestnodes.checks(settings, {}, UnreachableError("nobody answers"))] == found


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (None, "settings that name no hosts"),
        (GuestNodesHealth(partition="vms", trouble=""), "looks at partition vms, and guest_nodes.partition is guests"),
        (
            GuestNodesHealth(partition="guests", trouble="slurm \x1b[2J is away"),
            "does nothing for guests that are nodes",
        ),
        (GuestNodesHealth(partition="guests", trouble=""), ""),
    ],
)
def test_what_carrelctld_was_started_with_is_compared_with_the_settings(
    runs: GuestNodesHealth | None, said: str
) -> None:
    health = Health(version="1", started=datetime.now(UTC), nodes=1, guests=0, guest_nodes=runs)
    (found,) = guestnodes.controller(Config(guest_nodes=GuestNodes(hosts="h1")), health)
    assert (found.ok, said in found.what, "\x1b" in found.what) == (not said, True, False)


def host(name: str, state: HostState = "up") -> HostView:
    sizes = dict.fromkeys(
        (
            *("cpus", "cpus_most", "cpus_used", "cpus_others", "memory_bytes", "memory_most_bytes"),
            *("memory_used_bytes", "memory_others_bytes", "guests"),
        ),
        0,
    )
    return HostView(name=name, state=state, reason="it is away", reports=True, places=(), **sizes)


@pytest.mark.parametrize(
    ("table", "silent", "said"),
    [
        ((host("h1"), host("h2")), (), {"2 of 2 hosts take guests that are nodes"}),
        (
            (host("h1"),),
            (),
            {"no guest goes to h2: not in the table of hosts", "1 of 2 hosts take guests that are nodes"},
        ),
        ((), (), {"no guest goes to h1, h2: not in the table of hosts"}),
        (
            (host("h1"), host("h2"), host("c1")),
            ("h2",),
            {
                "no guest goes to c1: in the table of hosts, and not named in [guest_nodes]",
                "no guest goes to h2: not heard to ask what to carry",
                "1 of 2 hosts take guests that are nodes",
            },
        ),
        (
            (host("h1", "down"), host("h2", "drained")),
            ("h1",),
            {"no guest goes to host h1: it is away"},
        ),
        ((host("h1", "drained"), host("h2", "drained")), (), {"no host takes guests: each is drained"}),
    ],
)
def test_the_table_of_hosts_is_compared_with_the_settings_and_with_who_speaks(
    monkeypatch: pytest.MonkeyPatch, table: tuple[HostView, ...], silent: tuple[str, ...], said: set[str]
) -> None:
    monkeypatch.setattr(api, "hosts", lambda _: list(table))
    found = list(guestnodes.hosts(Config(guest_nodes=GuestNodes(hosts="h[1-2]")), silent))
    assert {check.what for check in found} == said
    assert all(bool(check.next) is not check.ok for check in found)


def test_the_line_that_is_to_be_added_is_one_that_works(tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\necho slurm 22.05.8\n")
    (tmp_path / "squeue").chmod(0o755)
    settings = Config(slurm=Slurm(bin_dir=str(tmp_path), conf=str(tmp_path / "slurm.conf")))
    (absent,) = doctor._plugstack(settings, {})
    line = absent.next.partition(": ")[2]
    assert "socket=/var/spool/carrel/%n/carreld.sock enter=" in line
    (tmp_path / "plugstack.conf").write_text(line.partition(" enter=")[0] + "\n")
    (short,) = doctor._plugstack(settings, {})
    assert (short.ok, "no enter=" in short.what, short.next.endswith(line)) == (False, True, True)
    (tmp_path / "plugstack.conf").write_text(line + "\n")
    (found,) = doctor._plugstack(settings, {})
    assert "no enter=" not in found.what


def test_hooks_are_found_in_the_words_of_every_release(tmp_path: Path) -> None:
    script = tmp_path / "prolog"
    script.write_text("exec carrel-hook prolog\n")
    for slurm in ({"Prolog": str(script)}, {"Prolog[0]": "/bin/true", "Prolog[1]": str(script)}):
        prolog, epilog = doctor._hooks({**slurm, "PrologFlags": "Alloc", "Epilog": "(null)"})
        assert (prolog.ok, epilog.ok) == (True, False)
        assert epilog.next.startswith("Epilog=SCRIPT in slurm.conf, one that runs ")


def test_a_controller_that_does_not_answer_is_a_problem_and_stops_no_guest(tmp_path: Path) -> None:
    settings = Config(controller=Controller(listen=f"unix:{tmp_path}/none.sock"))
    (silent,) = doctor._controller(settings, doctor._health(settings))
    assert not silent.ok
    assert "guests run all the same" in silent.what
