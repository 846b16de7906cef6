"""A cluster of one node with templates of its own: for tests of clones, and of how templates are made."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from carrel.sandbox import descendants
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, wait_for
from carrel.testing.sandbox import MakeSandbox, User

OPTIONS = (f"--guest={IMAGE}", "-N1", "-n1", "--mem=400")
BASE_BYTES = 160 * 2**20
"""The memory with which the template for a guest of these options is made."""


class Node(msgspec.Struct, frozen=True):
    """A cluster of one node with templates of its own."""

    box: Sandbox
    user: User
    templates: Path

    @property
    def daemon(self) -> str:
        return f"carreld@{self.box.nodes[0]}"

    def runs(self, *words: str, options: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
        """Run a command in a new job's guest; return what it said, and the guest."""
        with allocation(self.box, *OPTIONS, *options, user=self.user.name) as job_id:
            step = ["srun", f"--jobid={job_id}", *(words or ("true",))]
            done = self.box.run(step, user=self.user.name, timeout_s=GUEST_TIMEOUT_S)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
            wait_for(lambda: [one["state"] for one in self.guests() if one["job_id"] == job_id] == ["ready"])
            (guest,) = (one for one in self.guests() if one["job_id"] == job_id)
        return done.stdout, guest

    def became(self) -> tuple[str, str]:
        """Return which clone the guest of a new job becomes, and why."""
        _, guest = self.runs()
        return guest["clone"], guest["clone_why"]

    def guests(self) -> list[dict[str, Any]]:
        done = self.box.run(["carrel", "guest", "list", "--json"])
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def homes(self) -> list[Path]:
        """Return the templates that are there for the guests of most of these tests."""
        return [home for home in self.all() if f'"cpus":1,"memory_bytes":{BASE_BYTES},' in about(home)]

    def all(self) -> list[Path]:
        return sorted(path.parent for path in self.templates.glob("[!.]*/template.json"))

    def begun(self) -> list[Path]:
        return list(self.templates.glob(".new-*"))

    def template(self) -> Path:
        """Return the only template, and have one where there is none."""
        if not self.homes():
            self.runs()
        wait_for(lambda: len(self.homes()) == 1 and not self.begun())
        return self.homes()[0]

    def makers(self) -> set[int]:
        """Return the QEMUs in which a template is made."""
        found = set()
        for pid in descendants.living(self.box.facts().pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"guest=carrel-template," in words:
                found.add(pid)
        return found


def a_node(sandbox_factory: MakeSandbox, user: User, templates: Path, *, conf: str = "") -> Node:
    # A template that is not made in time is not tried again for minutes, and on a busy machine a boot takes one.
    conf = f'[guests]\nboot_timeout_s = 150.0\n[guests.templates]\ndir = "{templates}"\n{conf}'
    return Node(sandbox_factory(nodes=1, carrel_conf=conf), user, templates)


def about(home: Path) -> str:
    """Return what a template says of itself; nothing where it is going just now."""
    with suppress(FileNotFoundError):
        return (home / "template.json").read_text()
    return ""


def created_s(home: Path) -> float:
    with suppress(ValueError):
        return float(json.loads(about(home))["created_s"])
    return 0.0


def digests(template: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(template.iterdir())}
