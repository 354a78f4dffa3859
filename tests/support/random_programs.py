"""Random straight-line programs over activations, as Python source.

A program is drawn line by line, and each line runs in eager torch as soon as it is drawn: so the
next one can be drawn to fit what is there, and a line that torch refuses is left out. What is
multiplied as matrices is made of small integers: other sums round by where in memory they lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st

MAX_ELEMENTS = 2048
_LARGEST = 1e6
_UNKNOWN_SHAPE = re.compile(
    r"\bu\d|> [^()]*\]|mean\(\)\]|== 0|unique|nonzero|_select\(|where\(.*\)\["
)

Reader = Callable[[str], Any]
"""Gives the activation at a module path, or its proxy."""


class Activations:
    """What a model gives at some of its modules, for one prompt after the other.

    Unlike a list of tensors it has a short repr, which hypothesis makes often.
    """

    def __init__(self, prompts: list[Mapping[str, torch.Tensor]]) -> None:
        self.prompts = prompts


class Program:
    """Blocks of lines: one for each trace.

    Values are named v0, v1 and so on; u0, u1 and so on where their shape depends on elements, so
    that nobody can know it before the program runs.
    """

    def __init__(self, activations: list[Mapping[str, torch.Tensor]]) -> None:
        self.blocks: list[list[str]] = []
        self.paths = sorted(activations[0])
        self._activations = activations
        self._models: set[str] = set()
        self.names: dict[str, Any] = {}

    def add_block(self) -> None:
        """Starts the next trace."""
        self.blocks.append([])

    def add(self, line: str) -> None:
        """Adds a line, unless torch refuses it or it makes values that are not small numbers."""
        self.blocks[-1].append(line)
        try:
            run_block([line], self.names, self._reader(len(self.blocks) - 1))
        except (RuntimeError, IndexError, ValueError, TypeError):
            self._take_back()
        else:
            if not all(map(_is_small, self.values().values())):
                self._take_back()

    def add_value(self, expression: str, *, is_new: bool = True) -> None:
        """Adds the line that names the value of an expression.

        Args:
            expression: the expression.
            is_new: whether its memory is sure to be its own, whatever the layout and dtype.
        """
        kind = "u" if _UNKNOWN_SHAPE.search(expression) else "v"
        name = f"{kind}{len(self.values())}"
        used = set(re.findall(r"\b[uv]\d+", expression))
        is_models = not is_new and (not used or not self._models.isdisjoint(used))
        self._models = self._models | {name} if is_models else self._models - {name}
        self.add(f"{name} = {expression}")

    def values(self, *, known_only: bool = False) -> dict[str, torch.Tensor]:
        """Gives all values by name, or only those whose shape is known before the program runs."""
        kinds = "v" if known_only else "uv"
        return {key: value for key, value in self.names.items() if key[0] in kinds}

    def is_writable(self, name: str) -> bool:
        """Whether a value may be written to: not what may be the model's, nor an expanded one."""
        value = self.names[name]
        is_expanded = any(
            step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)
        )
        return not is_expanded and name not in self._models

    def _reader(self, block: int) -> Reader:
        return self._activations[block].__getitem__

    def _take_back(self) -> None:
        """Forgets the last line; what it may have written is undone by running the rest again."""
        self.blocks[-1].pop()
        self.names.clear()
        for number, lines in enumerate(self.blocks):
            run_block(lines, self.names, self._reader(number))

    def __repr__(self) -> str:
        blocks = ("\n".join([f"# trace {n}", *lines]) for n, lines in enumerate(self.blocks))
        return "\n".join(blocks)


def run_block(lines: list[str], names: dict[str, Any], read: Reader) -> None:
    """Runs the lines of one trace on tensors or on proxies."""
    names.update(torch=torch, read=read)
    for line in lines:
        exec(line, names)


def _is_small(value: torch.Tensor) -> bool:
    if value.numel() > MAX_ELEMENTS:
        return False
    return not value.numel() or bool(value.double().abs().max() < _LARGEST)


@st.composite
def programs(draw: Callable[..., Any], activations: Activations, max_lines: int) -> Program:
    """Draws programs of as many blocks as there are activations."""
    program = Program(activations.prompts)
    for _ in activations.prompts:
        program.add_block()
        for _ in range(draw(st.integers(1, 3))):
            _read(draw, program)
        for _ in range(draw(st.integers(1, max_lines))):
            make = draw(st.sampled_from(_LINES))
            make(draw, program)
    return program


def _pick(draw: Any, program: Program, *, known_only: bool = False) -> str:
    return str(draw(st.sampled_from(list(program.values(known_only=known_only)))))


def _read(draw: Any, program: Program) -> None:
    path = draw(st.sampled_from(program.paths))
    part = draw(st.sampled_from(["", ".clone()", ".clone()", "[:, -1]", "[..., :8].clone()"]))
    program.add_value(f"read({path!r}){part}", is_new=part.endswith("clone()"))


def _elementwise(draw: Any, program: Program) -> None:
    call = draw(
        st.sampled_from(
            ["torch.abs({})", "-{}", "{}.sigmoid()", "torch.tanh({})", "{}.floor()", "{}.sign()",
             "torch.relu({})", "{}.square()", "{}.cos()", "~({} > 0)", "torch.isfinite({})",
             "torch.clamp({}, -1, 1)", "{}.clamp(min=0.5)", "torch.nn.functional.gelu({})",
             "2 - {}", "{} / 3", "{} // 2", "{} % 5", "1 / (1 + {}.abs())", "{} ** 2", "{} * 0.5",
             "torch.where({} > 0, 1.5, -1.0)", "{}.round(decimals=1)", "{}.clone()"]
        )
    )  # fmt: skip
    program.add_value(call.format(_pick(draw, program)))


def _binary(draw: Any, program: Program) -> None:
    first = _pick(draw, program)
    second = _fitting(draw, program, first)
    call = draw(
        st.sampled_from(
            ["{} + {}", "{} - {}", "{} * {}", "{} < {}", "{} >= {}", "{} == {}", "{} != {}",
             "torch.maximum({}, {})", "torch.minimum({}, {})", "({} > 0) & ({} > 0)",
             "({} > 0) ^ ({} < 0)", "{} | {}", "torch.where({0} > 0, {0}, {1})",
             "torch.where({1} > {0}, {1}, 0)", "torch.add({}, {}, alpha=2)",
             "torch.lerp({}, {}, 0.5)",
             "{}.expand_as({})", "{}.type_as({})", "{}.view_as({})", "torch.logical_or({}, {})"]
        )
    )  # fmt: skip
    program.add_value(call.format(first, second), is_new="_as(" not in call)


def _fitting(draw: Any, program: Program, other: str) -> str:
    """Picks a value that broadcasts with another; that one itself does."""
    shape = program.names[other].shape

    def fits(value: torch.Tensor) -> bool:
        pairs = zip(reversed(shape), reversed(value.shape), strict=False)
        return all(a == b or 1 in (a, b) for a, b in pairs)

    return str(
        draw(st.sampled_from([name for name, value in program.values().items() if fits(value)]))
    )


def _dim(draw: Any, program: Program, name: str) -> int:
    ndim = program.names[name].ndim
    return int(draw(st.integers(-ndim, ndim - 1))) if ndim else 0


def _reduction(draw: Any, program: Program) -> None:
    name = _pick(draw, program)
    call = draw(
        st.sampled_from(
            ["{}.sum({})", "{}.mean({}, keepdim=True)", "{}.amax({})", "torch.argmax({}, {})",
             "torch.any({} > 0, {})", "{}.all({})", "{}.cumsum({})", "{}.prod()", "{}.sum()",
             "torch.softmax({}, {})", "{}.norm(dim={})", "{}.std({})", "{}.argmin()",
             "{}.max({}).values", "{}.min({}).indices", "torch.max({})", "{}.median({})[0]",
             "torch.count_nonzero({}, {})", "{}.logsumexp({})", "torch.cummax({}, {})[1]",
             "{}.diff(dim={})", "{}.sum({}, dtype=torch.float64)"]
        )
    )  # fmt: skip
    program.add_value(call.format(name, _dim(draw, program, name)))


def _view(draw: Any, program: Program) -> None:
    name = _pick(draw, program, known_only=True)
    call = draw(
        st.sampled_from(
            ["{0}.transpose({1}, {2})", "{0}.movedim({1}, {2})", "{0}.mT", "{0}.flatten()",
             "{0}.unsqueeze({1})", "{0}.squeeze()", "{0}.reshape(-1, 2)", "{0}.view(-1)",
             "{0}.view(2, -1)", "{0}.contiguous()", "{0}.chunk(2, {1})[0]", "{0}.unbind({1})[-1]",
             "{0}.split(3, {1})[-1]", "{0}.narrow({1}, 0, 1)", "{0}.select({1}, -1)",
             "{0}.unfold({1}, 2, 1)", "{0}.diagonal(0, {1}, {2})",
             "{0}[None].expand(2, *{0}.shape)",
             "{0}.flip({1})", "{0}.roll(1, {1})", "{0}.permute(*reversed(range({0}.ndim)))",
             "{0}.tile(2)", "{0}.swapaxes({1}, {2})", "{0}.reshape({0}.shape[::-1])",
             "{0}.repeat_interleave(2, {1})", "{0}.unflatten({1}, (2, -1))", "{0}.detach()"]
        )
    )  # fmt: skip
    dims = (_dim(draw, program, name), _dim(draw, program, name))
    program.add_value(call.format(name, *dims), is_new=False)


def _index(draw: Any, program: Program, name: str) -> str:
    """Draws what stands in the brackets behind a value."""
    shape = program.names[name].shape
    if draw(st.integers(0, 9)) == 0:
        return f"{name} > {draw(st.sampled_from(['0', f'{name}.double().mean()', '100']))}"
    parts = [_index_part(draw, size) for size in shape[: draw(st.integers(0, len(shape)))]]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), "None")
    if draw(st.booleans()):
        parts.append("...")
        if len(parts) <= len(shape) and shape:
            parts.append(_index_part(draw, shape[-1]))
    return ", ".join(parts) or "..."


def _index_part(draw: Any, size: int) -> str:
    place = st.integers(-size, max(size - 1, 0))
    kind = draw(st.integers(0, 9))
    if kind < 3:
        return str(draw(place))
    if kind < 7:
        start, stop = draw(st.none() | place), draw(st.none() | place)
        step = draw(st.sampled_from(["", ":2"]))
        return f"{'' if start is None else start}:{'' if stop is None else stop}{step}"
    if kind == 7:
        return f"torch.tensor({draw(st.lists(place, min_size=1, max_size=4))})"
    if kind == 8:
        return str(draw(st.lists(place, min_size=1, max_size=3)))
    return f"torch.arange({size}) % 2 == 0"


def _indexing(draw: Any, program: Program) -> None:
    name = _pick(draw, program)
    program.add_value(f"{name}[{_index(draw, program, name)}]", is_new=False)


def _matmul(draw: Any, program: Program) -> None:
    first = _pick(draw, program)
    call = draw(
        st.sampled_from(
            ["{0} @ {0}.mT", "torch.matmul({0}, {0}.mT)", "{0}.flatten() @ {0}.flatten()",
             "torch.einsum('...i,...i->...', {0}, {1})", "torch.kron({0}, {1}.flatten()[:4])",
             "torch.outer({0}.flatten()[:8], {1}.flatten()[:8])", "{0} @ {1}", "{0} @ {1}.mT",
             "torch.nn.functional.linear({0}, {0}.flatten(0, -2))"]
        )
    )  # fmt: skip
    operands = (first, _fitting(draw, program, first))
    small = (f"{name}.clamp(-9, 9).round()" for name in operands)
    program.add_value(call.format(*small))


def _joining(draw: Any, program: Program) -> None:
    first = _pick(draw, program, known_only=True)
    second = _fitting(draw, program, first)
    dim = _dim(draw, program, first)
    call = draw(
        st.sampled_from(
            ["torch.cat([{0}, {1}], {2})", "torch.stack([{0}, {1}], {2})",
             "torch.stack({0}.unbind({2}))", "torch.hstack(({0}, {0}))",
             "torch.cat({0}.split(2, {2}), {2})", "torch.cat([{0}, {0}[:1]])",
             "torch.stack(list({0}))", "sum({0}.chunk(2, {2}))", "torch.vstack(({0}, {1}))"]
        )
    )  # fmt: skip
    program.add_value(call.format(first, second, dim))


def _ordering(draw: Any, program: Program) -> None:
    name = _pick(draw, program)
    call = draw(
        st.sampled_from(
            ["{}.topk(1, {}).values", "torch.topk({}, 2, {})[1]", "{}.sort({})[0]",
             "torch.sort({}, {}, stable=True).indices", "{}.argsort({}, stable=True)",
             "{}.kthvalue(1, {})[0]", "torch.unique({})",
             "torch.bucketize({}, torch.tensor([-1., 0., 1.]))",
             "{0}.gather({1}, {0}.argsort({1}, stable=True))", "torch.nonzero({0} > 0)",
             "torch.masked_select({0}, {0} > 0)", "torch.where({0} > 0)[0]"]
        )
    )  # fmt: skip
    program.add_value(call.format(name, _dim(draw, program, name)))


def _conversion(draw: Any, program: Program) -> None:
    call = draw(
        st.sampled_from(
            ["{}.long()", "{}.double()", "{}.bfloat16()", "{}.to(torch.float16)", "{}.bool()",
             "{}.float()", "{}.int()", "{}.to(dtype=torch.float32)", "{}.to('cpu')",
             "torch.zeros_like({})", "torch.ones_like({}, dtype=torch.int64)",
             "torch.full_like({}, 2.5)", "{0}.new_zeros({0}.shape)",
             "torch.tensor([[1.0], [2.0]]) * {}",
             "torch.arange(len({})) + {}.sum()"]
        )
    )  # fmt: skip
    name = _pick(draw, program, known_only=True)
    program.add_value(call.format(name, name), is_new=False)


def _writing(draw: Any, program: Program) -> None:
    names = [name for name in program.values(known_only=True) if program.is_writable(name)]
    if not names:
        return
    target = draw(st.sampled_from(names))
    source = _fitting(draw, program, target)
    place = f"{target}[{_index(draw, program, target)}]"
    call = draw(
        st.sampled_from(
            ["{p} = {n}", "{p} = {s}", "{p} += {n}", "{p} *= {n}", "{p} -= {s}", "{p} = {p} * 2",
             "{p} = {p}.flip(-1)", "{p}.zero_()", "{p}.add_({n})", "{t} += {s}", "{t} *= {s}",
             "{t}.copy_({s})", "{t}.clamp_(-1, 1)", "{t}.neg_()", "{t}.masked_fill_({t} > 0, {n})",
             "{t}.mT.mul_({n})", "{t}.view(-1)[0] = {n}", "{t}.flatten()[1:3] = {n}",
             "{t}.unbind(0)[0].fill_({n})", "{t}.chunk(2, -1)[1].sub_({n})",
             "{t}.diagonal().fill_({n})",
             "{t}[:1] = {s}[-1:]", "{t}.index_fill_(0, torch.tensor([0]), {n})", "{t}.cumsum_(0)",
             "{t}.transpose(0, -1)[0] = {n}", "{t}.reshape(-1)[::2].add_({n})", "{t} &= ({s} > 0)",
             "{t}.lerp_({s}, 0.5)", "{t}.scatter_(0, {t}.argsort(0, stable=True), {n})",
             "{t}.narrow(0, 0, 1).copy_({s}[:1])", "{t}.abs_()"]
        )
    )  # fmt: skip
    number = draw(st.sampled_from(["0", "1", "-2", "0.5", "True"]))
    program.add(call.format(t=target, p=place, s=source, n=number))


_LINES: list[Any] = [
    _read, _elementwise, _binary, _binary, _reduction, _view, _view, _indexing, _indexing, _matmul,
    _joining, _ordering, _conversion, _writing, _writing, _writing, _writing,
]  # fmt: skip
