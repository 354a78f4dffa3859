"""The model that users hold: its structure and tokenizer, never its weights."""

from __future__ import annotations

import json
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from insitu._config import CONFIG
from insitu._envoy import Envoy
from insitu._session import Session, Tracer, active_session
from insitu._source import user_location
from insitu._structure import ModuleTree
from insitu._submission import submit
from insitu._tokens import token_rows
from insitu.backends.remote import RemoteBackend
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from insitu._recorder import TraceRecorder
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
    """

    def __init__(self, name: str, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(self, "")
        self.__dict__["name"] = str(name)
        self.__dict__["_dtype"] = dtype

    name: str
    """Name by which the server knows the model, or the path of its folder."""
    _dtype: torch.dtype | None

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

    def trace(self, prompt: Prompt, *, remote: bool = False, blocking: bool = True) -> Tracer:
        """Opens a trace: one forward pass over a prompt, with interventions.

        Args:
            prompt: text, token ids, a list of either (rows of one batch), a tensor of ids
                [rows, length], or what the tokenizer returned.
            remote: whether it runs on the server; inside a session, the session decides.
            blocking: whether the end of the block waits for it; inside a session, the session
                decides.
        """
        session = active_session()
        if session is None:
            session = self.session(remote=remote, blocking=blocking)
            return Tracer(session, self._rows(prompt, session.backend), owns_session=True)
        if session.model is not self:
            raise error(
                Reason.UNSUPPORTED_FEATURE,
                f"this session is over {session.model.name}, and this version of insitu runs a "
                f"session over one model; trace {self.name} in a session of its own",
                location=user_location(),
            )
        return Tracer(session, self._rows(prompt, session.backend), owns_session=False)

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

    def _rows(self, prompt: Prompt, backend: Backend) -> list[list[int]]:
        return token_rows(prompt, lambda: self.tokenizer, user_location())

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
            return session.backend
        is_folder = (Path(self.name).expanduser() / "config.json").is_file()
        return self._remote if CONFIG.has_endpoint and not is_folder else self._local

    @cached_property
    def _description(self) -> model_pb2.ModelDescription:
        return self._backend.describe(self.name)

    @cached_property
    def _tree(self) -> ModuleTree:
        return ModuleTree(self._description)

    def _current_trace(self, what: str, location: Location) -> TraceRecorder:
        session = active_session()
        trace = session.current_trace if session is not None else None
        if trace is None:
            raise error(
                Reason.MALFORMED_SESSION,
                f"{what} has a value only while the model runs; use it inside a "
                "`with model.trace(...)` block",
                location=location,
            )
        return trace
