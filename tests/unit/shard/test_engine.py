from __future__ import annotations

import pytest
import torch

from insitu_proto.v1 import intervention_pb2, shard_service_pb2, trace_pb2
from insitu_shard.engine import (
    Budgets,
    HandleStore,
    Logged,
    Saved,
    SegmentRun,
    StepFollows,
    TraceStarted,
    load_model,
)
from insitu_shard.engine.graph import Side
from insitu_shard.engine.inputs import model_inputs
from insitu_shard.engine.layout import BoundaryLayout, Split, _split
from insitu_shard.engine.loading import check_ranks
from insitu_shard.engine.logs import format_values
from insitu_shard.engine.memory import compact
from insitu_shard.engine.model_folder import load_config
from insitu_shard.engine.ranks import Ranks
from insitu_wire.errors import CapacityError, ConfigurationError, InvalidTraceError
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


def _segment() -> tuple[shard_service_pb2.Segment, trace_pb2.Trace]:
    segment = shard_service_pb2.Segment(first_trace_number=1)
    trace = segment.steps.add().trace
    trace.model = "tiny"
    trace.mode = trace_pb2.TRACE_MODE_FORWARD
    trace.invokes.add().rows.add(token_ids=IDS)
    return segment, trace


def _read(trace: trace_pb2.Trace, node_id: int, path: str, call_index: int = 0) -> None:
    point = trace.nodes.add(id=node_id).read.hook_point
    point.module_path, point.call_index = path, call_index
    point.side = intervention_pb2.HOOK_SIDE_OUTPUT


def _run(tiny: TinyModels, segment: shard_service_pb2.Segment) -> list[object]:
    model = load_model("tiny", tiny.folder("llama"))
    return list(SegmentRun({"tiny": model}, segment, values={}).run())


def test_a_write_that_would_come_too_late_is_an_error_where_the_model_runs_too(
    tiny: TinyModels,
) -> None:
    segment, trace = _segment()
    _read(trace, 1, "model.layers.2")
    write = trace.nodes.add(id=2).write
    write.hook_point.module_path = "model.layers.0"
    write.hook_point.side = intervention_pb2.HOOK_SIDE_OUTPUT
    write.value.reference.node_id = 1
    with pytest.raises(InvalidTraceError, match=r"model\.layers\.2\.output") as raised:
        _run(tiny, segment)
    assert raised.value.reason == "CYCLIC_TRACE"
    assert raised.value.trace_number == 1


def test_a_call_that_does_not_happen_is_an_error(tiny: TinyModels) -> None:
    segment, trace = _segment()
    _read(trace, 1, "model.layers.2", call_index=5)
    trace.nodes.add(id=2).save.value.reference.node_id = 1
    with pytest.raises(InvalidTraceError, match="call 5") as raised:
        _run(tiny, segment)
    assert raised.value.reason == "HOOK_POINT_NOT_REACHED"


def test_steps_tell_in_order_what_happens_and_free_what_nobody_needs(tiny: TinyModels) -> None:
    segment, trace = _segment()
    _read(trace, 1, "model.layers.1")
    trace.nodes.add(id=2).save.value.reference.node_id = 1
    segment.steps.add().log.values.add().reference.node_id = 1
    segment.steps.add().exit.SetInParent()
    store = HandleStore()
    model = load_model("tiny", tiny.folder("llama"))
    run = SegmentRun({"tiny": model}, segment, store.values("s"))
    events = run.run()
    assert [type(next(events)) for _ in range(3)] == [TraceStarted, StepFollows, Saved]
    assert store.num_values == 1
    assert store.num_bytes == 4 * 64 * 4
    logged = next(events)
    assert isinstance(logged, Logged)
    assert logged.message.startswith("tensor(float32[1, 4, 64]")
    assert list(events) == []
    assert store.num_values == 0
    assert run.has_exited


def test_a_trace_tells_how_many_tokens_it_takes_also_where_its_prompt_is_not_written_down(
    tiny: TinyModels,
) -> None:
    segment, generating = _segment()
    generating.mode = trace_pb2.TRACE_MODE_GENERATE
    generating.generation.max_new_tokens = 3
    loop = segment.steps.add().loop
    loop.item_node_id = 1
    for ids in ([3, 4], [5, 6, 7]):
        item = loop.items.list.items.add()
        for token in ids:
            item.list.items.add().int_value = token
    repeated = loop.steps.add().trace
    repeated.model = "tiny"
    repeated.mode = trace_pb2.TRACE_MODE_FORWARD
    repeated.invokes.add().token_ids.reference.node_id = 1
    events = _run(tiny, segment)
    assert [at.num_tokens for at in events if isinstance(at, TraceStarted)] == [6, 2, 3]


def test_a_session_that_is_released_keeps_nothing() -> None:
    store = HandleStore()
    store.values("a")[1] = torch.zeros(4)
    store.values("b")[1] = torch.zeros(2)
    assert store.num_bytes == 24
    assert store.release("a") == 1
    assert store.release("a") == 0
    assert store.num_bytes == 8


def test_what_users_keep_is_not_counted_among_what_sessions_keep() -> None:
    store = HandleStore(Budgets(kept=100))
    values = store.values("a")
    values[1] = torch.zeros(4)
    values.check()
    store.kept_for("ann").keep({"handle": torch.zeros(8)})
    assert (store.session_bytes, store.num_bytes) == (16, 48)
    store.release("a")
    assert store.session_bytes == 0


def test_a_small_view_lets_its_base_go() -> None:
    base = torch.zeros(1000)
    view = compact({1: {"kept": base[:2]}})[1]["kept"]
    assert view.untyped_storage().nbytes() == 8
    assert compact({1: base})[1] is base


def test_views_that_may_be_written_to_go_on_sharing_memory() -> None:
    base = torch.zeros(1000)
    kept = compact({1: base[:2], 2: base[1:3]}, beside=())
    kept[1][1] = 7.0
    assert kept[2][0] == 7.0
    assert compact({1: base[:2]}, beside=[base])[1].untyped_storage().nbytes() == 4000


def test_rows_of_equal_length_need_no_mask() -> None:
    inputs = model_inputs([[1, 2], [3, 4]], pad_token_id=0, device=torch.device("cpu"))
    assert set(inputs) == {"input_ids"}


def test_rows_of_other_lengths_are_padded_on_the_left_with_their_own_positions() -> None:
    inputs = model_inputs([[1, 2, 3], [4]], pad_token_id=9, device=torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_large_tensor_is_logged_as_its_statistics() -> None:
    assert format_values(("x", 1, torch.tensor([1.0, 2.0]))) == "x 1 tensor([1., 2.])"
    large = format_values((torch.arange(100),))
    assert large.startswith("tensor(int64[100], min=0, max=99, mean=49.5")


@pytest.mark.parametrize("size", [6, 7, 2, 49152])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_chunks_are_those_of_torch(size: int, num_ranks: int) -> None:
    whole = torch.arange(size)
    expected = list(whole.chunk(num_ranks))
    chunks = [Ranks(rank, num_ranks).local_chunk(whole, dim=0) for rank in range(num_ranks)]
    assert [chunk.tolist() for chunk in chunks if len(chunk)] == [c.tolist() for c in expected]


def test_a_split_is_recognised_by_the_one_size_that_differs() -> None:
    ranks = Ranks(0, 2)
    assert _split(torch.Size([3, 7, 128]), torch.Size([3, 7, 64]), ranks) == Split(-1, 128)
    assert _split(torch.Size([3, 4, 7, 7]), torch.Size([3, 2, 7, 7]), ranks) == Split(-3, 4)
    assert _split(torch.Size([3, 7, 128]), torch.Size([3, 5, 64]), ranks) is None
    assert _split(torch.Size([3, 7, 128]), torch.Size([3, 7, 50]), ranks) is None


def test_a_split_that_is_not_understood_is_refused_and_never_shown() -> None:
    layout = BoundaryLayout({"[0]": None}, Ranks(0, 2))
    with pytest.raises(Exception, match="can not be shown whole"):
        layout.gather((torch.zeros(2),))


def test_more_ranks_than_heads_are_refused_with_the_numbers_that_work(tiny: TinyModels) -> None:
    for num_ranks in (1, 2, 3, 4):
        check_ranks(load_config(tiny.folder("llama")), num_ranks)
    with pytest.raises(ConfigurationError, match=r"use at most 4 \(.* with 1, 2\)"):
        check_ranks(load_config(tiny.folder("llama")), 5)
    check_ranks(load_config(tiny.folder("gpt2")), 2)


def test_sides_have_the_names_that_users_write() -> None:
    assert {side.value for side in Side} == {"input", "inputs", "output"}


def test_what_steps_give_to_later_ones_is_bounded(tiny: TinyModels) -> None:
    segment, trace = _segment()
    _read(trace, 1, "model.layers.1")
    segment.steps.add().log.values.add().reference.node_id = 1
    model = load_model("tiny", tiny.folder("llama"))
    values = HandleStore().values("s")
    values.bound(4 * 64 * 4)
    enough = SegmentRun({"tiny": model}, segment, values)
    assert [type(event) for event in enough.run()][-1] is Logged
    values.clear()
    values.bound(4 * 64 * 4 - 1)
    with pytest.raises(CapacityError, match="at most 1,023") as raised:
        list(SegmentRun({"tiny": model}, segment, values).run())
    assert raised.value.reason == "LIMIT_EXCEEDED"


@pytest.mark.parametrize(("budget", "reason"), [(3, "OUT_OF_MEMORY"), (5, "LIMIT_EXCEEDED")])
def test_the_smaller_bound_is_the_one_that_is_told(budget: int, reason: str) -> None:
    values = HandleStore(Budgets(session=budget)).values("s")
    values.bound(4)
    values[1] = torch.zeros(2)
    with pytest.raises(CapacityError) as raised:
        values.check()
    assert raised.value.reason == reason


def test_a_key_bounds_what_its_user_keeps_and_never_more_than_the_group_allows() -> None:
    kept = HandleStore(Budgets(kept=8)).kept_for("ann")
    for bound, size in ((4, 2), (100, 3), (None, 3)):
        kept.bound(bound)
        with pytest.raises(CapacityError):
            kept.keep({"h": torch.zeros(size)})
    kept.keep({"h": torch.zeros(2)})


def test_values_between_steps_are_within_the_budgets_of_a_session_and_of_the_shard(
    tiny: TinyModels,
) -> None:
    segment, trace = _segment()
    _read(trace, 1, "model.layers.1")
    segment.steps.add().log.values.add().reference.node_id = 1
    models = {"tiny": load_model("tiny", tiny.folder("llama"))}

    def run(store: HandleStore, session_id: str) -> None:
        list(SegmentRun(models, segment, store.values(session_id), kept=[1]).run())

    size = 4 * 64 * 4
    with pytest.raises(CapacityError, match=r"take 1,024 bytes .* at most 1,023 here"):
        run(HandleStore(Budgets(session=size - 1)), "a")
    store = HandleStore(Budgets(session=size, shard=2 * size))
    for session_id in ("a", "b"):
        run(store, session_id)
    assert store.num_bytes == 2 * size
    with pytest.raises(CapacityError, match="other sessions 3,072, and all may take at most 2,048"):
        run(store, "c")
    for session_id in ("a", "c"):
        store.release(session_id)
    run(store, "d")
