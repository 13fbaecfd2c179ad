"""`generate`: layouts, batches, seeds, lengths, stop rules, streamers and what it refuses."""

import copy
import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mimo_fast import MimoAudio, MiMoSampler, MiMoStopper, PromptError, generate
from mimo_fast.generation import flatten_ids, unflatten_ids
from mimo_fast.sampling import row_seeds
from mimo_fast.testing.parity import Golden

Prompts = list[Tensor]
SAMPLED = MiMoSampler(do_sample=True, temperature=0.9, top_p=0.95)
GROUP, CHANNELS = 4, 8
WIDTH = (CHANNELS + 1) * GROUP
INTEGERS = [torch.int64, torch.int32]


@pytest.fixture(scope="module")
def prompts(golden: Golden) -> Prompts:
    """Four prompts of different lengths: 42, 45, 29 and 36 groups."""
    return [golden.get(f"prompts:{name}").long() for name in ("tts_en", "asr", "text", "s2t")]


@pytest.fixture(scope="module")
def sampled(model: MimoAudio) -> Any:
    """`generate` on the model, with sampling."""
    return partial(generate, model, global_sampler=SAMPLED, local_sampler=SAMPLED)


@pytest.fixture(scope="module")
def free(sampled: Any, prompts: Prompts) -> list[int]:
    """30 text tokens after the first prompt with seed 7, nothing stopping them."""
    return new_text(sampled(prompts[0], max_new_tokens=30, seed=7), prompts[0])


def new_text(ids: Tensor, prompt: Tensor) -> list[int]:
    """Text tokens of the generated groups."""
    return ids[0, prompt.shape[1] :: GROUP].tolist()


def equal_rows(got: Any, want: Any) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


stopper = partial(MiMoStopper, GROUP, CHANNELS)


def test_generated_groups_are_well_formed(model, sampled, prompts):
    ids = sampled(prompts[0], max_new_tokens=40, seed=0)
    assert torch.equal(ids[:, : prompts[0].shape[1]], prompts[0])
    groups = ids[:, prompts[0].shape[1] :].unflatten(1, (-1, GROUP))
    assert (groups[0] == groups[0, :, :1]).all()
    empty = torch.tensor(model.lm.config.empty_codes)[:, None, None]
    speaks = groups[0, :, 0] == model.empty_token
    assert 0 < speaks.sum() < len(speaks)
    assert (groups[1:, ~speaks] == empty).all()
    assert (groups[1:, speaks] < empty).all()


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from(INTEGERS))
@example(groups=9, rows=1, seed=0, dtype=torch.int64).via("[9, 36], as long as one flattened group")
@example(groups=2, rows=9, seed=0, dtype=torch.int64).via(
    "nine flattened rows, as many as channels"
)
def test_the_result_has_the_layout_of_the_input(model, sampled, groups, rows, seed, dtype):
    shape, sizes = (rows, groups * GROUP), (model.vocab_size, *model.lm.config.code_sizes)
    random = torch.Generator().manual_seed(seed)
    channels = [torch.randint(size, shape, generator=random, dtype=dtype) for size in sizes]
    batch = torch.stack(channels, dim=1)
    batch[:, 0].view(rows, -1, GROUP)[..., 1:] = -100
    run = partial(sampled, max_new_tokens=2)
    want = [run(ids, seed=row) for row, ids in enumerate(batch)]
    assert all(ids.shape == (CHANNELS + 1, (groups + 2) * GROUP) for ids in want)
    flat = run(torch.stack([flatten_ids(ids) for ids in batch]), seed=range(rows))
    listed, stacked = (run(form, seed=range(rows)) for form in (list(batch), batch))
    unflattened = [unflatten_ids(row, CHANNELS) for row in flat]
    assert all(equal_rows(got, want) for got in (listed, stacked, unflattened))
    every = (*want, *listed, stacked, flat)
    assert {(ids.dtype, ids.device) for ids in every} == {(dtype, batch.device)}


@given(channels=st.integers(0, 9), frames=st.integers(1, 20))
def test_flattening_goes_frame_by_frame_and_back(channels, frames):
    ids = torch.arange((channels + 1) * frames).view(channels + 1, frames)
    flat = flatten_ids(ids)
    assert flat.tolist() == [int(ids[c, t]) for t in range(frames) for c in range(channels + 1)]
    assert torch.equal(unflatten_ids(flat, channels), ids)


@pytest.mark.parametrize(
    "seed", [None, 11, [3, 1, 4, 1]], ids=["greedy", "one seed", "a seed each"]
)
def test_rows_of_a_batch_equal_single_runs(model, sampled, prompts, seed):
    run = partial(generate, model) if seed is None else sampled
    seeds = seed if isinstance(seed, list) else [seed] * 4
    each = zip(prompts, seeds, strict=True)
    alone = [run(prompt, max_new_tokens=24, seed=seed) for prompt, seed in each]
    assert equal_rows(run(prompts, max_new_tokens=24, seed=seed), alone)


def test_rows_end_each_in_its_own_time(model, sampled, prompts):
    run = partial(sampled, max_new_tokens=24, seed=7)
    free = list(map(new_text, run(prompts), prompts))
    texts = (free[0][4:], free[1][9:])
    stops = {next(token for token in text if token != model.empty_token) for text in texts}
    ends = [next((i + 1 for i, t in enumerate(text) if t in stops), 24) for text in free]
    assert len(set(ends)) > 2
    rows = run(prompts, stopping_criteria=[stopper(stops)])
    want = [text[:end] for text, end in zip(free, ends, strict=True)]
    assert list(map(new_text, rows, prompts)) == want
    # The first row has just reached this minimum where it ends, and shorter prompts have not.
    for criterion in (stopper(stops), stopper(stops, min_length=42 + ends[0] - 1)):
        alone = [run(prompt, stopping_criteria=[criterion]) for prompt in prompts]
        assert equal_rows(run(prompts, stopping_criteria=[criterion]), alone)


@pytest.mark.parametrize(("config", "pad"), [(None, -100), ({"pad_token_id": 401}, 401)])
def test_short_rows_of_a_tensor_are_padded(model, sampled, prompts, config, pad):
    text = new_text(sampled(prompts[2], max_new_tokens=10, seed=0), prompts[2])
    stop = next(t for t in text[3:] if t != model.empty_token)
    options = {"generation_config": config, "stopping_criteria": [stopper([stop])]}
    run = partial(sampled, max_new_tokens=24, **options)
    alone = [run(prompts[2], seed=seed) for seed in range(4)]
    assert len({row.shape for row in alone}) > 1
    filler = torch.tensor((pad, *model.lm.config.empty_codes))[:, None]
    rows = run(flatten_ids(prompts[2]).expand(4, -1), seed=range(4))
    for ids, want in zip((unflatten_ids(row, CHANNELS) for row in rows), alone, strict=True):
        assert torch.equal(ids[:, : want.shape[1]], want)
        assert (ids[:, want.shape[1] :] == filler).all()


def test_a_prompt_may_be_prefilled_in_parts(sampled, prompts, free, monkeypatch):
    monkeypatch.setattr("mimo_fast.runtime.lm.model.PREFILL_CHUNK", 7)
    assert new_text(sampled(prompts[0], max_new_tokens=30, seed=7), prompts[0]) == free


def test_a_seed_fixes_the_tokens_of_its_row(sampled, prompts):
    run = partial(sampled, [prompts[0]] * 3, max_new_tokens=8)
    one, again, other = run(seed=[5, 6, 7]), run(seed=[5, 6, 7]), run(seed=[7, 9, 5])
    assert equal_rows(one, again)
    assert equal_rows([one[0], one[2]], [other[2], other[0]])
    assert not torch.equal(one[0], one[1])
    fresh = [*run(seed=None), *run(seed=None)]
    assert len({tuple(row.flatten().tolist()) for row in fresh}) == 6


@pytest.mark.parametrize(
    ("config", "arguments", "groups"),
    [
        ({"max_new_tokens": 5}, {}, 5),
        ({"max_length": 48, "max_new_tokens": None}, {}, 6),
        ({"max_length": 48}, {"stopping_criteria": [stopper(max_length=45)]}, 3),
        ({"max_length": 48, "max_new_tokens": 9}, {}, 9),
        ({"max_new_tokens": 9}, {"max_new_tokens": 4}, 4),
        ({}, {"max_new_tokens": 9, "stopping_criteria": [stopper(max_length=45)]}, 3),
    ],
)
@pytest.mark.parametrize("form", [dict, SimpleNamespace, GenerationConfig])
def test_the_limit_decides_the_length(model, prompts, form, config, arguments, groups):
    ids = generate(model, prompts[0], form(**config), **arguments)
    assert len(new_text(ids, prompts[0])) == groups


def test_without_a_limit_the_context_is_filled(model, prompts):
    lm = copy.copy(model.lm)
    lm.config = dataclasses.replace(lm.config, max_positions=47)
    assert len(new_text(generate(lm, prompts[0]), prompts[0])) == 5
    with pytest.raises(
        PromptError,
        match=r"has 84 groups \(13\.4 s\) and the limit is 47 groups",
    ):
        generate(lm, torch.cat([prompts[0]] * 2, dim=1))


def test_stop_tokens_wait_for_the_minimum(model, sampled, prompts, free):
    stops = set(range(model.vocab_size)) - {model.empty_token, *free[8:]}
    assert stops.intersection(free[:8])
    run = partial(sampled, prompts[0], max_new_tokens=40, seed=7)
    first, *others = [
        run(stopping_criteria=[stopper(stops)], min_new_tokens=8),
        run(generation_config={"min_new_tokens": 8}, stopping_criteria=[stopper(stops)]),
        run(stopping_criteria=[stopper(stops, min_length=42 + 8)]),
    ]
    text = new_text(first, prompts[0])
    assert all(torch.equal(other, first) for other in others)
    assert 8 < len(text) < 40
    assert [token in stops for token in text] == [False] * (len(text) - 1) + [True]


class Recorder(StoppingCriteria):
    """A criterion that ends a row of so many groups, and keeps all it was shown."""

    def __init__(self, groups: int, form: Any = bool) -> None:
        self.groups, self.form, self.seen = groups, form, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_options: Any) -> Any:
        self.seen.append(input_ids)
        return self.form(input_ids.shape[1] >= self.groups * WIDTH)


@pytest.mark.parametrize("form", [bool, lambda done: torch.tensor([done])], ids=["bool", "tensor"])
@pytest.mark.parametrize(
    "limit", [5, 20], ids=["ended by max_new_tokens", "ended by the criterion"]
)
def test_criteria_are_shown_every_group(sampled, prompts, form, limit):
    criterion, groups = Recorder(42 + 7, form), min(limit, 7)
    run = partial(sampled, prompts[0], seed=7)
    ids = run(max_new_tokens=limit, stopping_criteria=StoppingCriteriaList([criterion]))
    assert torch.equal(ids, run(max_new_tokens=groups))
    for seen in criterion.seen:
        assert torch.equal(seen, flatten_ids(ids)[None, : seen.shape[1]])
    assert [seen.shape[1] // WIDTH for seen in criterion.seen] == list(range(43, 43 + groups))


def test_criteria_are_asked_row_by_row(sampled, prompts):
    run = partial(sampled, seed=7)
    alone = [run(prompt, max_new_tokens=48 - prompt.shape[1] // GROUP) for prompt in prompts]
    criteria = [MaxLengthCriteria(48 * WIDTH)]
    assert equal_rows(run(prompts, max_new_tokens=50, stopping_criteria=criteria), alone)


def test_a_criterion_or_a_stop_token_ends_the_row(sampled, prompts, free):
    stop = next(token for token in free[4:] if free.index(token) >= 4)
    end = free.index(stop) + 1
    for length, groups in ((end - 2, end - 2), (end + 3, end)):
        criteria = [Recorder(42 + length), stopper([stop])]
        ids = sampled(prompts[0], seed=7, stopping_criteria=criteria)
        assert new_text(ids, prompts[0]) == free[:groups]


def test_having_stop_token_ids_makes_no_stopper(model, prompts):
    criterion = Recorder(42 + 3)
    criterion.stop_token_ids = [401]  # type: ignore[attr-defined]
    ids = generate(model, prompts[0], stopping_criteria=[criterion])
    assert len(new_text(ids, prompts[0])) == 3


class RecordingStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.got = list[Any]()

    def put(self, value: Tensor) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.got.append("end")


@pytest.mark.parametrize("criteria", [[], [Recorder(10**6)]], ids=["alone", "beside a criterion"])
def test_a_streamer_gets_the_prompt_and_every_group(sampled, prompts, criteria):
    streamer = RecordingStreamer()
    options = {"streamer": streamer, "stopping_criteria": criteria}
    ids = sampled(prompts[0], max_new_tokens=6, seed=7, **options)
    *parts, end = streamer.got
    assert [part.shape for part in parts] == [(1, 42 * WIDTH), *[(1, WIDTH)] * 6]
    assert torch.equal(torch.cat(parts, dim=1)[0], flatten_ids(ids))
    assert end == "end"


@pytest.mark.parametrize(
    "form", [MiMoSampler, SimpleNamespace, dict], ids=["sampler", "quack", "config"]
)
def test_what_may_be_a_sampler(model, sampled, prompts, form):
    like = form(do_sample=True, temperature=0.9, top_k=None, top_p=0.95)
    role = {"generation_config": like} if form is dict else {"global_sampler": like}
    ids = generate(model, prompts[0], max_new_tokens=16, seed=4, local_sampler=SAMPLED, **role)
    assert torch.equal(ids, sampled(prompts[0], max_new_tokens=16, seed=4))


SHAPES = [
    ([], "non-empty"),
    (torch.zeros(0, WIDTH), "non-empty"),
    (torch.zeros(0, CHANNELS + 1, GROUP), "non-empty"),
    ([torch.zeros(CHANNELS + 1, GROUP), torch.zeros(CHANNELS + 1)], r"list of \[C \+ 1"),
    (torch.zeros(CHANNELS + 1, 0), "positive multiple of 4"),
    (torch.zeros(CHANNELS + 1, 6), "neither"),
    (torch.zeros(WIDTH), "neither"),
    (torch.zeros(2, CHANNELS, GROUP), "a prompt must be"),
]


@pytest.mark.parametrize(("ids", "message"), SHAPES)
def test_refuses_a_wrong_shape(model, ids, message):
    with pytest.raises(PromptError, match=message):
        generate(model, ids, max_new_tokens=1)


@pytest.mark.parametrize(
    "case", [(0, 8, 448, 447), (0, 0, -100, 447), (1, 5, 65, 64), (8, 3, -1, 16)]
)
def test_refuses_an_id_out_of_range(model, prompts, case):
    (channel, frame, value, last), ids = case, prompts[0].clone()
    ids[channel, frame] = value
    problem = f"^id {value} of channel {channel} at frame {frame} is outside 0..{last}$"
    for run in (partial(generate, model), model.forward):
        with pytest.raises(PromptError, match=problem):
            run(ids, max_new_tokens=1)


@pytest.mark.parametrize(
    "ids",
    [
        *(torch.zeros(9, 8, dtype=dtype) for dtype in (torch.float32, torch.bool, torch.complex64)),
        *(torch.zeros(shape, dtype=torch.int64) for shape in ((9, 6), (8, 8), (9, 0), (9,), ())),
        torch.zeros(1, 9, 8, dtype=torch.int64),
    ],
    ids=lambda ids: str(ids.shape),
)
def test_forward_refuses_what_is_no_prompt(model, ids):
    before = model.history
    with pytest.raises(PromptError, match=r"ids must be|a prompt must be"):
        model.forward(ids, max_new_tokens=1)
    assert before is None or torch.equal(model.history, before)


def test_refuses_wrong_arguments(model, prompts):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        generate(model, prompts[0], max_new_tokens=0)
    with pytest.raises(PromptError, match=r"42 groups \(6\.7 s\) and the limit is 42"):
        generate(model, prompts[0], stopping_criteria=[stopper(max_length=42)])
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        generate(model, prompts[:2], max_new_tokens=1, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="a streamer takes a batch of one, not 2"):
        generate(model, prompts[:2], streamer=RecordingStreamer(), max_new_tokens=1)
    with pytest.raises(TypeError, match=r"cannot generate with a Linear.*mimo_fast\.accelerate"):
        generate(torch.nn.Linear(1, 1), prompts[0], max_new_tokens=1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", "x"),
        ("max_length", [3]),
        ("min_new_tokens", 1.5),
        ("pad_token_id", "0"),
        ("do_sample", "yes"),
        ("temperature", "warm"),
    ],
)
def test_an_option_of_another_type_is_named(model, option, value):
    config = {"do_sample": True, option: value}
    with pytest.raises(TypeError, match=f"generation_config: {option} must be .*, not "):
        generate(model, torch.zeros(9, 8, dtype=torch.int64), config)


def test_values_that_cannot_be_read_are_no_seeds():
    class Elsewhere:
        def tolist(self):
            raise RuntimeError("its values are not here")

    for seed in (torch.ones(1, dtype=torch.int64, device="meta"), Elsewhere()):
        with pytest.raises(TypeError, match="seeds are integers"):
            row_seeds(seed, 1)


def test_any_top_k_is_as_good_as_the_vocabulary(model):
    ids = torch.zeros(9, 8, dtype=torch.int64)
    samplers = [MiMoSampler(True, 1.0, top_k, 1.0) for top_k in (2**40, 2**70)]
    options = {"max_new_tokens": 3, "seed": 1}
    first, second = (generate(model, ids, global_sampler=each, **options) for each in samplers)
    assert torch.equal(first, second)
