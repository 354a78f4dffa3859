"""The compiler's plans: values in, plans out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from insitu_proto.v1.model_pb2 import DimensionSpec, ModelDescription, Module, StructureSpec
from insitu_proto.v1.model_pb2 import TensorSpec as Tensor
from insitu_shard.compiler import (
    GRADIENTS,
    Fork,
    LaneTree,
    Limits,
    Outline,
    Pass,
    TraceFacts,
    Window,
    WindowStep,
    plan_passes,
    reason_for_apart,
)

ROWS = ((1, 2, 3),)
OTHERS = ((4, 5, 6),)
NUM_BLOCKS = 3


def _hidden(size: int = 8) -> StructureSpec:
    dimensions = [
        DimensionSpec(factor=1, batch_power=1),
        DimensionSpec(factor=1, length_power=1),
        DimensionSpec(factor=size),
    ]
    return StructureSpec(tensor=Tensor(dimensions=dimensions))


def _outline() -> Outline:
    paths = ["", "model", "model.embed"]
    for number in range(NUM_BLOCKS):
        paths += [f"model.layers.{number}", f"model.layers.{number}.mlp"]
    paths += ["model.norm", "head"]
    description = ModelDescription()
    for order, path in enumerate(paths, 1):
        module = Module(path=path, call_order=order, output=_hidden(16 if path == "head" else 8))
        module.is_block = path.startswith("model.layers.") and path.count(".") == 2
        module.args.tuple.items.append(_hidden())
        description.modules.append(module)
    return Outline.of(description)


def _trace(*forks: tuple[int, str], rows: tuple[tuple[int, ...], ...] = ROWS) -> TraceFacts:
    return TraceFacts(
        rows=rows,
        key=len(rows[0]),
        forks=tuple(Fork(*fork) for fork in forks),
        last_moment=2 * (NUM_BLOCKS + 1),
        head=(0, 3),
    )


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import insitu_shard.compiler"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_outline_knows_when_modules_are_reached_and_where_rows_can_part() -> None:
    outline = _outline()
    assert outline.blocks == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert outline.head_path == "head"
    moments = {
        ("model.embed", False): (0, 0),
        ("model.layers.0", True): (2, 1),
        ("model.layers.1.mlp", False): (4, 3),
        ("model.layers.1", False): (5, 5),
        ("model.norm", True): (8, 7),
        ("head", False): (8, 7),
        ("", False): (8, 7),
        ("", True): (0, 0),
    }
    for (path, is_input), (moment, fork) in moments.items():
        assert outline.moment(path, is_input=is_input) == moment, path
        assert outline.fork_moment(path, is_input=is_input) == fork, path
    assert outline.moment("never called", is_input=True) is None


def test_a_model_whose_blocks_do_not_just_follow_has_no_rows_that_fork() -> None:
    description = ModelDescription()
    for order, path in enumerate(["layers.0", "between", "layers.1"], 1):
        module = Module(path=path, call_order=order, output=_hidden(), is_block="." in path)
        module.args.tuple.items.append(_hidden())
        description.modules.append(module)
    assert Outline.of(description).blocks == ()


def test_lanes_fork_at_the_first_write_that_differs() -> None:
    tree = LaneTree(
        [
            _trace(),
            _trace((3, "a")),
            _trace((3, "a"), (5, "b")),
            _trace((3, "a"), (5, "c")),
            _trace((3, "a"), rows=OTHERS),
            _trace((0, "a")),
        ]
    )
    lanes = {number: tree.paths[number] for number in range(6)}
    assert lanes[0] == (0,)
    assert lanes[1][0] == lanes[2][0] == lanes[3][0] == 0
    assert lanes[1][1] == lanes[2][1] == lanes[3][1]
    assert lanes[2][2] != lanes[3][2]
    assert lanes[4][0] != 0
    assert len(lanes[5]) == 1
    assert lanes[5][0] != 0
    assert tree.alive(2) == [0, lanes[4][0], lanes[5][0]]
    assert len(tree.alive(8)) == 6


def test_a_lane_goes_after_what_is_needed_last() -> None:
    short = TraceFacts(rows=ROWS, key=3, last_moment=4)
    planned = Pass((0, 1), (short, _trace((5, "a"), rows=OTHERS)), _outline())
    assert planned.rows_of_blocks == (2, 2, 1)
    assert (planned.layers_run, planned.layers_saved) == (5, 1)


def _positioned(*forks: tuple[int, str, int], last: int = 8, length: int = 10) -> TraceFacts:
    return TraceFacts(
        rows=(tuple(range(length)),),
        key=length,
        forks=tuple(Fork(*fork) for fork in forks),
        last_moment=last,
    )


def _sharing(*traces: TraceFacts, shares: bool = True) -> Pass:
    outline = replace(_outline(), shares_prefixes=shares)
    return Pass(tuple(range(len(traces))), traces, outline)


def test_lanes_begin_where_they_differ_and_what_they_fork_from_stays() -> None:
    planned = _sharing(_positioned((3, "a", 4)), _positioned((3, "b", 7)), _positioned((5, "c", 9)))
    root, *forks = planned.tree.lanes
    assert [(lane.start, lane.source) for lane in forks] == [(4, 0), (7, 0), (9, 0)]
    assert root.last == 2 * NUM_BLOCKS
    assert planned.tokens_of_blocks == (10, 10 + 6 + 3, 10 + 6 + 3 + 1)
    assert planned.num_tokens == 20


def test_a_lane_that_forks_again_takes_from_the_nearest_that_stays() -> None:
    clean = _positioned()
    twice = [_positioned((1, "a", 6), (3, "b", at)) for at in (3, 8)]
    planned = _sharing(clean, *twice)
    found = {lane.differs_from: (lane.start, lane.source) for lane in planned.tree.lanes}
    # Nobody else needs the lane that begins at 6: it ends, and each child has 6 and on itself.
    assert found == {0: (0, None), 6: (6, 0), 3: (3, 0), 8: (6, 0)}


def test_rows_are_whole_where_little_is_saved_or_nothing_is_known() -> None:
    many = [_positioned((3, str(at), at)) for at in range(10)]
    assert _sharing(*many).is_packed
    whole = [
        _sharing(_positioned((3, "a", 4))),
        _sharing(*(_positioned((3, name, 1)) for name in "ab")),
        _sharing(*many, shares=False),
        _sharing(*many, replace(many[0], needs_whole_rows=True)),
        _sharing(*many, replace(many[0], rows=((1, 2, 3),))),
        replace(_sharing(*many), has_whole_rows=True),
    ]
    for planned in whole:
        assert not planned.is_packed
        assert planned.num_tokens == 10 * planned.num_rows


@given(
    st.lists(
        st.tuples(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=3)),
        min_size=1,
        max_size=12,
    )
)
def test_what_a_lane_leaves_to_others_is_there_and_as_it_would_be(
    described: list[tuple[list[tuple[str, int]]]],
) -> None:
    moments = (1, 3, 5)
    planned = _sharing(
        *(
            _positioned(*((moment, *write) for moment, write in zip(moments, writes, strict=False)))
            for (writes,) in described
        )
    )
    lanes = planned.tree.lanes
    for moment in range(2 * NUM_BLOCKS + 1):
        alive = planned.tree.alive(moment)
        for number in alive:
            source, start = lanes[number].source, lanes[number].start
            assert (source is None) == (start == 0)
            if source is None:
                continue
            assert alive.index(source) < alive.index(number)
            while number != source:
                assert start <= lanes[number].differs_from
                number = lanes[number].parent


@given(
    st.lists(
        st.tuples(
            st.sampled_from([ROWS, OTHERS]),
            st.lists(st.sampled_from([0, 1, 3, 5, 7]), unique=True).map(sorted),
            st.sampled_from("ab"),
            st.integers(0, 8),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_trace_has_a_living_lane_of_its_rows_at_every_moment_it_needs(
    described: list[tuple[tuple[tuple[int, ...], ...], list[int], str, int]],
) -> None:
    traces = [
        TraceFacts(
            rows=rows,
            key=3,
            forks=tuple(Fork(moment, writes) for moment in moments),
            last_moment=max([last, *moments]),
        )
        for rows, moments, writes, last in described
    ]
    tree = LaneTree(traces)
    for place, trace in enumerate(traces):
        for moment in range(trace.last_moment + 1):
            lane = tree.lane_at(place, moment)
            assert lane in tree.alive(moment)
            assert tree.lanes[lane].rows == trace.rows
            # Whoever shares the lane has written the same so far.
            written = [fork for fork in trace.forks if fork.moment <= moment]
            for other in tree.traces[lane]:
                if tree.lane_at(other, moment) == lane:
                    forks = [at for at in traces[other].forks if at.moment <= moment]
                    assert forks == written


def test_passes_take_equal_keys_in_order_and_stay_within_limits() -> None:
    outline = _outline()
    alone = TraceFacts(rows=ROWS, alone_because="it skips")
    longer = TraceFacts(rows=((1, 2, 3, 4),), key=4, last_moment=8)
    traces = [_trace((3, "a")), alone, longer, _trace((3, "b")), _trace((3, "c"))]
    members = [planned.members for planned in plan_passes(traces, outline, Limits())]
    assert members == [(0, 3, 4), (1,), (2,)]
    small = Limits(max_tokens=6)
    planned = list(plan_passes(traces, outline, small))
    assert [each.members for each in planned] == [(0,), (3, 4), (1,), (2,)]
    assert all(each.num_tokens <= 6 for each in planned)


def _of_length(length: int, **facts: Any) -> TraceFacts:
    return TraceFacts(**{"rows": (tuple(range(length)),), "key": length, **facts})


def test_it_says_why_a_trace_is_not_in_a_pass() -> None:
    fitting = [_of_length(length, fits_other_lengths=True) for length in (9, 5)]
    ragged = _of_length(5, key="ragged")
    cases = {
        "it takes gradients, and trace 8 is one forward pass": _of_length(5, kind=GRADIENTS),
        "its prompt has 11 tokens, and that of trace 8 5; with padding=True they may share a "
        "pass": _of_length(11, fits_other_lengths=True),
        "with trace 8 the pass would be larger than it may be": fitting[0],
        "of it and trace 8 one has rows of several lengths": ragged,
    }
    shared = Pass((0, 1), tuple(fitting), _outline())
    for reason, trace in cases.items():
        assert reason_for_apart(trace, shared, (7, 8)) == reason
    taking = Pass((0,), (_of_length(4, kind=GRADIENTS),), _outline())
    without_a_cure = reason_for_apart(_of_length(5, kind=GRADIENTS), taking, (1,))
    assert without_a_cure == "its prompt has 5 tokens, and that of trace 1 4"


def test_a_window_lets_run_what_needs_nothing_that_is_to_come() -> None:
    trace, log = WindowStep(is_trace=True), WindowStep(is_trace=False)
    first = WindowStep(is_trace=True, defines=frozenset({1, 2}))
    needing = WindowStep(is_trace=True, defines=frozenset({3}), needs=frozenset({1}))
    window = Window([first, log, needing, trace])
    assert window.ready() == [0, 3]
    assert window.definers(2) == {0}
    window.ran(0, {1})
    assert window.ready() == [2, 3]  # what the first gave is there, though it has not ended
    window.ran(2, {3})
    assert window.head == 0
    for _ in range(3):
        window.ended()
    assert (window.head, window.ready()) == (3, [3])


def test_what_a_step_writes_into_is_used_in_order_only() -> None:
    writing = WindowStep(is_trace=True, writes=frozenset({9}))
    reading = WindowStep(is_trace=True, needs=frozenset({9}))
    in_order = WindowStep(is_trace=True, is_in_order=True)
    window = Window([writing, reading, in_order])
    assert window.ready() == [0]
    window.ran(0, set())
    window.ended()
    assert window.ready() == [1]
    tensors = WindowStep(is_trace=True, writes_tensors=True)
    assert Window([tensors, WindowStep(is_trace=True, needs=frozenset({4}))]).ready() == [0]
