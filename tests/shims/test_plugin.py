"""spank_carrel.so in a real Slurm, with a script in carrel-enter's place that tells what it was given."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from carrel import paths
from carrel.sandbox.cluster import Sandbox

pytestmark = pytest.mark.slurm

ENTER = """\
#!/bin/sh
# The command is named by a variable, or follows a "--", as Slurm's release allows.
[ "${CARREL_ENTER_ARGV0-}" ] || { export CARREL_ENTER_ARGV0="$2"; shift 2; }
# A newline in a value becomes "|", so that one line is one variable.
echo "ENTERED $CARREL_ENTER_ARGV0 $*"
env -0 | tr '\\n\\0' '|\\n' | grep -a '^SLURM_SPANK_CARREL_\\|^CARREL_ENTER_'
exit 37
"""
PROLOG = """\
#!/bin/sh
env -0 | tr '\\n\\0' '|\\n' | grep -a '^SPANK_CARREL_' > {root}/seen/$SLURM_JOB_ID
exit 0
"""


class Cluster:
    """A sandbox of plain Slurm with the plug-in in front of it."""

    def __init__(self, box: Sandbox) -> None:
        self.box = box
        self.plugin = box.layout.libexec / "spank_carrel.so"
        self.enter = box.layout.libexec / "enter"
        shutil.copy(paths.libexec() / "spank_carrel.so", self.plugin)
        self.plugin.chmod(0o755)
        self.enter.write_text(ENTER)
        self.enter.chmod(0o755)
        self.plugstack()

    def plugstack(self, arguments: str = "") -> None:
        usual = f"socket={self.box.dir}/nodes/%n/carreld.sock enter={self.enter}"
        (self.box.layout.etc / "plugstack.conf").write_text(f"required {self.plugin} {arguments or usual}\n")

    def run(self, *words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        return self.box.run(words, cwd=Path("/tmp"), env=env)

    def srun(self, *words: str, env: dict[str, str] | None = None) -> str:
        return self.run("srun", *words, env=env).stdout

    def batch(self, script: str, *options: str, env: dict[str, str] | None = None) -> str:
        """Run a batch script to its end and return what it wrote."""
        file = self.box.dir / "seen" / "job.sh"
        output = self.box.dir / "seen" / "job.out"
        file.write_text("#!/bin/bash\n" + dedent(script))
        done = self.run("sbatch", "-W", "-o", str(output), *options, str(file), env=env)
        assert "Submitted" in done.stdout, done.stderr
        return output.read_text()

    def prolog(self) -> str:
        """What the latest prolog saw."""
        return max((path for path in self.seen.iterdir() if path.name.isdigit()), key=lambda p: int(p.name)).read_text()

    @property
    def seen(self) -> Path:
        return self.box.dir / "seen"


@pytest.fixture(scope="module")
def cluster(sandbox_factory: Callable[..., Sandbox]) -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="carrel-", dir="/tmp"))
    conf = f"Prolog={root}/etc/prolog\nPrologFlags=Alloc\n"
    box = sandbox_factory(nodes=2, guests=False, dir=root, extra_conf=conf)
    (root / "seen").mkdir()
    prolog = root / "etc" / "prolog"
    prolog.write_text(PROLOG.format(root=root))
    prolog.chmod(0o755)
    yield Cluster(box)
    box.down()
    shutil.rmtree(root, ignore_errors=True)


def variables(output: str) -> dict[str, str]:
    pairs = (line.split("=", 1) for line in output.splitlines() if "=" in line)
    return {
        name.removeprefix("SLURM_SPANK_CARREL_JOB_").removeprefix("SPANK_CARREL_JOB_"): value for name, value in pairs
    }


def test_only_what_slurm_looks_for_is_exported() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", paths.libexec() / "spank_carrel.so"], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == {
        "plugin_name", "plugin_type", "plugin_version", "spank_plugin_version",
        "slurm_spank_init", "slurm_spank_init_post_opt", "slurm_spank_task_init",
    }  # fmt: skip


def test_a_job_without_a_guest_is_left_alone(cluster: Cluster) -> None:
    done = cluster.run("srun", "env")
    assert done.returncode == 0
    assert "CARREL_JOB_" not in done.stdout
    assert "CARREL_ENTER_" not in done.stdout
    assert done.stderr == ""
    assert cluster.prolog() == ""


@pytest.mark.parametrize("asked", [["--carrel-report"], []], ids=["option", "variable"])
def test_a_report_is_asked_for_with_or_without_a_guest(cluster: Cluster, asked: list[str]) -> None:
    env = {} if asked else {"CARREL_REPORT": "yes"}
    assert cluster.batch("echo bare", *asked, env=env) == "bare\n"
    assert cluster.prolog() == "SPANK_CARREL_JOB_REPORT=yes\n"
    cluster.batch("true", *asked, "--guest=debian12", env=env)
    assert "SPANK_CARREL_JOB_REPORT=yes\n" in cluster.prolog()


def test_the_task_of_a_guest_job_becomes_carrel_enter_and_ends_as_it_ends(cluster: Cluster) -> None:
    done = cluster.run("srun", "--guest=debian12", "echo", "a b", "--", "-x")
    assert "ENTERED echo a b -- -x" in done.stdout
    assert f"CARREL_ENTER_SOCKET={cluster.box.dir}/nodes/c1/carreld.sock" in done.stdout
    assert done.returncode == 37


def test_every_task_of_every_node_enters_by_its_own_nodes_socket(cluster: Cluster) -> None:
    said = cluster.srun("-N2", "-n4", "--guest=debian12", "true")
    assert said.count("ENTERED true") == 4
    for node in ("c1", "c2"):
        assert f"/nodes/{node}/carreld.sock" in said


def test_every_option_is_carried_to_the_task_and_to_the_prolog(cluster: Cluster) -> None:
    options = ["--guest=debian12", "--guest-per=task", "--guest-clone=full", "--guest-root", "--guest-boot-timeout=90",
               "--guest-mount=/a", "--guest-mount=/b:/c:ro", "--guest-driver=qemu"]  # fmt: skip
    wanted = {"IMAGE": "debian12", "PER": "task", "CLONE": "full", "ROOT": "yes", "BOOT_TIMEOUT_S": "90",
              "MOUNT": "/a|/b:/c:ro", "DRIVER": "qemu"}  # fmt: skip
    seen = variables(cluster.srun(*options, "true"))
    assert {name: seen.get(name) for name in wanted} == wanted
    assert variables(cluster.prolog()) == wanted


def test_a_batch_script_enters_and_so_do_its_steps_with_all_that_was_asked_for(cluster: Cluster) -> None:
    cluster.enter.write_text(ENTER.replace("exit 37", '[ "${SLURM_STEP_ID:-}" ] || exec "$CARREL_ENTER_ARGV0"'))
    try:
        said = cluster.batch("""\
            #SBATCH --guest=debian12
            #SBATCH --guest-mount=/a
            #SBATCH --guest-mount=/b
            #SBATCH --guest-root
            srun -n1 inner
            srun --export=NONE -n1 exportless
            srun -n1 --guest-mount=/c --guest-per=task changed
            """)
    finally:
        cluster.enter.write_text(ENTER)
    batch, inner, exportless, changed = (variables(part) for part in said.split("ENTERED ")[1:])
    assert "slurm_script" in batch["CARREL_ENTER_ARGV0"]
    for part in (batch, inner, exportless):
        assert (part["IMAGE"], part["MOUNT"], part["ROOT"]) == ("debian12", "/a|/b", "yes")
    assert (changed["IMAGE"], changed["MOUNT"], changed["PER"]) == ("debian12", "/c", "task")


def test_a_job_submitted_from_inside_asks_for_the_same_guest(cluster: Cluster) -> None:
    cluster.enter.write_text(ENTER.replace("exit 37", '[ "$SLURM_JOB_NAME" = nested ] || exec "$CARREL_ENTER_ARGV0"'))
    output = cluster.seen / "nested.out"
    try:
        cluster.batch(
            f"sbatch -W -J nested -o {output} --guest-per=task --wrap true\n",
            "--guest=debian12", "--guest-mount=/a", "--guest-mount=/b",
        )  # fmt: skip
    finally:
        cluster.enter.write_text(ENTER)
    wanted = {"IMAGE": "debian12", "MOUNT": "/a|/b", "PER": "task"}
    seen = variables(output.read_text())
    assert {name: seen.get(name) for name in wanted} == wanted
    assert variables(cluster.prolog()) == wanted


def test_each_task_of_an_array_enters(cluster: Cluster) -> None:
    output = cluster.seen / "array"
    cluster.run("sbatch", "-W", "--array=1-3", "-o", f"{output}.%a", "--guest=debian12", "--wrap", "true")
    for index in (1, 2, 3):
        assert "IMAGE=debian12" in Path(f"{output}.{index}").read_text()


def test_a_step_of_salloc_enters(cluster: Cluster) -> None:
    said = cluster.run("salloc", "--guest=debian12", "--guest-mount=/a", "--guest-mount=/b", "srun", "-n1", "x").stdout
    assert "ENTERED x" in said
    assert variables(said)["MOUNT"] == "/a|/b"


def test_a_job_without_a_guest_may_have_a_step_with_one(cluster: Cluster) -> None:
    said = cluster.batch("srun -n1 echo bare\nsrun -n1 --guest=debian12 --guest-mount=/a --guest-mount=/b x\n")
    assert said.startswith("bare\n")
    assert "\nENTERED x" in said  # srun's own line about the status may come first
    assert variables(said)["MOUNT"] == "/a|/b"


def test_a_batch_job_that_exports_nothing_still_enters(cluster: Cluster) -> None:
    assert "IMAGE=debian12" in cluster.batch("true\n", "--guest=debian12", "--export=NONE")


def test_an_srun_that_exports_nothing_still_enters(cluster: Cluster) -> None:
    said = cluster.srun("--export=NONE", "--guest=debian12", "--guest-mount=/a", "--guest-mount=/b", "true")
    assert "ENTERED true" in said
    assert variables(said)["MOUNT"] == "/a|/b"


def test_the_environment_stands_in_for_absent_options_and_yields_to_given_ones(cluster: Cluster) -> None:
    env = {
        "CARREL_GUEST": "rocky9",
        "CARREL_GUEST_PER": "task",
        "CARREL_GUEST_MOUNT": "/a\n/b",
        "CARREL_GUEST_ROOT": "yes",
    }
    seen = variables(cluster.srun("--guest-per=job", "true", env=env))
    assert (seen["IMAGE"], seen["PER"], seen["MOUNT"], seen["ROOT"]) == ("rocky9", "job", "/a|/b", "yes")


def test_a_directive_wins_over_the_environment_and_the_command_line_over_both(cluster: Cluster) -> None:
    script = "#SBATCH --guest=directive\ntrue\n"
    assert "IMAGE=directive" in cluster.batch(script, env={"CARREL_GUEST": "environment"})
    assert "IMAGE=line" in cluster.batch(script, "--guest=line", env={"CARREL_GUEST": "environment"})


def test_variables_about_guests_give_no_guest_to_a_job_that_asks_for_none(cluster: Cluster) -> None:
    done = cluster.run("srun", "echo", "bare", env={"CARREL_GUEST_PER": "task"})
    assert (done.stdout, done.returncode) == ("bare\n", 0)


@pytest.mark.parametrize("option", ["--cloud=kvm", "--cloud-type=kvm"])
def test_the_cloud_options_mean_the_sites_image_in_qemu(cluster: Cluster, option: str) -> None:
    seen = variables(cluster.srun(option, "--cloud-create=yes", "true"))
    assert (seen["IMAGE"], seen["DRIVER"], seen["ROOT"]) == ("default", "qemu", "yes")


def test_the_sites_image_is_named_in_plugstack(cluster: Cluster) -> None:
    cluster.plugstack(f"socket=/x/%n/carreld.sock enter={cluster.enter} image=alma9")
    try:
        assert variables(cluster.srun("--cloud=kvm", "true"))["IMAGE"] == "alma9"
    finally:
        cluster.plugstack()


@pytest.mark.parametrize("command", ["srun", "sbatch", "salloc"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--guest=", "--guest=: must be the name or the hash of an image"),
        ("--guest=a --guest-per=foo", "--guest-per=foo: must be job, task or node"),
        ("--guest=a --guest-clone=thin", "--guest-clone=thin: must be instant, linked, full or auto"),
        ("--guest=a --guest-mount=data", "--guest-mount=data: must be SRC[:DST][:ro] with absolute paths"),
        ("--guest=a --guest-mount=/data:rel", "--guest-mount=/data:rel: must be SRC[:DST][:ro] with absolute paths"),
        ("--guest=a --guest-boot-timeout=1m", "--guest-boot-timeout=1m: must be 1 to 86400 seconds"),
        ("--cloud=lxc", "--cloud=lxc: must be kvm"),
        ("--guest-root", "--guest-root: needs --guest=IMAGE"),
        ("--guest-per=task", "--guest-per: needs --guest=IMAGE"),
    ],
)
def test_a_wrong_value_is_refused_before_the_job_is_queued(
    cluster: Cluster, command: str, options: str, sentence: str
) -> None:
    what = ["--wrap", "true"] if command == "sbatch" else ["true"]
    done = cluster.run(command, *options.split(), *what)
    assert sentence in done.stderr
    assert done.returncode != 0
    assert "Submitted" not in done.stdout
    assert "Granted" not in done.stderr


def test_a_wrong_variable_is_refused_by_its_own_name(cluster: Cluster) -> None:
    done = cluster.run("srun", "true", env={"CARREL_GUEST": "a", "CARREL_GUEST_PER": "host"})
    assert "CARREL_GUEST_PER=host: must be job, task or node" in done.stderr
    assert done.returncode != 0


def test_srun_help_tells_of_the_options(cluster: Cluster) -> None:
    said = cluster.srun("--help")
    for option in (
        "--guest=IMAGE",
        "--guest-per=job|task",
        "--guest-mount=SRC[:DST][:ro]",
        "--guest-root",
        "--cloud=kvm",
    ):
        assert option in said


def test_a_step_that_lost_its_environment_never_runs_on_the_bare_node(cluster: Cluster) -> None:
    records = cluster.box.dir / "nodes" / "c1" / "jobs"
    records.mkdir(parents=True)
    said = cluster.batch(
        f"touch {records}/$SLURM_JOB_ID\n"
        "exec env -i PATH=$PATH SLURM_CONF=$SLURM_CONF srun --jobid=$SLURM_JOB_ID -n1 -w c1 x\n",
        "-w", "c1",
    )  # fmt: skip
    shutil.rmtree(records)
    assert "ENTERED x" in said


def test_a_node_without_carrel_enter_refuses_the_task_with_one_sentence(cluster: Cluster) -> None:
    cluster.plugstack("socket=/x/%n/carreld.sock enter=/no/such/carrel-enter")
    try:
        done = cluster.run("srun", "--guest=debian12", "true")
        assert (
            "carrel: /no/such/carrel-enter: No such file or directory; is Carrel installed on this node?" in done.stderr
        )
        assert done.returncode != 0
        assert cluster.srun("echo", "bare") == "bare\n", "a job without a guest does not need it"
    finally:
        cluster.plugstack()
    assert "drain" not in cluster.run("sinfo", "-h", "-o", "%T").stdout


def test_a_plugstack_without_enter_refuses_only_guest_jobs(cluster: Cluster) -> None:
    cluster.plugstack("socket=/x/%n/carreld.sock")
    try:
        done = cluster.run("srun", "--guest=debian12", "true")
        assert "plugstack.conf of this node gives no enter=" in done.stderr
        assert done.returncode != 0
        assert cluster.srun("echo", "bare") == "bare\n"
    finally:
        cluster.plugstack()
