"""A ledger that is put back after days is made whole from Slurm's accounting: docs/how-to/bank.md says how."""

import shutil
from pathlib import Path

import pytest

from carrel.testing.banked import Banked
from carrel.testing.sandbox import MakeSandbox

pytestmark = pytest.mark.slurm


def test_a_ledger_that_was_put_back_charges_what_ended_since_once(sandbox_factory: MakeSandbox, tmp_path: Path) -> None:
    box = sandbox_factory(nodes=1, guests=False, slurmdbd=True, bank=True)
    bank = Banked(box)
    first = bank.sbatch("--wrap=sleep 1")
    bank.wait_state(first, "COMPLETED")
    bank.wait_settled()
    assert box.run(["carrel", "bank", "backup", str(tmp_path / "copy")]).returncode == 0
    second = bank.sbatch("--wrap=sleep 1")
    bank.wait_state(second, "COMPLETED")
    bank.wait_settled()
    box.kill("carrelctld")  # the machine is lost with its disk
    here = Path(bank.settings.bank.dir)
    for path in here.iterdir():
        path.unlink()
    for path in (tmp_path / "copy").iterdir():
        shutil.copy(path, here)
    box.start("carrelctld")
    done = box.run(["carrel", "bank", "reconcile"])
    assert done.returncode == 0, done.stderr
    assert bank.wrong() == []
    assert bank.broken() == []
    assert {lien.job_id for lien in bank.liens("settled")} == {first, second}
    box.down()
