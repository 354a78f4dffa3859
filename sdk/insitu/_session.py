"""Sessions and traces: the `with` blocks in which the user's code is recorded."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Self

from insitu._names import name_saves
from insitu._proxy import fill, reference
from insitu._recorder import SessionRecorder
from insitu._session_file import write_session
from insitu._source import user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextvars import Token
    from os import PathLike
    from types import TracebackType

    from insitu._model import LanguageModel
    from insitu._recorder import TraceRecorder
    from insitu._submission import Submission
    from insitu.backends import Backend
    from insitu_proto.v1 import session_pb2

    Receive = Callable[[Iterable[tuple[int, object]]], None]
    Submit = Callable[[session_pb2.Session, Receive], Submission]

_ACTIVE: ContextVar[Session | None] = ContextVar("insitu_session", default=None)


def active_session() -> Session | None:
    """Gives the session whose block is open here, if one is."""
    return _ACTIVE.get()


class Session:
    """One request: traces that run strictly in order, where the model is.

    Values of a trace may be used in later ones; they stay where the model runs. Saved values are
    there after the block.
    """

    def __init__(
        self,
        model: LanguageModel,
        backend: Backend,
        *,
        run: bool = True,
        submit: Submit | None = None,
    ) -> None:
        """Makes a session that can be opened once.

        Args:
            model: the model of its traces.
            backend: where it runs.
            run: whether it runs at all; if not, it is only recorded.
            submit: hands it in at the end of its block, instead of running it there.
        """
        self.model = model
        self.backend = backend
        self._runs = run
        self._submit = submit
        self._is_recorded = False
        self._submission: Submission | None = None
        self._recorder = SessionRecorder(reference)
        self._tracer: Tracer | None = None
        self._token: Token[Session | None] | None = None

    def log(self, *values: object) -> None:
        """Prints values when the session comes to this place; they arrive as its LOG events."""
        self._recorder.add_log(values)

    def exit(self) -> None:
        """Ends the session here, as completed: later steps do not run."""
        self._recorder.add_exit()

    def save(self, path: str | PathLike[str]) -> None:
        """Writes what was recorded to a file, which `insitu run` runs; for use after the block.

        The same code gives the same bytes.
        """
        if not self._is_recorded:
            raise error(
                Reason.MALFORMED_SESSION,
                "the session has not been recorded to its end; save it after its block",
                location=user_location(),
            )
        write_session(path, self._recorder.session)

    @property
    def submission(self) -> Submission:
        """The grip on the session, after its block, if it was opened with blocking=False."""
        if self._submission is None:
            raise error(
                Reason.VALUE_NOT_AVAILABLE,
                "the session has not been submitted: open it with remote=True, blocking=False, and "
                "use its submission after the block",
                location=user_location(),
            )
        return self._submission

    @property
    def current_trace(self) -> TraceRecorder | None:
        """The trace whose block is open, if one is."""
        return self._tracer._recorder if self._tracer is not None else None

    def __enter__(self) -> Self:
        if active_session() is not None:
            raise error(
                Reason.MALFORMED_SESSION,
                "a session can not be opened inside another; put its traces into the outer one",
                location=user_location(),
            )
        if self._recorder.state != "recording":
            raise error(
                Reason.MALFORMED_SESSION,
                "this session has run; open a new one with model.session(...) or model.trace(...)",
                location=user_location(),
            )
        self._token = _ACTIVE.set(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is not None:
            _ACTIVE.reset(self._token)
        if exc_type is not None:
            self._recorder.state = "done"
            return
        try:
            self._finish()
        except BaseException:
            self._recorder.state = "done"
            raise

    def _finish(self) -> None:
        """Runs what was recorded, or hands it in, or leaves it at that."""
        recorder = self._recorder
        if not recorder.session.steps:
            raise error(
                Reason.MALFORMED_SESSION,
                "the session has no steps: put a `with model.trace(...)` block, a log or an exit "
                "into it",
                location=user_location(),
            )
        name_saves(recorder.session.steps)
        self._is_recorded = True
        if not self._runs:
            recorder.state = "recorded"
            return
        if self._submit is not None:
            recorder.state = "submitted"
            self._submission = self._submit(recorder.session, self._receive)
            return
        recorder.state = "running"
        self._receive(self.backend.run(recorder.session))

    def _receive(self, saved: Iterable[tuple[int, object]]) -> None:
        """Makes saved proxies their values, as these come to the session's end."""
        try:
            for node_id, value in saved:
                fill(self._recorder.saved[node_id], value)
        finally:
            self._recorder.state = "done"


class Tracer:
    """One run of the model over an input, with interventions.

    Opened by itself it is a session of one trace.
    """

    def __init__(self, session: Session, rows: list[list[int]], *, owns_session: bool) -> None:
        self._session = session
        self._rows = rows
        self._owns_session = owns_session
        self._recorder: TraceRecorder | None = None

    @property
    def submission(self) -> Submission:
        """The session's; for a trace that was opened by itself with blocking=False."""
        return self._session.submission

    def log(self, *values: object) -> None:
        """Prints values when they are there; they arrive as the session's LOG events."""
        if self._recorder is None:
            raise error(
                Reason.MALFORMED_SESSION,
                "this trace is not open; log inside its `with` block",
                location=user_location(),
            )
        self._recorder.log(values)

    def __enter__(self) -> Self:
        if self._owns_session:
            self._session.__enter__()
        if self._session._tracer is not None:
            raise error(
                Reason.MALFORMED_SESSION,
                "a trace can not be opened inside another; put it after the other's block, in one "
                "session",
                location=user_location(),
            )
        try:
            self._recorder = self._session._recorder.add_trace(self._session.model.name, self._rows)
        except BaseException as exception:
            if self._owns_session:
                self._session.__exit__(type(exception), exception, None)
            raise
        self._session._tracer = self
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._session._tracer = None
        self._recorder = None
        if self._owns_session:
            self._session.__exit__(exc_type, exc, traceback)
