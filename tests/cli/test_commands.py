"""What the commands print: from a real carrelctld, from a carreld that stands in, from recorded Slurm."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carrel.cli import main
from carrel.cli.job import JobView, advice
from carrel.config import Controller
from carrel.daemons import transport, views
from carrel.errors import RefusedError
from carrel.model.guest import Counters, Guest, GuestState
from carrel.model.report import Event, NodeReport
from carrel.testing.daemons import ControllerProcess, a_guest, a_report, fake_carreld

GUEST = "7.1795220388.0"
SQUEUE = "7|1001|1001|RUNNING|0|1795220388|UNLIMITED|1|c[1-2]|ada|main|7|N/A|"


@pytest.fixture(scope="module")
def daemon() -> Iterator[ControllerProcess]:
    directory = Path(tempfile.mkdtemp(prefix="ccli"))
    process = ControllerProcess(directory)
    process.start()
    _commands(directory / "no-slurm")
    yield process
    process.kill()
    shutil.rmtree(directory)


@pytest.fixture
def cluster(daemon: ControllerProcess, monkeypatch: pytest.MonkeyPatch) -> ControllerProcess:
    """Two nodes, job 7 with a guest on each, one of them down."""
    monkeypatch.setenv("CARREL_CONFIG", str(daemon.config))
    event = Event(time_s=1795220391.5, node="c1", what="guest-ready", text="guest ready", job_id=7, guest=GUEST)
    down = a_guest("c2", state="down", reason="the kernel panicked", ready_s=None)
    _report(daemon, a_report(a_guest("c1"), node="c1", sent_s=time.time(), events=(event,)))
    held = msgspec.structs.replace(
        a_report(down, node="c2", sent_s=time.time()), consoles={GUEST: "Kernel panic\x1b[0m"}
    )
    _report(daemon, held)
    return daemon


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with the directory of node c1, and no controller."""
    directory = Path(tempfile.mkdtemp(prefix="ccli"))
    process = ControllerProcess(directory)
    _commands(directory / "no-slurm")
    monkeypatch.setenv("CARREL_CONFIG", str(process.config))
    yield directory / "nodes" / "c1"
    shutil.rmtree(directory)


def _report(daemon: ControllerProcess, report: NodeReport) -> None:
    body = msgspec.json.encode(report)
    transport.decoded(asyncio.run(transport.request(Controller(listen=daemon.listen), "POST", "/v1/reports", body)))


def _commands(directory: Path) -> None:
    """Slurm's commands, as far as they are asked: one running job, and the line that names it."""
    directory.mkdir()
    squeue = directory / "squeue"
    squeue.write_text(
        '#!/bin/sh\ncase "$*" in *"-j 9 "*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;; esac\n'
        f"case \"$*\" in *' -o '*) echo '7|physics|train';; *) echo '{SQUEUE}';; esac\n"
    )
    scontrol = directory / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$2" = config ] && echo "ClusterName = k"; exit 0\n')
    for path in (squeue, scontrol):
        path.chmod(0o755)


def lines(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_guests_as_json_are_one_object_per_line(cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["guest", "list", "--json"]) == 0
    found = lines(capsys)
    assert [(guest["node"], guest["state"]) for guest in found] == [("c1", "ready"), ("c2", "down")]
    assert found[0]["started"] == "2026-11-21T00:19:49Z"


def test_guests_of_another_job_are_left_out(cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["guest", "list", "--job", "8", "--json"]) == 0
    assert lines(capsys) == []


def test_a_guest_is_shown_by_its_job(cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["guest", "show", "7", "--node", "c2"]) == 0
    shown = capsys.readouterr().out
    assert "the kernel panicked" in shown
    assert "tcg (chosen in the configuration)" in shown


def test_a_guest_shows_its_clone_its_memory_and_how_its_start_went(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = (("qemu", 0.25), ("resume", 0.75))
    guest = a_guest("c6", name="13.1.0", run=None, clone="instant", clone_why="from a template", phases=phases)
    used = Counters(memory_pss_bytes=68 * 2**20, memory_shared_bytes=45 * 2**20)
    report = a_report(guest, node="c6", sent_s=time.time())
    _report(cluster, msgspec.structs.replace(report, counters={guest.name: used}))
    assert main.run(["guest", "show", "13.1.0", "--timing"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in shown if line.startswith("clone ")] == ["instant (from a template)"]
    assert any(line.startswith("memory used") and "68M" in line and "45M" in line for line in shown)
    assert [line.split() for line in shown[-3:]] == [
        ["qemu", "250", "ms", "█" * 10],
        ["resume", "750", "ms", "█" * 30],
        ["total", "1000", "ms", "█" * 40],
    ]
    assert main.run(["guest", "show", "13.1.0", "--json"]) == 0
    (found,) = lines(capsys)
    assert (found["memory_pss_bytes"], found["memory_shared_bytes"]) == (68 * 2**20, 45 * 2**20)
    assert found["phases"] == {"qemu": 0.25, "resume": 0.75}


def test_a_guest_of_this_machine_shows_the_memory_that_it_takes_now(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = msgspec.structs.replace(a_report(a_guest()), counters={GUEST: Counters(memory_pss_bytes=68 * 2**20)})
    with fake_carreld(node, {"list": [a_guest()], "status": now}):
        assert main.run(["guest", "show", "7", "--json"]) == 0
    assert lines(capsys)[0]["memory_pss_bytes"] == 68 * 2**20


def test_a_guest_that_is_not_there_is_not_found(cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["guest", "show", "nothing"]) == 3
    assert "see: carrel guest list" in capsys.readouterr().err


def test_a_name_that_means_two_guests_asks_for_the_node(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["guest", "console", GUEST]) == 2
    assert "add --node: c1, c2" in capsys.readouterr().err


def test_a_console_of_another_machine_is_what_the_controller_holds(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["guest", "console", GUEST, "--node", "c2"]) == 0
    said = capsys.readouterr()
    assert said.out == "Kernel panic\n"
    assert "last reported to carrelctld" in said.err


def test_a_console_of_this_machine_is_its_file(
    cluster: ControllerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "console.log"
    path.write_text("Linux version 6.1\n\x1b[31mred\x1b[0m\n")
    guest = a_guest("c3", name="12.1.0", run=None, console=str(path))
    _report(cluster, a_report(guest, node="c3", sent_s=time.time()))
    assert main.run(["guest", "console", "12.1.0"]) == 0
    said = capsys.readouterr()
    assert said.out == "Linux version 6.1\nred\n"
    assert str(path) in said.err


def test_the_map_of_a_job_is_a_table_json_or_vinos_xml(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["guest", "map", "7", "--json"]) == 0
    assert [(slot["hm"], slot["mem_mb"], slot["cores"]) for slot in lines(capsys)] == [("c1", 512, 2)]
    assert main.run(["guest", "map", "7", "--xml"]) == 0
    assert capsys.readouterr().out.startswith("<VM_LIST>\n<VM>\n<item id=")
    assert main.run(["guest", "map", "7"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["c1", "0"]


def test_a_guest_of_another_machine_is_not_destroyed_from_here(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["guest", "destroy", "7", "--node", "c2"]) == 4
    assert "run there: carrel guest destroy" in capsys.readouterr().err


def test_nodes_are_listed_as_they_reported(cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    _report(cluster, a_report(node="c4", sent_s=time.time(), faults=("no kvm",)))
    assert main.run(["node", "list", "--json"]) == 0
    states = {found["node"]: found["state"] for found in lines(capsys)}
    assert (states["c1"], states["c4"]) == ("ready", "faulty")
    assert main.run(["node", "show", "c4"]) == 0
    assert "no kvm" in capsys.readouterr().out


def test_a_node_that_never_reported_is_not_found(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["node", "show", "c99"]) == 3
    assert "on that node: carrel node check" in capsys.readouterr().err


def test_the_events_of_a_job_are_listed(cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["job", "events", "7", "--json"]) == 0
    (event,) = lines(capsys)
    assert (event["time"], event["what"]) == ("2026-11-21T00:19:51.500000Z", "guest-ready")


def test_a_job_is_slurms_and_its_guests_are_ours(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["job", "list", "--json"]) == 0
    (job,) = lines(capsys)
    assert (job["name"], job["account"], job["nodes"]) == ("train", "physics", ["c1", "c2"])
    assert [guest["node"] for guest in job["guests"]] == ["c1", "c2"]
    assert main.run(["job", "list"]) == 0
    assert "1 ready, 1 down" in capsys.readouterr().out


def test_job_show_says_why_a_guest_is_down_and_what_to_do(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["job", "show", "7"]) == 0
    shown = capsys.readouterr().out
    assert "the kernel panicked" in shown
    assert f"carrel guest console {GUEST} --node c2" in shown


def test_a_job_that_slurm_does_not_know_is_not_found(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["job", "show", "9"]) == 3
    assert "slurm has no job 9" in capsys.readouterr().err


def test_without_a_controller_this_machines_nodes_answer_and_the_user_is_told(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_carreld(node, {"list": [a_guest()]}) as asked:
        assert main.run(["guest", "list", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["node"] == "c1"
    assert "known to this machine alone (c1)" in said.err
    assert [message.get("verb") for message in asked] == ["list"]


def test_a_job_is_shown_although_nobody_knows_its_guests(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["job", "show", "7", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["guests"] is None
    assert "guests unknown" in said.err


def test_destroy_asks_the_carreld_of_the_guests_node(node: Path) -> None:
    with fake_carreld(node, {"list": [a_guest()], "destroy": None}) as asked:
        assert main.run(["guest", "destroy", "7"]) == 0
    assert [(message.get("verb"), message.get("guest")) for message in asked][-1] == ("destroy", GUEST)


def test_what_carreld_refuses_is_said_in_its_words(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_carreld(node, {"list": [a_guest()], "destroy": RefusedError("guest is not yours")}):
        assert main.run(["guest", "destroy", "7"]) != 0
    assert "carrel: guest is not yours" in capsys.readouterr().err


def test_the_doctor_names_what_is_wrong_and_the_next_step(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_carreld(node, {"status": a_report(faults=("the emulator does not start",))}):
        assert main.run(["node", "check", "--json"]) == 1
    found = lines(capsys)
    problems = {check["what"]: check["next"] for check in found if not check["ok"]}
    assert "node c1: the emulator does not start" in problems
    assert any("loads no spank_carrel.so" in what for what in problems)
    assert all(problems.values())
    assert any(check["ok"] and "carreld 0.1.0 answers" in check["what"] for check in found)


def test_the_doctor_says_how_to_start_a_carreld_that_is_silent(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["node", "check", "c1"]) == 1
    assert "next: systemctl start carreld; by hand, as root: carrel serve node --node c1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("guests", "state", "next_step"),
    [
        (None, "running", "cannot be told"),
        ([], "pending", "squeue --start"),
        ([], "held", "scontrol release 7"),
        ([], "running", "asked for none"),
        ([], "ended", "carrel job events 7"),
        ([a_guest(state="starting")], "running", "--follow"),
        ([a_guest()], "running", "carrel job enter 7"),
        ([a_guest(), a_guest("c2", state="down")], "running", "ended: carrel guest console"),
    ],
)
def test_the_advice_fits_what_is_known(guests: list[Guest] | None, state: Any, next_step: str) -> None:
    assert next_step in advice(a_job(guests, state))[0]


@pytest.mark.parametrize("state", ["starting", "ready", "down"])
def test_nobody_is_sent_to_a_console_that_only_the_guests_driver_has(state: GuestState) -> None:
    told = advice(a_job([a_guest(state=state)], "running"), consoles=False)
    assert told
    assert not any("console" in line for line in told)


def a_job(guests: list[Guest] | None, state: Any) -> JobView:
    return JobView(
        job_id=7,
        run=GUEST,
        cluster="k",
        name="",
        user="ada",
        account="",
        partition="main",
        state=state,
        slurm_state="",
        nodes=(),
        submitted=None,
        time_limit_s=None,
        guests=None if guests is None else [views.guest_view(guest) for guest in guests],
    )


def test_the_console_of_a_jobs_last_guest_is_found_after_its_end(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    event = Event(time_s=1.0, node="c5", what="guest-down", text="panic", job_id=21, guest="21.1.0", uid=1001)
    report = a_report(node="c5", sent_s=time.time(), events=(event,))
    _report(cluster, msgspec.structs.replace(report, consoles={"21.1.0": "no init found\n"}))
    assert main.run(["guest", "console", "21"]) == 0
    assert capsys.readouterr().out == "no init found\n"


def test_the_map_of_one_step_leaves_the_others_out(
    cluster: ControllerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["guest", "map", "7", "--step", "3", "--json"]) == 0
    assert lines(capsys) == []
