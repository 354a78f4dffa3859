"""Plain Python `if` and `for` over values that are known only when the session runs.

Python asks such a value for its truth, or for its items. Then the statement that asks is looked up
in the source. Its body runs once, as it stands, and is recorded as a branch or as a loop. Variables
that it assigns are joined afterwards: they are what the branch that ran, or the last item, left.
To that end the frame is traced, as a debugger does it, while it is inside the statement.
"""

from __future__ import annotations

import ast
import ctypes
import itertools
import linecache
import sys
from contextlib import ExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from insitu._control import Branch, Loop
from insitu._joining import is_recordable, join, kept, make_variable
from insitu._origin import not_here
from insitu._proxy import Proxy
from insitu._source import user_frame, user_location
from insitu_wire.errors import Reason, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import FrameType

    from insitu._origin import Container
    from insitu_wire.errors import Error, Location

_MISSING = object()


def truth(value: Proxy) -> bool:
    """Records the `if` statement that asks for a value's truth; gives whether to run its body.

    Raises:
        ValueNotAvailableError: it is not an `if` that asks, or its source can not be read.
    """
    frame = user_frame()
    statement = statement_at(frame, ast.If)
    if value._origin.recorder.state != "recording":
        raise not_here(value._origin)
    if statement is None or isinstance(statement.test, ast.BoolOp | ast.NamedExpr):
        raise _unknown_truth(value)
    _refuse_jumps([*statement.body, *statement.orelse], user_location())
    is_negated = isinstance(statement.test, ast.UnaryOp) and isinstance(statement.test.op, ast.Not)
    _If(frame, statement, value, is_negated).enter()
    return not is_negated


def items(value: Proxy | Container) -> Iterator[Any]:
    """Records the `for` statement that asks for a value's items; gives the one that stands for all.

    Raises:
        ValueNotAvailableError: it is not a `for` that asks, or its source can not be read.
    """
    frame = user_frame()
    statement = statement_at(frame, ast.For)
    if value._origin.recorder.state != "recording":
        raise not_here(value._origin)
    if statement is None:
        raise error(
            Reason.VALUE_NOT_AVAILABLE,
            f"how many items {value._origin} has is known only when the session runs; loop over it "
            "with a `for` statement in a file or notebook, or `with session.iter(...) as item:`",
            location=user_location(),
        )
    _refuse_jumps(statement.body, user_location())
    return _For(frame, statement, value)


class _If:
    """One `if` statement while its body is recorded."""

    def __init__(
        self, frame: FrameType, statement: ast.If, condition: Proxy, is_negated: bool
    ) -> None:
        self._frame = frame
        self._statement = statement
        self._is_negated = is_negated
        self._location = user_location()
        # What is assigned in a branch does not change which of the two runs.
        self._condition = kept(condition)
        self._body = ExitStack()
        self._before = dict(frame.f_locals)
        self._after_else = self._before

    def enter(self) -> None:
        """Records what is run else, and starts to record the body."""
        if self._statement.orelse:
            # Before the body: after it, a trace function runs, in which Python traces nothing.
            self._after_else = self._run_else()
        self._body.enter_context(self._taken(negated=self._is_negated))
        _watch(self._frame, self._step)

    def _step(self, frame: FrameType, event: str) -> bool:
        """Ends the recording when the body has been left; tells whether to go on watching."""
        line = frame.f_lineno
        first, last = self._statement.lineno, self._statement.body[-1].end_lineno or 0
        # Some instructions, such as those that clean up, belong to no line.
        if event in ("line", "opcode") and (line is None or first <= line <= last):
            return True
        self._body.close()
        if event != "exception":
            self._join(frame)
        return False

    def _join(self, frame: FrameType) -> None:
        names = stored_names([*self._statement.body, *self._statement.orelse])
        after_body = {name: frame.f_locals.get(name, _MISSING) for name in names}
        joined = {}
        for name in sorted(names):
            one, other = after_body[name], self._after_else.get(name, _MISSING)
            if one is other:
                continue
            if one is _MISSING or other is _MISSING:
                joined[name] = other if one is _MISSING else one
                continue
            pair = (other, one) if self._is_negated else (one, other)
            joined[name] = join(self._condition, *pair, name, self._location)
        _bind(frame, joined)

    def _taken(self, *, negated: bool) -> AbstractContextManager[None]:
        branch = Branch(self._condition._origin.recorder, self._condition, self._location)
        return branch.taken(negated=negated)

    def _run_else(self) -> dict[str, Any]:
        statements = ast.Module(body=self._statement.orelse, type_ignores=[])
        code = compile(statements, self._frame.f_code.co_filename, "exec")
        namespace = {**self._frame.f_globals, **self._before}
        with self._taken(negated=not self._is_negated):
            exec(code, namespace)
        return namespace


class _For:
    """One `for` statement while its body is recorded: an iterator that gives one item."""

    def __init__(self, frame: FrameType, statement: ast.For, value: Proxy | Container) -> None:
        self._frame = frame
        self._statement = statement
        self._value = value
        self._location = user_location()
        self._loop = Loop(value._origin.recorder, value, self._location)
        self._variables: dict[str, Proxy] = {}
        self._has_run = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._has_run:
            self._leave()
            raise StopIteration
        self._has_run = True
        names = stored_names(self._statement.body) - stored_names([self._statement.target])
        bound = self._frame.f_locals
        carried = [name for name in sorted(names) if is_recordable(bound.get(name))]
        self._variables = {name: make_variable(bound[name]) for name in carried}
        item = self._loop.__enter__()
        self._bind_variables()
        if isinstance(self._statement.target, ast.Tuple) and isinstance(item, Proxy):
            return tuple(item[index] for index in range(len(self._statement.target.elts)))
        return item

    def _leave(self) -> None:
        for name, variable in self._variables.items():
            value = self._frame.f_locals[name]
            if value is not variable:
                _carry(variable, value, name, self._location)
        self._loop.__exit__(None, None, None)
        self._bind_variables()

    def _bind_variables(self) -> None:
        """Has the frame's names mean the variables, from its next instruction on."""
        if self._variables:
            bind_soon(self._frame, self._variables)


def _carry(variable: Any, value: Any, name: str, location: Location) -> None:
    """Carries what an item left in a variable to the next item."""
    if not is_recordable(value):
        raise error(
            Reason.UNSUPPORTED_FEATURE,
            f"{name!r} is a {type(value).__name__} after an item of this loop, and was a tensor "
            "before it; use another name, or collect in insitu.list()",
            location=location,
        )
    variable.update(value)


def bind_soon(frame: FrameType, values: Mapping[str, object]) -> None:
    """Has names of a frame mean values from its next instruction on."""

    def bind(at: FrameType, event: str) -> bool:
        del event
        _bind(at, values)
        return False

    _watch(frame, bind)


def _bind(frame: FrameType, values: Mapping[str, object]) -> None:
    """Has names of a frame mean values."""
    frame.f_locals.update(values)
    if sys.version_info < (3, 13):
        # Else the next look at f_locals would undo it.
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _watch(frame: FrameType, step: Callable[[FrameType, str], bool]) -> None:
    """Calls a function at each instruction of a frame, until it gives False."""
    outer, outer_local, had_opcodes = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes

    def local(at: FrameType, event: str, arg: Any) -> Any:
        if step(at, event):
            return local
        sys.settrace(outer)
        at.f_trace, at.f_trace_opcodes = outer_local, had_opcodes
        return outer_local(at, event, arg) if outer_local is not None else None

    frame.f_trace, frame.f_trace_opcodes = local, True
    sys.settrace(outer or (lambda *_: None))


def statement_at(frame: FrameType, kind: type[Any]) -> Any:
    """Finds the statement that a frame's current instruction belongs to, by its position."""
    instructions = itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
    position = next(instructions, None)
    lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)
    for node in _statements("".join(lines)):
        if isinstance(node, kind):
            asked = node.test if isinstance(node, ast.If) else node.iter
            if isinstance(asked, ast.UnaryOp) and isinstance(asked.op, ast.Not):
                asked = asked.operand
            if position in (_position(node), _position(asked)):
                return node
    return None


@lru_cache(maxsize=64)
def _statements(source: str) -> tuple[ast.If | ast.For, ...]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.If | ast.For))


def _position(node: ast.stmt | ast.expr) -> tuple[int | None, ...]:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def stored_names(nodes: list[Any]) -> set[str]:
    """Gives the names that statements assign to, without those of functions inside."""
    names: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ListComp | ast.DictComp):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def _refuse_jumps(body: list[ast.stmt], location: Location) -> None:
    """Refuses what would leave a body that is run once to be recorded."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Break | ast.Continue | ast.Return | ast.Yield):
                word = type(node).__name__.lower()
                raise error(
                    Reason.UNSUPPORTED_FEATURE,
                    f"`{word}` in line {node.lineno} can not hang on a value of the session; use "
                    "`with session.iter(items, return_context=True) as (item, loop):` with "
                    "loop.exit(), and `with session.cond(...)`",
                    location=location,
                )


def _unknown_truth(value: Proxy) -> Error:
    return error(
        Reason.VALUE_NOT_AVAILABLE,
        f"whether {value._origin} is true is known only when the session runs; ask it in an `if` "
        "statement of its own in a file or notebook (with & and | instead of and, or), use `with "
        "session.cond(...) as branch:` or torch.where, or .save() it and ask after the block",
        location=user_location(),
    )
