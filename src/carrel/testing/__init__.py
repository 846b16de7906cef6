"""For plug-in authors: fakes, fixtures and contract suites. Public, and kept stable."""

from carrel.drivers.fake import FakeDriver
from carrel.slurm.fake import FakeSlurm
from carrel.testing.bank import FakeBank
from carrel.testing.drivers import DriverContract
from carrel.testing.fuse import Fuse, PowerCut
from carrel.testing.ledger_contract import LedgerContract
from carrel.testing.ledger_failures import LedgerFailureModes
from carrel.testing.sinks import SinkContract, TakenRow

__all__ = [
    "DriverContract",
    "FakeBank",
    "FakeDriver",
    "FakeSlurm",
    "Fuse",
    "LedgerContract",
    "LedgerFailureModes",
    "PowerCut",
    "SinkContract",
    "TakenRow",
]
