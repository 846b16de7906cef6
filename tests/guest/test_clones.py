"""Instant clones: the first guest of a shape boots, twenty at once are distinct, and nothing of one is in another."""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from carrel.process import run
from carrel.testing.cloning import OPTIONS, Node, a_node, about, digests
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, wait_for
from carrel.testing.leaks import nothing_left, pid_of
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)),
    pytest.mark.clones("auto"),  # what a site has; the templates are these tests' own
]

MANY = 20


@pytest.fixture(scope="module")
def node(sandbox_factory: MakeSandbox, user: User, scratch: Path) -> Iterator[Node]:
    made = a_node(sandbox_factory, user, scratch / "templates")
    yield made
    made.box.down()


# -- from the first guest of a shape to the second


def test_the_first_guest_of_a_shape_boots_and_the_next_goes_on_from_a_template(node: Node) -> None:
    assert node.became() == (
        "linked",
        f"the first for {IMAGE}, 1 CPU and from 160 MiB: a template is made for the next",
    )
    assert json.loads(about(node.template()))["image_name"] == IMAGE
    with allocation(node.box, *OPTIONS, user=node.user.name) as job_id:
        node.box.run(["srun", f"--jobid={job_id}", "true"], user=node.user.name, timeout_s=GUEST_TIMEOUT_S)
        wait_for(lambda: [guest["state"] for guest in node.guests()] == ["ready"])
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
    # An overcommitted job has one CPU, and each guest all of it: they are of the shape of the other tests' guests.
    each = [*OPTIONS, "--guest-per=task", "--overcommit", "-c1", f"-n{MANY}", *mount]
    before = {home: digests(home) for home in node.all()}
    assert len(before) == 1

    place = node.user.home / f"clones-{secrets.token_hex(4)}"
    run(["install", "-d", "-o", node.user.name, place])
    with ThreadPoolExecutor() as threads:
        words = ["srun", *each, "-l", "sh", "-c", _TELL, str(place)]
        srun = threads.submit(node.box.run, words, user=node.user.name, cwd=place, timeout_s=GUEST_TIMEOUT_S)
        try:
            wait_for(lambda: len(list(place.glob("ready.*"))) == MANY or srun.done())
            wait_for(lambda: [one["state"] for one in node.guests()] == ["ready"] * MANY or srun.done())
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
            path for path in Path(f"/proc/{qemu.number}/fd").iterdir() if "carrel-template" in _leads_to(path)
        )
        assert hashlib.sha256(memory.read_bytes()).hexdigest() == before["ram"]
    memory_tried = {what: answer for place, link, what, answer in tried if place == "fd" and "memfd:" in link}
    assert memory_tried == dict.fromkeys(("write", "map", "shrink", "grow", "hole"), "Operation not permitted")
    parts = {Path(link).name for _, link, what, answer in tried if (what, answer) == ("open", "Permission denied")}
    assert parts >= {"disk", "root.img"}, "the state is read once, and closed"
    assert "done" not in {answer for *_, answer in tried}, tried
    assert digests(template) == before


def _leads_to(link: Path) -> str:
    with suppress(FileNotFoundError):  # QEMU has closed it meanwhile
        return str(link.readlink())
    return ""


def test_templates_outlive_the_node_that_made_them(
    sandbox_factory: MakeSandbox, user: User, scratch: Path, node: Node
) -> None:
    before = digests(node.template())
    again = a_node(sandbox_factory, user, node.templates)  # nothing that runs is of the node before
    assert again.became()[0] == "instant"
    assert digests(again.template()) == before
    again.box.down()
