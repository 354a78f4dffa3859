"""What the order of definition inside a trace means: hazards, views, cycles, liveness."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import insitu
from insitu import Error, InvalidTraceError, LanguageModel, ValueNotAvailableError
from insitu_shard.engine.graph import Call, HookPoint, Node, Read, Ref, Side
from insitu_shard.engine.plan import plan_nodes
from support.tiny_models import TinyModels

IDS = [5, 9, 17, 23]


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> LanguageModel:
    return LanguageModel(str(tiny.folder("llama")))


def test_definition_order_is_free_where_nothing_is_written(model: LanguageModel) -> None:
    with model.trace(IDS):
        late = model.model.layers[2].output[0]
        early = model.model.layers[0].output[0]
        total = (late + early).save()
        first = early.save()
        last = late.save()
    assert torch.equal(total, first + last)


def test_a_read_after_a_write_sees_it_and_one_before_does_not(model: LanguageModel) -> None:
    with model.trace(IDS):
        before = model.model.layers[1].output[0].clone().save()
        model.model.layers[1].output[0][:] = 0
        after = model.model.layers[1].output[0].clone().save()
    assert before.abs().sum() > 0
    assert after.abs().sum() == 0


def test_writes_to_one_module_happen_in_order(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.model.layers[1].output[0][:] = 1
        model.model.layers[1].output[0][:] += 2
        model.model.layers[1].output = model.model.layers[1].output[0] * 5
        result = model.model.layers[1].output[0].save()
    assert torch.equal(result, torch.full_like(result, 15))


def test_a_waiting_reader_sees_what_was_there_when_it_was_defined(model: LanguageModel) -> None:
    with model.trace(IDS):
        clean = model.model.layers[1].output[0].clone().save()
        # Needs layer 2, so it runs after the write that is defined below it.
        mixed = model.model.layers[1].output[0] + model.model.layers[2].output[0]
        model.model.layers[1].output[0][:] = 0
        last = model.model.layers[2].output[0].save()
        mixed.save()
    assert torch.equal(mixed, clean + last)


def test_a_write_to_a_value_of_an_earlier_trace_is_seen_by_later_reads(
    model: LanguageModel,
) -> None:
    with model.session():
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0]
        with model.trace(IDS):
            hidden[:] = model.model.layers[0].output[0]
            total = hidden.sum().save()
            expected = model.model.layers[0].output[0].sum().save()
    assert torch.equal(total, expected)


def test_a_write_that_needs_a_later_module_names_both_lines(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError, match=r"model.layers.2.output") as raised:
        with model.trace(IDS):
            late = model.model.layers[2].output[0]
            model.model.layers[0].output[0][:] = late
    assert raised.value.reason == "CYCLIC_TRACE"
    assert raised.value.location is not None
    assert raised.value.location.source == "model.model.layers[0].output[0][:] = late"
    assert "late = model.model.layers[2].output[0]" in str(raised.value)


def test_a_module_that_is_not_called_is_named(model: LanguageModel, tiny: TinyModels) -> None:
    gpt2 = LanguageModel(str(tiny.folder("gpt2")))
    with pytest.raises(InvalidTraceError, match="never reached") as raised:
        with gpt2.trace(IDS):
            gpt2.transformer.h.output.save()
    assert raised.value.reason == "HOOK_POINT_NOT_REACHED"


def test_a_module_is_applied_to_a_value_without_firing_hooks(model: LanguageModel) -> None:
    with model.trace(IDS):
        lens = model.lm_head(model.model.norm(model.model.layers[2].output[0])).save()
        logits = model.lm_head.output.save()
    assert torch.equal(lens, logits)


def test_inputs_are_read_and_written(model: LanguageModel) -> None:
    with model.trace(IDS):
        args, kwargs = model.model.layers[1].inputs
        assert model.model.layers[1].input.shape == (1, len(IDS), 64)
        entering = args[0].save()
        leaving = model.model.layers[0].output[0].save()
        model.model.layers[1].input = model.model.layers[1].input * 0
        zeroed = model.model.layers[1].input_layernorm.input.save()
        assert "position_ids" in kwargs
    assert torch.equal(entering, leaving)
    assert zeroed.abs().sum() == 0


def test_structures_come_back_whole(model: LanguageModel) -> None:
    with model.trace(IDS):
        attention = model.model.layers[0].self_attn.output
        attention[0][:] *= 2
        attention.save()
        top = torch.topk(model.lm_head.output, 3)
        values = top.values.save()
        indices = top.indices.save()
        output = model.output.save()
    assert attention[0].shape == (1, len(IDS), 64)
    assert attention[1] is None
    assert torch.equal(values, output.logits.topk(3).values)
    assert torch.equal(indices, output.logits.topk(3).indices)


def test_values_of_unknown_shape_are_recorded_all_the_same(model: LanguageModel) -> None:
    with model.trace(IDS):
        logits = model.lm_head.output[0, -1]
        positive = logits[logits > 0].save()
        kept = logits.save()
    assert torch.equal(positive, kept[kept > 0])


def test_items_of_a_tuple_that_could_not_be_known_are_saved_one_by_one(
    model: LanguageModel,
) -> None:
    with model.trace(IDS):
        unique = torch.unique(model.lm_head.output.argmax(-1), return_counts=True)
        tokens, counts = unique[0].save(), unique[1].save()
    assert counts.sum() == len(IDS)
    assert len(tokens) == len(counts)
    with pytest.raises(ValueNotAvailableError, match=r"is a tuple.*\.save\(\)"):
        with model.trace(IDS):
            torch.unique(model.lm_head.output.argmax(-1), return_counts=True).save()


def test_a_tuple_of_values_is_an_argument_like_a_list(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        halves = hidden.chunk(2, dim=-1)
        assert torch.stack(halves).shape == (2, 1, 4, 32)
        joined = torch.cat(halves, dim=-1).save()
        hidden.save()
    assert torch.equal(joined, hidden)


def test_the_parts_of_a_pair_of_unknown_shape_have_their_names(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0].save()
        positive = hidden[hidden > 0]
        best = positive.topk(3).values.save()
        first = positive.max(dim=0).indices.save()
        rows, columns = torch.where(hidden[0] > 0)
        again = hidden[0][rows, columns].save()
    expected = hidden[hidden > 0]
    assert torch.equal(best, expected.topk(3).values)
    assert first == expected.argmax()
    assert torch.equal(again, expected)


def test_a_write_of_what_has_no_encoding_is_refused_by_its_type(tiny: TinyModels) -> None:
    class Cache:
        pass

    model = LanguageModel(str(tiny.folder("llama")))
    with pytest.raises(InvalidTraceError, match="Cache can not be part of a session"):
        with model.trace(IDS):
            model.lm_head(Cache())


def test_values_accumulate_over_layers(model: LanguageModel) -> None:
    with model.trace(IDS):
        total = model.model.layers[0].output[0].clone()
        for layer in model.model.layers[1:]:
            total += layer.output[0]
        total.save()
        parts = [layer.output[0].save() for layer in model.model.layers]
    torch.testing.assert_close(total, sum(parts))


def test_what_makes_the_model_raise_is_an_error_of_the_trace(model: LanguageModel) -> None:
    with pytest.raises(Error, match="the model can not run"):
        with model.trace(IDS):
            args, kwargs = model.model.layers[1].inputs
            model.model.layers[1].inputs = (args, {**kwargs, "position_embeddings": None})
            model.model.layers[2].output.save()


def test_an_error_on_entering_a_trace_leaves_no_session_open(model: LanguageModel) -> None:
    with pytest.raises(InvalidTraceError):
        with model.trace([5_000_000_000]):
            pass
    with model.trace(IDS):
        tokens = model.lm_head.output.argmax(-1).save()
    assert tokens.shape == (1, 4)


def test_a_write_into_the_users_own_tensor_is_refused_and_not_lost(model: LanguageModel) -> None:
    own = torch.zeros(4, 64)
    with pytest.raises(InvalidTraceError, match="tensor of yours"):
        with model.trace(IDS):
            own[0] = model.model.layers[0].output[0][0, -1]


def test_a_saved_value_is_not_what_later_traces_write_to(model: LanguageModel) -> None:
    with model.session():
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0].save()
        with model.trace(IDS):
            hidden[:] = 0
    assert hidden.abs().sum() > 0


def test_inputs_are_replaced_by_the_same_arguments(model: LanguageModel) -> None:
    with pytest.raises(
        InvalidTraceError, match=r"1 positional .* replaced by 1 and none"
    ) as raised:
        with model.trace(IDS):
            model.model.layers[1].inputs = (model.model.layers[1].inputs[0], {})
            model.model.layers[2].output.save()
    assert raised.value.reason == "SHAPE_MISMATCH"


def test_ids_that_the_embedding_lacks_are_refused_at_the_line_of_the_write(
    model: LanguageModel,
) -> None:
    with pytest.raises(InvalidTraceError, match="takes token ids from 0 to 255") as raised:
        with model.trace(IDS):
            model.model.embed_tokens.input[0, 0] = 999
            model.lm_head.output.save()
    assert raised.value.location is not None
    assert "= 999" in raised.value.location.source


def test_whole_writes_of_another_shape_are_refused_before_anything_runs(
    model: LanguageModel,
) -> None:
    with pytest.raises(InvalidTraceError, match=r"layers.1.mlp.output is float32\[1, 4, 64\]"):
        with model.trace(IDS):
            model.model.layers[1].mlp.output = torch.zeros(4, 64)
            pytest.fail("the line above is refused")
    with pytest.raises(InvalidTraceError, match=r"can not be replaced by a int"):
        with model.trace(IDS):
            model.model.layers[1].output = 0


def test_views_across_traces_go_on_sharing_memory(model: LanguageModel) -> None:
    with model.session():
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0]
            last = hidden[:, -1]
        with model.trace(IDS):
            last[:] = 5
            seen = hidden.clone().save()
        with model.trace(IDS):
            first = hidden[:, 0]
        with model.trace(IDS):
            first[:] = 7
            seen_again = hidden.clone().save()
    assert torch.equal(seen[:, -1], torch.full_like(seen[:, -1], 5))
    assert torch.equal(seen_again[:, 0], torch.full_like(seen[:, 0], 7))
    assert not torch.equal(seen[:, 0], seen_again[:, 0])


def test_what_one_layer_gives_and_the_next_takes_are_two_values(model: LanguageModel) -> None:
    with model.trace(IDS):
        clean = model.model.layers[0].output[0].clone().save()
        given = model.model.layers[0].output[0].save()
        late = model.model.layers[0].output[0] + 0 * model.model.layers[2].output[0]
        model.model.layers[1].input[:] = 0
        taken = model.model.layers[1].input.clone().save()
        late.save()
    assert taken.abs().sum() == 0
    assert torch.equal(given, clean)
    torch.testing.assert_close(late, clean)


def test_a_value_written_whole_is_not_changed_by_writes_to_its_new_place(
    model: LanguageModel,
) -> None:
    with model.trace(IDS):
        value = model.model.layers[0].output[0].clone()
        model.model.layers[1].output = value
        model.model.layers[1].output[0][:, -1] = 0
        written = model.model.layers[1].output[0].save()
        value.save()
    assert value[:, -1].abs().sum() > 0
    assert written[:, -1].abs().sum() == 0
    assert torch.equal(value[:, :-1], written[:, :-1])


def test_an_index_that_is_a_value_does_not_make_a_view_of_it(model: LanguageModel) -> None:
    with model.trace(IDS):
        best = model.model.layers[0].output[0][0, -1].argmax()
        row = model.model.layers[1].output[0][0][best % 4]
        row[:] = 0
        best.save()
        model.model.layers[2].output.save()


@pytest.mark.parametrize(
    "call",
    [
        lambda value: torch.nn.functional.relu(value, inplace=True),
        lambda value: torch.nn.functional.relu(value, True),
        lambda value: torch.add(value, 1, out=torch.zeros(1, 4, 64)),
        lambda value: torch.nn.functional.embedding(value.argmax(-1), value[0], None, 1.0),
    ],
)
def test_calls_that_write_without_saying_so_are_refused(
    model: LanguageModel, call: Callable[[torch.Tensor], object]
) -> None:
    with pytest.raises(InvalidTraceError, match=r"does not run inside a session"):
        with model.trace(IDS):
            call(model.model.layers[0].output[0])


def test_named_results_are_saved_whole_and_read_by_name(model: LanguageModel) -> None:
    with model.trace(IDS):
        top = model.lm_head.output.topk(3).save()
        logits = model.lm_head.output.save()
    assert torch.equal(top.values, logits.topk(3).values)
    assert torch.equal(top[1], logits.topk(3).indices)


def test_the_first_argument_may_be_passed_by_name(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        more = torch.unsqueeze(input=hidden, dim=0).save()
    assert more.shape == (1, 1, 4, 64)


def test_a_module_call_has_a_shape_while_recording(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        assert model.lm_head(model.model.norm(hidden)).shape == (1, 4, 256)
        with pytest.raises(InvalidTraceError, match="add"):
            model.lm_head(hidden[:, -1:]) + torch.zeros(3)
        hidden.save()


def test_a_saved_layer_output_can_be_copied_and_pickled(model: LanguageModel) -> None:
    with model.trace([IDS, IDS]):
        hidden = model.model.layers[0].output.save()
    for again in (copy.deepcopy(hidden), pickle.loads(pickle.dumps(hidden))):
        assert torch.equal(again[:, -1], hidden[:, -1])
    assert copy.deepcopy(hidden)[0].shape == (2, 4, 64)
    assert hidden[0].shape == (2, 4, 64)


def test_many_writes_to_one_value_are_planned_in_linear_time() -> None:
    nodes = [Node(1, Read(HookPoint("m", Side.OUTPUT)))]
    nodes += [Node(i, Call("torch.Tensor.add_", (Ref(1), 1), {})) for i in range(2, 2000)]
    plan = plan_nodes(nodes, used_later=())
    assert max(map(len, plan.predecessors.values())) <= 3
    assert max(map(len, plan.readers_before.values())) <= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda value: torch.zeros(40_000, 40_000) + value.sum(),
        lambda value: value.flatten().repeat(10_000_000),
        lambda value: value.flatten()[:, None].expand(-1, 10**9),
        lambda value: torch.cdist(value.reshape(-1, 1).repeat(300, 1), torch.zeros(60_000, 1)),
        lambda value: value.flatten().repeat(400)[:, None] * torch.ones(20_000),
    ],
)
def test_what_would_take_too_much_memory_is_refused_before_it_does(
    model: LanguageModel, make: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with pytest.raises(Error, match="at most 4,294,967,296 may be made") as raised:
        with model.trace(IDS):
            make(model.model.layers[0].output[0]).sum().save()
    assert raised.value.reason == "OUT_OF_MEMORY"


def test_random_numbers_are_those_of_the_traces_seed(model: LanguageModel) -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        with model.trace(IDS, seed=seed):
            one = torch.randn(3).save()
            other = torch.rand_like(model.model.layers[0].output[0][0, 0]).save()
        return [one, other]

    before = torch.random.get_rng_state()
    first, again, different = draw(1), draw(1), draw(2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, different))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_numbers_follow_torchs_own_seed_where_a_trace_has_none(
    model: LanguageModel,
) -> None:
    def draw() -> torch.Tensor:
        with model.session() as session:
            drawn = insitu.list().save()
            with session.iter(range(2)):
                drawn.append(torch.randn(3))
        return torch.stack(drawn)

    torch.manual_seed(3)
    first, other = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_a_slice_may_end_where_a_value_says(model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        end = (hidden.norm(dim=-1)[0].argmax() % 3) + 1
        part = hidden[:, :end].save()
        end.save()
        hidden.save()
    assert torch.equal(part, hidden[:, : int(end)])
