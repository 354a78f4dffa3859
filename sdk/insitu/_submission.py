"""Sessions on a server that this process need not wait for."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from insitu._config import CONFIG
from insitu._names import by_name
from insitu.backends._watch import kind_name, state_name
from insitu.backends.remote import RemoteBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from insitu_proto.v1 import scheduler_service_pb2
    from insitu_proto.v1.session_pb2 import Session


class SessionState(StrEnum):
    """Where a session on a server stands."""

    RECEIVED = "RECEIVED"
    APPROVED = "APPROVED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    ERROR = "ERROR"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a step of a generation has chosen."""

    trace_number: int
    """Number of the trace in the session, from 1."""
    step: int
    """The step, from 0."""
    token_ids: tuple[int, ...]
    """One id of each row; rows that have ended have padding."""


class Submission:
    """The grip on a session that was submitted; it goes on when this process ends.

    Attributes:
        id: names the session; `insitu.attach` takes it, in any process of the same user.
    """

    def __init__(
        self,
        backend: RemoteBackend,
        session_id: str,
        receive: Callable[[Iterable[tuple[int, object]]], None] | None = None,
    ) -> None:
        """Takes hold of a session.

        Args:
            backend: the server that has it.
            session_id: its id.
            receive: takes the saved values, by the ids of their save nodes, once it has ended.
        """
        self.id = session_id
        self._backend = backend
        self._watch = backend.watch(session_id)
        self._receive = receive
        self._values: dict[str, object] | None = None

    def status(self) -> SessionState:
        """Asks the server for the session's state, without waiting."""
        return SessionState(kind_name(self._backend.state(self.id)))

    def wait(self, timeout: float | None = None) -> None:
        """Shows the session's events to its end; the saved values of its block are there then.

        Args:
            timeout: how long to wait, in seconds; None for as long as it takes.

        Raises:
            Error: why the session failed; what its finished traces saved is there.
            DeadlineError: it has not ended in time. It is a TimeoutError too; the session goes on.
        """
        failure = self._watch.to_end(timeout)
        if self._receive is not None:
            self._fetch(is_partial=failure is not None)
        if failure is not None:
            raise failure

    def tokens(self, timeout: float | None = None) -> Iterator[Tokens]:
        """Yields the tokens of generations with stream=True, as they are chosen, to the end.

        Args:
            timeout: how long to wait for the session's end, in seconds; None for as long as it
                takes.

        Raises:
            Error: why the session failed.
        """
        for event in self._watch.events(timeout):
            if event.HasField("tokens"):
                told = event.tokens
                yield Tokens(told.trace_number, told.step, tuple(told.token_ids))
        self.wait()

    def result(self, *, timeout: float | None = None, partial: bool = False) -> dict[str, Any]:
        """Gives the saved values by the names of the user's variables.

        The second value of a name x is x_2; values without a name are value_1, value_2.

        Args:
            timeout: how long to wait, in seconds; None for as long as it takes.
            partial: whether to give, without waiting, what the traces that have finished saved,
                also if a later one failed.

        Raises:
            Error: as `wait`, unless the result may be partial.
        """
        if partial:
            received = self._backend.fetch(self.id, is_partial=True)
            return by_name((one.name, one.value) for one in received)
        self.wait(timeout)
        return dict(self._fetch(is_partial=False))

    def cancel(self) -> None:
        """Cancels the session; one that has ended stays as it is."""
        self._backend.cancel(self.id)

    def __repr__(self) -> str:
        return f"Submission({self.id!r})"

    def _fetch(self, *, is_partial: bool) -> dict[str, object]:
        """Gives the values of a session that has ended, downloading them once."""
        if self._values is None:
            come = self._watch.result
            received = list(self._backend.fetch(self.id, is_partial=is_partial, come=come))
            self._values = by_name((one.name, one.value) for one in received)
            if self._receive is not None:
                self._receive((one.node_id, one.value) for one in received)
                # It is the session's, which has this: large values are not to wait for a collector.
                self._receive = None
        return self._values


def submit(
    backend: RemoteBackend,
    session: Session,
    tensors: Mapping[int, torch.Tensor],
    receive: Callable[[Iterable[tuple[int, object]]], None],
    *,
    deadline: float | None = None,
) -> Submission:
    """Submits a session that goes on when nobody watches it."""
    session_id = backend.submit(session, tensors, is_detached=True, deadline=deadline)
    return Submission(backend, session_id, receive)


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What the server's list tells of a session."""

    id: str
    """Names it; `insitu.attach` takes it."""
    user: str
    """Whose it is."""
    model: str
    """The model that it used first; empty if none."""
    state: SessionState
    created_at: datetime.datetime
    """When the server accepted it, in UTC."""
    finished_at: datetime.datetime | None
    """When it ended, in UTC; None while it has not."""


def sessions(limit: int = 100, *, all_users: bool = False) -> list[SessionSummary]:
    """Lists the user's sessions on the server, the newest first.

    A session that has ended is kept, with what it saved, as long as the server says (a week).

    Args:
        limit: how many at most.
        all_users: whether to list those of all users, as administrators may.
    """
    backend = RemoteBackend(CONFIG)
    try:
        return [_summary(found) for found in backend.sessions(limit, all_users=all_users)]
    finally:
        backend.close()


def _summary(message: scheduler_service_pb2.SessionSummary) -> SessionSummary:
    has_ended = message.HasField("finished_at")
    return SessionSummary(
        id=message.session_id,
        user=message.user,
        model=message.model,
        state=SessionState(state_name(message.state)),
        created_at=message.created_at.ToDatetime(tzinfo=datetime.UTC),
        finished_at=message.finished_at.ToDatetime(tzinfo=datetime.UTC) if has_ended else None,
    )


def attach(session_id: str) -> Submission:
    """Takes hold of a session that was submitted before, by this process or another.

    Raises:
        NotFoundError: the server has no such session.
        PermissionDeniedError: it is another user's.
    """
    submission = Submission(RemoteBackend(CONFIG), session_id)
    submission.status()
    return submission


def fetch(session_id: str, *, timeout: float | None = None) -> dict[str, Any]:
    """Gives what a session saved that was submitted before, by this process or another.

    Waits for its end. As `attach(session_id).result()`.

    Args:
        session_id: the session's id, as `Submission.id` and `insitu.sessions()` have it.
        timeout: how long to wait, in seconds; None for as long as it takes.

    Raises:
        Error: why the session failed, or why it can not be fetched.
    """
    return attach(session_id).result(timeout=timeout)
