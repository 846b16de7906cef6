"""Batch scripts in a guest: their words, their here-documents, and ``srun`` in them, on all nodes of the job."""

from pathlib import Path

import msgspec
import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.guests import IMAGE, await_end, normal, submit
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root, pytest.mark.timeout(400)]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# Each part writes one file, so that a test looks at one fact; all parts cost the boot of two guests. Where stderr is
# looked at, srun is quiet: it says that it waits for the step before, where that one is still ending.
SCRIPT = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --nodelist=c1,c2
printf '%s\\n' "$#" "$@" > arguments
cat > here <<EOF
in here: $1
EOF
cat > quoted <<'EOF'
in here: $1
EOF
tr a-z A-Z <<< "a word" > word
basename "$0" > name
pwd > directory
cat > stdin
( exit 3 ) || echo "$?" > subshell
echo "to stderr" >&2
trap 'echo trapped > trap' EXIT
export GREETING="from the script"

uname -n > host
cat /proc/sys/kernel/random/boot_id > boot
srun sh -c 'echo "$(uname -n) $(cat /proc/sys/kernel/random/boot_id)"' > boots
srun -l sh -c 'echo "$SLURMD_NODENAME $GREETING"' | sort > labelled
srun -N1 -n1 sh -c 'exit 5'; echo "$?" > exit-one
srun sh -c 'exit "$SLURM_PROCID"'; echo "$?" > exit-two
srun -N1 -n1 sh -c 'kill -9 $$'; echo "$?" > killed
srun -Q -N1 -n1 -w c1 no-such-command 2> no-command; echo "$?" >> no-command; sort -o no-command no-command
srun -N1 -n1 cat <<< "a here string" > inner-here
head -c 300000 /dev/zero | tr '\\0' x | srun -N1 -n1 cat | wc -c > inner-pipe
srun -Q -N1 -n1 sh -c 'echo out; echo err >&2' > inner-out 2> inner-err
LD_LIBRARY_PATH=/nowhere srun -N1 -n1 sh -c 'echo "$LD_LIBRARY_PATH"' > inner-library
place=$(mktemp -d)
( cd "$place"; srun -Q -N1 -n1 -w c1 pwd; squeue -h -j "$SLURM_JOB_ID" -o %A ) > only 2>&1
echo "$place $SLURM_JOB_ID" >> only; rmdir "$place"
exit 7
"""


class Ran(msgspec.Struct, frozen=True):
    """A batch job that has ended, and the files that it wrote."""

    state: str
    place: Path

    def __getitem__(self, name: str) -> str:
        return (self.place / name).read_text()


def ran(box: Sandbox, user: User, *options: str) -> Ran:
    job_id, place = submit(box, SCRIPT, *options, user=user, arguments=["one two", 'qu"ote', "", "*"])
    return Ran(await_end(box, job_id), place)


@pytest.fixture(scope="module")
def bare(sandbox: Sandbox, user: User) -> Ran:
    return ran(sandbox, user)


@pytest.fixture(scope="module")
def inside(sandbox: Sandbox, user: User) -> Ran:
    return ran(sandbox, user, f"--guest={IMAGE}")


@pytest.mark.parametrize(
    "name",
    [
        *("arguments", "here", "quoted", "word", "name", "stdin", "subshell", "trap"),
        *("labelled", "exit-one", "exit-two", "killed", "no-command"),
        *("inner-here", "inner-pipe", "inner-out", "inner-err"),
    ],
)
def test_a_script_does_in_a_guest_what_it_does_without_one(bare: Ran, inside: Ran, name: str) -> None:
    assert normal(inside[name]) == normal(bare[name])


def test_the_job_ends_as_its_script_did(bare: Ran, inside: Ran) -> None:
    assert (inside.state, bare.state) == ("FAILED", "FAILED")


def test_the_scripts_words_are_what_was_given(inside: Ran) -> None:
    assert inside["arguments"] == '4\none two\nqu"ote\n\n*\n'


def test_a_here_document_is_expanded_unless_its_end_was_quoted(inside: Ran) -> None:
    assert (inside["here"], inside["quoted"]) == ("in here: one two\n", "in here: $1\n")


def test_the_script_runs_where_it_was_submitted(inside: Ran) -> None:
    assert inside["directory"].strip() == str(inside.place)


def test_the_scripts_stderr_is_in_its_output(inside: Ran) -> None:
    assert "to stderr\n" in inside["out"]


def test_the_script_runs_in_the_guest_of_the_first_node(inside: Ran) -> None:
    assert inside["host"] == "c1\n"
    assert inside["boot"] != BOOT_ID.read_text()


def test_srun_in_a_script_runs_its_tasks_in_the_guests_of_all_nodes(inside: Ran) -> None:
    boots = dict(line.split() for line in inside["boots"].splitlines())
    assert boots["c1"] == inside["boot"].strip()
    assert boots["c2"] not in {boots["c1"], BOOT_ID.read_text().strip()}


def test_a_variable_that_the_script_exports_reaches_the_tasks_of_its_srun(inside: Ran) -> None:
    assert inside["labelled"] == "0: c1 from the script\n1: c2 from the script\n"


def test_srun_starts_its_tasks_in_a_directory_that_is_the_guests_alone(inside: Ran) -> None:
    where, listed, called_in = inside["only"].splitlines()
    assert f"{where} {listed}" == called_in


def test_the_guests_libraries_are_named_to_its_tasks_and_not_to_the_hosts_srun(inside: Ran) -> None:
    assert inside["inner-library"] == "/nowhere\n"


def test_an_interpreter_line_with_options_is_obeyed(sandbox: Sandbox, user: User) -> None:
    script = "#!/bin/sh -e\n#SBATCH --ntasks=1\ntrue\nfalse\necho not reached\n"
    job_id, place = submit(sandbox, script, f"--guest={IMAGE}", user=user)
    assert await_end(sandbox, job_id) == "FAILED"
    assert (place / "out").read_text() == ""
