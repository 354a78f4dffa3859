"""The steps of a generation at which something is recorded."""

from __future__ import annotations

import ast
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from insitu._last import bind_last
from insitu._origin import Moment, Origin
from insitu._proxy import wrap
from insitu._python_flow import statement_at, stored_names
from insitu._repeat import Body
from insitu._source import user_frame, user_location
from insitu_proto.v1 import intervention_pb2
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

    from insitu._block_recorder import BlockRecorder
    from insitu_wire.errors import Error, Location


class Steps:
    """Chooses steps: `[1:4]`, `[:]`, `[[0, 2]]`, `[3]`."""

    def __init__(self, block: BlockRecorder, max_new_tokens: int) -> None:
        self._block = block
        self._num_steps = max_new_tokens

    def __getitem__(self, key: int | slice | list[int] | tuple[int, ...]) -> StepLoop:
        location = user_location()
        match key:
            case slice():
                steps = self._range(key, location)
            case list() | tuple():
                steps = [self._step(one, location) for one in key]
            case _:
                steps = [self._step(key, location)]
        return StepLoop(self._block, steps, location)

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def _range(self, key: slice, location: Location) -> list[int]:
        for part in (key.start, key.stop):
            if part is not None:
                self._check(part, location, last=self._num_steps)
        if key.step is not None and (not isinstance(key.step, int) or key.step < 1):
            raise self._wrong(key.step, location)
        return list(range(self._num_steps)[key])

    def _step(self, step: Any, location: Location) -> int:
        self._check(step, location, last=self._num_steps - 1)
        return int(step)

    def _check(self, step: Any, location: Location, *, last: int) -> None:
        is_whole = isinstance(step, int) and not isinstance(step, bool)
        if not is_whole or not 0 <= step <= last:
            raise self._wrong(step, location)

    def _wrong(self, step: object, location: Location) -> Error:
        return error(
            Reason.MALFORMED_SESSION,
            f"tracer.iter[...] with {step!r:.40}: this generation has max_new_tokens="
            f"{self._num_steps}, so its steps are 0 to {self._num_steps - 1}, step 0 being the "
            "prompt's; count from the first, and raise max_new_tokens for more",
            location=location,
            maxNewTokens=self._num_steps,
        )


class StepLoop:
    """Some steps, as a `for` loop whose body runs once a step, or a `with` block that runs once."""

    def __init__(self, block: BlockRecorder, steps: list[int], location: Location) -> None:
        self._block = block
        self._steps = steps
        self._location = location
        self._body: Body | None = None
        self._open = ExitStack()

    def __iter__(self) -> Iterator[int]:
        frame = user_frame()
        loop: ast.For | None = statement_at(frame, ast.For)
        return self._run(frame, stored_names(loop.body) if loop is not None else set())

    def _run(self, frame: FrameType, names: set[str]) -> Iterator[int]:
        history = [_bound(frame, names)]
        for step in self._steps:
            with self._block.at_step(step, self._location):
                yield step
            history.append(_bound(frame, names))
        bind_last(frame, self._block, history, self._location)

    def __enter__(self) -> Any:
        if not self._steps:
            raise error(
                Reason.MALFORMED_SESSION,
                "tracer.iter[...] names no step, so its block would never run",
                location=self._location,
            )
        lengths = {bool(step) for step in self._steps}
        first = self._block.at_step(
            self._steps[0], self._location, has_known_length=len(lengths) == 1
        )
        self._open.enter_context(first)
        self._body = Body(self._block, self._steps[0])
        return self._number()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()
        if exc_type is None and self._body is not None:
            self._body.repeat(self._steps[1:], self._location)

    def _number(self) -> Any:
        """Gives the number of the step as a value, for it is another in each."""
        block, location = self._block, self._location
        node_id = block.generated(intervention_pb2.GENERATED_PART_STEP, location)
        recorder = block.session_recorder
        origin = Origin(
            recorder,
            location,
            "the step",
            node_id,
            moment=Moment(block.number),
            scope=recorder.scope,
        )
        return wrap(torch.empty((), dtype=torch.int64, device="meta"), origin)


def _bound(frame: FrameType, names: set[str]) -> dict[str, Any]:
    bound = frame.f_locals
    return {name: bound[name] for name in names if name in bound}
