"""The model that users hold: its structure and tokenizer, never its weights."""

from __future__ import annotations

import json
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from insitu._base_model import BaseModel
from insitu._config import CONFIG
from insitu._generate import GenerationTracer, Generator, generation_options
from insitu._proxy import as_meta, reference
from insitu._session import Session, Together, active_session
from insitu._shapes import Unknown, applied
from insitu._source import user_location
from insitu._submission import submit
from insitu._tokens import token_rows
from insitu.backends.remote import RemoteBackend
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from insitu._block_recorder import BlockRecorder
    from insitu._generate import Streamer
    from insitu._tokens import Prompt
    from insitu._trace import Tracer
    from insitu.backends import Backend
    from insitu.backends.local import LocalBackend
    from insitu_wire.errors import Location

# A year: what is longer is no deadline.
_MAX_DEADLINE_SECONDS = 365 * 24 * 3600


class LanguageModel(BaseModel):
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
        super().__init__(str(name), rename)
        self.__dict__["_dtype"] = dtype

    _dtype: torch.dtype | None

    def session(
        self,
        *,
        remote: bool = False,
        blocking: bool = True,
        run: bool = True,
        exact: bool = False,
        padding: bool = False,
        checkpoint: bool = False,
        deadline: float | None = None,
    ) -> Session:
        """Opens a session: one request that holds traces.

        Traces that do not need each other share forward passes, with the results of running one by
        one: to the bit in float32 on a CPU for prompts of 12 tokens or more, else to rounding
        (1e-4 in float32).

        Args:
            remote: whether it runs on the server instead of in this process.
            blocking: whether the end of the block waits for it; if not, the session's `submission`
                gives what became of it. Needs `remote=True`.
            run: whether it runs at all; if not, it is recorded, for its `save`.
            exact: whether each trace has a forward pass of its own, as plain transformers runs it.
            padding: whether traces of all lengths may share a pass, in every family of models,
                padded on the left: values differ by rounding (1e-3 in float32).
            checkpoint: whether traces that take gradients keep only what decoder layers are given,
                and run the layers again in the backward pass: less memory, a third more time.
            deadline: how many seconds after the server has accepted it the session ends at the
                latest, with a DeadlineError, whether it waits or runs then. Needs `remote=True`.
        """
        _check_deadline(deadline, remote=remote)
        together = Together(exact=exact, padding=padding, checkpoint=checkpoint)
        if blocking:
            backend = self._remote if remote else self._local
            return Session(self, backend, run=run, together=together, deadline=deadline)
        if not remote:
            raise error(
                Reason.INVALID_CONFIGURATION,
                "blocking=False needs remote=True: a session in this process ends with its block",
                location=user_location(),
            )
        hand_in = partial(submit, self._remote, deadline=deadline)
        return Session(self, self._remote, run=run, submit=hand_in, together=together)

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
        if active_session() is not None:
            return self._open_trace(prompt, None, seed)
        return self._open_trace(prompt, self.session(remote=remote, blocking=blocking), seed)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        max_new_tokens: int,
        remote: bool = False,
        blocking: bool = True,
        seed: int = 0,
        stream: bool = False,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> GenerationTracer:
        """Opens a generation: transformers' `generate` with its cache, with interventions.

            with model.generate("The Eiffel Tower is in", max_new_tokens=5) as tracer:
                for step in tracer.iter[:]:
                    model.model.layers[5].output[0][:, -1] += direction
                ids = tracer.result.save()

        Args:
            prompt: see `trace`.
            max_new_tokens: how many tokens each row gets at most.
            remote: see `trace`.
            blocking: see `trace`.
            seed: of the tokens that are drawn, from 1, as `torch.manual_seed` takes it; by default
                one that torch's own generator gives.
            stream: whether tokens are told as they are chosen, for `submission.tokens()`.
            streamer: takes them as they are chosen, such as `transformers.TextStreamer(tokenizer)`.
            options: min_new_tokens, do_sample, temperature, top_k, top_p, min_p,
                repetition_penalty, no_repeat_ngram_size, eos_token_id, pad_token_id and
                stop_strings, as transformers takes them; what is left out is as the model's own
                generation configuration has it.
        """
        streams = stream or streamer is not None
        generation = generation_options(max_new_tokens, options, streams=streams)
        is_alone = active_session() is None
        if is_alone:
            session = self.session(remote=remote, blocking=blocking)
        else:
            session = self._joined_session()
        return GenerationTracer(
            session,
            self,
            prompt,
            generation,
            owns_session=is_alone,
            seed=seed,
            streamer=streamer,
        )

    def scan(self, prompt: Prompt | None = None) -> Tracer:
        """Opens a trace that is recorded and checked, and does not run: for shapes.

        with model.scan("Hello"):
            hidden_size = model.model.layers[0].output.shape[-1]
        """
        return self._open_trace(prompt, Session(self, self._backend, run=False), 0)

    @property
    def generator(self) -> Generator:
        """What generates, in a `generate` block: its `output` is `tracer.result`."""
        return Generator()

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

    def _loop_items(self, items: Any) -> Any:
        is_known = isinstance(items, list | tuple) and reference(items) is None
        if is_known and items and all(isinstance(x, str) for x in items):
            return [torch.tensor(self.tokenizer(text)["input_ids"]) for text in items]
        return items

    def _add_input(self, block: BlockRecorder, given: Any, location: Location) -> int:
        if reference(given) is not None:
            meta = as_meta(given)
            is_known = isinstance(meta, torch.Tensor) and meta.ndim in (1, 2)
            block.num_rows, block.length = (1, *meta.shape)[-2:] if is_known else (0, 0)
            return block.add_computed_invoke(given, location)
        rows = token_rows(given, lambda: self.tokenizer, location)
        block.num_rows, block.length = len(rows), max(map(len, rows))
        return block.add_invoke(rows)

    def _applied(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return Unknown() if kwargs else applied(self._tree[path], args)


def _check_deadline(deadline: float | None, *, remote: bool) -> None:
    if deadline is None:
        return
    if not remote:
        raise error(
            Reason.INVALID_CONFIGURATION,
            "deadline needs remote=True: a session in this process waits for nobody",
            location=user_location(),
        )
    if not 0 < deadline <= _MAX_DEADLINE_SECONDS:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"deadline is {deadline!r}; it must be a number of seconds above 0 and at most "
            f"{_MAX_DEADLINE_SECONDS:,}",
            location=user_location(),
        )
