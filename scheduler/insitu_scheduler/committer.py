"""Runs database work on one thread, and commits together what waits together."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_WRITE_BEHIND_SECONDS = 0.02


class OnCommit(Protocol):
    """Is told of a commit."""

    def __call__(self, seconds: float, *, has_failed: bool) -> None:
        """Takes note of how long it took, and whether it failed."""
        ...


class Committer:
    """Owns the one connection to a database, on a thread of its own.

    While the thread commits, new work gathers; it is committed next, all at once: the cost of a
    commit is shared by all who wait for it. If it fails, it fails for all of them.
    """

    def __init__(
        self,
        url: str | sa.URL,
        on_commit: OnCommit | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        """Makes it; nothing is opened yet.

        Args:
            url: of the database, as SQLAlchemy has them.
            on_commit: told of each commit, on the thread.
            on_lost: told on the event loop that the connection has broken, and with it the lock.
        """
        self._on_commit = on_commit
        self._on_lost = on_lost
        self.is_lost = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._engine = sa.create_engine(url, poolclass=sa.NullPool)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _make_durable)
        self._connection: sa.Connection | None = None
        self._pending: list[tuple[Callable[[sa.Connection], Any], asyncio.Future[Any]]] = []
        self._flushing: asyncio.Future[list[Any]] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_pending(self) -> int:
        """Counts the operations that wait for the next commit."""
        return len(self._pending)

    async def open(self) -> None:
        """Opens the file, making it if it is missing."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connect)

    async def close(self) -> None:
        """Commits what is pending and closes the file."""
        if self._connection is not None and not self.is_lost:
            await self.run(lambda connection: None)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    async def run(self, operation: Callable[[sa.Connection], _T]) -> _T:
        """Gives an operation's result once it is committed."""
        future = self._add(operation)
        self._flush()
        return await future

    def run_later(
        self, operation: Callable[[sa.Connection], None], then: Callable[[], None]
    ) -> None:
        """Commits an operation within a moment, together with others, and calls back after it.

        The call comes in the order of the operations, and also after a commit that failed.
        """
        future = self._add(operation)
        future.add_done_callback(_log_failure)
        future.add_done_callback(lambda _: then())
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_WRITE_BEHIND_SECONDS, self._flush)

    def _add(self, operation: Callable[[sa.Connection], _T]) -> asyncio.Future[_T]:
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._pending.append((operation, future))
        return future

    def _flush(self) -> None:
        """Has the thread commit all that is pending, unless it is at work: then right after."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flushing is not None or not self._pending:
            return
        operations, futures = zip(*self._pending, strict=True)
        self._pending = []
        loop = asyncio.get_running_loop()
        self._flushing = loop.run_in_executor(self._thread, self._commit, operations)
        self._flushing.add_done_callback(lambda flushing: self._flushed(flushing, futures))

    def _flushed(
        self, flushing: asyncio.Future[list[Any]], futures: Sequence[asyncio.Future[Any]]
    ) -> None:
        self._flushing = None
        exception = flushing.exception()
        if _has_broken(exception) and not self.is_lost:
            self.is_lost = True
            if self._on_lost is not None:
                self._on_lost()
        results = [None] * len(futures) if exception else flushing.result()
        for future, result in zip(futures, results, strict=True):
            if future.done():  # whoever waited has gone
                continue
            if exception:
                future.set_exception(exception)
            else:
                future.set_result(result)
        self._flush()

    def _connect(self) -> None:
        self._connection = self._engine.connect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    def _commit(self, operations: Sequence[Callable[[sa.Connection], Any]]) -> list[Any]:
        # One that connected again would write without the lock.
        if self._connection is None or self._connection.invalidated:
            raise RuntimeError("the journal is not open")
        started, has_failed = time.perf_counter(), True
        try:
            with self._connection.begin():
                results = [operation(self._connection) for operation in operations]
            has_failed = False
            return results
        finally:
            if self._on_commit is not None:
                self._on_commit(time.perf_counter() - started, has_failed=has_failed)


def _has_broken(exception: BaseException | None) -> bool:
    return isinstance(exception, sa.exc.DBAPIError) and exception.connection_invalidated


def _log_failure(written: asyncio.Future[None]) -> None:
    if not written.cancelled() and (exception := written.exception()) is not None:
        _log.critical("the journal can not be written", exc_info=exception)


def _make_durable(connection: Any, record: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
