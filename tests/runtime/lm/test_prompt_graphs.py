"""Prompts as graphs: what `LM.prefill` computes, whatever pads them and wherever they start."""

import pytest
import torch
from helpers import slow_after
from launch_counter import HostLaunches
from replays import Counted, repeated
from replies import CAPACITY, drawn, poison
from variants import random_prompt

from mimo_fast import LM
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm import graphs as graphs_module
from mimo_fast.runtime.lm.executor import layer_by_layer
from mimo_fast.runtime.lm.graphs import PROMPTS, Graphs, PromptPart
from mimo_fast.runtime.lm.state import NO_POSITION, DecodeState
from mimo_fast.text.prompt import PackedPrompt


def poisoned_state(lm: LM, capacity: int, quantized: bool = False, slots: int = 2) -> DecodeState:
    """Slots whose cache is NaN."""
    state = lm.new_state([0] * slots, capacity, quantized)
    for part in state.cache.parts:
        part.fill_(127 if part.dtype == torch.int8 else torch.nan)
    return state


def assert_equal_states(got: DecodeState, want: DecodeState) -> None:
    """Up to the order of sums, and an int8 value up to one level: a tie may round either way."""
    assert torch.equal(got.lengths, want.lengths)
    bound = 1e-5 if want.cache.k_scales is None else 2e-3
    torch.testing.assert_close(got.hidden[:-1], want.hidden[:-1], rtol=bound, atol=bound)
    for x, y in zip(got.cache.parts, want.cache.parts, strict=True):
        if x.dtype == torch.int8:
            assert (x.int() - y.int()).abs().max() <= 1
            assert (x != y).float().mean() < 0.01
        else:
            torch.testing.assert_close(x, y, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("first", [1, 31, 32, 33, 100])
def test_as_a_prefill_at_any_length_and_start(loaded, first, quantized):
    """Three turns of one slot, with a turn of another slot in between."""
    lm = loaded.model.lm
    size, capacity = lm.config.group_size, first + 60
    ids = random_prompt(lm.config, lm.empty_id, first + 50)
    other = random_prompt(lm.config, lm.empty_id, 45)
    want, got = (poisoned_state(lm, capacity, quantized) for _ in range(2))
    graphs = Graphs(lm, got, repeated, prompts=True)
    start, middle, end = ids.split([first * size, 7 * size, 43 * size], dim=1)
    turns = [(start, 1, 0), (other, 0, 0), (middle, 1, first), (end, 1, first + 7)]
    for part, slot, start in turns:
        lm.prefill(part, want, slot, start)
        graphs.prefill(part, slot, start)
        assert_equal_states(got, want)
        texts = [lm.text_logits(state.hidden[:2]).argmax(-1)[slot] for state in (got, want)]
        assert torch.equal(*texts)


def test_padding_leaves_no_trace(model):
    """The result has the same bits whatever ids the padding holds."""
    lm, length, start = model.lm, 20, 9
    size = lm.config.group_size
    ids = random_prompt(lm.config, lm.empty_id, 32).unflatten(1, (32, size))
    place = torch.tensor([1, start, length])
    states = list[DecodeState]()
    for padding in (ids.roll(5, dims=1), torch.zeros_like(ids)):
        state = poisoned_state(lm, 70)
        lm.prefill(random_prompt(lm.config, lm.empty_id, start), state, 1)
        padded = torch.cat((ids[:, :length], padding[:, length:]), dim=1)
        last = lm.prefill_padded(padded, place, state)
        assert torch.equal(last[0], state.hidden[1])
        states.append(state)
    assert torch.equal(states[0].hidden, states[1].hidden)
    for x, y in zip(states[0].cache.parts, states[1].cache.parts, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        assert x[:, 0].isnan().all()
        assert x[:, 1, :, start + length :].isnan().all()
        assert not x[:, 1, :, : start + length].isnan().any()


def test_a_warm_up_touches_the_scratch_row_alone(model):
    lm, capture = model.lm, Counted()
    state = poisoned_state(lm, 200)
    state.hidden.fill_(7)
    state.lengths[:2] = 5
    graphs = Graphs(lm, state, capture, prompts=True)
    graphs.warmup(progress=False)
    assert graphs.prompt_buckets == [32, 64, 128, 256]
    assert capture.captures == 4 + 2 * len(graphs.buckets)
    assert state.lengths.tolist() == [5, 5, NO_POSITION]
    assert (state.hidden[:2] == 7).all()
    assert all(part.isnan().all() for part in state.cache.parts)


@pytest.mark.parametrize(("groups", "replays"), [(1, 1), (PROMPTS[-1], 1), (PROMPTS[-1] + 1, 2)])
def test_a_prompt_is_a_graph_for_each_part(model, groups, replays):
    capture = Counted()
    want, got = (poisoned_state(model.lm, PROMPTS[-1] + 8) for _ in range(2))
    graphs = Graphs(model.lm, got, capture, prompts=True)
    ids = random_prompt(model.lm.config, model.lm.empty_id, groups)
    graphs.prefill(ids, 0)
    assert capture.replays == replays
    model.lm.prefill(ids, want, 0)
    assert_equal_states(got, want)


@pytest.mark.parametrize("chosen", ["", "0", "1"])
def test_they_are_experimental(model, monkeypatch, chosen):
    """Without the switch no prompt is captured."""
    monkeypatch.setenv("MIMO_FAST_EXPERIMENTAL", chosen)
    capture, state = Counted(), model.lm.new_state([0], 40)
    graphs = Graphs(model.lm, state, capture)
    monkeypatch.delenv("MIMO_FAST_EXPERIMENTAL")
    graphs.prefill(random_prompt(model.lm.config, model.lm.empty_id, 9), 0)
    assert (capture.replays == 1) == graphs.takes_prompts == (chosen == "1")
    assert int(state.lengths[0]) == 9


@pytest.mark.parametrize("slots", [1, 3])
def test_replies_to_them_are_the_same(model, requests, alone, slots):
    """Whole replies, sampled and greedy, with more rows than slots."""
    engine, capture = Engine(model.lm, slots, CAPACITY), Counted()
    poison(engine)
    engine.decoder.graphs = Graphs(model.lm, engine.state, capture, prompts=True)
    engine.warmup(progress=False)
    replies = [request.start(engine) for request in requests]
    for reply, want in zip(replies, alone, strict=True):
        assert drawn(list(reply)) == want


def tensors_of(state: DecodeState) -> list[torch.Tensor]:
    found = [x for x in vars(state).values() if isinstance(x, torch.Tensor)]
    return [*found, *state.cache.parts]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("lengths", slow_after(2, [(20, 9), (60, 40, 33, 64), (32, 1, 5)]))
def test_packed_prompts_are_each_what_it_is_alone(loaded, lengths, quantized):
    """Bit for bit: keys, values and hidden states, at starts and in slots of their own."""
    lm, size = loaded.model.lm, loaded.model.lm.config.group_size
    states = [poisoned_state(lm, 100, quantized, slots=4) for _ in range(2)]
    packed, lone = (Graphs(lm, state, repeated, prompts=True, packed=True) for state in states)
    parts = list[PromptPart]()
    for i, length in enumerate(lengths):
        ids = random_prompt(lm.config, lm.empty_id, 7 * i + length)
        earlier, new = ids.split([7 * i * size, length * size], dim=1)
        for graphs in (packed, lone) if i else ():
            graphs.prefill(earlier, 3 - i)
        parts.append(PromptPart(PackedPrompt(new), 3 - i, 7 * i))
    packed.prefill_parts(parts)
    for part in parts:
        lone.prefill_parts([part])
    got, want = states
    assert torch.equal(got.lengths, want.lengths)
    assert torch.equal(got.hidden[:-1], want.hidden[:-1])
    for x, y in zip(got.cache.parts, want.cache.parts, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert got.hidden[4 - len(lengths) :].count_nonzero()
    assert got.lengths[:-1].tolist()[::-1][: len(lengths)] == [
        7 * i + length for i, length in enumerate(lengths)
    ]


def test_how_many_are_packed(model):
    """As many as slots; with no more rows than the longest prompt alone."""
    for slots, most in ((1, [1] * 5), (3, [2, 2, 2, 2, 1]), (9, [4, 4, 4, 2, 1])):
        capture, state = Counted(), model.lm.new_state([0] * slots, 512)
        graphs = Graphs(model.lm, state, capture, prompts=True, packed=True)
        assert [graphs.most_packed(bucket) for bucket in PROMPTS] == most
    sizes = [count * bucket for count, bucket in graphs._prompt_graphs()]
    assert sizes == sorted(sizes)
    assert len(sizes) == 5 + 4 + 3
    assert not Graphs(model.lm, state, capture, prompts=True).packs_prompts


def test_prompts_that_wait_together_are_prefilled_together(model, requests, alone):
    """Of one bucket; every reply is the one that it is alone, some begin while others run."""
    engine, capture = Engine(model.lm, 4, CAPACITY), Counted()
    poison(engine)
    graphs = Graphs(model.lm, engine.state, capture, prompts=True, packed=True)
    engine.decoder.graphs = graphs
    engine.warmup(progress=False)
    taken = list[int]()
    run = graphs_module.CapturedPrompt.run

    def watched(captured, parts):
        taken.append(len(parts))
        run(captured, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_module.CapturedPrompt, "run", watched)
        replies = [request.start(engine) for request in requests]
        for reply in replies[:4]:
            reply.prefill()
        for reply, want in zip(replies, alone, strict=True):
            assert drawn(list(reply)) == want
    assert sum(taken) == len(requests)
    assert max(taken) > 1


def test_a_failure_of_one_is_not_the_others(model, requests, alone, monkeypatch):
    engine = Engine(model.lm, 4, CAPACITY)
    graphs = Graphs(model.lm, engine.state, repeated, prompts=True, packed=True)
    engine.decoder.graphs = graphs
    engine.warmup(progress=False)
    run = graphs_module.CapturedPrompt.run

    def failing(captured, parts):
        if any(part.slot == 1 for part in parts):
            raise RuntimeError("no")
        run(captured, parts)

    monkeypatch.setattr(graphs_module.CapturedPrompt, "run", failing)
    replies = [request.start(engine) for request in requests[:3]]
    with pytest.raises(RuntimeError, match="no"):
        replies[1].prefill()
    for i in (0, 2):
        assert drawn(list(replies[i])) == alone[i]


@pytest.mark.parametrize("groups", [1, 254, PROMPTS[-1]])
def test_a_prompt_is_two_launches(model, groups, monkeypatch):
    counted, state = HostLaunches(), poisoned_state(model.lm, PROMPTS[-1])
    counted.owns(*tensors_of(state))
    graphs = Graphs(model.lm, state, counted.unwatched, prompts=True)
    bucket = graphs.bucket_of(groups)
    counted.owns(graphs._prompt(0, 1, bucket).inputs)
    ids = random_prompt(model.lm.config, model.lm.empty_id, groups)
    with counted:
        graphs.prefill(ids, 0)
    assert counted.names == ["copy_", "graph"]
    # Kernel by kernel it is many.
    counted.names.clear()
    monkeypatch.setattr(model.lm, "_executor", layer_by_layer(model.lm.network))
    with counted:
        model.lm.prefill(ids, state, 1)
    assert len(counted.names) > 20


@pytest.mark.parametrize(("name", "captured"), [("CAPTURE_SECONDS", 0), ("CAPTURE_BYTES", 2)])
def test_what_is_over_budget_is_captured_at_its_first_use(model, monkeypatch, name, captured):
    """Of time, and of memory: there each capture takes 300 MB, and 256 and 128 groups fit."""
    capture, state = Counted(), model.lm.new_state([0], 200)
    monkeypatch.setattr(graphs_module, name, 0.0 if name.endswith("SECONDS") else 5 * 10**8)
    monkeypatch.setattr(Graphs, "_reserved", lambda graphs: 3 * 10**8 * capture.captures)
    graphs = Graphs(model.lm, state, capture, prompts=True)
    graphs.warmup(progress=False)
    assert sorted(graphs._prompts) == [(0, 1, 128), (0, 1, 256)][:captured]
    assert capture.captures == 2 * len(graphs.buckets) + captured
    graphs.prefill(random_prompt(model.lm.config, model.lm.empty_id, 40), 0)
    assert capture.captures == 2 * len(graphs.buckets) + captured + 1
