"""Envoys: they stand for the modules of a model that is somewhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu._block_proxy import BlockProxy
from insitu._origin import Moment, Origin, check_in_time, latest
from insitu._proxy import as_meta, proxies_in, wrap
from insitu._shapes import Unknown, check_fits, structure
from insitu._source import user_location
from insitu._structure import RESIDUAL
from insitu_proto.v1 import intervention_pb2
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from insitu._base_model import BaseModel
    from insitu._block_recorder import BlockRecorder
    from insitu_wire.errors import Location

# Of an attention that shows its heads.
_SIZES = {"num_heads": 0, "head_dim": 1}
_SIDES = {
    "input": intervention_pb2.HOOK_SIDE_INPUT,
    "inputs": intervention_pb2.HOOK_SIDE_INPUTS,
    "output": intervention_pb2.HOOK_SIDE_OUTPUT,
}


class Envoy:
    """Stands for one module: its children are attributes, its values are read and written.

    Inside a trace `output` is what the module returns, `input` its first argument, and `inputs` all
    of them as `(positional, keyword)`. Assigning to one replaces it in the forward pass; assigning
    to a part of one changes that part.
    """

    def __init__(self, model: BaseModel, path: str, call_index: int = 0) -> None:
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "_call_index", call_index)

    _model: BaseModel
    _call_index: int
    path: str
    """Module path, as in `named_modules()`."""

    @property
    def output(self) -> Any:
        """What the module returns; of a decoder layer its hidden state, [batch, length, hidden]."""
        return self._read("output")

    @output.setter
    def output(self, value: Any) -> None:
        if self._model._tree[self.path].is_block and isinstance(value, tuple) and len(value) == 1:
            (value,) = value
        self._write("output", value)

    @property
    def input(self) -> Any:
        """The first argument that the module is called with."""
        return self._read("input")

    @input.setter
    def input(self, value: Any) -> None:
        self._write("input", value)

    @property
    def inputs(self) -> Any:
        """All arguments that the module is called with: (positional, keyword)."""
        return self._read("inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._write("inputs", value)

    @property
    def calls(self) -> Calls:
        """The calls of the module in one forward pass, of which `output` is that of the first.

        `calls[1].output` is what the second returns.
        """
        return Calls(self)

    def next(self) -> Envoy:
        """Goes on to the module's next step of a generation, for what is recorded from here on."""
        location = user_location()
        self._trace(".next()", location).next_step(location, self.path)
        return self

    def skip(self, value: Any) -> None:
        """Has the module not run in this forward pass, and return a value in its place.

        Args:
            value: what it returns; for a decoder layer its hidden state. It must be there when the
                pass comes to the module.
        """
        location = user_location()
        trace = self._trace(".skip", location)
        if trace.invoke:
            raise error(
                Reason.UNSUPPORTED_FEATURE,
                "a module is skipped for all rows of the batch or for none; skip it outside of the "
                "invokes of the trace",
                location=location,
            )
        if self._model._tree[self.path].is_block and isinstance(value, tuple) and len(value) == 1:
            (value,) = value
        self._check_in_time(value, trace, self._place(trace, is_input=True), location)
        name = self._name("output", trace)
        check_fits(self._shapes("output", trace), as_meta(value), name, location)
        trace.skip(self.path, self._call_index, value, location)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Applies the module to values of the session, without firing its hook points."""
        location = user_location()
        block = self._model._current_block(f"{self.path or 'model'}(...)", location)
        node_id = block.module_call(self.path, args, kwargs, location)
        used = (proxy._origin for proxy in proxies_in((args, kwargs)))
        recorder = block.session_recorder
        origin = Origin(
            recorder,
            location,
            f"{self.path}(...)",
            node_id,
            moment=latest(used, block.number),
            scope=recorder.scope,
        )
        shapes = self._model._applied(self.path, as_meta(args), as_meta(kwargs))
        result: torch.Tensor = wrap(shapes, origin)
        return result

    def get(self, path: str) -> Envoy:
        """Gives the envoy of a module below this one by its path, such as "layers.3.mlp"."""
        full = self._model._tree.find(self.path, path)
        if full is None:
            wanted = f"{self.path}.{path}" if self.path else path
            raise self._model._tree.unknown(wanted, user_location())
        return Envoy(self._model, full)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in RESIDUAL and self._model._tree.is_block(self.path):
            return self.input if name == "resid_pre" else self.output[0]
        if name in _SIZES and (sizes := self._model._tree.head_sizes(self.path)):
            return sizes[_SIZES[name]]
        envoy = self.get(name)
        return envoy.output if self._model._tree[envoy.path].is_point else envoy

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RESIDUAL and self._model._tree.is_block(self.path):
            name = RESIDUAL[name]
        elif point := self._model._tree.point(self.path, name):
            Envoy(self._model, point).output = value
            return
        if not isinstance(getattr(type(self), name, None), property):
            raise error(
                Reason.UNKNOWN_MODULE_PATH,
                f"{name!r} of {self.path or 'the model'} can not be assigned; assign to .output, "
                ".input or .inputs of a module",
                location=user_location(),
            )
        super().__setattr__(name, value)

    def __getitem__(self, index: int | slice) -> Any:
        names = self._model._tree.children(self.path)
        if isinstance(index, slice):
            return [self.get(name) for name in names[index]]
        if not -len(names) <= index < len(names):
            raise self._model._tree.unknown(f"{self.path}.{index}", user_location())
        return self.get(names[index])

    def __iter__(self) -> Iterator[Envoy]:
        return iter(self[:])

    def __len__(self) -> int:
        return len(self._model._tree.children(self.path))

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._model._tree.names(self.path)]

    def __repr__(self) -> str:
        return self._model._tree.render(self.path)

    def _read(self, side: str) -> Any:
        location = user_location()
        trace = self._trace(f".{side}", location)
        node_id = trace.read(self._hook_point(side, trace), location)
        name = self._name(side, trace)
        place = self._place(trace, is_input=side != "output")
        moment = Moment(trace.number, place, f"{name} ({location})", written_by=place)
        recorder = trace.session_recorder
        # A read does not wait for conditions, but stands where steps may not run.
        scope = recorder.scope
        origin = Origin(recorder, location, name, node_id, moment=moment, scope=scope)
        is_block = side == "output" and self._model._tree[self.path].is_block
        return wrap(self._shapes(side, trace), origin, BlockProxy if is_block else None)

    def _write(self, side: str, value: Any) -> None:
        location = user_location()
        trace = self._trace(f".{side}", location)
        place = self._place(trace, is_input=side != "output")
        self._check_in_time(value, trace, place, location)
        check_fits(self._shapes(side, trace), as_meta(value), self._name(side, trace), location)
        trace.write(self._hook_point(side, trace), value, location)

    def _name(self, side: str, trace: BlockRecorder) -> str:
        call = f".calls[{self._call_index}]" if self._call_index else ""
        step = f" at step {trace.step_of(self.path)}" if trace.max_new_tokens else ""
        return f"{self.path or 'model'}{call}.{side}{step}"

    def _place(self, trace: BlockRecorder, *, is_input: bool) -> int:
        tree = trace.tree or self._model._tree
        place = tree.place(self.path, is_input=is_input, call_index=self._call_index)
        return place and place + trace.step_of(self.path) * tree.num_moments

    def _check_in_time(
        self, value: Any, trace: BlockRecorder, place: int, location: Location
    ) -> None:
        used = proxies_in((value, trace.conditions))
        check_in_time(latest((proxy._origin for proxy in used), trace.number), place, location)

    def _shapes(self, side: str, trace: BlockRecorder) -> Any:
        module = (trace.tree or self._model._tree)[self.path]
        step = trace.step_of(self.path)
        batch = (trace.num_rows, trace.length_at(step))
        # After the first step, points inside of attention have the keys of all tokens so far.
        if not all(batch) or self._call_index or (step and module.is_point):
            return Unknown()
        if side == "output":
            return structure(module.output, *batch)
        args, kwargs = structure(module.args, *batch), structure(module.kwargs, *batch)
        if side == "inputs":
            return args, kwargs
        if isinstance(args, Unknown) or not (args or kwargs):
            return Unknown()
        return args[0] if args else next(iter(kwargs.values()))

    def _hook_point(self, side: str, trace: BlockRecorder) -> intervention_pb2.HookPoint:
        return intervention_pb2.HookPoint(
            module_path=self.path,
            side=_SIDES[side],
            call_index=self._call_index,
            invoke=trace.invoke,
            step=trace.step_of(self.path),
        )

    def _trace(self, what: str, location: Location) -> BlockRecorder:
        return self._model._current_trace(f"{self.path or 'model'}{what}", location)


class Calls:
    """The calls of a module in one forward pass, by number from 0."""

    def __init__(self, envoy: Envoy) -> None:
        self._envoy = envoy

    def __getitem__(self, index: int) -> Envoy:
        if index < 0:
            raise IndexError(
                "how often a module is called shows only when it runs; count its calls from 0"
            )
        return Envoy(self._envoy._model, self._envoy.path, index)
