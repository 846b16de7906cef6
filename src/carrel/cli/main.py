"""The command ``carrel``: ``carrel NOUN VERB``, one module per noun, each imported only when it is called.

A failure is one sentence on stderr and an exit code of ``carrel.errors``; a traceback is always our bug.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from carrel import __version__
from carrel.errors import CarrelError, UsageError

_INTERRUPTED = 130
"""What a shell shows for a command that SIGINT ended."""

_NOUNS = {
    "job": "Slurm's jobs and the guests that they run in.",
    "guest": "Guests: the virtual machines and containers of running jobs.",
    "image": "Images that guests are cloned from.",
    "node": "Nodes, and why one cannot run guests.",
    "host": "Hosts of guests that are Slurm nodes of their own.",
    "quote": "What a submission may cost, before it is submitted.",
    "account": "Accounts: who pays, and what is left.",
    "charge": "Liens and charges: what runs may cost and did cost.",
    "bank": "The site's service units: the ledger as a whole, prices, tokens.",
    "metrics": "Samples that LDMS took, and what LDMS is told here.",
    "simulate": "What a workload would see of a site of guests-as-nodes.",
    "config": "The settings in force.",
    "sandbox": "A real Slurm cluster with Carrel in a private directory.",
    "serve": "The daemons.",
    "completion": "Print the completion script of a shell.",
}

app = App(
    name="carrel",
    help="Gives every Slurm job its own virtual machine.",
    help_epilogue="Exit status: 0 done, 1 failed, 2 usage, 3 not found, 4 refused, 5 nobody answered.",
    version=f"carrel {__version__}",
    result_action="return_value",
    help_format="plaintext",
)
for _noun, _help in _NOUNS.items():
    app.command(f"carrel.cli.{_noun}:app", name=_noun, help=_help)


def main(words: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    status = run(sys.argv[1:] if words is None else list(words))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_stdout()
    sys.exit(status)


def run(words: Sequence[str]) -> int:
    """Run one command and return its exit status; what went wrong is on stderr as one sentence."""
    try:
        result = app(list(words), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _say(UsageError(_one_line(str(error))))
    except CarrelError as error:
        return _say(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`carrel job list | head`): it has what it wanted.
        _let_go_of_stdout()
        return 0
    return result if isinstance(result, int) else 0


def _say(error: CarrelError) -> int:
    print(f"carrel: {error}", file=sys.stderr)
    return error.exit_code


def _one_line(text: str) -> str:
    sentence = " ".join(text.replace('"', "'").split()).removesuffix(".")
    return f"{sentence[:1].lower()}{sentence[1:]}; see: carrel --help"


def _let_go_of_stdout() -> None:
    """Keep the interpreter from complaining once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
