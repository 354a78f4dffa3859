"""What all models that users hold have in common: edits, traces, and where these are recorded."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from insitu._edits import Edit
from insitu._envoy import Envoy
from insitu._session import Session, active_session, detached
from insitu._structure import ModuleTree
from insitu._trace import Tracer
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from insitu._block_recorder import BlockRecorder
    from insitu.backends import Backend
    from insitu.backends.local import LocalBackend
    from insitu_proto.v1 import model_pb2
    from insitu_wire.errors import Location


class BaseModel(Envoy):
    """A model to be traced, as its root envoy."""

    def __init__(self, name: str, rename: Mapping[str, str] | None) -> None:
        super().__init__(self, "")
        self.__dict__.update(name=name, _rename=rename, _edits=())

    name: str
    """Name by which sessions ask for the model."""
    _rename: Mapping[str, str] | None
    _edits: tuple[Edit, ...]

    @contextmanager
    def edit(self, *, inplace: bool = False) -> Iterator[Self]:
        """Records interventions that are applied to every later trace of a model.

            with model.edit() as edited:
                model.model.layers[3].output[:] *= 1.5
            with edited.trace(prompt):
                ...

        In a session they hold for its later traces of this model object.

        Args:
            inplace: whether this model object gets them; else a copy of it, which the block gives.
        """
        edited = self if inplace else self._copy()
        session = Session(self, self._backend, run=False)
        with detached(), Tracer(session, self, None, owns_session=True, is_edit=True):
            yield edited
        edited.__dict__["_edits"] = (*edited._edits, Edit.recorded_by(session._recorder))

    def clear_edits(self) -> None:
        """Takes away the interventions that `edit(inplace=True)` has attached."""
        self.__dict__["_edits"] = ()

    @property
    @abstractmethod
    def _local(self) -> LocalBackend:
        """Runs its sessions in this process."""

    @property
    @abstractmethod
    def _backend(self) -> Backend:
        """Describes it."""

    @abstractmethod
    def _add_input(self, block: BlockRecorder, given: Any, location: Location) -> int:
        """Adds an input, as `trace` took it, to a trace and gives its invoke's number."""

    @abstractmethod
    def _applied(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives what a module returns for meta tensors, if it can be known."""

    def _loop_items(self, items: Any) -> Any:
        """Gives what a loop runs over, from what the user gave."""
        return items

    def _open_trace(self, given: Any, session: Session | None, seed: int) -> Tracer:
        """Opens a trace over an input, in a session of its own or in the one that is open."""
        if session is not None:
            return Tracer(session, self, given, owns_session=True, seed=seed)
        return Tracer(self._joined_session(), self, given, owns_session=False, seed=seed)

    def _joined_session(self) -> Session:
        """Gives the session that is open, which the model is a part of from here on."""
        session = active_session()
        assert session is not None
        session.add_model(self._base)
        return session

    @property
    def _base(self) -> Self:
        """The model that this is an edited copy of; itself if it is none."""
        base: Self = self.__dict__.get("_edited_from", self)
        return base

    def _copy(self) -> Self:
        """Gives another object for the same model, with the same edits and backends."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__, _edited_from=self._base, _model=copy)
        return copy

    def _apply_edits(self, block: BlockRecorder) -> None:
        for step in range(block.max_new_tokens or 1):
            for edit in self._edits:
                edit.apply(block, step)

    @cached_property
    def _description(self) -> model_pb2.ModelDescription:
        return self._backend.describe(self.name)

    @cached_property
    def _tree(self) -> ModuleTree:
        return ModuleTree(self._description, self._rename)

    def _current_block(self, what: str, location: Location) -> BlockRecorder:
        """Gives where a call of a module is recorded: the open trace, or between traces."""
        session = active_session()
        if session is None or session._recorder.trace is not None:
            return self._current_trace(what, location)
        session.add_model(self._base)
        return session._recorder.compute_on(self.name)

    def _current_trace(self, what: str, location: Location) -> BlockRecorder:
        session = active_session()
        trace = session._recorder.trace if session is not None else None
        if trace is None:
            raise error(
                Reason.MALFORMED_SESSION,
                f"{what} has a value only while the model runs; use it inside a "
                "`with model.trace(...)` block",
                location=location,
            )
        assert trace.trace is not None
        if trace.trace.model != self.name:
            raise error(
                Reason.MALFORMED_SESSION,
                f"{what} is of {self.name}, and this trace runs {trace.trace.model}; use it in a "
                "trace of its own, where values of this one may be written",
                location=location,
            )
        return trace
