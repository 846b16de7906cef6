"""The bank's one writer: commands from any thread or event loop, done in batches, answered after they are on the disk.

Group commit: while one batch is written, the next gathers. What a batch costs is mostly its flush, so a hundred
commands cost little more than one, and nobody waits for a timer. Any number of processes may each have a ``Ledger``
on one database; the store lets one batch in at a time.

From asyncio: ``await ledger.do(command)``. Reads of ``carrel.bank.queries`` block for milliseconds:
``await asyncio.to_thread(balances, ledger.store)``.
"""

import asyncio
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec

from carrel.bank.shelf import load, write
from carrel.core.ledger import Asked, Wants, apply, wants
from carrel.errors import CarrelError, LostRaceError, UnreachableError, UsageError
from carrel.model.ledger import Answer, AnyCommand
from carrel.ports import Store

BATCH = 256
"""Commands written with one flush, at most. Beyond this the rows cost more than the flush."""
WAITING = 100_000
"""Submissions that may wait; beyond it the caller is told to come back rather than kept waiting without a bound."""
REQUEST_BYTES = 64 * 1024
RACES = 5

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyCommand] = msgspec.json.Decoder(AnyCommand)


class _Submission(msgspec.Struct, frozen=True):
    asked: list[Asked]
    future: "Future[list[Answer]]"


def asked(command: AnyCommand | bytes) -> Asked:
    """Check a command, given as a struct or as JSON.

    Raises:
        UsageError: it has an unknown field, a wrong type, or a value out of bounds.
    """
    try:
        given = command if isinstance(command, bytes) else _encoder.encode(command)
        known = _decoder.decode(given)
        # One form only: what came as JSON may have its fields in any order.
        request = _encoder.encode(known) if isinstance(command, bytes) else given
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"not a command of the ledger: {str(error).replace('`', '').lower()}") from error
    if len(request) > REQUEST_BYTES:
        raise UsageError(f"a command of {len(request)} bytes is too long; the most is {REQUEST_BYTES}")
    return Asked(known, request.decode(), hashlib.sha256(request).digest())


class Ledger:
    """Takes commands and answers them. A refusal is an answer; ``UnreachableError`` is *cannot tell*: ask again."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        """Bring the tables up to date and start the writer's thread.

        Args:
            store: Where to; the ledger closes it.
            clock: Seconds since the epoch: the time that counts for everybody.
        """
        self._store = store
        self._clock = clock
        self._waiting: queue.Queue[_Submission | None] = queue.Queue(WAITING)
        self._gate = threading.Lock()
        self._closed = False
        store.migrate()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def store(self) -> Store:
        """For reads."""
        return self._store

    def submit(self, commands: Sequence[AnyCommand | bytes]) -> "Future[list[Answer]]":
        """Have commands done in this order, and return their answers to come.

        Others may come between them. The future fails with ``UnreachableError`` where the database did not answer:
        the commands may have been done, and asking again under the same keys tells.

        Raises:
            UsageError: one of them is malformed; none is done.
            UnreachableError: the ledger is closed, or too many wait.
        """
        submission = _Submission([asked(command) for command in commands], Future())
        with self._gate:
            if self._closed:
                raise UnreachableError("the ledger is closed")
            try:
                self._waiting.put_nowait(submission)
            except queue.Full:
                raise UnreachableError(f"{WAITING} submissions wait for the ledger; come back later") from None
        return submission.future

    def call(self, command: AnyCommand | bytes, *, timeout_s: float = 60.0) -> Answer:
        """Do one command and wait for its answer.

        Raises:
            UsageError: it is malformed.
            UnreachableError: no answer: nobody can tell whether it was done.
        """
        try:
            return self.submit([command]).result(timeout_s)[0]
        except TimeoutError:
            raise UnreachableError(f"the ledger did not answer within {timeout_s:g} s") from None

    async def do(self, command: AnyCommand | bytes) -> Answer:
        """Do one command from an event loop. Cancelling the call does not undo it; its key tells what became of it."""
        return (await self.do_all([command]))[0]

    async def do_all(self, commands: Sequence[AnyCommand | bytes]) -> list[Answer]:
        """Do commands in this order from an event loop."""
        return await asyncio.wrap_future(self.submit(commands))

    def close(self) -> None:
        """Finish what was taken, and let go of the database."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        self._waiting.put(None)
        self._thread.join()
        self._store.close()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            count = len(first.asked)
            last = False
            with suppress(queue.Empty):
                while count < BATCH and not last:
                    following = self._waiting.get_nowait()
                    last = following is None
                    if following is not None:
                        batch.append(following)
                        count += len(following.asked)
            self._answer([one for one in batch if one.future.set_running_or_notify_cancel()])
            if last:
                return

    def _answer(self, batch: list[_Submission]) -> None:
        """Do the batch and answer; by itself each, where one of them is more than the rules or the database take."""
        if not batch:
            return
        try:
            answers = self._do([one for submission in batch for one in submission.asked])
        except CarrelError as error:
            for submission in batch:
                submission.future.set_exception(error)
        except Exception as error:  # noqa: BLE001  # one poisonous command must not stop the bank
            if len(batch) == 1:
                batch[0].future.set_exception(_poison(error))
            else:
                for submission in batch:
                    self._answer([submission])
        else:
            for submission in batch:
                submission.future.set_result(answers[: len(submission.asked)])
                del answers[: len(submission.asked)]

    def _do(self, batch: list[Asked]) -> list[Answer]:
        answers: list[Answer] = []
        for begin in range(0, len(batch), BATCH):
            answers += self._commit(batch[begin : begin + BATCH])
        return answers

    def _commit(self, batch: list[Asked]) -> list[Answer]:
        needed = wants(batch)
        for _ in range(RACES):
            with suppress(LostRaceError):
                return self._attempt(batch, needed)
        raise UnreachableError(f"somebody else writes to the ledger past its lock; {RACES} attempts were in vain")

    def _attempt(self, batch: list[Asked], needed: Wants) -> list[Answer]:
        with self._store.writing() as session:
            book = load(session, needed, int(self._clock()))
            answers = [apply(book, one) for one in batch]
            write(session, book)
        return answers


def _poison(error: Exception) -> CarrelError:
    return CarrelError(f"the ledger cannot do this command: {type(error).__name__}: {error}; nothing was changed")
