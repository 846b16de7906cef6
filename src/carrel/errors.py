"""What can go wrong, and what the command line then exits with.

::

    CarrelError            exit 1   anything a person should read as one sentence
    ├── UsageError         exit 2   the request itself is malformed
    ├── NotFoundError      exit 3   no such image, guest, job, node
    ├── RefusedError       exit 4   understood, and not allowed or not possible here
    │   ├── NodeFaultError exit 4   the node is at fault, not the request: drain it, requeue the job
    │   └── NoAddressError exit 4   a guest that is to be a node got no address of its own
    ├── UnreachableError   exit 5   a daemon or Slurm did not answer: *cannot tell*
    └── LostRaceError      exit 1   a row changed under its writer, who begins again

A message is one line, lower case, without a full stop: the thing, the value, the next step.
"""


class CarrelError(Exception):
    """A sentence for a person; subclasses only choose the exit code."""

    exit_code = 1


class UsageError(CarrelError):
    """The request is malformed."""

    exit_code = 2


class NotFoundError(CarrelError):
    """What was named does not exist."""

    exit_code = 3


class RefusedError(CarrelError):
    """Understood, and not possible: the request is at fault."""

    exit_code = 4


class NodeFaultError(RefusedError):
    """Understood, and not possible here: this node is at fault, another may do it."""


class NoAddressError(RefusedError):
    """A guest came up and got no address of its own: it is destroyed, and its job does not try again."""


class UnreachableError(CarrelError):
    """Nobody answered, so nothing is known. Never a reason to destroy."""

    exit_code = 5


class LostRaceError(CarrelError):
    """A row was changed by somebody else since it was read; nothing was written, and the writer begins again."""
