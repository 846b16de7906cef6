"""Templates on the disk: found only whole, made by one process at a time, and gone when nobody can use them."""

import fcntl
import mmap
import os
import subprocess  # a second process that holds what it makes until it is killed
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest

from carrel import config
from carrel.drivers.qemu.templates import Conditions, Parts, Template, TemplateError, Templates, new_ram
from carrel.errors import CarrelError

MIB = 2**20
MEMORY = b"what a guest had in its memory"
CONDITIONS = Conditions(
    image="1" * 64,
    kernel="2" * 64,
    cpus=1,
    memory_bytes=4 * MIB,
    growth_bytes=MIB,
    ports=20,
    machine="pc-q35-7.2",
    cpu="max",
    accelerator="tcg",
    qemu="/usr/bin/qemu 1 2 3",
    command="4" * 64,
    host="",
)
PARTS = ("ram", "state", "disk", "empty", "template.json")


def a_store(where: Path, **settings: object) -> Templates:
    return Templates(where / "templates", msgspec.convert(settings, config.Templates))


def made(store: Templates, conditions: Conditions = CONDITIONS, *, created_s: float = 1.0) -> Template:
    with store.making(conditions) as new:
        assert new is not None
        return filled(store, new, conditions, created_s=created_s)


def filled(store: Templates, new: Path, conditions: Conditions, *, created_s: float) -> Template:
    ram = new_ram(conditions.memory_bytes)
    os.pwrite(ram, MEMORY, MIB)
    for name in ("state", "disk", "empty"):
        (new / name).write_text(f"{name} of {created_s}")
    template = Template(
        conditions=conditions, image_name="debian12", kernel_version="6.1", created_s=created_s, boot_s=1.0
    )
    try:
        return store.add(template, new, ram=ram)
    finally:
        os.close(ram)


def other(**changes: object) -> Conditions:
    return msgspec.structs.replace(CONDITIONS, **changes)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# -- finding


def test_a_template_is_found_under_its_conditions_and_no_others(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert store.find(CONDITIONS) is None
    template = made(store)
    assert store.find(CONDITIONS) == template
    assert list(store.all()) == [template]
    changes: list[dict[str, object]] = [
        {name: f"another {name}"} for name in ("image", "kernel", "machine", "cpu", "qemu", "command", "host")
    ]
    changes += [{"cpus": 2}, {"memory_bytes": 8 * MIB}, {"growth_bytes": 0}, {"ports": 21}, {"accelerator": "kvm"}]
    assert {name for change in changes for name in change} == set(Conditions.__struct_fields__)
    assert [change for change in changes if store.find(other(**change))] == []


def test_a_template_of_other_conditions_under_this_name_is_none(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    made(store)
    stranger = other(cpus=2)
    (store.path / CONDITIONS.digest).rename(store.path / stranger.digest)
    assert store.find(stranger) is None
    assert store.all() == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda json: json.unlink(),
        lambda json: json.write_bytes(b""),
        lambda json: json.write_bytes(json.read_bytes()[:-20]),
        lambda json: json.write_bytes(json.read_bytes().replace(b'"cpus":1', b'"cpus":"one"')),
        lambda json: json.write_bytes(json.read_bytes().replace(b'"sizes":[', b'"before":[')),
    ],
    ids=["absent", "empty", "cut", "of-another-type", "of-an-older-carrel"],
)
def test_a_template_without_its_whole_description_is_none_and_goes(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    store = a_store(tmp_path)
    made(store)
    spoil(store.path / CONDITIONS.digest / "template.json")
    assert store.find(CONDITIONS) is None
    store.prune()
    assert list(store.path.iterdir()) == []


@pytest.mark.parametrize("name", ["ram", "state", "disk", "empty"])
def test_a_template_with_a_part_that_was_cut_off_or_is_gone_is_not_opened(
    tmp_path: Path, opened: ExitStack, name: str
) -> None:
    store = a_store(tmp_path)
    template = made(store)
    part = store.path / CONDITIONS.digest / name
    os.truncate(part, 3)
    with pytest.raises(TemplateError, match=f"its {name} has 3 bytes, and had"):
        store.open(template, uid=0, stack=opened)
    part.unlink()
    with pytest.raises(TemplateError, match=f"its {name}: No such file"):
        store.open(template, uid=0, stack=opened)


# -- opening


def read(parts: Parts) -> tuple[bytes, bytes]:
    return os.pread(parts.ram, len(MEMORY), MIB), os.pread(parts.state, 100, 0)


def test_clones_of_all_users_have_the_same_memory_unless_the_site_says_otherwise(
    tmp_path: Path, opened: ExitStack
) -> None:
    def files(share: str, *uids: int) -> list[int]:
        store = a_store(tmp_path, share=share)
        template = store.find(CONDITIONS) or made(store)
        return [os.fstat(store.open(template, uid=uid, stack=opened).ram).st_ino for uid in uids]

    one, other_one = files("all", 1001, 1002)
    assert one == other_one
    own, others, own_again = files("user", 1001, 1002, 1001)
    assert own == own_again != others


def test_the_memory_is_what_the_guest_had_and_nobody_can_write_to_it(tmp_path: Path, opened: ExitStack) -> None:
    store = a_store(tmp_path)
    parts = store.open(made(store), uid=0, stack=opened)
    assert os.fstat(parts.ram).st_size == CONDITIONS.memory_bytes
    assert os.fstat(parts.ram).st_blocks * 512 < MIB, "holes stay holes"
    assert read(parts)[0] == MEMORY
    assert os.pread(parts.ram, 100, 0) == bytes(100)
    again = os.open(f"/proc/self/fd/{parts.ram}", os.O_RDWR | os.O_CLOEXEC)
    opened.callback(os.close, again)
    refused: list[Callable[[], object]] = [
        lambda: os.pwrite(again, b"x", MIB),
        lambda: os.ftruncate(again, 0),
        lambda: os.ftruncate(again, 8 * MIB),
        lambda: os.posix_fallocate(again, 0, 8 * MIB),
        lambda: mmap.mmap(again, MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda: fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL),
    ]
    for attempt in refused:
        with pytest.raises(PermissionError):
            attempt()
    with mmap.mmap(again, CONDITIONS.memory_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
        private[MIB] = ord("x")
    assert read(parts)[0] == MEMORY


def test_the_parts_of_one_made_anew_are_never_mixed_with_those_of_the_one_before(
    tmp_path: Path, opened: ExitStack
) -> None:
    store = a_store(tmp_path)
    first = made(store)
    before = store.open(first, uid=0, stack=opened)
    second = made(store, created_s=2.0)
    with pytest.raises(TemplateError, match="made anew"):
        store.open(first, uid=0, stack=opened)
    assert read(store.open(second, uid=0, stack=opened)) == (MEMORY, b"state of 2.0")
    assert read(before) == (MEMORY, b"state of 1.0"), "a clone that is being started keeps what it has"


# -- making


HOLDER = """
import sys
from pathlib import Path
from carrel import config
from carrel.drivers.qemu.templates import Templates
from tests_conditions import CONDITIONS
store = Templates(Path(sys.argv[1]), config.Templates())
with store.making(CONDITIONS) as new:
    if new:
        (new / "ram").write_text("half of it")
    print("making" if new else "nothing to do", flush=True)
    sys.stdin.read()
"""


def another_process(store: Templates, tmp_path: Path) -> subprocess.Popen[str]:
    """Return a process that makes the same template, as far as it can, once it is at it or has left it."""
    (tmp_path / "tests_conditions.py").write_text(
        f"import msgspec\nfrom carrel.drivers.qemu.templates import Conditions\n"
        f"CONDITIONS = msgspec.json.decode({msgspec.json.encode(CONDITIONS)!r}, type=Conditions)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.path],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_two_processes_one_makes_a_template_and_the_other_leaves_it_to_that_one(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with another_process(store, tmp_path) as first:
        assert said(first) == "making"
        with another_process(store, tmp_path) as second:
            assert said(second) == "nothing to do"
            second.communicate()
        with store.making(CONDITIONS) as ours:
            assert ours is None
        with store.making(other(cpus=2)) as another:
            assert another is not None
        store.prune()
        assert [path.name for path in store.path.iterdir()] == [f".new-{CONDITIONS.digest}"], "nobody takes it away"
        first.communicate()
    assert list(store.path.iterdir()) == []


def test_what_a_killed_process_had_made_is_never_used_and_goes_at_the_next_look(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    for clean in (store.prune, lambda: made(store)):
        with another_process(store, tmp_path) as killed:
            assert said(killed) == "making"
            killed.kill()
        assert (store.path / f".new-{CONDITIONS.digest}" / "ram").exists()
        assert store.find(CONDITIONS) is None
        clean()
        assert [path for path in store.path.iterdir() if path.name.startswith(".")] == []
    assert store.find(CONDITIONS) is not None
    assert (store.path / CONDITIONS.digest / "ram").stat().st_size == CONDITIONS.memory_bytes


def test_nothing_is_left_of_one_that_could_not_be_made(tmp_path: Path) -> None:
    store = a_store(tmp_path)

    def begin() -> None:
        with store.making(CONDITIONS) as new:
            assert new is not None
            (new / "guest").mkdir()
            (new / "guest" / "console.log").write_text("words")
            raise CarrelError("no disk")

    with pytest.raises(CarrelError, match="no disk"):
        begin()
    assert list(store.path.iterdir()) == []
    assert store.find(CONDITIONS) is None


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.path.mkdir(mode=0o777)
    store.path.chmod(0o777)
    with pytest.raises(CarrelError, match=r"mode 777; .*guests\.templates\.dir"), store.making(CONDITIONS):
        pass
    assert list(store.path.iterdir()) == []


def test_nobody_else_may_look_into_a_template(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    made(store)
    home = store.path / CONDITIONS.digest
    assert [path.stat().st_mode & 0o077 for path in (store.path, home)] == [0, 0]
    assert {path.name for path in home.iterdir()} == set(PARTS)


# -- removing


def used(store: Templates, conditions: Conditions, at_s: float) -> None:
    os.utime(store.path / conditions.digest, (at_s, at_s))


def test_the_longest_unused_go_until_the_rest_has_room_and_those_unused_for_too_long(tmp_path: Path) -> None:
    several = [other(cpus=cpus) for cpus in range(1, 5)]
    store = a_store(tmp_path)
    templates = [made(store, conditions) for conditions in several]
    size = templates[0].ram_bytes
    assert 0 < size < MIB
    for at_s, conditions in enumerate(several, start=1000):
        used(store, conditions, at_s)
    store = a_store(tmp_path, max_bytes=3 * size, max_age_s=100.0)
    assert [gone.conditions.cpus for gone in store.prune(now_s=1004)] == [1]
    assert [gone.conditions.cpus for gone in store.prune(now_s=1102)] == [3, 2]
    assert [left.conditions.cpus for left in store.all()] == [4]


def test_one_that_a_clone_was_made_of_is_used(tmp_path: Path, opened: ExitStack) -> None:
    store = a_store(tmp_path, max_age_s=100.0)
    template = made(store)
    used(store, CONDITIONS, 1000)
    store.open(template, uid=0, stack=opened)
    assert store.used_s(template) > 1000
    assert store.prune() == []


def test_those_that_no_guest_can_be_made_from_go_and_the_others_stay(tmp_path: Path, opened: ExitStack) -> None:
    store = a_store(tmp_path)
    old, new = made(store), made(store, other(kernel="3" * 64))
    before = store.open(old, uid=0, stack=opened)
    gone = store.keep_only(lambda conditions: conditions.kernel == "3" * 64)
    assert list(gone) == [old]
    assert (store.find(old.conditions), store.find(new.conditions)) == (None, new)
    assert read(before) == (MEMORY, b"state of 1.0"), "clones that run keep their memory"


def test_the_memory_of_templates_that_are_gone_is_given_back(tmp_path: Path) -> None:
    store, elsewhere = a_store(tmp_path), a_store(tmp_path)
    with ExitStack() as stack:
        store.open(made(store), uid=0, stack=stack)
    held = memfds()
    elsewhere.discard(CONDITIONS.digest)
    store.find(CONDITIONS)
    assert memfds() == held - 1


def memfds() -> int:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(entry.readlink()))
    return sum("carrel-template" in link for link in links)
