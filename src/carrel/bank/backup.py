"""A copy of the ledger that can be put in its place, made while carrelctld goes on writing.

How far the accounting was compared is a file of its own, and belongs to the copy: with a newer one beside an older
ledger, what was charged in between would never be looked at again.
"""

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import quote

from carrel.errors import CarrelError

MARKS = "reconciled.json"
LEDGER = "ledger.db"
_MODE = 0o700


def backup(ledger: Path, marks: Path, directory: Path) -> int:
    """Copy an SQLite ledger, and how far it was compared; return the number of its transactions.

    Killed at any instruction, what was in the directory before is whole. A second call takes its place.

    Raises:
        CarrelError: there is no such ledger, or the copy cannot be made, or is no whole ledger.
    """
    new = directory / f".{LEDGER}.new"
    try:
        directory.mkdir(mode=_MODE, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        # The marks first: what is compared meanwhile is compared once more.
        if marks.exists():
            _put(marks, directory / MARKS)
        with (
            contextlib.closing(sqlite3.connect(f"file:{quote(str(ledger))}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(new)) as target,
        ):
            source.backup(target)
            ((said,),) = target.execute("PRAGMA quick_check(1)").fetchall()
            ((count,),) = target.execute("SELECT count(*) FROM txn").fetchall()
        if said != "ok":
            raise CarrelError(f"{ledger}: its copy is damaged: {said}; see: carrel bank verify")
        _synced(new)
        new.replace(directory / LEDGER)
    except sqlite3.Error as error:
        raise CarrelError(f"{ledger}: {error}; is it this site's ledger, and may you read it?") from error
    except OSError as error:
        raise CarrelError(
            f"{error.filename or directory}: {error.strerror}; is there room, and is it yours?"
        ) from error
    return int(count)


def _put(source: Path, target: Path) -> None:
    new = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, new)
    _synced(new)
    new.replace(target)


def _synced(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
