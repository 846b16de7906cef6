"""What cannot have its guest gets one sentence and a status other than 0, and never runs on the bare node."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from carrel import paths
from carrel.images.initramfs import Entry, cpio
from carrel.images.kernel import ensure_kernel
from carrel.process import run
from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import GUEST_TIMEOUT_S, IMAGE, allocation, job_state, outcome, store_like_ours, wait_for
from carrel.testing.sandbox import MakeSandbox, User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(300)]

# What Slurm adds to every refusal of its plug-in or end of a task, whatever the reason.
_SLURMS_FRAME = re.compile(
    r"srun: error: (\w+: tasks? [\d,-]+: Exited with exit code 1"
    r"|Invalid --[\w-]+ argument: .*"
    r"|spank: required plugin .* failed with rc=-1"
    r"|Plugin stack post-option processing failed\.)"
    r"|srun: job J (queued and waiting for|has been allocated) resources"
    r"|slurmstepd: error: (spank: required plugin .* failed with rc=-1|Failed to invoke spank plugin stack)"
)


class Commands:
    """Runs commands that must not run, and tells whether one did."""

    def __init__(self, box: Sandbox, user: User) -> None:
        """Run them as ``user``, whose home a bare command could write to."""
        self.box = box
        self._user = user
        self._marker = user.home / f"{box.dir.name}.it-ran"
        self._words = ["sh", "-c", f"touch {self._marker}; uname -r"]

    def no_marker(self) -> Path:
        """Return what a command makes that runs, and see to it that it is not there yet."""
        self._marker.unlink(missing_ok=True)
        return self._marker

    def refused(self, *options: str | Path, env: dict[str, str] | None = None) -> str:
        """Run ``srun`` with ``options``; return the one sentence that its user reads."""
        marker = self.no_marker()
        words = ["srun", *options, *self._words]
        seen = outcome(self.box, words, user=self._user.name, cwd=self._user.home, env=env)
        assert seen.status != 0
        assert seen.stdout == ""
        assert not marker.exists()
        sentences = [line for line in seen.stderr.splitlines() if not _SLURMS_FRAME.fullmatch(line)]
        assert len(sentences) == 1, seen.stderr
        return sentences[0]

    def runs(self, *options: str) -> None:
        """Assert that the same command runs when it is asked for properly."""
        marker = self.no_marker()
        seen = outcome(self.box, ["srun", *options, *self._words], user=self._user.name, cwd=self._user.home)
        assert (seen.status, marker.exists()) == (0, True), seen.stderr

    @property
    def drained(self) -> str:
        """Return why the node is drained; empty: it is not."""
        return self.box.run(["sinfo", "--noheader", "--list-reasons", "--format=%E"]).stdout.strip()

    def resume_node(self) -> None:
        self.box.run(["scontrol", "update", "NodeName=c1", "State=resume"])
        wait_for(lambda: self.box.run(["sinfo", "--noheader", "--format=%T"]).stdout.strip() == "idle")


@pytest.fixture(scope="module")
def commands(sandbox_factory: MakeSandbox, scratch: Path, user: User) -> Iterator[Commands]:
    """Have one node whose store also holds an image without a shell."""
    store = store_like_ours(scratch / "store")
    box = sandbox_factory(nodes=1, carrel_conf=f'[images]\nstore = "{store}"\n')
    (scratch / "root" / "usr").mkdir(parents=True)
    (scratch / "root" / "usr" / "hello").write_text("no shell here\n")
    added = box.run(["carrel", "image", "add", "shell-less", scratch / "root"])
    assert added.returncode == 0, added.stderr
    yield Commands(box, user)
    box.down()


# -- the request is at fault: the node goes on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--guest=", "--guest=: must be the name or the hash of an image; see: carrel image list"),
        ("--guest=a b", "--guest=a b: must be the name or the hash of an image; see: carrel image list"),
        ("--guest-per=host", "--guest-per=host: must be job, task or node"),
        ("--guest-clone=thin", "--guest-clone=thin: must be instant, linked, full or auto"),
        ("--guest-mount=data", "--guest-mount=data: must be SRC[:DST][:ro] with absolute paths"),
        ("--guest-mount=/data:there", "--guest-mount=/data:there: must be SRC[:DST][:ro] with absolute paths"),
        ("--guest-boot-timeout=soon", "--guest-boot-timeout=soon: must be 1 to 86400 seconds"),
        ("--guest-boot-timeout=0", "--guest-boot-timeout=0: must be 1 to 86400 seconds"),
        ("--guest-driver=a b", "--guest-driver=a b: must be the name of a driver; see: carrel node check"),
        ("--cloud=xen", "--cloud=xen: must be kvm"),
        ("--cloud-type=xen", "--cloud-type=xen: must be kvm"),
        ("--cloud-create=perhaps", "--cloud-create=perhaps: must be yes or no"),
    ],
)
def test_a_malformed_option_is_refused_where_it_was_typed(commands: Commands, option: str, sentence: str) -> None:
    assert commands.refused(f"--guest={IMAGE}", option) == f"srun: error: {sentence}"
    submitted = commands.box.run(["sbatch", f"--guest={IMAGE}", option, "--wrap=true"])
    assert submitted.returncode != 0
    assert submitted.stderr.splitlines()[0] == f"sbatch: error: {sentence}"


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("CARREL_GUEST=a b", "CARREL_GUEST=a b: must be the name or the hash of an image; see: carrel image list"),
        ("CARREL_GUEST_PER=host", "CARREL_GUEST_PER=host: must be job, task or node"),
        ("CARREL_GUEST_CLONE=x", "CARREL_GUEST_CLONE=x: must be instant, linked, full or auto"),
        ("CARREL_GUEST_ROOT=1", "CARREL_GUEST_ROOT=1: must be yes or no"),
        ("CARREL_GUEST_BOOT_TIMEOUT=x", "CARREL_GUEST_BOOT_TIMEOUT=x: must be 1 to 86400 seconds"),
    ],
)
def test_a_malformed_variable_is_refused_by_its_name(commands: Commands, variable: str, sentence: str) -> None:
    name, _, value = variable.partition("=")
    assert commands.refused(env={"CARREL_GUEST": IMAGE, name: value}) == f"srun: error: {sentence}"


def test_an_option_without_an_image_is_refused(commands: Commands) -> None:
    assert commands.refused("--guest-per=task") == "srun: error: --guest-per: needs --guest=IMAGE"


def test_a_malformed_line_of_a_script_is_refused_at_submission(commands: Commands) -> None:
    script = f"#!/bin/sh\n#SBATCH --guest={IMAGE}\n#SBATCH --guest-per=host\ntrue\n"
    done = commands.box.run(["sbatch"], stdin=script)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "sbatch: error: --guest-per=host: must be job, task or node"


def test_an_unknown_image_is_answered_with_the_known_ones(commands: Commands) -> None:
    assert commands.refused("--guest=debain12") == (
        f"carrel: no image 'debain12'; known: {IMAGE}, shell-less; see: carrel image list"
    )


def test_an_image_without_a_shell_is_refused(commands: Commands) -> None:
    assert commands.refused("--guest=shell-less") == (
        "carrel: image shell-less has no /bin/sh, so no command can run in it; see: carrel image show"
    )


def test_a_guest_that_is_a_node_is_refused_where_a_site_has_none(commands: Commands) -> None:
    assert re.fullmatch(
        r"carrel: --guest-per=node: c\d is no guest, and .* partition guests, .* an administrator \(docs/how-to/.*\)",
        commands.refused(f"--guest={IMAGE}", "--guest-per=node"),
    )


def test_an_unknown_driver_is_answered_with_the_known_ones_and_drains_nothing(commands: Commands) -> None:
    sentence = commands.refused(f"--guest={IMAGE}", "--guest-driver=xen")
    assert sentence.startswith("carrel: --guest-driver=xen: ")
    assert "known: " in sentence
    assert "qemu" in sentence
    assert commands.drained == ""


def test_a_driver_for_tests_is_not_a_way_out_of_the_guest(commands: Commands) -> None:
    assert "'fake'" in commands.refused(f"--guest={IMAGE}", "--guest-driver=fake")


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        ("/no/such/directory", "/no/such/directory: No such file or directory"),
        ("/tmp:/data:rw", "/tmp:/data:rw: 'rw' is neither 'ro' nor an absolute path"),
        ("/tmp:/a:/b:/c", "/tmp:/a:/b:/c: too many parts, write SRC[:DST][:ro]"),
        ("/tmp/../etc:/data", "/tmp/../etc:/data: the source must not contain '..'"),
        ("/tmp:/", "/tmp:/: the guest's root cannot be replaced, name a directory below it"),
        ("/tmp:/proc/1", "/tmp:/proc/1: /proc/1 belongs to the guest's kernel, choose another target"),
    ],
)
def test_a_mount_that_cannot_be_is_refused(commands: Commands, mount: str, reason: str) -> None:
    assert commands.refused(f"--guest={IMAGE}", f"--guest-mount={mount}") == f"carrel: --guest-mount={reason}"


def test_two_mounts_at_one_place_are_refused(commands: Commands) -> None:
    assert commands.refused(f"--guest={IMAGE}", "--guest-mount=/tmp:/data", "--guest-mount=/var:/data") == (
        "carrel: --guest-mount: both /tmp and /var go to /data; give one another target"
    )


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_mount_that_the_user_may_not_read_is_refused(commands: Commands, scratch: Path, below: str) -> None:
    closed = scratch / "closed"
    (closed / "deeper").mkdir(parents=True, exist_ok=True)
    closed.chmod(0o700)
    assert commands.refused(f"--guest={IMAGE}", f"--guest-mount={closed}{below}:/data") == (
        f"carrel: --guest-mount={closed}{below}: Permission denied"
    )


def test_a_job_with_less_memory_than_boots_is_refused_with_what_it_needs(commands: Commands) -> None:
    sentence = commands.refused(f"--guest={IMAGE}", "--mem=100M")
    needed = re.search(r"this job's 100 on the node leave it 0; ask for --mem=(\d+)M or more$", sentence)
    assert needed, sentence
    commands.runs(f"--guest={IMAGE}", f"--mem={needed[1]}M")


def test_a_batch_job_that_is_refused_fails_with_the_sentence_in_its_output(commands: Commands, user: User) -> None:
    marker, output = commands.no_marker(), user.home / f"{commands.box.dir.name}.refused.out"
    words = ["sbatch", "--parsable", f"--output={output}", "--guest=debain12", "--wrap", f"touch {marker}"]
    done = commands.box.run(words, user=user.name)
    job_id = int(done.stdout)
    wait_for(lambda: job_state(commands.box, job_id) == "FAILED")
    assert output.read_text() == (f"carrel: no image 'debain12'; known: {IMAGE}, shell-less; see: carrel image list\n")
    assert not marker.exists()


def test_what_a_user_asked_wrongly_takes_no_node_away(commands: Commands) -> None:
    assert commands.drained == ""
    assert commands.box.run(["carrel", "guest", "list", "--json"]).stdout == ""


# -- the node is at fault, or something on it --------------------------------------------------------------------------


def test_a_task_waits_five_seconds_for_carreld_and_is_then_refused(commands: Commands) -> None:
    commands.box.kill("carreld@c1")
    try:
        sentence = commands.refused(f"--guest={IMAGE}")
    finally:
        commands.box.start("carreld@c1")
    socket = commands.box.layout.node_socket("c1")
    assert sentence == f"carrel: carreld does not answer on {socket}: Connection refused; see: carrel node check"
    assert commands.drained == ""


def test_a_node_without_carrel_enter_refuses(commands: Commands) -> None:
    enter = commands.box.layout.libexec / "carrel-enter"
    hidden = enter.with_name("hidden")
    enter.rename(hidden)
    try:
        sentence = commands.refused(f"--guest={IMAGE}")
    finally:
        hidden.rename(enter)
    assert sentence.endswith(f"error: carrel: {enter}: No such file or directory; is Carrel installed on this node?"), (
        sentence
    )


def test_a_cluster_without_the_plug_in_does_not_know_the_option(slurm: Sandbox, user: User) -> None:
    marker = user.home / f"{slurm.dir.name}.it-ran"
    done = slurm.run(["srun", f"--guest={IMAGE}", "touch", marker], user=user.name)
    assert done.returncode != 0
    assert f"unrecognized option '--guest={IMAGE}'" in done.stderr
    assert not marker.exists()


@contextmanager
def small_disk(where: Path, size: str) -> Iterator[None]:
    """Let there be little room below a directory."""
    run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", where])
    try:
        yield
    finally:
        run(["umount", "--lazy", where])  # carreld may be looking there


def test_a_node_without_room_for_the_clone_is_drained_with_the_reason(commands: Commands) -> None:
    guests = commands.box.layout.node("c1") / "guests"
    with small_disk(guests, "80m"):
        sentence = commands.refused(f"--guest={IMAGE}", "--guest-clone=full")
        wait_for(lambda: not list(guests.iterdir()))
    found = re.fullmatch(
        rf"carrel: (node c1: {guests}: \d+ MiB free, a full clone of {IMAGE} needs \d+ MiB; see: carrel node check)",
        sentence,
    )
    assert found, sentence
    assert commands.drained == f"carrel: {found[1]}"
    commands.resume_node()
    commands.runs(f"--guest={IMAGE}", "--guest-clone=full")


class Broken:
    """A node whose guests do not start, for a reason that a test chooses."""

    def __init__(self, commands: Commands, initramfs: Path) -> None:
        """Take over the initramfs of its store."""
        self.commands = commands
        self.initramfs = initramfs


@pytest.fixture(scope="module")
def broken(sandbox_factory: MakeSandbox, scratch: Path, user: User) -> Iterator[Broken]:
    store = store_like_ours(scratch / "broken")
    kernel = ensure_kernel(store, agent=paths.libexec() / "carrel-agent", progress=lambda _: None)
    conf = f'[images]\nstore = "{store}"\n[guests]\nclone = "linked"\n'  # a clone of a template boots nothing
    box = sandbox_factory(nodes=1, carrel_conf=conf)
    yield Broken(Commands(box, user), kernel.initramfs)
    box.down()


def test_a_kernel_that_panics_is_told_of_with_the_console_to_see(broken: Broken) -> None:
    broken.initramfs.write_bytes(b"no archive at all")
    sentence = broken.commands.refused(f"--guest={IMAGE}")
    found = re.fullmatch(
        rf"carrel: guest of image {IMAGE}: its kernel panicked: (.*); see: carrel guest console (\d+)", sentence
    )
    assert found, sentence
    console = broken.commands.box.run(["carrel", "guest", "console", found[2]])
    assert f"Kernel panic - not syncing: {found[1]}" in console.stdout
    assert broken.commands.drained == ""


_HANGS = '#include <unistd.h>\nint main(void) { write(1, "hangs\\n", 6); for (;;) pause(); }\n'


@pytest.fixture
def hanging(broken: Broken, scratch: Path) -> Broken:
    """Let the guests' first process say a word and then nothing."""
    program = scratch / "init"
    subprocess.run(["cc", "-static", "-x", "c", "-o", program, "-"], input=_HANGS, text=True, check=True)
    broken.initramfs.write_bytes(cpio([Entry(path="init", mode=0o100755, data=program.read_bytes())]))
    return broken


def test_a_guest_that_never_answers_is_given_up_after_its_time(hanging: Broken) -> None:
    sentence = hanging.commands.refused(f"--guest={IMAGE}", "--guest-boot-timeout=5")
    found = re.fullmatch(
        r"carrel: guest not ready after 5 s \(--guest-boot-timeout\); see: carrel guest console (\d+)", sentence
    )
    assert found, sentence
    assert hanging.commands.box.run(["carrel", "guest", "console", found[1]]).returncode == 0


def test_a_later_step_of_its_job_is_told_the_same_at_once(hanging: Broken, user: User) -> None:
    with allocation(hanging.commands.box, user=user.name) as job_id:
        # Without --overlap srun says that it waits for the step before, where that one is still ending.
        options = (f"--jobid={job_id}", "--overlap", f"--guest={IMAGE}", "--guest-boot-timeout=5")
        first = hanging.commands.refused(*options)
        assert hanging.commands.refused(*options) == first


def test_a_full_image_store_drains_the_node_and_refuses_images(
    sandbox_factory: MakeSandbox, scratch: Path, user: User
) -> None:
    store = scratch / "full"
    store.mkdir()
    root = scratch / "large"
    (root / "usr").mkdir(parents=True)
    (root / "usr" / "data").write_bytes(bytes(2 * 2**20))
    with small_disk(store, "1m"):
        store_like_ours(store)
        box = sandbox_factory(nodes=1, carrel_conf=f'[images]\nstore = "{store}"\n')
        commands = Commands(box, user)
        sentence = commands.refused(f"--guest={IMAGE}")
        added = box.run(["carrel", "image", "add", "more", root])
        drained = commands.drained
        box.down()
    assert sentence.startswith("carrel: no kernel for guests: "), sentence
    assert f"image store {store}/initramfs: No space left on device; see: carrel image remove" in sentence
    assert drained == sentence
    assert added.returncode == 4
    last = added.stderr.splitlines()[-1]
    assert re.fullmatch(rf"carrel: {store}: 0 MiB free, this image needs about \d+ MiB; see: .*", last), last


def test_kvm_that_boots_no_guest_drains_the_node_and_requeues_the_job(sandbox_factory: MakeSandbox, user: User) -> None:
    conf = '[guests]\naccelerator = "kvm"\n[drivers.qemu]\nprobe_timeout_s = 3\n'
    box = sandbox_factory(nodes=1, carrel_conf=conf)
    commands = Commands(box, user)
    marker = commands.no_marker()
    if box.run(["srun", f"--guest={IMAGE}", "true"], timeout_s=GUEST_TIMEOUT_S).returncode == 0:
        pytest.skip("guests boot with KVM on this machine")
    commands.resume_node()
    assert "no usable KVM" in box.run(["carrel", "node", "check", "c1"]).stdout
    sentence = commands.refused(f"--guest={IMAGE}")
    assert sentence.startswith("carrel: node c1 has no usable KVM: /dev/kvm")
    assert 'guests.accelerator = "auto" would allow emulation' in sentence
    assert commands.drained == sentence
    commands.resume_node()
    done = box.run(
        ["sbatch", "--parsable", f"--guest={IMAGE}", "--output=/dev/null", "--wrap", f"touch {marker}"], user=user.name
    )
    job_id = int(done.stdout)
    wait_for(lambda: commands.drained == sentence and job_state(box, job_id) == "PENDING")
    assert "Restarts=1" in box.run(["scontrol", "show", "job", str(job_id)]).stdout
    assert not marker.exists()
    box.down()
