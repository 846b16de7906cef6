"""The site's price book, from its file: for the command line and the daemons alike."""

from pathlib import Path

from carrel.config import Config
from carrel.core import pricebook
from carrel.errors import CarrelError, NotFoundError
from carrel.model.price import PriceBook

_SYSTEM = Path("/etc/carrel/prices.toml")


def path(settings: Config) -> Path:
    """Return where the price book is, or should be."""
    if settings.bank.prices.book:
        return Path(settings.bank.prices.book)
    return Path(settings.source).with_name(_SYSTEM.name) if settings.source else _SYSTEM


def load(settings: Config) -> PriceBook:
    """Read the price book.

    Raises:
        NotFoundError: there is none; without one nothing has a price.
        CarrelError: it cannot be read, or says something that is no price.
    """
    return read(path(settings))


def read(file: Path) -> PriceBook:
    """Read a price book; see ``load``."""
    try:
        return pricebook.parse(file.read_text(), where=str(file))
    except FileNotFoundError as error:
        raise NotFoundError(f"{file}: no price book; make one: carrel bank prices import-weights > {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CarrelError(f"{file}: {error}; is it a text file and readable by you?") from error
