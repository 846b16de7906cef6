"""``carrel sandbox``: a real Slurm with Carrel in a directory, for a demo, a test, or whoever has no cluster."""

import os
import signal
import subprocess  # the command gets our own terminal, which carrel.process would not give it
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import msgspec
from cyclopts import App, Parameter

from carrel.errors import UsageError
from carrel.sandbox.cluster import Remote, Sandbox

app = App(name="sandbox", help="A real Slurm cluster with Carrel in a private directory.")

_TERM_TIMEOUT_S = 10.0

Nodes = Annotated[int, Parameter(help="Number of nodes: c1, c2, …")]
Dir = Annotated[Path | None, Parameter(help="Its directory: absent or empty, on a short path.")]
Hosts = Annotated[int, Parameter(help="How many hypervisor hosts: guests on them are Slurm nodes (--guest-per=node).")]
Netns = Annotated[
    bool, Parameter(negative=(), show_default=False, help="Own network and host name for each node. Needs root.")
]
Slurmdbd = Annotated[
    bool, Parameter(negative=(), show_default=False, help="With accounting: MariaDB, slurmdbd, the account demo.")
]
Bank = Annotated[
    bool,
    Parameter(
        negative=(),
        show_default=False,
        help="With the bank: jobs are priced, refused and charged; the account demo has 1000 SU.",
    ),
]
Proctrack = Annotated[Literal["linuxproc", "cgroup"], Parameter(help="cgroup: jobs are confined too. Needs root.")]
Json = Annotated[bool, Parameter(negative=(), show_default=False, help="Print JSON: one object.")]
Settings = Annotated[
    Path | None, Parameter(name="--settings", help="TOML that goes over the sandbox's carrel.toml, key by key.")
]
Guests = Annotated[bool | None, Parameter(negative="--no-guests", help="With carreld and carrelctld. Needs root.")]


@app.command
def run(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True, help="The command and its arguments, after --.")],
    nodes: Nodes = 3,
    dir: Dir = None,  # noqa: A002  # the option's name
    hosts: Hosts = 0,
    netns: Netns = False,
    slurmdbd: Slurmdbd = False,
    bank: Bank = False,
    proctrack: Proctrack = "linuxproc",
    guests: Guests = None,
    settings: Settings = None,
) -> int:
    """Run a command in a fresh cluster; its exit status is the command's, and nothing is left.

    The command finds the cluster by its environment (SLURM_CONF, CARREL_CONFIG, CARREL_SANDBOX) and has
    this terminal. 128 + n: signal n ended it.
    """
    if not command:
        raise UsageError("no command given; for example: carrel sandbox run -- srun -N3 hostname")
    box = Sandbox(
        dir=dir,
        nodes=nodes,
        hosts=hosts,
        netns=netns,
        slurmdbd=slurmdbd,
        bank=bank,
        users=_users(),
        proctrack=proctrack,
        guests=_guests(asked=guests),
        carrel_conf=_settings(settings),
        say=_say,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        box.up()
        return _in_foreground(box.command(command, netns=box.netns), box.env)
    except _InterruptedError as interrupted:
        return 128 + interrupted.number
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the second Ctrl-C of an impatient user would leave things behind
        box.down()


@app.command
def up(
    *,
    nodes: Nodes = 3,
    dir: Dir = None,  # noqa: A002  # the option's name
    hosts: Hosts = 0,
    netns: Netns = False,
    slurmdbd: Slurmdbd = False,
    bank: Bank = False,
    proctrack: Proctrack = "linuxproc",
    guests: Guests = None,
    settings: Settings = None,
) -> None:
    """Start a cluster that stays until `carrel sandbox down`."""
    box = Sandbox(
        dir=_directory(dir),
        nodes=nodes,
        hosts=hosts,
        netns=netns,
        slurmdbd=slurmdbd,
        bank=bank,
        users=_users(),
        proctrack=proctrack,
        guests=_guests(asked=guests),
        carrel_conf=_settings(settings),
        detached=True,
        say=_say,
    )
    box.up()
    facts = box.let_go()
    option = f" --dir {dir}" if dir else ""
    print(f"Slurm is up: {len(facts.nodes)} nodes, cluster {facts.cluster}, in {facts.dir}")
    print(f"  carrel sandbox shell{option}     a shell in it")
    print(f"  carrel sandbox down{option}      the end of it")
    print(f"  export SLURM_CONF={box.layout.slurm_conf}     for any other shell")


@app.command
def down(*, dir: Dir = None) -> None:  # noqa: A002  # the option's name
    """End the cluster, its jobs and guests, and delete its directory."""
    Remote(_directory(dir)).down()


@app.command
def shell(*, dir: Dir = None) -> int:  # noqa: A002  # the option's name
    """Open $SHELL in the cluster that `carrel sandbox up` started."""
    box = Remote(_directory(dir))
    facts = box.facts()
    words, more = _shell(os.environ.get("SHELL") or "/bin/sh")
    return _in_foreground(box.command(words, netns=facts.netns), {**box.env, **more})


@app.command
def status(*, dir: Dir = None, json: Json = False) -> None:  # noqa: A002  # as above
    """Show the daemons of the cluster."""
    facts = Remote(_directory(dir)).facts()
    if json:
        print(msgspec.json.encode(facts).decode())
        return
    print(f"cluster {facts.cluster} in {facts.dir}: nodes {' '.join(facts.nodes)}")
    for daemon in facts.daemons:
        print(f"  {daemon.name:<14} {f'pid {daemon.pid}' if daemon.pid else daemon.ended}")


class _InterruptedError(Exception):
    """A signal said stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    raise _InterruptedError(number)


def _in_foreground(words: Sequence[str], env: dict[str, str]) -> int:
    """Run a command on our own terminal and return how it ended, as a shell counts."""
    # Ctrl-C reaches the command too, being of our process group: it decides what that means, and we wait for it.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        child = subprocess.Popen(words, env={**os.environ, **env})
    except FileNotFoundError:
        print(f"carrel: {words[0]}: not found", file=sys.stderr)
        return 127
    except PermissionError:
        print(f"carrel: {words[0]}: not executable", file=sys.stderr)
        return 126
    else:
        try:
            status = child.wait()
        except _InterruptedError as interrupted:
            child.send_signal(interrupted.number)
            try:
                child.wait(timeout=_TERM_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            raise
        return status if status >= 0 else 128 - status
    finally:
        signal.signal(signal.SIGINT, before)


def _guests(*, asked: bool | None) -> bool:
    """Decide whether there are guests: what was asked, else whether this user can have them."""
    if asked is not None:
        return asked
    if os.getuid() != 0:
        _say("guests are off: carreld needs root")
        return False
    return True


def _settings(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        text = file.read_text()
        tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--settings {file}: {getattr(error, 'strerror', None) or error}; is it TOML?") from error
    return text


def _users() -> tuple[str, ...]:
    """Return whom the accounting shall know besides root: whoever came through sudo."""
    return tuple(name for name in (os.environ.get("SUDO_USER"),) if name)


def _directory(named: Path | None) -> Path:
    return (named or Path(tempfile.gettempdir()) / f"carrel-sandbox-{os.getuid()}").absolute()


def _shell(path: str) -> tuple[list[str], dict[str, str]]:
    """Return the shell with a prompt that says where one is, as far as the shell lets us."""
    if Path(path).name == "bash":
        return [path], {"PROMPT_COMMAND": _BASH_PROMPT}
    return [path], {"PS1": "(carrel) $ "}


_BASH_PROMPT = 'case $PS1 in "(carrel) "*) ;; *) PS1="(carrel) $PS1";; esac'
"""Run before each prompt: bash reads PS1 from its start-up files, after our environment."""


def _say(text: str) -> None:
    print(f"carrel: {text}", file=sys.stderr, flush=True)
