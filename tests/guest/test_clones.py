"""Instant clones: twenty at once from one template, nothing of one in another, and no template that is not whole."""

import hashlib
import json
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import msgspec
import pytest

from carrel.process import run
from carrel.sandbox import descendants
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, await_end, store_like_ours, submit, wait_for
from carrel.testing.leaks import nothing_left, pid_of
from carrel.testing.sandbox import User

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)),
    pytest.mark.clones("auto"),  # what a site has; the templates are these tests' own
]

MakeSandbox = Callable[..., Sandbox]
OPTIONS = (f"--guest={IMAGE}", "-N1", "-n1", "--mem=400")
MANY = 20
FOLLOWERS = 2
BASE_BYTES = 160 * 2**20
RESUME_S = 4.0


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


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """Give a directory that daemons and users can enter."""
    path = Path(mkdtemp(prefix="cr", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def a_node(sandbox_factory: MakeSandbox, user: User, templates: Path, *, conf: str = "") -> Node:
    conf = f'[guests.templates]\ndir = "{templates}"\n{conf}'
    return Node(sandbox_factory(nodes=1, carrel_conf=conf), user, templates)


@pytest.fixture(scope="module")
def node(sandbox_factory: MakeSandbox, user: User, scratch: Path) -> Iterator[Node]:
    made = a_node(sandbox_factory, user, scratch / "templates", conf=f"[drivers.qemu]\nresume_timeout_s = {RESUME_S}\n")
    yield made
    made.box.down()


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


# -- from the first guest of a shape to the second


def test_the_first_guest_of_a_shape_boots_and_the_next_goes_on_from_a_template(node: Node) -> None:
    assert node.became() == (
        "linked",
        f"the first for {IMAGE}, 1 CPU and from 160 MiB: a template is made for the next",
    )
    assert json.loads(about(node.template()))["image_name"] == IMAGE
    with allocation(node.box, *OPTIONS, user=node.user.name) as job_id:
        node.box.run(["srun", f"--jobid={job_id}", "true"], user=node.user.name, timeout_s=GUEST_TIMEOUT_S)
        (name,) = (guest["name"] for guest in node.guests())
        shown = json.loads(node.box.run(["carrel", "guest", "show", name, "--json"]).stdout)
        job = node.box.run(["carrel", "job", "show", str(job_id)]).stdout
    assert (shown["clone"], shown["clone_why"]) == (
        "instant",
        f"from a template for {IMAGE}, 1 CPU and from 160 MiB",
    )
    assert "instant" in job
    events = node.box.run(["carrel", "job", "events", str(job_id)]).stdout
    assert re.search(
        r"guest-ready +\S+ +instant clone, ready [0-9.]+ s after its start; from a template for", events
    ), events


# -- many at once

# Written by the guest's first command: bytes of the pool, identifiers, and a key that openssl makes of it.
_TELL = """\
echo "machine-id $(cat /etc/machine-id)"
echo "boot_id $(cat /proc/sys/kernel/random/boot_id)"
echo "urandom $(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')"
echo "uuid $(cat /proc/sys/kernel/random/uuid)"
[ ! -x /opt/openssl ] || echo "key $(/opt/openssl ecparam -genkey -noout -name prime256v1 | tr -d '\\n')"
echo "host $(uname -n)"
touch "$0/ready.$SLURM_PROCID"
while [ ! -e "$0/done" ]; do sleep 0.2; done
"""


def test_twenty_at_once_all_answer_are_all_distinct_leave_nothing_and_leave_the_template_as_it_was(
    node: Node,
) -> None:
    node.template()
    openssl = shutil.which("openssl")
    mount = [f"--guest-mount={openssl}:/opt/openssl:ro"] if openssl else []
    each = [f"--guest={IMAGE}", "--guest-per=task", "--overcommit", "-N1", "-c1", "--mem=1400", *mount]
    # A CPU's share of that memory is another shape than that of the other tests.
    first = node.box.run(["srun", *each, "-n1", "true"], user=node.user.name, timeout_s=GUEST_TIMEOUT_S)
    assert first.returncode == 0, first.stderr
    wait_for(lambda: len(node.all()) == 2 and not node.begun())
    before = {home: digests(home) for home in node.all()}

    place = node.user.home / f"clones-{secrets.token_hex(4)}"
    run(["install", "-d", "-o", node.user.name, place])
    with ThreadPoolExecutor() as threads:
        words = ["srun", *each, f"-n{MANY}", "-l", "sh", "-c", _TELL, str(place)]
        srun = threads.submit(node.box.run, words, user=node.user.name, cwd=place, timeout_s=GUEST_TIMEOUT_S)
        try:
            wait_for(lambda: len(list(place.glob("ready.*"))) == MANY or srun.done())
            guests = node.guests()
        finally:
            (place / "done").touch()
        done = srun.result()

    assert (done.returncode, done.stderr) == (0, "")
    assert [guest["clone"] for guest in guests] == ["instant"] * MANY, [guest["clone_why"] for guest in guests]
    assert len({guest["name"] for guest in guests}) == MANY
    said: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(": ")[2].partition(" ")
        said.setdefault(name, []).append(value)
    assert set(said.pop("host")) == {node.box.nodes[0]}
    assert set(said) == {"machine-id", "boot_id", "urandom", "uuid", *(["key"] if openssl else [])}
    for name, values in said.items():
        assert all(values), name
        assert len(set(values)) == len(values) == MANY, name
    nothing_left(node.box)
    assert {home: digests(home) for home in node.all()} == before


# -- what one wrote

_CANARY = "c4n4ry-"
_WRITE = f"""\
import os
mark = ("{_CANARY}" + os.environ["MARK"] + "\\n").encode()
page = mark.ljust(16384, b".")
memory = page * (40 << 6)
for path, pages in (("/dev/shm/mark", 1500), ("/var/tmp/mark", 3000), ("/etc/mark", 250)):
    with open(path, "wb", buffering=1 << 20) as file:
        for _ in range(pages):
            file.write(page)
os.sync()
"""
# It must not find what it itself is looking for: a mark is the word and 32 digits, and the word alone is here.
_SEARCH = f"""\
import os, struct
word, found, room = b"{_CANARY}", set(), bytearray(4 << 20)
def look(file, start, end, skip=0):
    while start < end:
        try:
            got = os.preadv(file, [memoryview(room)[skip : skip + min(4000 << 10, end - start)]], start)
        except OSError:
            got = 0
        if not got:
            return
        at = skip
        while (at := room.find(word, at, skip + got)) >= 0:
            mark = room[at + len(word) : min(at + len(word) + 32, skip + got)]
            if len(mark) == 32 and all(letter in b"0123456789abcdef" for letter in mark):
                found.add(mark.decode())
            at += 1
        # What lies across is read twice.
        start += got if start + got >= end else got - 4096
    return True
core = os.open("/proc/kcore", os.O_RDONLY)
head = os.pread(core, 1 << 16, 0)
offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
memory = 0
for number in range(count):
    kind, _, at, _, physical, length, _, _ = struct.unpack_from("<IIQQQQQQ", head, offset + number * size)
    if kind == 1 and physical != 2**64 - 1 and length < 1 << 40:
        memory += length
        look(core, at, at + length)
in_memory = sorted(found)
found.clear()
# Past the cache, which takes a tenth of the time, and a place in memory that the device can write to.
disk = os.open("/dev/vda", os.O_RDONLY | os.O_DIRECT)
length = os.lseek(disk, 0, os.SEEK_END)
assert any(look(disk, 0, length, skip) for skip in range(0, 512, 16))
print(memory >> 20, length >> 20, ",".join(in_memory) or "-", ",".join(sorted(found)) or "-")
"""


def test_a_clone_finds_nothing_in_its_memory_or_on_its_disk_of_what_another_wrote(node: Node) -> None:
    node.template()
    mark = secrets.token_hex(16)
    root = ("--guest-root",)
    with allocation(node.box, *OPTIONS, *root, user=node.user.name) as job_id:

        def step(script: str, **env: str) -> str:
            words = ["srun", f"--jobid={job_id}", "python3", "-c", script]
            done = node.box.run(words, user=node.user.name, env=env, timeout_s=GUEST_TIMEOUT_S)
            assert done.returncode == 0, done.stderr
            return done.stdout

        step(_WRITE, MARK=mark)
        assert [guest["clone"] for guest in node.guests()] == ["instant"]
        memory_mib, disk_mib, in_memory, on_disk = step(_SEARCH).split()
    assert int(memory_mib) >= 160, "the search looks through all of its memory"
    assert int(disk_mib) >= 1024
    assert (in_memory, on_disk) == (mark, mark), "and finds what is there"
    for _ in range(FOLLOWERS):
        said, guest = node.runs("python3", "-c", _SEARCH, options=root)
        assert guest["clone"] == "instant", guest["clone_why"]
        assert said.split() == [memory_mib, disk_mib, "-", "-"]


_TAMPER = """\
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def said(deed):
    try:
        deed()
    except OSError as error:
        return error.strerror
    return "done"
def hole(file):
    if libc.fallocate(file, 3, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
qemu, found = f"/proc/{sys.argv[1]}", []
for place in ("fd", "map_files"):
    for name in os.listdir(f"{qemu}/{place}"):
        path = f"{qemu}/{place}/{name}"
        try:
            link = os.readlink(path)
        except OSError:
            continue
        if "carrel-template" not in link and "/templates/" not in link and "root.img" not in link:
            continue
        try:
            file = os.open(path, os.O_RDWR)
        except OSError as error:
            found.append([place, link, "open", error.strerror])
            continue
        both = mmap.PROT_READ | mmap.PROT_WRITE
        for what, deed in {
            "write": lambda: os.pwrite(file, b"x", 0),
            "map": lambda: mmap.mmap(file, 4096, mmap.MAP_SHARED, both),
            "shrink": lambda: os.ftruncate(file, 0),
            "grow": lambda: os.ftruncate(file, 1 << 40),
            "hole": lambda: hole(file),
        }.items():
            found.append([place, link, what, said(deed)])
print(json.dumps(found))
"""


def test_the_user_of_a_clone_cannot_write_to_what_other_users_clones_come_from(node: Node) -> None:
    template = node.template()
    before = digests(template)
    with allocation(node.box, *OPTIONS, user=node.user.name) as job_id:
        node.box.run(["srun", f"--jobid={job_id}", "true"], user=node.user.name, timeout_s=GUEST_TIMEOUT_S)
        qemu = pid_of(node.box, job_id, "qemu")
        assert qemu is not None
        words = ["/usr/bin/python3", "-c", _TAMPER, str(qemu.number)]
        done = node.box.run(words, user=node.user.name)
        assert done.returncode == 0, done.stderr
        tried = [tuple(attempt) for attempt in json.loads(done.stdout)]
        memory = next(
            path for path in Path(f"/proc/{qemu.number}/fd").iterdir() if "carrel-template" in str(path.readlink())
        )
        assert hashlib.sha256(memory.read_bytes()).hexdigest() == before["ram"]
    memory_tried = {what: answer for place, link, what, answer in tried if place == "fd" and "memfd:" in link}
    assert memory_tried == dict.fromkeys(("write", "map", "shrink", "grow", "hole"), "Operation not permitted")
    parts = {Path(link).name for _, link, what, answer in tried if (what, answer) == ("open", "Permission denied")}
    assert parts >= {"disk", "root.img"}, "the state is read once, and closed"
    assert "done" not in {answer for *_, answer in tried}, tried
    assert digests(template) == before


# -- templates that are not whole


def cut(name: str) -> Callable[[Path], object]:
    return lambda home: (home / name).write_bytes((home / name).read_bytes()[:4096])


def of_other_conditions(home: Path) -> None:
    (home / "template.json").write_text(about(home).replace('"cpus":1', '"cpus":2'))


def nonsense(name: str) -> Callable[[Path], object]:
    def spoil(home: Path) -> None:
        size = (home / name).stat().st_size
        (home / name).write_bytes(secrets.token_bytes(4096) * (size // 4096) + bytes(size % 4096))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(cut("ram"), r"of no use and is made anew: its ram has 4096 bytes, and had \d+", id="cut-ram"),
        pytest.param(nonsense("state"), "of no use and is made anew: .*load of migration failed", id="nonsense-state"),
        pytest.param(nonsense("ram"), "of no use and is made anew: ", id="nonsense-ram"),
        pytest.param(lambda home: (home / "template.json").write_bytes(b'{"cond'), "the first for", id="cut-json"),
        pytest.param(of_other_conditions, "the first for", id="of-other-conditions"),
    ],
)
def test_a_job_whose_template_is_spoilt_boots_its_guest_says_why_and_the_template_is_made_anew(
    node: Node, spoil: Callable[[Path], object], why: str
) -> None:
    home = node.template()
    was = created_s(home)
    spoil(home)
    node.box.restart(node.daemon)  # or it would have the memory still
    clone, clone_why = node.became()
    assert (clone, bool(re.search(why, clone_why))) == ("linked", True), clone_why
    wait_for(lambda: node.homes() == [home] and created_s(home) > was and not node.begun())
    assert node.became()[0] == "instant"


# -- carreld killed, the disk full, the node started again


def makes(node: Node, part: str) -> bool:
    """Return whether this part of a template that is being made is there."""
    with suppress(FileNotFoundError):  # it is finished just now
        return any((new / part).stat().st_size for new in node.begun())
    return False


@pytest.mark.parametrize("part", [".", "guest/console.log", "ram"])
def test_a_carreld_that_is_killed_while_it_makes_a_template_leaves_no_guest_and_no_template(
    node: Node, part: str
) -> None:
    shutil.rmtree(node.templates, ignore_errors=True)
    job_id, place = submit(node.box, "#!/bin/sh\nuname -r\n", *OPTIONS, user=node.user)
    wait_for_quickly(lambda: makes(node, part) or bool(node.homes()))
    node.box.kill(node.daemon, signal.SIGKILL)
    made = bool(node.homes())
    wait_for(lambda: not node.makers(), 10)
    node.box.start(node.daemon)
    assert await_end(node.box, job_id) == "COMPLETED"
    assert re.fullmatch(r"6\..*\n", (place / "out").read_text())
    wait_for(lambda: not node.begun(), 30)
    assert bool(node.homes()) == made, "what was begun is no template"
    nothing_left(node.box)
    node.template()
    assert node.became()[0] == "instant"


def wait_for_quickly(fact: Callable[[], bool]) -> None:
    """Return at once when the fact is true: it is not for long."""
    with ThreadPoolExecutor() as threads:
        found: Future[None] = threads.submit(_spin, fact)
        found.result(GUEST_TIMEOUT_S)


def _spin(fact: Callable[[], bool]) -> None:
    while not fact():
        pass


def test_a_job_runs_while_templates_find_no_room_and_says_so(
    sandbox_factory: MakeSandbox, user: User, scratch: Path
) -> None:
    where = scratch / "small"
    where.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", where])
    try:
        node = a_node(sandbox_factory, user, where)
        for size in ("64k", "20m"):  # no room for a disk; none for the memory
            run(["mount", "-o", f"remount,size={size}", where])
            node.box.restart(node.daemon)  # it forgets what failed
            assert node.became()[0] == "linked"
            wait_for(lambda: not node.begun() and not node.makers())
            clone, why = node.became()
            assert (clone, node.homes()) == ("linked", [])
            assert re.search(f"no template for {IMAGE}, 1 CPU and from 160 MiB: .*No space left on device", why), why
            assert list(where.iterdir()) == []
        run(["mount", "-o", "remount,size=400m", where])
        node.box.restart(node.daemon)
        node.template()
        assert node.became()[0] == "instant"
        node.box.down()
    finally:
        run(["umount", where])


def test_templates_outlive_the_node_that_made_them(
    sandbox_factory: MakeSandbox, user: User, scratch: Path, node: Node
) -> None:
    before = digests(node.template())
    again = a_node(sandbox_factory, user, node.templates)  # nothing that runs is of the node before
    assert again.became()[0] == "instant"
    assert digests(again.template()) == before
    again.box.down()


# -- another QEMU, another kernel, another image


@pytest.fixture(scope="module")
def changing(sandbox_factory: MakeSandbox, user: User, scratch: Path) -> Iterator[Node]:
    """Have a node with a QEMU, an image store and a carrel-agent of its own."""
    (scratch / "bin").mkdir()
    for beside in ("share", "lib"):  # QEMU looks for its firmware and its modules beside itself
        (scratch / beside).symlink_to(f"/usr/{beside}")
    shutil.copy("/usr/bin/qemu-system-x86_64", scratch / "bin")
    store = store_like_ours(scratch / "store")
    conf = f'[drivers.qemu]\nbinary = "{scratch}/bin/qemu-system-x86_64"\n[images]\nstore = "{store}"\n'
    made = a_node(sandbox_factory, user, scratch / "changing", conf=conf)
    yield made
    made.box.down()


def upgrade_qemu(node: Node, scratch: Path) -> None:  # one shape for all
    new = scratch / "bin" / "new"
    shutil.copyfile("/usr/bin/qemu-system-x86_64", new)
    new.chmod(0o755)
    new.rename(scratch / "bin" / "qemu-system-x86_64")


def change_agent(node: Node, scratch: Path) -> None:  # one shape for all
    agent = node.box.dir / "libexec" / "carrel-agent"
    new = agent.with_name("new")
    new.write_bytes(agent.read_bytes() + b"\0")
    new.chmod(0o755)
    new.rename(agent)


@pytest.mark.parametrize("change", [upgrade_qemu, change_agent])
def test_a_template_of_another_qemu_or_kernel_is_not_used_and_goes(
    changing: Node, scratch: Path, change: Callable[[Node, Path], None]
) -> None:
    old = changing.template()
    assert changing.became()[0] == "instant"
    change(changing, scratch)
    clone, why = changing.became()
    assert (clone, why.partition(",")[0]) == ("linked", f"the first for {IMAGE}")
    assert changing.template() != old
    assert changing.became()[0] == "instant"


def test_a_template_of_a_kernel_before_goes_also_when_carreld_starts(changing: Node, scratch: Path) -> None:
    changing.template()
    changing.box.kill(changing.daemon)
    change_agent(changing, scratch)
    changing.box.start(changing.daemon)
    wait_for(lambda: changing.homes() == [])


def test_a_template_of_an_image_before_is_not_used_and_goes_with_the_image(changing: Node, scratch: Path) -> None:
    old = changing.template()
    store = scratch / "store"
    before = (store / "tags" / IMAGE).read_text().strip()
    rebuilt(store, before)
    clone, why = changing.became()
    assert (clone, why.partition(",")[0]) == ("linked", f"the first for {IMAGE}")
    wait_for(lambda: len(changing.homes()) == 2)
    assert changing.became()[0] == "instant"
    removed = changing.box.run(["carrel", "image", "remove", before])
    assert removed.returncode == 0, removed.stderr
    assert not old.exists()
    assert changing.became()[0] == "instant"


def rebuilt(store: Path, before: str) -> None:
    """Let the name stand for another image, which has the same files under another hash, as after a rebuild."""
    after = hashlib.sha256(before.encode()).hexdigest()
    ours = (store / "images" / before).resolve()
    (store / "images" / before).unlink()  # it is another store's directory, and not to be pruned
    for digest in (before, after):
        home = store / "images" / digest
        home.mkdir()
        (home / "root.img").symlink_to(ours / "root.img")
        (home / "image.json").write_text((ours / "image.json").read_text().replace(before, digest))
    (store / "tags" / IMAGE).write_text(f"{after}\n")
