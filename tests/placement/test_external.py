"""Placement by a site's command: its answer counts where it is one, and nothing it does cancels a job by accident."""

import json
import re
import sys
from pathlib import Path

import pytest

from carrel.config import Placement
from carrel.hosts.admission import Admission
from carrel.hosts.table import Facts
from carrel.model.host import Answer, Demand, Here, Never, NotNow

ONE = Demand(cpus=2, memory_bytes=1)


def site(directory: Path, program: str, *, timeout_s: float = 20.0) -> Admission:
    script = directory / "choose"
    script.write_text(f"#!{sys.executable}\nimport json, sys\nasked = json.load(sys.stdin)\n{program}\n")
    script.chmod(0o755)
    settings = Placement(table=str(directory / "hosts.db"), command=(str(script),), command_timeout_s=timeout_s)
    admission = Admission(settings)
    admission.table.put(Facts(name=name, cpus=cpus, memory_bytes=9) for name, cpus in (("h0", 4), ("h1", 2)))
    return admission


def saying(answer: object) -> str:
    return f"print({json.dumps(json.dumps(answer))})"


def test_the_command_sees_run_demand_and_hosts_and_its_choice_is_taken(tmp_path: Path) -> None:
    admission = site(
        tmp_path,
        f"open({str(tmp_path / 'asked')!r}, 'w').write(json.dumps(asked))\n"
        "print(json.dumps({'answer': 'here', 'hosts': [asked['hosts'][-1]['name']]}))",
    )
    assert admission.take("7.9.0", ONE, without=["h0"]) == Here(("h1",))
    asked = json.loads((tmp_path / "asked").read_text())
    assert (asked["run"], asked["demand"]["cpus"], asked["without"]) == ("7.9.0", 2, ["h0"])
    assert [host["name"] for host in asked["hosts"]] == ["h0", "h1"]
    assert [place.host for place in admission.table.places()] == ["h1"]


def test_a_run_that_has_its_places_asks_nobody_again(tmp_path: Path) -> None:
    admission = site(tmp_path, saying({"answer": "here", "hosts": ["h0"]}))
    assert admission.take("run", ONE) == Here(("h0",))
    (tmp_path / "choose").unlink()
    assert admission.take("run", ONE) == Here(("h0",))


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("sys.exit('no licence server')", "told nothing: .*exited with 1: no licence server"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "told nothing: .*exited with -9"),
        ("pass", "gave no answer"),
        ("print('h0')", "gave no answer"),
        (saying({"answer": "perhaps"}), "gave no answer: Invalid value 'perhaps'"),
        (saying({"answer": "here", "hosts": ["h9"]}), "host 'h9' was chosen, which is not in the table"),
        (saying({"answer": "here", "hosts": []}), "0 hosts were chosen for 2 CPUs"),
        (saying({"answer": "not-now", "reason": "the rack is hot"}), "the rack is hot"),
    ],
)
def test_a_command_that_says_nothing_useful_is_a_reason_to_wait(tmp_path: Path, program: str, why: str) -> None:
    answer: Answer = site(tmp_path, program).take("run", ONE)
    assert isinstance(answer, NotNow)
    assert re.search(why, answer.reason)


def test_a_command_that_takes_too_long_is_a_reason_to_wait(tmp_path: Path) -> None:
    answer = site(tmp_path, "import signal; signal.pause()", timeout_s=0.3).take("run", ONE)
    assert isinstance(answer, NotNow)
    assert "not done after 0.3 s" in answer.reason


def test_a_command_that_is_not_there_is_a_reason_to_wait(tmp_path: Path) -> None:
    settings = Placement(table=str(tmp_path / "hosts.db"), command=("/no/such/command",))
    answer = Admission(settings).query(ONE)
    assert isinstance(answer, NotNow)
    assert "/no/such/command: not found" in answer.reason


def test_only_a_command_that_says_never_means_it(tmp_path: Path) -> None:
    admission = site(tmp_path, saying({"answer": "never", "reason": "no GPU in this site"}))
    assert admission.take("run", ONE) == Never("no GPU in this site")


def test_no_command_fills_a_host_above_its_capacity(tmp_path: Path) -> None:
    admission = site(tmp_path, saying({"answer": "here", "hosts": ["h0"]}))
    answers = [admission.take(f"run{number}", ONE) for number in range(3)]
    assert answers == [
        Here(("h0",)),
        Here(("h0",)),
        NotNow("host 'h0' was chosen, which has no room for 2 CPUs and 0 MiB now"),
    ]
    assert admission.query(ONE) == answers[2]


@pytest.mark.parametrize(("state", "without"), [("drained", ()), ("up", ("h0",))])
def test_no_command_uses_a_host_that_takes_no_guests(tmp_path: Path, state: str, without: tuple[str, ...]) -> None:
    admission = site(tmp_path, saying({"answer": "here", "hosts": ["h0"]}))
    if state == "drained":
        admission.table.drain("h0", "new disks")
    assert admission.take("run", ONE, without=without) == NotNow("host 'h0' was chosen, which takes no guests now")


def test_no_command_puts_two_guests_on_a_host_that_must_be_apart(tmp_path: Path) -> None:
    admission = site(tmp_path, saying({"answer": "here", "hosts": ["h0", "h0"]}))
    apart = Demand(cpus=1, memory_bytes=1, count=2, apart=True)
    answer = admission.take("run", apart)
    assert isinstance(answer, NotNow)
    assert "host 'h0' was chosen 2 times for 2 guests" in answer.reason
