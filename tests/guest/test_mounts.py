"""Directories of the host in a guest: whose files they are, what they let through, and what stays out of sight."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation
from carrel.testing.sandbox import User

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.guest,
    pytest.mark.root,
    pytest.mark.timeout(400),
    pytest.mark.clones("instant", "linked"),
]


class Place(msgspec.Struct, frozen=True):
    """Directories of the host that tests mount, below one that every user may enter."""

    root: Path

    @property
    def mine(self) -> Path:
        """The job's user's own; holds ``secret``, root's and 0600, and links out of the directory."""
        return self.root / "mine"

    @property
    def data(self) -> Path:
        """To be mounted read-only."""
        return self.root / "data"

    @property
    def outside(self) -> Path:
        """Never mounted; everybody may read it."""
        return self.root / "outside"

    @property
    def closed(self) -> Path:
        """Root's own: the user may not enter."""
        return self.root / "closed"


class Guest(msgspec.Struct, frozen=True):
    """A job in whose guest scripts run, one after the other."""

    box: Sandbox
    user: User
    job_id: int

    def sh(self, script: str) -> str:
        """Return what a script of the shell prints, errors too."""
        words = ["srun", f"--jobid={self.job_id}", "-n1", "sh", "-c", f"exec 2>&1; {script}"]
        return self.box.run(words, user=self.user.name, timeout_s=GUEST_TIMEOUT_S).stdout


@pytest.fixture(scope="module")
def place(sandbox: Sandbox, user: User) -> Place:
    place = Place(sandbox.dir / f"mounts-{secrets.token_hex(4)}")
    for directory in (place.root, place.mine, place.data, place.outside, place.closed):
        directory.mkdir()
        directory.chmod(0o755)
    place.closed.chmod(0o700)
    for directory in (place.mine, place.data):
        os.chown(directory, user.uid, user.gid)
    (place.outside / "plain").write_text("of the host\n")
    (place.data / "input").write_text("42\n")
    (place.data / "sub").mkdir()
    os.chown(place.data / "sub", user.uid, user.gid)
    secret = place.mine / "secret"
    secret.touch(mode=0o600)
    secret.write_text("of root\n")
    (place.root / "door").symlink_to("data")
    (place.mine / "absolute").symlink_to(place.outside / "plain")
    (place.mine / "upward").symlink_to("../outside/plain")
    (place.mine / "key").symlink_to(sandbox.layout.munge_key)
    return place


def mounts(place: Place) -> list[str]:
    return [
        f"--guest-mount={place.mine}:/mine",
        f"--guest-mount={place.data}:/data:ro",
        f"--guest-mount={place.mine}:/data/sub",
        f"--guest-mount={place.data}/input:/opt/one/file",
        f"--guest-mount={place.root}/door:/linked:ro",
    ]


@pytest.fixture(scope="module")
def plain(sandbox: Sandbox, user: User, place: Place) -> Iterator[Guest]:
    """Give a guest of an ordinary user."""
    with allocation(sandbox, f"--guest={IMAGE}", "--ntasks=1", *mounts(place), user=user.name) as job_id:
        yield Guest(sandbox, user, job_id)


@pytest.fixture(scope="module")
def rooted(sandbox: Sandbox, user: User, place: Place) -> Iterator[Guest]:
    """Give a guest in which the user is root."""
    options = [f"--guest={IMAGE}", "--guest-root", "--ntasks=1", *mounts(place)]
    with allocation(sandbox, *options, user=user.name) as job_id:
        yield Guest(sandbox, user, job_id)


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def test_files_written_in_a_mount_are_the_users_on_the_host(plain: Guest, place: Place) -> None:
    assert plain.sh("cd /mine; echo x > file; mkdir dir; ln -s nowhere link; echo y > dir/deep; id -u") == (
        f"{plain.user.uid}\n"
    )
    for name in ("file", "dir", "link", "dir/deep"):
        assert owner(place.mine / name) == (plain.user.uid, plain.user.gid)
    assert (place.mine / "dir" / "deep").read_text() == "y\n"


def test_modes_and_umask_are_kept(plain: Guest, place: Place) -> None:
    assert plain.sh("cd /mine; umask 027; echo x > masked; touch exact; chmod 4751 exact") == ""
    assert (place.mine / "masked").stat().st_mode & 0o7777 == 0o640
    assert (place.mine / "exact").stat().st_mode & 0o7777 == 0o4751


def test_files_written_by_root_of_a_guest_are_the_users_on_the_host(rooted: Guest, place: Place) -> None:
    assert rooted.sh("id -u; cd /mine; echo x > by-root; mkdir dir-by-root; stat -c %u by-root") == (
        f"0\n{rooted.user.uid}\n"
    )
    for name in ("by-root", "dir-by-root"):
        assert owner(place.mine / name) == (rooted.user.uid, rooted.user.gid)


def test_root_of_a_guest_gives_no_file_away_and_makes_no_device(rooted: Guest, place: Place) -> None:
    said = rooted.sh(
        "cd /mine; touch mine; chown 0:0 mine || echo no chown; mknod zero c 1 5 || echo no mknod; stat -c %u mine"
    )
    assert "no chown" in said
    assert "no mknod" in said
    assert said.endswith(f"{rooted.user.uid}\n")
    assert not (place.mine / "zero").exists()


def test_root_of_a_guest_reads_no_file_that_its_user_may_not(rooted: Guest, place: Place) -> None:
    said = rooted.sh("cd /mine; id -u; cat secret; cp secret copy; echo more >> secret; chmod 666 secret; true")
    assert said.startswith("0\n")
    assert "of root" not in said
    assert said.count("Permission denied") + said.count("Operation not permitted") >= 3
    assert (place.mine / "secret").read_text() == "of root\n"
    assert (place.mine / "secret").stat().st_mode & 0o777 == 0o600


def test_a_user_reads_no_file_of_another(plain: Guest) -> None:
    assert "Permission denied" in plain.sh("cat /mine/secret")


@pytest.mark.parametrize("who", ["plain", "rooted"])
def test_a_read_only_mount_takes_nothing(request: pytest.FixtureRequest, place: Place, who: str) -> None:
    guest: Guest = request.getfixturevalue(who)
    said = guest.sh("cat /data/input; echo x > /data/new; rm -f /data/input; chmod 777 /data; mkdir /data/new; true")
    assert said.startswith("42\n")
    assert said.count("Read-only file system") == 4
    assert sorted(path.name for path in place.data.iterdir()) == ["input", "sub"]


def test_root_of_a_guest_cannot_make_a_read_only_mount_writable(rooted: Guest, place: Place) -> None:
    said = rooted.sh(
        "mount -o remount,bind,rw /data; mkdir -p /tmp/again; "
        "mount -t 9p -o trans=virtio,version=9p2000.L carrel /tmp/again; "
        "for d in /data /tmp/again/* /run/carrel/stage/*; do echo x > $d/forced; done; true"
    )
    assert said
    assert not (place.data / "forced").exists()


def test_a_mount_inside_a_mount_shows_its_own_files_and_rights(plain: Guest, place: Place) -> None:
    assert plain.sh("echo nested > /data/sub/nested; cat /data/input; ls /data") == "42\ninput\nsub\n"
    assert (place.mine / "nested").read_text() == "nested\n"
    assert list((place.data / "sub").iterdir()) == []


def test_a_single_file_can_be_mounted(plain: Guest) -> None:
    assert plain.sh("cat /opt/one/file; stat -c %F /opt/one/file") == "42\nregular file\n"


def test_a_link_that_is_named_as_source_is_followed(plain: Guest) -> None:
    assert plain.sh("cat /linked/input; stat -c %F /linked") == "42\ndirectory\n"


@pytest.mark.parametrize("link", ["absolute", "upward", "key"])
def test_a_link_that_leads_out_of_a_mount_leads_nowhere_on_the_host(rooted: Guest, link: str) -> None:
    said = rooted.sh(f"cat /mine/{link}; true")
    assert "No such file" in said
    assert "of the host" not in said


def test_going_up_from_a_mount_stays_in_the_guest(rooted: Guest, place: Place) -> None:
    assert "No such file" in rooted.sh("cat /mine/../outside/plain")
    assert "No such file" in rooted.sh("cat /run/carrel/stage/0/../../outside/plain")
    assert "No such file" in rooted.sh(f"ls {place.outside}")


def test_nothing_of_the_host_is_seen_but_what_was_mounted(rooted: Guest, place: Place) -> None:
    said = rooted.sh("awk '$3 == \"9p\" { print $2 }' /proc/mounts | sort; ls -A /run/carrel/stage | sort")
    home = str(rooted.user.home)
    shown = ["/data", "/data/sub", home, "/linked", "/mine", "/opt/one/file", "/run/carrel/stage"]
    assert said.split() == [*sorted(shown), *(str(index) for index in range(6))]
    assert "No such file" in rooted.sh(f"ls {place.root}")


def test_what_changes_on_the_host_while_the_job_runs_is_seen(plain: Guest, place: Place) -> None:
    (place.mine / "late").write_text("first\n")
    assert plain.sh("cat /mine/late") == "first\n"
    (place.mine / "late").write_text("second, longer\n")
    assert plain.sh("cat /mine/late") == "second, longer\n"


def test_home_and_working_directory_are_there_unasked_and_writable(plain: Guest, user: User) -> None:
    name = f"from-guest-{secrets.token_hex(4)}"
    assert plain.sh(f'pwd; echo "$HOME"; echo x > ~/{name}') == f"{user.home}\n{user.home}\n"
    assert owner(user.home / name) == (user.uid, user.gid)


def test_the_working_directory_is_there_wherever_it_is(sandbox: Sandbox, user: User, place: Place) -> None:
    (place.mine / "run").mkdir()
    os.chown(place.mine / "run", user.uid, user.gid)
    done = sandbox.run(
        ["srun", "-Q", f"--guest={IMAGE}", "-n1", "sh", "-c", "pwd; echo made > here"],
        user=user.name,
        cwd=place.mine / "run",
        timeout_s=GUEST_TIMEOUT_S,
    )
    assert (done.stdout, done.stderr) == (f"{place.mine}/run\n", "")
    assert (place.mine / "run" / "here").read_text() == "made\n"


@pytest.mark.parametrize(
    ("mount", "sentence"),
    [
        ("/no/such/directory", "carrel: --guest-mount=/no/such/directory: No such file or directory"),
        ("{closed}", "carrel: --guest-mount={closed}: Permission denied"),
        ("{closed}/below", "carrel: --guest-mount={closed}/below: Permission denied"),
        ("{mine}:/", "carrel: --guest-mount={mine}:/: the guest's root cannot be replaced"),
        ("{mine}:/proc/x", "carrel: --guest-mount={mine}:/proc/x: /proc/x belongs to the guest's kernel"),
        ("{mine}/..:/up", "carrel: --guest-mount={mine}/..:/up: the source must not contain '..'"),
        ("{mine}:/a/../b", "carrel: --guest-mount={mine}:/a/../b: the target must not contain '..'"),
        ("{mine}:/a:rw", "carrel: --guest-mount={mine}:/a:rw: 'rw' is neither 'ro' nor an absolute path"),
        ("{mine}/secret", "carrel: --guest-mount={mine}/secret: Permission denied"),
        ("/dev/null:/x", "carrel: --guest-mount=/dev/null: neither a directory nor a file"),
    ],
)
def test_a_mount_that_cannot_be_is_one_sentence_and_nothing_runs(
    sandbox: Sandbox, user: User, place: Place, mount: str, sentence: str
) -> None:
    names = {"mine": place.mine, "closed": place.closed}
    ran = user.home / f"ran-{secrets.token_hex(4)}"
    words = ["srun", f"--guest={IMAGE}", f"--guest-mount={mount.format(**names)}", "-n1", "touch", str(ran)]
    done = sandbox.run(words, user=user.name, timeout_s=GUEST_TIMEOUT_S)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "--guest-mount" in line]
    assert len(ours) == 1
    assert sentence.format(**names) in ours[0]
    assert not ran.exists()


def test_two_mounts_at_one_place_are_refused(sandbox: Sandbox, user: User, place: Place) -> None:
    words = ["srun", f"--guest={IMAGE}", f"--guest-mount={place.mine}:/x", f"--guest-mount={place.data}:/x", "true"]
    done = sandbox.run(words, user=user.name, timeout_s=GUEST_TIMEOUT_S)
    assert done.returncode != 0
    assert f"both {place.mine} and {place.data} go to /x" in done.stderr
