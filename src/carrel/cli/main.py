"""The command ``carrel``: ``carrel NOUN VERB``, one module per noun, each imported only when it is called.

A failure is one sentence on stderr and an exit code of ``carrel.errors``. What we did not foresee is a sentence too;
its traceback is in a daemon's log, and for a command comes with ``CARREL_TRACEBACK`` in the environment.
"""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from cyclopts import App, CycloptsError

from carrel import __version__
from carrel.errors import CarrelError, UsageError

_INTERRUPTED = 130
"""What a shell shows for a command that SIGINT ended."""
_SENTENCE_MAX = 1000
"""Letters: what somebody typed may be as long as a command line."""

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a letter that the terminal lacks shall not cost the answer
            stream.reconfigure(errors="backslashreplace")
    status = run(sys.argv[1:] if words is None else list(words))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_stdout()
    except OSError as error:  # the disk is full, and the answer is not there
        _let_go_of_stdout()
        status = _say(_of_the_system(error))
    sys.exit(status)


def run(words: Sequence[str]) -> int:
    """Run one command and return its exit status; what went wrong is on stderr as one sentence."""
    try:
        result = app(list(words), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        command = " ".join(("carrel", *(error.command_chain or ())))
        return _say(UsageError(_one_line(str(error), f"{command} --help")))
    except CarrelError as error:
        return _say(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`carrel job list | head`): it has what it wanted.
        _let_go_of_stdout()
        return 0
    except OSError as error:
        return _say(_of_the_system(error))
    except UnicodeEncodeError:
        return _say(UsageError("a word of the command line is not UTF-8, and only a file may be called so"))
    except Exception as error:  # noqa: BLE001  # a person gets a sentence whatever we did not think of
        return _unforeseen(error, words)
    return result if isinstance(result, int) else 0


def _say(error: CarrelError) -> int:
    text = str(error).encode(errors="backslashreplace").decode()  # a name on the command line may hold any byte
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    shown = plain if len(plain) <= _SENTENCE_MAX else f"{plain[: _SENTENCE_MAX // 2]} … {plain[-_SENTENCE_MAX // 2 :]}"
    print(f"carrel: {shown}", file=sys.stderr)
    return error.exit_code


def _of_the_system(error: OSError) -> CarrelError:
    """Return what a file, a directory or the terminal refused, as a sentence."""
    where = error.filename if isinstance(error.filename, str) else ""
    return CarrelError(f"{where or 'standard output'}: {error.strerror or error}; is there room, and is it yours?")


def _unforeseen(error: Exception, words: Sequence[str]) -> int:
    """Say that this is our bug, and where: who finds it needs no traceback to tell us."""
    import traceback  # noqa: PLC0415  # it takes a while to load, and no command that works needs it

    if list(words[:1]) == ["serve"] or os.environ.get("CARREL_TRACEBACK"):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = next((frame for frame in reversed(frames) if f"{os.sep}carrel{os.sep}" in frame.filename), frames[-1])
    where = f"{ours.filename.rpartition(os.sep)[2]}:{ours.lineno}"
    return _say(
        CarrelError(
            f"a bug of ours: {type(error).__name__} at {where}: {error}; report it with what this prints: "
            "CARREL_TRACEBACK=1 and the same command"
        )
    )


def _one_line(text: str, see: str) -> str:
    sentence = " ".join(text.replace('"', "'").split()).removesuffix(".")
    return f"{sentence[:1].lower()}{sentence[1:]}; see: {see}"


def _let_go_of_stdout() -> None:
    """Keep the interpreter from complaining once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
