"""The pytest plug-in: fixtures for tests against a real Slurm, real guests and a real PostgreSQL.

``sandbox_factory``, ``slurm``, ``sandbox`` and ``user`` are described in ``carrel.testing.sandbox``, ``postgres`` and
``postgres_server`` in ``carrel.testing.postgres``, ``vcsim`` and ``vcenter_certificates`` in ``carrel.testing.vcsim``.
"""

from collections.abc import Generator

import pytest

from carrel.testing.postgres import postgres, postgres_server
from carrel.testing.sandbox import logs_of_living_sandboxes, sandbox, sandbox_factory, slurm, user
from carrel.testing.vcsim import vcenter_certificates, vcsim

__all__ = [
    "postgres",
    "postgres_server",
    "pytest_runtest_makereport",
    "sandbox",
    "sandbox_factory",
    "slurm",
    "user",
    "vcenter_certificates",
    "vcsim",
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the logs of the sandboxes beside a failure: afterwards their directories are gone."""
    report = yield
    if report.failed:
        report.sections.extend(logs_of_living_sandboxes())
    return report
