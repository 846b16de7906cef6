"""The directory of a job's samples: the user's own, and no trick of theirs leads anywhere else."""

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.errors import CarrelError
from carrel.model.job import JobKey
from carrel.sampling.folder import JobFolder, component, of_stem, stem

RUN = JobKey(cluster="k", job_id=7, submit_s=100)
UID, GID = os.geteuid(), os.getegid()


def made(root: Path, run: JobKey = RUN, *, user: str = "ann", uid: int = UID, gid: int = GID) -> JobFolder:
    return JobFolder.make(root, run, user=user, uid=uid, gid=gid)


@given(st.text(min_size=1, max_size=16))
def test_no_name_leads_out_of_its_directory(name: str) -> None:
    part = component(name)
    assert "/" not in part
    assert part not in {".", ".."}
    assert not part.startswith((".", "-"))
    assert part.isascii()
    assert part.isprintable()


@given(st.text(min_size=1, max_size=16), st.text(min_size=1, max_size=16))
def test_two_names_never_become_one(one: str, other: str) -> None:
    assert (component(one) == component(other)) == (one == other)


@pytest.mark.parametrize("name", ["", "x" * 201, "é" * 100])
def test_a_name_that_cannot_be_a_directory_is_refused(name: str) -> None:
    with pytest.raises(CarrelError, match="cannot name a directory"):
        component(name)


@given(st.text(min_size=1, max_size=16))
def test_a_files_name_says_whose_it_is(node: str) -> None:
    assert of_stem(stem(node, "host") + ".csv.zst") == (node, "host")
    assert of_stem(stem(node, "guest") + ".seg") == (node, "guest")


def test_it_is_called_after_user_and_job_and_is_closed_to_others(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert folder.path == tmp_path / "ann" / "7"
    for path in (folder.path, folder.path.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o2750
    folder.close()


def test_a_second_call_gives_the_same_one(tmp_path: Path) -> None:
    one, other = made(tmp_path), made(tmp_path)
    assert os.fstat(one.descriptor).st_ino == os.fstat(other.descriptor).st_ino
    one.close()
    other.close()


def test_a_job_id_that_came_back_has_a_directory_of_its_own(tmp_path: Path) -> None:
    first = made(tmp_path)
    again = made(tmp_path, JobKey(cluster="k", job_id=7, submit_s=100, restart=1))
    assert (first.path.name, again.path.name) == ("7", "7.100.1")
    first.close()
    again.close()


def test_of_many_nodes_that_make_it_at_once_all_have_the_same_one(tmp_path: Path) -> None:
    found: list[JobFolder] = []
    barrier = threading.Barrier(8)

    def node() -> None:
        barrier.wait()
        found.append(made(tmp_path))

    threads = [threading.Thread(target=node) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({os.fstat(folder.descriptor).st_ino for folder in found}) == 1
    assert len(found) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ann"]
    assert sorted(path.name for path in (tmp_path / "ann").iterdir()) == ["7"]
    for folder in found:
        folder.close()


def test_a_link_in_place_of_the_job_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root" / "ann").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "ann" / "7").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CarrelError, match="symbolic link"):
        made(tmp_path / "root")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (tmp_path / "target").write_text("mine")
    (folder.path / "samples.c1.seg").symlink_to(tmp_path / "target")
    with pytest.raises(CarrelError, match="must be a plain file"):
        folder.create("samples.c1.seg")
    assert (tmp_path / "target").read_text() == "mine"
    folder.close()


def test_a_second_name_of_another_file_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (tmp_path / "target").write_text("mine")
    os.link(tmp_path / "target", folder.path / "samples.c1.seg")
    with pytest.raises(CarrelError, match="one name"):
        folder.create("samples.c1.seg")
    folder.close()


def test_a_pipe_in_place_of_a_file_is_refused_and_nobody_waits_for_it(tmp_path: Path) -> None:
    folder = made(tmp_path)
    os.mkfifo(folder.path / "samples.c1.seg")
    with pytest.raises(CarrelError, match="not a file"):
        folder.create("samples.c1.seg")
    folder.close()


def test_moved_away_it_is_still_the_directory_that_was_opened(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    folder.path.rename(tmp_path / "moved")
    folder.path.symlink_to(tmp_path / "elsewhere")
    os.close(folder.create("x"))
    assert (tmp_path / "moved" / "x").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    folder.close()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    folder = made(tmp_path)
    folder.replace("job.json", b"one")
    folder.replace("job.json", b"two")
    assert (folder.path / "job.json").read_bytes() == b"two"
    assert sorted(path.name for path in folder.path.iterdir()) == [".run", "job.json"]
    folder.close()


@pytest.mark.root
def test_directory_and_files_belong_to_the_user(tmp_path: Path) -> None:
    folder = made(tmp_path, uid=4242, gid=4243)
    os.close(folder.create("samples.c1.seg"))
    for path in (folder.path.parent, folder.path, folder.path / "samples.c1.seg", folder.path / ".run"):
        assert (path.stat().st_uid, path.stat().st_gid) == (4242, 4243)
    assert stat.S_IMODE((folder.path / "samples.c1.seg").stat().st_mode) == 0o640
    folder.close()


@pytest.mark.root
def test_another_users_directory_is_not_taken_over(tmp_path: Path) -> None:
    made(tmp_path, uid=4242, gid=4243).close()
    victim = tmp_path / "victim"
    victim.mkdir()
    victim.chmod(0o700)
    (tmp_path / "ann" / "7" / ".run").unlink()
    (tmp_path / "ann" / "7").rmdir()
    victim.rename(tmp_path / "ann" / "7")
    with pytest.raises(CarrelError, match="belongs to uid 0, not to 4242"):
        made(tmp_path, uid=4242, gid=4243)
    assert (tmp_path / "ann" / "7").stat().st_uid == 0
