"""Numbered changes to the tables, in the two dialects. One that was released is never edited; the next one follows."""

from importlib import resources

from carrel.errors import CarrelError


def after(version: int, dialect: str) -> list[tuple[int, str]]:
    """Return (number, SQL) of the migrations that a database of this version lacks, in order.

    Raises:
        CarrelError: the database is newer than this program.
    """
    files = resources.files(__name__) / dialect
    every = sorted((int(file.name.split("_")[0]), file.read_text()) for file in files.iterdir() if file.name[0] != "_")
    if version > every[-1][0]:
        raise CarrelError(f"the ledger has version {version}, this program knows {every[-1][0]}; upgrade carrel")
    return [(number, sql) for number, sql in every if number > version]
