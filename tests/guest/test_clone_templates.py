"""Templates: whatever happens to one, or while it is made, jobs run, what is of no use goes, and it is made anew."""

import hashlib
import re
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from carrel.process import run
from carrel.testing.cloning import OPTIONS, Node, a_node, created_s
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, await_end, store_like_ours, submit, wait_for
from carrel.testing.leaks import nothing_left
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)),
    pytest.mark.clones("auto"),  # what a site has; the templates are these tests' own
]

RESUME_S = 4.0


@pytest.fixture(scope="module")
def node(sandbox_factory: MakeSandbox, user: User, scratch: Path) -> Iterator[Node]:
    made = a_node(sandbox_factory, user, scratch / "templates", conf=f"[drivers.qemu]\nresume_timeout_s = {RESUME_S}\n")
    yield made
    made.box.down()


# -- templates that are not whole


def cut(name: str) -> Callable[[Path], object]:
    return lambda home: (home / name).write_bytes((home / name).read_bytes()[:4096])


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
    """Return whether this part of a template that is being made is there, or all of it already."""
    with suppress(FileNotFoundError):  # it is finished just now
        if any((new / part).stat().st_size for new in node.begun()):
            return True
    return bool(node.homes())


def test_a_carreld_that_is_killed_while_it_makes_a_template_leaves_no_guest_and_no_template(node: Node) -> None:
    """Each kill comes later than the one before, and so shows too that the template was begun anew after that one."""
    for part in (".", "guest/console.log", "ram"):
        shutil.rmtree(node.templates, ignore_errors=True)
        job_id, place = submit(node.box, "#!/bin/sh\nuname -r\n", *OPTIONS, user=node.user)
        wait_for_quickly(partial(makes, node, part))
        node.box.kill(node.daemon, signal.SIGKILL)
        made = bool(node.homes())
        wait_for(lambda: not node.makers())
        node.box.start(node.daemon)
        assert await_end(node.box, job_id) == "COMPLETED"
        assert re.fullmatch(r"6\..*\n", (place / "out").read_text())
        wait_for(lambda: not node.begun())
        assert bool(node.homes()) == made, "what was begun is no template"
        nothing_left(node.box)
    node.template()
    assert node.became()[0] == "instant"


def wait_for_quickly(fact: Callable[[], bool]) -> None:
    """Return within milliseconds when the fact is true: it is not for long."""
    deadline_s = time.monotonic() + GUEST_TIMEOUT_S
    while not fact():
        assert time.monotonic() < deadline_s, fact
        time.sleep(0.005)


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
        run(["umount", "--lazy", where])  # a failure before leaves it busy


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


def test_a_template_of_a_kernel_before_goes_also_when_carreld_starts(changing: Node, scratch: Path) -> None:
    changing.template()
    changing.box.kill(changing.daemon)
    change_agent(changing, scratch)
    changing.box.start(changing.daemon)
    wait_for(lambda: changing.homes() == [])
