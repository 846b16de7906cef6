"""The site's price book, from its file: for the command line and the daemons alike."""

from datetime import UTC, datetime
from pathlib import Path

from carrel.config import Config
from carrel.core import imports, pricebook
from carrel.errors import CarrelError, NotFoundError
from carrel.model.price import PriceBook

_SYSTEM = Path("/etc/carrel/prices.toml")


def path(settings: Config) -> Path:
    """Return where the price book is, or should be."""
    if settings.bank.prices.book:
        return Path(settings.bank.prices.book)
    if settings.bank.provider == "mybrc":
        return Path(settings.bank.remote.config)
    return Path(settings.source).with_name(_SYSTEM.name) if settings.source else _SYSTEM


def load(settings: Config) -> PriceBook:
    """Read the price book.

    Raises:
        NotFoundError: there is none; without one nothing has a price.
        CarrelError: it cannot be read, or says something that is no price.
    """
    file = path(settings)
    if settings.bank.provider == "mybrc" and not settings.bank.prices.book:
        # A partition without a price is refused rather than free: free computing is a slip more often than a wish.
        found = imports.mybrc(text(file), where=str(file))
        return imports.from_mybrc(found, unlisted="refuse", name=file.name, valid_from=datetime.fromtimestamp(0, UTC))
    return read(file)


def read(file: Path) -> PriceBook:
    """Read a price book; see ``load``."""
    return pricebook.parse(text(file), where=str(file))


def text(file: Path) -> str:
    """Return what a file with prices says.

    Raises:
        NotFoundError: it is not there.
        CarrelError: it cannot be read.
    """
    try:
        return file.read_text()
    except FileNotFoundError as error:
        raise NotFoundError(f"{file}: no price book; make one: carrel bank prices import-weights > {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CarrelError(f"{file}: {error}; is it a text file and readable by you?") from error
