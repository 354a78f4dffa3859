"""Generation: one trace of many steps, each a forward pass that gives every row a token."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Protocol

import torch

from insitu._origin import Moment, Origin
from insitu._proxy import as_meta, wrap
from insitu._session import active_session
from insitu._shapes import Unknown
from insitu._source import user_location
from insitu._steps import Steps
from insitu._trace import Tracer
from insitu_proto.v1 import intervention_pb2, trace_pb2
from insitu_wire.errors import Reason, error
from insitu_wire.limits import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from insitu._base_model import BaseModel
    from insitu._block_recorder import BlockRecorder
    from insitu._proxy import Proxy
    from insitu._session import Session
    from insitu._steps import StepLoop
    from insitu_wire.errors import Error, Location

_IDS, _NUM_STEPS = (
    intervention_pb2.GENERATED_PART_TOKEN_IDS,
    intervention_pb2.GENERATED_PART_NUM_STEPS,
)


class Streamer(Protocol):
    """Takes tokens as they are chosen; transformers' streamers are such."""

    def put(self, value: torch.Tensor) -> None:
        """Takes the token ids of the prompts, [rows, length], then those of each step, [rows]."""

    def end(self) -> None:
        """Is told that no more come."""


class GenerationTracer(Tracer):
    """One generation, with interventions at chosen steps: step 0 is the prompt's pass."""

    def __init__(
        self,
        session: Session,
        model: BaseModel,
        prompt: Any,
        generation: trace_pb2.Generation,
        *,
        owns_session: bool,
        seed: int,
        streamer: Streamer | None,
    ) -> None:
        super().__init__(session, model, prompt, owns_session=owns_session, seed=seed)
        self._generation = generation
        self._streamer = streamer

    @property
    def iter(self) -> Steps:
        """The steps at which what is recorded happens: `for step in tracer.iter[1:4]:`.

        `tracer.iter[:]` are all, `tracer.iter[[0, 2]]` some, `tracer.iter[3]` is one. The body of
        the loop runs here once a step, with its number; what it records happens if that step runs.
        `with tracer.iter[1:4] as step:` runs the body once, and `step` is a value of the session.
        """
        return Steps(self._open("iter"), self._generation.max_new_tokens)

    def all(self) -> StepLoop:
        """All steps: `for step in tracer.all():`, or `with tracer.all():`."""
        return self.iter[:]

    def next(self) -> None:
        """Goes on to the next step: what is recorded from here on happens there."""
        self._open("next").next_step(user_location())

    def stop(self, *, when: object = None) -> None:
        """Ends the trace, or the generation where a value is true.

        Args:
            when: a truth value of the session, one for all rows or one a row; in an invoke, of its
                rows. The step that it is of is their last: its token still counts. Without it the
                generation ends here at once, and what is defined below does not run.
        """
        if when is None:
            super().stop()
            return
        location = user_location()
        meta = as_meta(when)
        block = self._open("stop")
        if isinstance(meta, torch.Tensor) and block.num_rows:
            allowed = (1, block.num_rows)
            if meta.numel() not in allowed:
                raise error(
                    Reason.SHAPE_MISMATCH,
                    f"stop(when=...) takes one truth value, or one for each of {block.num_rows} "
                    f"rows, and this tensor is {list(meta.shape)}; reduce it with .any() or .all()",
                    location=location,
                )
        block.end_generation(when, location)

    @property
    def result(self) -> Proxy:
        """The token ids of the rows, prompt and what was generated, [rows, length].

        Rows that end before others are filled with padding, as transformers does it.
        """
        ids: Proxy = self._generated(_IDS, "result", Unknown())
        return ids

    @property
    def num_steps(self) -> Proxy:
        """How many steps ran: fewer than max_new_tokens where all rows ended before."""
        counted = torch.empty((), dtype=torch.int64, device="meta")
        number: Proxy = self._generated(_NUM_STEPS, "num_steps", counted)
        return number

    def cache(self, *args: Any, **kwargs: Any) -> Any:
        """Not while generating: read what you need in `for step in tracer.iter[...]:`."""
        del args, kwargs
        raise error(
            Reason.UNSUPPORTED_FEATURE,
            "a cache is of one forward pass, and this trace generates; read what you need in `for "
            "step in tracer.iter[...]:`, or cache a trace over the ids that were generated",
            location=user_location(),
        )

    def _generated(
        self, part: intervention_pb2.GeneratedPart.ValueType, name: str, shape: Any
    ) -> Any:
        location = user_location()
        block = self._open(name)
        with block.outside_steps():
            node_id = block.generated(part, location)
        at_end = Moment(block.number, block.end_of_steps, f"tracer.{name} ({location})")
        recorder = block.session_recorder
        scope = recorder.scope
        return wrap(
            shape, Origin(recorder, location, f"tracer.{name}", node_id, moment=at_end, scope=scope)
        )

    def _open_recorder(self) -> BlockRecorder:
        recorder = self._session._recorder
        block = recorder.open_trace(self._model.name, self._seed, self._generation)
        block.end_of_steps = self._generation.max_new_tokens * self._model._tree.num_moments + 1
        if self._streamer is not None:
            recorder.streamers[recorder.num_traces] = self._streamer
        return block


class Generator:
    """What generates: `model.generator.output` is `tracer.result`, as in nnsight."""

    @property
    def output(self) -> Proxy:
        """The token ids of the rows, prompt and what was generated, [rows, length]."""
        session = active_session()
        tracer = session._tracer if session is not None else None
        if not isinstance(tracer, GenerationTracer):
            raise error(
                Reason.MALFORMED_SESSION,
                "model.generator.output is there in a `with model.generate(...)` block only",
                location=user_location(),
            )
        return tracer.result


def generation_options(
    max_new_tokens: object, options: Mapping[str, object], *, streams: bool
) -> trace_pb2.Generation:
    """Checks the options of a generation.

    Raises:
        InvalidTraceError: MALFORMED_SESSION for one that is unknown or has a value that it can not.
    """
    location = user_location()
    message = trace_pb2.Generation(streams=streams)
    message.max_new_tokens = _checked("max_new_tokens", max_new_tokens, location)
    for name, value in options.items():
        if name not in _CHECKS:
            raise _unknown(name, location)
        if value is None and name != "eos_token_id":
            continue
        checked = _checked(name, value, location)
        if name == "eos_token_id":
            message.eos_token_ids.SetInParent()
            message.eos_token_ids.token_ids.extend(checked)
        elif name == "stop_strings":
            message.stop_strings.extend(checked)
        else:
            setattr(message, name, checked)
    return message


def _checked(name: str, value: Any, location: Location) -> Any:
    check, allowed = _CHECKS[name]
    if (fitting := check(value)) is None:
        raise error(
            Reason.MALFORMED_SESSION,
            f"{name}={value!r:.80}; it is {allowed}",
            location=location,
            option=name,
        )
    return fitting


def _unknown(name: str, location: Location) -> Error:
    near = difflib.get_close_matches(name, _CHECKS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return error(
        Reason.MALFORMED_SESSION,
        f"generate has no option {name!r}; {hint}it takes {', '.join(_CHECKS)}, and remote, "
        "blocking, seed, stream and streamer",
        location=location,
        option=name,
    )


def _whole(lowest: int, highest: int = 2**31) -> Callable[[Any], int | None]:
    def check(value: Any) -> int | None:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return value if is_whole and lowest <= value <= highest else None

    return check


def _number(fits: Callable[[float], bool]) -> Callable[[Any], float | None]:
    def check(value: Any) -> float | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and fits(value) else None

    return check


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _token_ids(value: Any) -> list[int] | None:
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    return list(ids) if all(_whole(0)(one) is not None for one in ids) else None


def _texts(value: Any) -> list[str] | None:
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list | tuple) and all(isinstance(one, str) and one for one in texts)
    return list(texts) if is_list else None


_CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "max_new_tokens": (_whole(1, MAX_NEW_TOKENS), f"a whole number from 1 to {MAX_NEW_TOKENS:,}"),
    "min_new_tokens": (_whole(0), "a whole number from 0"),
    "do_sample": (_truth, "True or False"),
    "temperature": (_number(lambda x: x > 0), "a number above 0"),
    "top_k": (_whole(0), "a whole number from 0, where 0 means all tokens"),
    "top_p": (_number(lambda x: 0 < x <= 1), "a number above 0, at most 1"),
    "min_p": (_number(lambda x: 0 <= x <= 1), "a number from 0 to 1"),
    "repetition_penalty": (_number(lambda x: x > 0), "a number above 0"),
    "no_repeat_ngram_size": (_whole(0), "a whole number from 0"),
    "eos_token_id": (_token_ids, "a token id, a list of them, or None for no end"),
    "pad_token_id": (_whole(0), "a token id"),
    "stop_strings": (_texts, "a text or a list of texts"),
}
