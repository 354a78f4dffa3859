"""Sessions: the `with` blocks in which the user's code is recorded."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple, Self

import torch

from insitu._control import Branch, Loop
from insitu._factories import FactoryMode
from insitu._fill import fill
from insitu._lint import warn_of_unused
from insitu._names import name_saves
from insitu._proxy import reference
from insitu._recorder import SessionRecorder
from insitu._session_file import write_session
from insitu._source import user_location
from insitu._token_show import TokenShow
from insitu.backends.remote import RemoteBackend
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextvars import Token
    from os import PathLike
    from types import TracebackType

    from insitu._base_model import BaseModel
    from insitu._envoy import Envoy
    from insitu._lora import LoRA
    from insitu._submission import Submission
    from insitu._trace import Tracer
    from insitu._training import Parameter, Trainable
    from insitu.backends import Backend
    from insitu_proto.v1 import session_pb2
    from insitu_shard.compiler import Explanation

    Receive = Callable[[Iterable[tuple[int, object]]], None]
    Submit = Callable[[session_pb2.Session, Mapping[int, torch.Tensor], Receive], Submission]

_ACTIVE: ContextVar[Session | None] = ContextVar("insitu_session", default=None)


def active_session() -> Session | None:
    """Gives the session whose block is open here, if one is."""
    return _ACTIVE.get()


@contextmanager
def detached() -> Iterator[None]:
    """Hides the session whose block is open here, for a while."""
    token = _ACTIVE.set(None)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class Together(NamedTuple):
    """How the traces of a session may run together."""

    exact: bool = False
    """Each has a forward pass of its own."""
    padding: bool = False
    """Traces of different lengths may share one."""
    checkpoint: bool = False
    """Those that take gradients keep the inputs of decoder layers alone."""


_BY_LENGTH = Together()


class Session:
    """One request: traces that run strictly in order, where the model is.

    Values of a trace may be used in later ones; they stay where the model runs. Saved values are
    there after the block.
    """

    def __init__(
        self,
        model: BaseModel,
        backend: Backend,
        *,
        run: bool = True,
        submit: Submit | None = None,
        together: Together = _BY_LENGTH,
        deadline: float | None = None,
    ) -> None:
        """Makes a session that can be opened once.

        Args:
            model: the model of its traces.
            backend: where it runs.
            run: whether it runs at all; if not, it is only recorded.
            submit: hands it in at the end of its block, instead of running it there.
            together: how its traces may run together.
            deadline: see `LanguageModel.session`.
        """
        self.model = model
        self.backend = backend
        self.is_remote = isinstance(backend, RemoteBackend)
        self._models = {model.name: model}
        self._runs = run
        self._submit = submit
        self._deadline = deadline
        self._is_recorded = False
        self._submission: Submission | None = None
        self._recorder = SessionRecorder(reference)
        recorded = self._recorder.session
        recorded.exact, recorded.padding, recorded.checkpoint = together
        self._tracer: Tracer | None = None
        self._token: Token[Session | None] | None = None
        self._open = ExitStack()

    def add_model(self, model: BaseModel) -> None:
        """Adds a model whose traces the session holds."""
        self._models.setdefault(model.name, model)

    def model_named(self, name: str) -> BaseModel:
        """Gives the model of a trace."""
        return self._models[name]

    def log(self, *values: object) -> None:
        """Prints values when the session comes to this place; they arrive as its LOG events.

        A large tensor is printed as its shape and statistics.
        """
        if self._recorder.trace is not None:
            self._recorder.trace.log(values, user_location())
        else:
            self._recorder.add_log(values)

    def exit(self) -> None:
        """Ends the session here, as completed: later steps do not run."""
        self._recorder.exit()

    def cond(self, condition: object) -> Branch:
        """Records what runs only if a condition holds, known when the session runs.

        Between traces whole traces may be inside; in a trace, what is done to its values.

            with session.cond(loss > 1) as branch:
                ...
            with branch.else_():
                ...

        Args:
            condition: a value of the session of one element, or anything that is true or false.
        """
        return Branch(self._recorder, condition, user_location())

    def iter(self, items: object, *, return_context: bool = False) -> Loop:
        """Records what runs once for each item of a list, range, tensor or value of the session.

            with session.iter([0.5, 1.0, 2.0]) as scale:
                with model.trace(prompt):
                    ...

        Numbers are tensors without dimensions inside, and texts the token ids of prompts. A value
        saved inside comes back as the last item left it; collect others with `insitu.list()`.

        Args:
            items: what to run over; known or not while recording.
            return_context: whether the block gets (item, loop), to call loop.exit(); else the item.
        """
        items = self.model._loop_items(items)
        return Loop(self._recorder, items, user_location(), return_context=return_context)

    def parameter(self, value: torch.Tensor) -> Parameter:
        """Makes a parameter out of a tensor: it lives as long as the session, and is trained there.

        `loss.backward()` adds to its `.grad`, and the optimizers of `insitu.optim` change it.

        Args:
            value: what it begins with; the tensor itself stays as it is.
        """
        from insitu._training import parameter

        return parameter(self._recorder, value)

    def trainable(self, module: torch.nn.Module) -> Trainable:
        """Makes parameters out of those of a module, which can be called on values then.

            probe = session.trainable(torch.nn.Linear(576, 2))
            optimizer = insitu.optim.AdamW(probe.parameters(), lr=1e-3)

        Args:
            module: the user's own; it stays as it is.
        """
        from insitu._training import Trainable

        return Trainable(self._recorder, module)

    def lora(
        self,
        modules: Envoy | Iterable[Envoy],
        *,
        rank: int = 8,
        alpha: float = 16,
        dtype: torch.dtype = torch.float32,
    ) -> LoRA:
        """Makes low-rank changes of linear modules, to be trained; call it in each trace.

        They begin as peft's do: A at random, by torch's generator, and B at 0.

        Args:
            modules: such as `[block.attn.q_proj for block in model.blocks]`.
            rank: how many numbers are between A and B.
            alpha: what is added is scaled by alpha / rank.
            dtype: of A and B, and of what is computed with them.
        """
        from insitu._lora import LoRA

        return LoRA(self._recorder, modules, rank=rank, alpha=alpha, dtype=dtype)

    def explain(self) -> Explanation:
        """Tells which traces share which forward passes; for use in the block or after it.

        It prints as text, and as a table in a notebook: passes, the rows, layers and tokens of
        each, the layers that are saved, and the memory that is estimated.
        """
        # Only who asks needs the engine.
        from insitu._explain import explain

        descriptions = {name: model._description for name, model in self._models.items()}
        return explain(self._recorder.session, descriptions, self._recorder.brought.large())

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
        write_session(path, self._recorder.session, self._recorder.brought.large())

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
        self._open.enter_context(FactoryMode(self._recorder))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()
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
        recorder.save_containers()
        recorder.close()
        if not recorder.session.steps:
            raise error(
                Reason.MALFORMED_SESSION,
                "the session has no steps: put a `with model.trace(...)` block, a log or an exit "
                "into it",
                location=user_location(),
            )
        warn_of_unused(recorder.session)
        name_saves(recorder.session.steps)
        recorder.seed()
        self._is_recorded = True
        if not self._runs:
            recorder.state = "recorded"
            return
        tensors = recorder.brought.large()
        if self._submit is not None:
            recorder.state = "submitted"
            self._submission = self._submit(recorder.session, tensors, self._receive)
            return
        recorder.state = "running"
        show = TokenShow(recorder)
        try:
            self._receive(self._run(recorder.session, tensors, show))
        finally:
            show.end()

    def _run(
        self,
        session: session_pb2.Session,
        tensors: Mapping[int, torch.Tensor],
        show: TokenShow,
    ) -> Iterator[tuple[int, object]]:
        if isinstance(self.backend, RemoteBackend):
            return self.backend.run(
                session, tensors, on_tokens=show.tokens, deadline=self._deadline
            )
        others = [model._local for model in self._models.values()]
        return self.backend.run(session, tensors, others, show.tokens)

    def _receive(self, saved: Iterable[tuple[int, object]]) -> None:
        """Makes saved proxies their values, as these come to the session's end."""
        # What several steps of a generation save is what the last of them leaves.
        last: dict[int, tuple[object, object]] = {}
        try:
            for node_id, value in saved:
                target = self._recorder.saved[node_id]
                last[id(target)] = target, value
        finally:
            self._recorder.state = "done"
            for target, value in last.values():
                fill(target, value)
