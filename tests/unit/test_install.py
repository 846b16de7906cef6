"""`make install` makes a tree that works by itself."""

import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.slurm  # not for its need of Slurm, but for its time: it installs all libraries anew
@pytest.mark.timeout(300)
def test_what_make_install_leaves_below_destdir_runs_without_the_checkout(tmp_path: Path) -> None:
    subprocess.run(
        ["make", "--no-print-directory", "install", f"DESTDIR={tmp_path}"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = tmp_path / "usr/bin/carrel"
    shown = subprocess.run([command, "--version"], env=clean, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert shown.stdout.strip().endswith("0.1.0")
    libraries = tmp_path / "usr/lib/carrel/python"
    assert "carrel job report" in (tmp_path / "usr/share/man/man1/carrel.1").read_text()
    completion = tmp_path / "usr/share/bash-completion/completions/carrel"
    assert subprocess.run(["bash", "-n", completion], check=False).returncode == 0
    drivers = subprocess.run(
        [
            "/usr/bin/python3",
            "-sP",
            "-c",
            "from importlib.metadata import entry_points as e; print(e(group='carrel.drivers').names)",
        ],
        env={**clean, "PYTHONPATH": str(libraries)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "qemu" in drivers.stdout
    programs = {path.name for path in (tmp_path / "usr/libexec/carrel").iterdir()}
    assert programs == {
        *("carrel-agent", "carrel-enter", "carrel-guard", "carrel-hook", "carrel-join"),
        *("spank_carrel.so", "job_submit.lua", "bank.lua", "guest_node.lua", "prolog", "epilog"),
    }
    # An afternoon of trying leaves nothing but what somebody may have written.
    (tmp_path / "etc/carrel/prices.toml").touch()
    subprocess.run(
        ["make", "--no-print-directory", "uninstall", f"DESTDIR={tmp_path}"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"etc/carrel/carrel.toml", "etc/carrel/prices.toml"}
