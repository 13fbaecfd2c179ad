"""Seeds: a script that seeds torch and `random` repeats; `seed=` reads and changes neither."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accelerate import Causal, kit_config, load_file

from mimo_fast import MimoAudio, MiMoSampler, accelerate, generate
from mimo_fast.sampling import DrawnSeed, fresh_seed
from mimo_fast.text.context import choose_template
from mimo_fast.text.templates import ASR_TEMPLATES, TTS_TEMPLATES

SPEECH = torch.linspace(-0.5, 0.5, 24000).sin()
DRAWN = MiMoSampler(do_sample=True, temperature=1.5)
SHORT: dict[str, Any] = {"max_new_tokens": 4}
USER = {"role": "user", "content": "Hi."}


def seeded(torch_seed: int = 0, python_seed: int = 0) -> None:
    torch.manual_seed(torch_seed)
    random.seed(python_seed)


def states() -> tuple[bytes, object]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


@pytest.fixture
def own(model: MimoAudio) -> MimoAudio:
    """A model that draws at a high temperature in every task, so that equal ids are no accident."""
    own = copy(model)
    own.task_sampler_configs = {}
    own.default_global_sampler = own.default_local_sampler = DRAWN
    own.clear_history()
    return own


async def read(*streams: Any) -> None:
    """Reads streams at the same time."""

    async def one(stream: Any) -> None:
        async for _ in stream:
            pass

    await asyncio.gather(*map(one, streams))


def streamed_by(*models: MimoAudio, **options: Any) -> None:
    async def together() -> None:
        await read(*(model.astream("tts", "Hi.", **SHORT, **options) for model in models))

    asyncio.run(together())


def drawn_ids(own: MimoAudio) -> torch.Tensor:
    """Prompt, with its template, and reply of the last call."""
    kept = own.history
    assert kept is not None
    return kept


def generated(own: MimoAudio, **options: Any) -> torch.Tensor:
    prompt = own.get_text_dialogue_sft_prompt("Hi.")
    batch = [prompt, own.get_tts_sft_prompt("Hi.", template=0)]
    samplers: dict[str, Any] = {"global_sampler": DRAWN, "local_sampler": DRAWN}
    return torch.cat(generate(own, batch, **samplers, **SHORT, **options), dim=1)


def by_task(own: MimoAudio, **options: Any) -> torch.Tensor:
    own.asr_sft(SPEECH, **SHORT, **options)
    return drawn_ids(own)


def continued(own: MimoAudio, **options: Any) -> torch.Tensor:
    own.text_dialogue_sft("Hi.", **SHORT, **options)
    own.text_dialogue_sft("And?", add_history=True, **SHORT, **options)
    return drawn_ids(own)


def by_forward(own: MimoAudio, **options: Any) -> torch.Tensor:
    seed = options.get("seed")
    own.forward(own.get_tts_sft_prompt("Hi.", seed=seed), task_name="tts", **SHORT, **options)
    return drawn_ids(own)


def streamed(own: MimoAudio, **options: Any) -> torch.Tensor:
    for _ in own.stream("tts", "Hi.", **SHORT, **options):
        pass
    return drawn_ids(own)


def streamed_later(own: MimoAudio, **options: Any) -> torch.Tensor:
    streamed_by(own, **options)
    return drawn_ids(own)


def in_session(own: MimoAudio, **options: Any) -> torch.Tensor:
    session = own.session(**options)
    for _ in session.stream(SPEECH, **SHORT):
        pass
    return session.ids


def decoded(own: MimoAudio, **options: Any) -> torch.Tensor:
    sequence = own.conversation(**options)
    sequence.add(own.get_text_dialogue_sft_prompt("Hi."))
    list(own.decode(sequence, "tts", frozenset(), 4))
    return sequence.ids


WAYS = [
    *(generated, by_task, continued, by_forward, streamed, streamed_later, in_session, decoded),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_seeded_script_repeats(own, way):
    seeded()
    first = way(own)
    other = way(own)
    seeded()
    again = way(own)
    assert torch.equal(again, first)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_seed_reads_and_changes_neither_generator(own, way):
    seeded(1, 2)
    before = states()
    first = way(own, seed=7)
    assert states() == before
    seeded(3, 4)
    assert torch.equal(way(own, seed=7), first)


def test_after_accelerate_a_seeded_script_repeats(kit: Path, model: MimoAudio):
    tensors = load_file(kit / "checkpoint/lm" / "model.safetensors")
    causal: Any = accelerate(Causal(tensors, kit_config("lm")))
    prompt = model.get_text_dialogue_sft_prompt("Hi.")
    samplers: dict[str, Any] = {"global_sampler": DRAWN, "local_sampler": DRAWN} | SHORT
    seeded()
    first, other = (causal.generate(prompt, **samplers) for _ in range(2))
    seeded()
    assert torch.equal(causal.generate(prompt, **samplers), first)
    assert not torch.equal(first, other)
    before = states()
    causal.generate(prompt, seed=1, **samplers)
    assert states() == before


def test_templates_are_the_ones_that_upstream_draws():
    """Upstream calls `random.choice` with lists of the same texts in the same order."""
    for templates in (ASR_TEMPLATES, *TTS_TEMPLATES.values()):
        random.seed(5)
        upstream = [random.choice(list(templates)) for _ in range(9)]
        random.seed(5)
        assert [choose_template(templates, None, None) for _ in range(9)] == upstream


def test_a_second_turn_draws_anew_and_goes_on_from_a_seed_that_was_given(own):
    """As upstream, whose turns each read the generator; the seed of a dialogue holds for all."""

    def turns(first_seed: int | None, before_second: int) -> torch.Tensor:
        seeded()
        own.text_dialogue_sft("Hi.", seed=first_seed, max_new_tokens=3)
        torch.manual_seed(before_second)
        own.text_dialogue_sft("And?", add_history=True, max_new_tokens=6)
        return drawn_ids(own)

    assert torch.equal(turns(None, 1), turns(None, 1))
    assert not torch.equal(turns(None, 1), turns(None, 2))
    assert torch.equal(turns(5, 1), turns(5, 2))


def test_streams_at_once_draw_in_the_order_of_their_calls(own):
    """Worker threads begin in any order."""

    def at_once() -> list[torch.Tensor]:
        seeded()
        twins = [copy(own) for _ in range(3)]
        streamed_by(*twins)
        return [drawn_ids(twin) for twin in twins]

    first, again = at_once(), at_once()
    assert all(torch.equal(ids, same) for ids, same in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_threads_draw_different_seeds_and_the_same_ones_again():
    def drawn() -> list[int]:
        torch.manual_seed(3)
        with ThreadPoolExecutor(8) as pool:
            return sorted(pool.map(lambda _: fresh_seed(), range(400)))

    first = drawn()
    assert len(set(first)) == 400
    assert all(0 <= seed < 2**63 for seed in first)
    assert max(first) > 2**62
    assert drawn() == first


def test_a_seed_drawn_ahead_is_an_int_with_templates_from_python():
    seeded()
    first, other = DrawnSeed.draw(), DrawnSeed.draw()
    seeded()
    again = DrawnSeed.draw()
    assert (again, again.templates) == (first, first.templates)
    assert (other, other.templates) != (first, first.templates)
    random.seed(1)
    torch.manual_seed(0)
    assert DrawnSeed.draw().templates != first.templates


@pytest.mark.parametrize(
    "surroundings",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")],
    ids=["inference mode", "no grad", "meta"],
)
def test_what_torch_is_set_to_changes_no_seed(surroundings):
    torch.manual_seed(0)
    want = fresh_seed()
    torch.manual_seed(0)
    with surroundings():
        assert fresh_seed() == want
