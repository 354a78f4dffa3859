"""The model that users hold: its structure and tokenizer, never its weights."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from insitu._config import CONFIG
from insitu._edits import Edit
from insitu._envoy import Envoy
from insitu._session import Session, active_session, detached
from insitu._source import user_location
from insitu._structure import ModuleTree
from insitu._submission import submit
from insitu._trace import Tracer
from insitu.backends.remote import RemoteBackend
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from insitu._recorder import BlockRecorder
    from insitu._tokens import Prompt
    from insitu.backends import Backend
    from insitu.backends.local import LocalBackend
    from insitu_proto.v1 import model_pb2
    from insitu_wire.errors import Location


class LanguageModel(Envoy):
    """A causal language model, to be traced where it runs.

    Its structure and tokenizer come from the server, or for a local path from that folder. Weights
    are loaded only if a session runs in this process, that is without `remote=True`.

    Args:
        name: a model that the server serves, the path of a folder, or a Hugging Face hub id.
        dtype: element type for sessions in this process; by default as stored.
        rename: further names for modules: `{"model.layers": "layers"}` gives `model.layers` also
            as `layers` of the model, `{"self_attn": "attn"}` every `self_attn` also as `attn`.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(self, "")
        self.__dict__.update(name=str(name), _dtype=dtype, _rename=rename, _edits=())

    name: str
    """Name by which the server knows the model, or the path of its folder."""
    _dtype: torch.dtype | None
    _rename: Mapping[str, str] | None
    _edits: tuple[Edit, ...]

    def session(self, *, remote: bool = False, blocking: bool = True, run: bool = True) -> Session:
        """Opens a session: one request that holds traces.

        Args:
            remote: whether it runs on the server instead of in this process.
            blocking: whether the end of the block waits for it; if not, the session's `submission`
                gives what became of it. Needs `remote=True`.
            run: whether it runs at all; if not, it is recorded, for its `save`.
        """
        if blocking:
            return Session(self, self._remote if remote else self._local, run=run)
        if not remote:
            raise error(
                Reason.INVALID_CONFIGURATION,
                "blocking=False needs remote=True: a session in this process ends with its block",
                location=user_location(),
            )
        return Session(self, self._remote, run=run, submit=partial(submit, self._remote))

    def trace(
        self,
        prompt: Prompt | None = None,
        *,
        remote: bool = False,
        blocking: bool = True,
        seed: int = 0,
    ) -> Tracer:
        """Opens a trace: one forward pass over a prompt, with interventions.

        Args:
            prompt: text, token ids, chat messages, a list of these (rows of one batch), a tensor of
                ids [rows, length], what the tokenizer returned, or a value of the session that is
                such ids. Without one, invokes in the block give the rows.
            remote: whether it runs on the server; inside a session, the session decides.
            blocking: whether the end of the block waits for it; inside a session, the session
                decides.
            seed: of the random numbers that the block draws, from 1; by default one that torch's
                own generator gives.
        """
        session = active_session()
        if session is None:
            session = self.session(remote=remote, blocking=blocking)
            return Tracer(session, self, prompt, owns_session=True, seed=seed)
        session.add_model(self._base)
        return Tracer(session, self, prompt, owns_session=False, seed=seed)

    def scan(self, prompt: Prompt | None = None) -> Tracer:
        """Opens a trace that is recorded and checked, and does not run: for shapes.

        with model.scan("Hello"):
            hidden_size = model.model.layers[0].output.shape[-1]
        """
        session = Session(self, self._backend, run=False)
        return Tracer(session, self, prompt, owns_session=True)

    @contextmanager
    def edit(self, *, inplace: bool = False) -> Iterator[LanguageModel]:
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

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, as transformers makes it."""
        from transformers import AutoTokenizer

        folder = self._backend.tokenizer_folder(self._description)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
        return tokenizer

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration, as transformers makes it."""
        from transformers import AutoConfig

        values = json.loads(self._description.config_json)
        config: PretrainedConfig = AutoConfig.for_model(**values)
        return config

    @property
    def _base(self) -> LanguageModel:
        """The model that this is an edited copy of; itself if it is none."""
        base: LanguageModel = self.__dict__.get("_edited_from", self)
        return base

    def _copy(self) -> LanguageModel:
        """Gives another object for the same model, with the same edits and backends."""
        copy = LanguageModel.__new__(type(self))
        copy.__dict__.update(self.__dict__, _edited_from=self._base, _model=copy)
        return copy

    def _apply_edits(self, block: BlockRecorder) -> None:
        for edit in self._edits:
            edit.apply(block)

    @cached_property
    def _remote(self) -> RemoteBackend:
        return RemoteBackend(CONFIG)

    @cached_property
    def _local(self) -> LocalBackend:
        # Only who runs models in this process needs what a shard needs.
        from insitu.backends.local import LocalBackend

        return LocalBackend(self.name, dtype=self._dtype)

    @property
    def _backend(self) -> Backend:
        """Who describes the model: the running session's backend, a local folder, or the server."""
        session = active_session()
        if session is not None:
            return self._remote if session.is_remote else self._local
        is_folder = (Path(self.name).expanduser() / "config.json").is_file()
        return self._remote if CONFIG.has_endpoint and not is_folder else self._local

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
