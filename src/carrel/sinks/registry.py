"""A schema registry, which gives each schema a number: readers of Avro find the schema by it."""

import urllib.request
from typing import Any

import msgspec

from carrel.errors import UnreachableError

_TIMEOUT_S = 10.0


class Registry:
    """A schema registry, as far as one who writes needs it."""

    def __init__(self, address: str) -> None:
        """Ask at ``address``: ``http://host:8081``."""
        self._address = address.rstrip("/")
        self._numbers: dict[str, int] = {}

    def number(self, subject: str, schema: dict[str, Any]) -> int:
        """Return the schema's number; see ``Schemas``."""
        if subject not in self._numbers:
            body = msgspec.json.encode({"schema": msgspec.json.encode(schema).decode()})
            where = f"{self._address}/subjects/{subject}/versions"
            headers = {"Content-Type": "application/vnd.schemaregistry.v1+json"}
            request = urllib.request.Request(where, body, headers)  # noqa: S310  # the site's own setting
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310  # the same
                    self._numbers[subject] = int(msgspec.json.decode(answer.read())["id"])
            except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
                raise UnreachableError(f"{where}: {error}; is this a schema registry?") from error
        return self._numbers[subject]
