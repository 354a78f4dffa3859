"""Traces: one run of a model over an input, with interventions."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from insitu._cache import Cache
from insitu._source import user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    import torch

    from insitu._base_model import BaseModel
    from insitu._block_recorder import BlockRecorder
    from insitu._control import Branch
    from insitu._envoy import Envoy
    from insitu._session import Session
    from insitu._submission import Submission


class Tracer:
    """One run of the model over an input, with interventions.

    Opened by itself it is a session of one trace.
    """

    def __init__(
        self,
        session: Session,
        model: BaseModel,
        prompt: Any,
        *,
        owns_session: bool,
        seed: int = 0,
        is_edit: bool = False,
    ) -> None:
        self._session = session
        self._model = model
        self._prompt = prompt
        self._owns_session = owns_session
        self._seed = seed
        self._is_edit = is_edit
        self._recorder: BlockRecorder | None = None
        self._caches: list[Cache] = []

    @property
    def submission(self) -> Submission:
        """The session's; for a trace that was opened by itself with blocking=False."""
        return self._session.submission

    def log(self, *values: object) -> None:
        """Prints values when they are there; they arrive as the session's LOG events."""
        self._open("log").log(values, user_location())

    def cond(self, condition: object) -> Branch:
        """As `Session.cond`, in this trace."""
        return self._session.cond(condition)

    def stop(self) -> None:
        """Ends the forward pass here: what is defined below does not run. Scoped to this trace."""
        self._open("stop").stop(user_location())

    @contextmanager
    def invoke(self, prompt: Any = None) -> Iterator[Self]:
        """Adds rows to the batch of a trace that was opened without a prompt.

        Inside, every value has the rows of this invoke only, without the padding that longer
        prompts of others cause; values of other invokes may be used as they are. An invoke
        without a prompt sees all rows, padded on the left.

        Args:
            prompt: see `LanguageModel.trace`; for a module, its argument.
        """
        recorder = self._open("invoke")
        location = user_location()
        if recorder.invoke or self._prompt is not None:
            raise error(
                Reason.MALFORMED_SESSION,
                "an invoke stands in a trace without a prompt, `with model.trace() as tracer:`, "
                "and not in another invoke",
                location=location,
            )
        outer = recorder.num_rows, recorder.length
        if prompt is not None:
            recorder.invoke = self._add_input(prompt)
        try:
            with recorder.stepping_apart():
                yield self
        finally:
            if prompt is not None:
                outer = outer[0] + recorder.num_rows, max(outer[1], recorder.length)
            recorder.invoke = 0
            recorder.num_rows, recorder.length = outer

    def barrier(self, num_invokes: int) -> Callable[[], None]:
        """Does nothing: values cross invokes as they are. Kept for code written for nnsight."""
        del num_invokes
        return lambda: None

    def cache(
        self,
        modules: Sequence[str | Envoy] | None = None,
        *,
        include_output: bool = True,
        include_inputs: bool = False,
        reduce: Callable[[torch.Tensor], object] | None = None,
    ) -> Cache:
        """Saves what modules return, as it is at the end of the trace.

        Args:
            modules: paths or envoys; by default all that the forward pass calls.
            include_output: whether to save outputs.
            include_inputs: whether to save first arguments.
            reduce: recorded on each tensor before it comes back, such as `lambda x: x[:, -1]`.

        Returns:
            A mapping of module paths; each has `.output` and `.input`.
        """
        tree = self._open("cache").tree or self._model._tree
        cache = Cache(self._model, tree, modules, include_output, include_inputs, reduce)
        self._caches.append(cache)
        return cache

    def _open(self, what: str) -> BlockRecorder:
        if self._recorder is None:
            raise error(
                Reason.MALFORMED_SESSION,
                f"this trace is not open; use {what} inside its `with` block",
                location=user_location(),
            )
        return self._recorder

    def _add_input(self, given: object) -> int:
        """Adds an input to the trace and gives its invoke's number."""
        assert self._recorder is not None
        return self._model._add_input(self._recorder, given, user_location())

    def __enter__(self) -> Self:
        if self._owns_session:
            self._session.__enter__()
        try:
            self._start()
        except BaseException as exception:
            self._stop(type(exception), exception, None)
            raise
        return self

    def _start(self) -> None:
        if self._session._tracer is not None:
            raise error(
                Reason.MALFORMED_SESSION,
                "a trace can not be opened inside another; put it after the other's block, in one "
                "session",
                location=user_location(),
            )
        self._session._tracer = self
        self._recorder = self._open_recorder()
        if self._prompt is not None:
            self._add_input(self._prompt)
        if not self._is_edit:
            self._model._apply_edits(self._recorder)

    def _open_recorder(self) -> BlockRecorder:
        return self._session._recorder.open_trace(self._model.name, self._seed)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self._finish()
        except BaseException as exception:
            self._stop(type(exception), exception, None)
            raise
        self._stop(exc_type, exc, traceback)

    def _finish(self) -> None:
        assert self._recorder is not None
        assert self._recorder.trace is not None
        for cache in self._caches:
            cache.record()
        if not self._recorder.trace.invokes and not self._is_edit:
            raise error(
                Reason.MALFORMED_SESSION,
                "a trace needs an input: give it a prompt, or open invokes in it with "
                "`with tracer.invoke(prompt):`",
                location=user_location(),
            )

    def _stop(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session._tracer is self:
            self._session._tracer = None
            self._session._recorder.close_trace()
        self._recorder = None
        if self._owns_session:
            self._session.__exit__(exc_type, exc, traceback)
