"""What `make matrix` says of the tests on each release of Slurm."""

import subprocess
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "scripts" / "matrix-table"

PASSED = '<testcase classname="tests.guest.test_ends" name="test_a"/>'
FAILED = (
    '<testcase classname="tests.guest.test_ends" name="test_b"><failure message="assert 1 == 2&#10;more"/></testcase>'
)
PASSED_AFTER_ALL = '<testcase classname="tests.guest.test_ends" name="test_b"/>'
SKIPPED = '<testcase classname="tests.ldms.test_real" name="test_c"><skipped message="no ldmsd on PATH"/></testcase>'
UNCLEAN = '<testcase classname="tests.guest.test_ends" name="test_b"><error message="left behind: a guest"/></testcase>'


def table(tmp_path: Path, *runs: str) -> tuple[int, str]:
    """Return exit status and text for a release whose tests were run so."""
    build = tmp_path / "trixie" / "build"
    build.mkdir(parents=True)
    (build / "releases").write_text("slurm-wlm 24.11.5\nPython 3.13.5\nQEMU emulator version 10.0.2 (Debian)\nmore\n")
    for number, cases in enumerate(runs, 1):
        (build / f"{number}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    done = subprocess.run([TABLE, build.parent], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_a_release_on_which_all_passes_has_its_figures_and_the_reasons_of_skips(tmp_path: Path) -> None:
    status, text = table(tmp_path, PASSED + SKIPPED)
    assert status == 0
    line = next(line for line in text.splitlines() if line.startswith("trixie"))
    assert line.split() == ["trixie", "24.11.5", "3.13.5", "10.0.2", "1", "0", "1"]
    assert "no ldmsd on PATH" in text


def test_a_failure_that_comes_back_is_named_and_fails_the_whole(tmp_path: Path) -> None:
    status, text = table(tmp_path, PASSED + FAILED, FAILED)
    assert status == 1
    assert "failed   tests/guest/test_ends.py::test_b: assert 1 == 2\n" in text


def test_a_failure_that_does_not_come_back_is_named_and_fails_nothing(tmp_path: Path) -> None:
    status, text = table(tmp_path, PASSED + FAILED, PASSED_AFTER_ALL)
    assert status == 0
    assert "passed only when run once more by itself: tests/guest/test_ends.py::test_b" in text


def test_a_test_that_passed_and_could_not_clean_up_has_failed(tmp_path: Path) -> None:
    assert table(tmp_path, PASSED + PASSED_AFTER_ALL + UNCLEAN)[0] == 1


def test_a_release_without_results_fails_the_whole(tmp_path: Path) -> None:
    status, text = table(tmp_path)
    assert status == 1
    assert "no results" in text


def test_a_release_on_which_nothing_could_run_fails_the_whole(tmp_path: Path) -> None:
    assert table(tmp_path, SKIPPED)[0] == 1
