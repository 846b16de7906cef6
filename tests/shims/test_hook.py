"""carrel-hook against a socket in carreld's place: whatever happens, it is quick, and it exits 0."""

import contextlib
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from carrel import wire

HOOK = Path(__file__).parents[2] / "slurm" / "carrel-hook"
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_UID": "1042", "SLURMD_NODENAME": "c1"}
GUEST = {
    "SPANK_CARREL_JOB_IMAGE": "debian12",
    "SPANK_CARREL_JOB_PER": "task",
    "SPANK_CARREL_JOB_MOUNT": "/a\n/b:/c:ro",
    "SPANK_CARREL_JOB_BOOT_TIMEOUT_S": "90",
}


class Carreld:
    """Takes one message and sends the given bytes; with None it never answers."""

    def __init__(self, answer: bytes | None) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="ch", dir="/tmp"))
        (self.dir / "c1").mkdir()
        (self.dir / "carrel.toml").write_text(
            f'[node]\ndir = "{self.dir}/{{node}}"\n[guests]\nstop_timeout_s = 0.5\n[images]\nstore = "/x"\n'
        )
        self.asked: wire.Message | None = None
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.dir / "c1" / "carreld.sock"))
        self._listener.listen()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self._listener.settimeout(20)
        # A hook that dies early ends the test by its own assertion, not by a second error from here.
        with contextlib.suppress(OSError, struct.error):
            client, _ = self._listener.accept()
            with client:
                (length,) = struct.unpack("<I", client.recv(4, socket.MSG_WAITALL))
                self.asked = wire.decode(client.recv(length, socket.MSG_WAITALL))
                if self._answer is None:
                    self._over.wait(20)
                else:
                    client.sendall(self._answer)

    def close(self) -> None:
        self._over.set()
        with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(OSError):
            last.connect(str(self.dir / "c1" / "carreld.sock"))
        self._thread.join()
        self._listener.close()
        subprocess.run(["rm", "-r", self.dir], check=True)


@contextlib.contextmanager
def carreld(answer: bytes | None) -> Iterator[Carreld]:
    made = Carreld(answer)
    try:
        yield made
    finally:
        made.close()


def hook(role: str, env: dict[str, str]) -> tuple[str, float]:
    """Run it as slurmd does; return what it said and how long it took. It must have exited with 0."""
    began = time.monotonic()
    done = subprocess.run(
        [HOOK, role], env={"PATH": os.defpath, **env}, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0
    assert done.stdout == ""
    return done.stderr, time.monotonic() - began


OK = wire.encode({"status": "ok"})


@pytest.mark.parametrize("role", ["prolog", "epilog"])
def test_the_job_and_all_that_it_asked_for_is_told_to_carreld(role: str) -> None:
    with carreld(OK) as node:
        said, _ = hook(role, {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
    assert said == ""
    assert node.asked
    assert node.asked.records == [
        ("verb", role), ("job", "4711"), ("uid", "1042"), ("image", "debian12"), ("per", "task"),
        ("boot_timeout_s", "90"), ("mount", "/a"), ("mount", "/b:/c:ro"),
    ]  # fmt: skip


def test_the_configuration_is_found_beside_slurm_conf() -> None:
    with carreld(OK) as node:
        said, _ = hook("prolog", {**JOB, **GUEST, "SLURM_CONF": str(node.dir / "slurm.conf")})
    assert said == ""
    assert node.asked


@pytest.mark.parametrize("role", ["prolog", "epilog"])
def test_a_job_without_a_guest_starts_no_python(role: str) -> None:
    env = {**JOB, "CARREL_CONFIG": "/no/such/file"}
    done = subprocess.run(["sh", "-x", HOOK, role], env=env, capture_output=True, text=True, check=True)
    assert "exit 0" in done.stderr
    assert "python" not in done.stderr


@pytest.mark.parametrize(("role", "hint"), [("prolog", "begin.4711"), ("epilog", "end.4711")])
@pytest.mark.parametrize(
    "line", ['dir = "{}/{{node}}"', "dir = '{}/{{node}}'  # ours", 'dir = "{}/c1"', '  dir="{}/{{node}}"']
)
def test_a_job_without_a_guest_leaves_a_hint_for_the_sampler(tmp_path: Path, role: str, hint: str, line: str) -> None:
    (tmp_path / "c1" / "hints").mkdir(parents=True)
    other = '[metrics]\ndir = "/elsewhere"\n'
    (tmp_path / "carrel.toml").write_text(f"{other}[node]\nsweep_period_s = 1.0\n{line.format(tmp_path)}\n{other}")
    said, _ = hook(role, {**JOB, "CARREL_CONFIG": str(tmp_path / "carrel.toml")})
    assert said == ""
    assert [path.name for path in (tmp_path / "c1" / "hints").iterdir()] == [hint]


@pytest.mark.parametrize(
    ("role", "asked", "hints"),
    [
        ("prolog", "yes", {"begin.4711", "report.4711"}),
        ("prolog", "no", {"begin.4711"}),
        ("epilog", "yes", {"end.4711"}),
    ],
)
def test_a_wish_for_a_report_is_a_hint_of_the_prolog(tmp_path: Path, role: str, asked: str, hints: set[str]) -> None:
    (tmp_path / "c1" / "hints").mkdir(parents=True)
    (tmp_path / "carrel.toml").write_text(f'[node]\ndir = "{tmp_path}/{{node}}"\n')
    said, _ = hook(role, {**JOB, "SPANK_CARREL_JOB_REPORT": asked, "CARREL_CONFIG": str(tmp_path / "carrel.toml")})
    assert said == ""
    assert {path.name for path in (tmp_path / "c1" / "hints").iterdir()} == hints


def test_a_hint_that_cannot_be_left_drains_no_node(tmp_path: Path) -> None:
    (tmp_path / "c1" / "hints" / "begin.4711").mkdir(parents=True)
    (tmp_path / "carrel.toml").write_text(f'[node]\ndir = "{tmp_path}/{{node}}"\n')
    said, _ = hook("prolog", {**JOB, "CARREL_CONFIG": str(tmp_path / "carrel.toml")})
    assert "begin.4711" in said


def test_words_of_waiting_are_not_the_answer() -> None:
    with carreld(wire.encode({"status": "wait", "text": "guest stops"}) + OK) as node:
        said, _ = hook("epilog", {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
    assert said == ""


def test_a_refusal_is_repeated_on_stderr() -> None:
    with carreld(wire.encode({"status": "refused", "text": "no image debian12"})) as node:
        said, _ = hook("prolog", {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
    assert said == "carrel-hook prolog: job 4711: carreld: no image debian12\n"


def test_without_carreld_it_says_one_line() -> None:
    with tempfile.TemporaryDirectory(prefix="ch", dir="/tmp") as empty:
        (Path(empty) / "carrel.toml").write_text(f'[node]\ndir = "{empty}/{{node}}"\n')
        said, _ = hook("prolog", {**JOB, **GUEST, "CARREL_CONFIG": f"{empty}/carrel.toml"})
    sentence = f"carreld at {empty}/c1/carreld.sock: No such file or directory; is it running?"
    assert said == f"carrel-hook prolog: job 4711: {sentence}\n"


@pytest.mark.parametrize(("role", "at_least_s", "bound"), [("prolog", 1.0, "1 s"), ("epilog", 1.5, "1.5 s")])
def test_a_carreld_that_hangs_is_waited_for_with_a_bound(role: str, at_least_s: float, bound: str) -> None:
    with carreld(None) as node:
        said, took_s = hook(role, {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
    assert f"no answer within {bound}" in said
    assert at_least_s <= took_s


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff\xff\xff\xff", b"\x05\0\0\0ab", b"\x03\0\0\0\xff\xfe\0"],
    ids=["empty", "huge", "short", "bytes"],
)
def test_garbage_is_one_line_on_stderr(garbage: bytes) -> None:
    with carreld(garbage) as node:
        said, _ = hook("prolog", {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
    assert said.startswith("carrel-hook prolog: job 4711: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("toml", ["not toml", "node = 3\n", '[guests]\nstop_timeout_s = "soon"\n'])
def test_a_broken_configuration_drains_no_node(toml: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ch", dir="/tmp") as where:
        (Path(where) / "carrel.toml").write_text(toml)
        said, _ = hook("prolog", {**JOB, **GUEST, "CARREL_CONFIG": f"{where}/carrel.toml"})
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "toml", ['node.dir = "{}/{{node}}"', 'node = {{ dir = "{}/{{node}}" }}', '[node]\ndir="{}/{{node}}"']
)
def test_a_directory_is_found_however_toml_says_it(toml: str) -> None:
    with carreld(OK) as node:
        (node.dir / "carrel.toml").write_text(toml.format(node.dir) + "\n")
        said, _ = hook("prolog", {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
    assert said == ""
    assert node.asked


def test_a_prolog_that_finds_its_carreld_reads_no_toml() -> None:
    with carreld(OK) as node:
        with (node.dir / "carrel.toml").open("a") as file:
            file.write("not toml\n")
        told, _ = hook("prolog", {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
        said, _ = hook("epilog", {**JOB, **GUEST, "CARREL_CONFIG": str(node.dir / "carrel.toml")})
    assert told == ""
    assert node.asked
    assert "epilog: job 4711" in said, "an epilog needs guests.stop_timeout_s"


@pytest.mark.parametrize("role", ["resume", "suspend", ""])
def test_an_unknown_role_is_named_and_does_no_harm(role: str) -> None:
    said, _ = hook(role, JOB)
    assert said == f"carrel-hook: unknown role {role!r}; known: prolog, epilog\n"


def test_a_person_who_runs_it_is_told_what_is_missing() -> None:
    said, _ = hook("prolog", {**GUEST, "SLURMD_NODENAME": "c1", "CARREL_CONFIG": "/dev/null"})
    assert said.count("\n") == 1
