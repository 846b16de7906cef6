import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from carrel.errors import CarrelError, NotFoundError, RefusedError, UsageError
from carrel.images import files
from carrel.images.store import Image, Store, disk_digest

_HASH = "ab" * 32
_OTHER = "ab" * 31 + "cd"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _add(store: Store, name: str, digest: str = _HASH, content: bytes = b"root") -> Image:
    staged = store.path / "staged"
    staged.mkdir(parents=True, exist_ok=True)
    (staged / "root.img").write_bytes(content)
    image = Image(
        hash=digest,
        name=name,
        created="2026-01-01T00:00:00Z",
        source="a test",
        disk_digest=disk_digest(staged / "root.img"),
    )
    return store.add(image, staged)


def test_an_image_is_found_by_its_name_its_hash_and_six_digits_of_it(store: Store) -> None:
    added = _add(store, "debian12")
    assert added.name == "debian12"
    assert {store.resolve(word).hash for word in ("debian12", _HASH, _HASH[:6])} == {_HASH}


def test_five_digits_of_a_hash_find_nothing(store: Store) -> None:
    _add(store, "debian12")
    with pytest.raises(NotFoundError):
        store.resolve(_HASH[:5])


def test_digits_that_begin_two_hashes_are_refused_with_both(store: Store) -> None:
    _add(store, "one")
    _add(store, "two", _OTHER)
    with pytest.raises(UsageError, match=f"(?s)begins 2 hashes.*{_OTHER}"):
        store.resolve("ababab")


def test_an_unknown_name_is_answered_with_the_known_ones(store: Store) -> None:
    _add(store, "rocky9")
    _add(store, "debian12")
    with pytest.raises(NotFoundError) as caught:
        store.resolve("foo")
    assert str(caught.value) == "no image 'foo'; known: debian12, rocky9; see: carrel image list"


def test_an_empty_store_says_how_to_fill_it(store: Store) -> None:
    with pytest.raises(NotFoundError, match="see: carrel image build debian12"):
        store.resolve("debian12")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "a b", "x" * 65, _HASH])
def test_a_name_that_is_no_plain_word_is_refused(store: Store, name: str) -> None:
    with pytest.raises(UsageError):
        _add(store, name)


def test_a_name_cannot_reach_outside_the_store(store: Store) -> None:
    _add(store, "debian12")
    with pytest.raises(NotFoundError):
        store.resolve("../tags/debian12")


def test_the_same_content_twice_is_one_image_with_two_names(store: Store) -> None:
    _add(store, "one")
    _add(store, "two")
    assert [image.name for image in store.list()] == ["one", "two"]
    assert len(list((store.path / "images").iterdir())) == 1


def test_an_image_stays_until_its_last_name_is_removed(store: Store) -> None:
    _add(store, "one")
    _add(store, "two")
    store.remove("one")
    assert store.resolve("two").hash == _HASH
    store.remove("two")
    with pytest.raises(NotFoundError):
        store.resolve(_HASH)


def test_an_image_that_has_a_name_is_not_removed_by_its_hash(store: Store) -> None:
    _add(store, "one")
    with pytest.raises(RefusedError, match=f"{_HASH[:6]} is the image one; remove it by name"):
        store.remove(_HASH[:6])
    assert store.resolve("one").hash == _HASH


def test_an_image_without_a_name_is_removed_by_its_hash(store: Store) -> None:
    _add(store, "one")
    _add(store, "one", _OTHER)
    store.remove(_HASH)
    assert [image.hash for image in store.list()] == [_OTHER]


def test_who_has_a_removed_image_open_keeps_it(store: Store) -> None:
    image = _add(store, "one", content=b"still here")
    with store.root_disk(image).open("rb") as disk:
        store.remove("one")
        assert disk.read() == b"still here"


def test_a_name_moves_to_the_new_image_and_the_old_one_is_pruned(store: Store) -> None:
    _add(store, "debian12")
    _add(store, "debian12", _OTHER)
    assert store.resolve("debian12").hash == _OTHER
    assert [image.hash for image in store.prune()] == [_HASH]
    assert [image.hash for image in store.list()] == [_OTHER]


def test_an_image_whose_disk_changed_is_not_verified(store: Store) -> None:
    image = _add(store, "debian12")
    store.verify("debian12")
    store.root_disk(image).write_bytes(b"r00t")
    with pytest.raises(CarrelError, match="remove the image"):
        store.verify("debian12")


def test_a_disk_with_holes_and_its_copy_without_are_the_same_disk(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    with sparse.open("wb") as file:
        file.seek(3 * 2**20)
        file.write(b"data")
        file.truncate(8 * 2**20)
    full.write_bytes(sparse.read_bytes())
    assert disk_digest(sparse) == disk_digest(full)


def test_data_moved_to_another_place_is_another_disk(tmp_path: Path) -> None:
    digests = set()
    for offset in (0, 65536):
        path = tmp_path / str(offset)
        path.write_bytes(bytes(offset) + b"data".ljust(2**20 - offset, b"\0"))
        digests.add(disk_digest(path))
    assert len(digests) == 2


def test_images_added_at_once_are_all_there(store: Store) -> None:
    def add(number: int) -> None:
        staged = store.path / f"staged{number}"
        staged.mkdir(parents=True)
        (staged / "root.img").write_bytes(b"same")
        store.add(Image(hash=_HASH, name=f"n{number}", created="", source=""), staged)

    store.path.mkdir()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert [image.name for image in store.list()] == [f"n{number}" for number in range(8)]


def test_a_directory_that_is_not_finished_is_not_seen(tmp_path: Path) -> None:
    def begin_and_fail() -> None:
        with files.new_directory(tmp_path / "new") as new:
            (new / "half").write_text("half")
            assert not (tmp_path / "new").exists()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        begin_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_a_day_later(store: Store) -> None:
    _add(store, "debian12")
    abandoned, under_way = store.path / "images/.new-old", store.path / "images/.new-young"
    for path in (abandoned, under_way):
        path.mkdir()
    os.utime(abandoned, (0, 0))
    store.prune()
    assert not abandoned.exists()
    assert under_way.exists()


def test_a_store_made_under_a_narrow_umask_can_be_read_by_all(store: Store, narrow_umask: None) -> None:
    image = _add(store, "debian12")
    disk = store.root_disk(image)
    assert all(path.stat().st_mode & 0o005 == 0o005 for path in (disk.parent, disk.parent.parent, store.path / "tags"))
    assert disk.stat().st_mode & 0o777 == 0o644


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_a_full_store_says_what_is_free_and_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"MiB free, this image needs about 1099511627776 MiB; see: carrel image remove"
    ):
        files.require_space(tmp_path / "store", 2**60, what="this image")


def test_a_directory_that_another_process_removes_too_is_gone_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree").mkdir()
    monkeypatch.setattr(os, "walk", lambda top: [(str(top), ["gone since it was listed"], [])])
    files.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
