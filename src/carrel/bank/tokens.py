"""Tokens of programs that ask the bank over REST. The secret is shown once and kept by its SHA-256 alone.

Forty hexadecimal digits, 160 random bits, so that a client of myBRC takes one, too. Nothing can be guessed from the
hash of something random, so a slow hash would only make each request slow.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from carrel.bank.tables import TOKEN
from carrel.errors import NotFoundError, UsageError
from carrel.model.access import Scope, Token
from carrel.ports import Reading, Store

SECRET_BYTES = 20
KNOWN_S = 2.0
"""How long another process may still take a token that was revoked here."""
MOST_S = 5 * 365 * 86400
NOTE_MAX = 200

_COLUMNS = ", ".join(TOKEN.columns)


class Tokens:
    """The tokens of one ledger. Every method blocks for milliseconds."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        """Read nothing yet."""
        self._store = store
        self._clock = clock
        self._known: dict[bytes, Token] = {}
        self._until_s = 0.0

    def add(self, *, user: str, scope: Scope, ttl_s: int, note: str = "") -> tuple[Token, str]:
        """Make a token and return it with its secret, which nobody can tell a second time.

        Raises:
            UsageError: it would never be good, or for longer than five years.
        """
        if not 0 < ttl_s <= MOST_S:
            raise UsageError(f"a token cannot be good for {ttl_s} s; the most is {MOST_S} s, five years")
        if len(note) > NOTE_MAX or not note.isprintable():
            raise UsageError(f"the note of a token is one line of at most {NOTE_MAX} characters")
        secret = secrets.token_hex(SECRET_BYTES)
        now_s = int(self._clock())
        token = Token(
            name=secrets.token_hex(4),
            user=user,
            scope=scope,
            note=note,
            created_s=now_s,
            expires_s=now_s + ttl_s,
            revoked_s=0,
        )
        row = (token.name, _hash(secret), user, scope, note, now_s, token.expires_s, 0, 1)
        with self._store.writing() as session:
            session.insert("token", [row])
        self._until_s = 0.0
        return token, secret

    def every(self, *, user: str = "") -> list[Token]:
        """Return tokens, of one user or of all, the newest first; also those that are good no more."""
        with self._store.reading() as session:
            found = [token for token, _ in _rows(session)]
        return sorted((token for token in found if user in ("", token.user)), key=lambda token: -token.created_s)

    def revoke(self, name: str, *, user: str = "") -> Token:
        """End a token at once. A second time changes nothing.

        Args:
            name: The token's, not its secret.
            user: Only if it is this user's; empty: anybody's.

        Raises:
            NotFoundError: there is none, or it is another user's.
        """
        sql = f"SELECT {_COLUMNS} FROM token WHERE name = %s"  # noqa: S608  # our own names
        with self._store.writing() as session:
            row = next(iter(session.rows(sql, name)), None)
            if row is None or user not in ("", row[2]):
                raise NotFoundError(f"there is no token '{name}'; see: carrel bank token list")
            if not row[7]:
                row = (*row[:7], int(self._clock()), row[8])
                session.update("token", [row])
        self._until_s = 0.0
        return _token(row)

    def find(self, secret: str) -> Token | None:
        """Return the token of a secret while it is good; None: unknown, expired or revoked, nobody is told which."""
        now_s = self._clock()
        if now_s >= self._until_s:
            with self._store.reading() as session:
                self._known = {digest: token for token, digest in _rows(session)}
            self._until_s = now_s + KNOWN_S
        token = self._known.get(_hash(secret))
        return token if token is not None and token.good(int(now_s)) else None


def _rows(session: Reading) -> list[tuple[Token, bytes]]:
    return [(_token(row), bytes(row[1])) for row in session.rows(f"SELECT {_COLUMNS} FROM token")]  # noqa: S608  # ours


def _token(row: Sequence[Any]) -> Token:
    name, _, user, scope, note, created_s, expires_s, revoked_s, _ = row
    return Token(
        name=name,
        user=user,
        scope=scope,
        note=note,
        created_s=created_s,
        expires_s=expires_s,
        revoked_s=revoked_s,
    )


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
