"""What ``carrel node check`` makes of the sampling of a node."""

from carrel.cli import doctor
from carrel.config import Config, Slurm
from carrel.errors import UnreachableError
from carrel.model.sample import SamplerStatus

SETTINGS = Config(slurm=Slurm(spool_dir="/var/spool/{node}/slurmd"))


def test_steps_are_looked_for_where_slurmd_has_them() -> None:
    assert not list(doctor._spool(SETTINGS, {"SlurmdSpoolDir": "/var/spool/%n/slurmd"}, "c1"))
    assert not list(doctor._spool(SETTINGS, UnreachableError("slurm did not answer"), "c1"))
    (problem,) = doctor._spool(SETTINGS, {"SlurmdSpoolDir": "/var/spool/slurm/%n"}, "c1")
    assert "slurm.spool_dir is /var/spool/c1/slurmd, and Slurm's SlurmdSpoolDir /var/spool/slurm/c1" in problem.what
    assert 'spool_dir = "/var/spool/slurm/{node}"' in problem.next


def test_what_failed_and_how_often_is_a_problem_and_so_is_a_fault() -> None:
    status = SamplerStatus(failures={"store": 3}, last_failure="store: \x1b[2J no room", fault="the sampler hangs")
    fault, failed = doctor._sampler(SETTINGS, "c1", status)
    assert (fault.ok, failed.ok) == (False, False)
    assert "store 3 times" in failed.what
    assert "\x1b" not in failed.what


def test_a_node_that_samples_and_one_that_shall_not_are_both_in_order() -> None:
    assert [check.ok for check in doctor._sampler(SETTINGS, "c1", SamplerStatus(jobs=2))] == [True]
    assert [check.ok for check in doctor._sampler(SETTINGS, "c1", None)] == [True]
