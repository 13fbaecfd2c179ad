"""Sessions: a turn prefills itself alone; an interruption drops what was not heard."""

import asyncio
import copy
import math
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from dialogues import collected, limit_context
from helpers import watch
from torch import Tensor

from mimo_fast import LM, Chunk, MimoAudio, MiMoStopper, PromptError, Session, generate
from mimo_fast.kernels.matmul.product import Weight

GROUP = 4
PATCH_MS = 160
REPLY, NEXT = 24, 8
PATCHES_HEARD = {0: 0, -5: 0, 1: 1, 80: 1, 160: 1, 161: 2, 480: 3, 999.5: 7}
PATCHES_HEARD |= {1e6: None, math.inf: None}
"""By milliseconds played; None is all."""


def insistent(model: MimoAudio, token: int) -> MimoAudio:
    """A model that says nothing but this token, as soon as it may."""
    model, bias = copy.copy(model), torch.zeros(model.vocab_size)
    bias[token] = 1e4
    model.lm = copy.copy(model.lm)
    model.lm.text_head = Weight.stack(model.lm.text_head.blocks, [bias])
    return model


def say(session: Session, audio: Any, groups: int = REPLY) -> list[Chunk]:
    return list(session.stream(audio, max_new_tokens=groups, min_new_tokens=groups))


def groups(ids: Tensor) -> int:
    return ids.shape[1] // GROUP


def tokens(ids: Tensor) -> list[int]:
    return ids[0, ::GROUP].tolist()


def from_scratch(model: MimoAudio, prompt: Tensor, new: int = NEXT) -> Tensor:
    """The prompt and its greedy reply, everything prefilled anew."""
    special = model.tokenizer.special
    stopper = MiMoStopper(GROUP, 8, [special.eos, special.eostm, special.im_end])
    limits = {"max_new_tokens": new, "min_new_tokens": new}
    return generate(model, prompt, stopping_criteria=[stopper], **limits)


def closed(model: MimoAudio, said: Tensor, audio: Any) -> Tensor:
    """What has been said, its last reply broken off, and a new turn: the next prompt."""
    closing = model.pack(["<|eostm|>", "<|im_end|>\n"])
    return torch.cat((said, closing, model.get_spoken_dialogue_sft_prompt(audio)), dim=1)


def patch_positions(model: MimoAudio, session: Session, reply: int = REPLY) -> list[int]:
    """Groups of a dialogue that are patches of its last reply, of so many groups."""
    said = tokens(session.ids)
    return [i for i in range(len(said) - reply, len(said)) if said[i] == model.empty_token]


def assert_goes_on(model: MimoAudio, session: Session, said: Tensor, audio: Any) -> Tensor:
    """A new turn after `said` equals one computed from scratch; returns its prompt."""
    say(session, audio, NEXT)
    prompt = closed(model, said, audio)
    assert torch.equal(session.ids, from_scratch(model, prompt))
    return prompt


def started(session: Session, audio: Any, taken: int) -> Iterator[Chunk]:
    """A stream of which so many groups have been taken."""
    running = session.stream(audio, max_new_tokens=REPLY, min_new_tokens=REPLY)
    for _ in range(taken):
        next(running)
    return running


class TestTurns:
    @pytest.mark.parametrize("system", [None, "", "Be brief."])
    @pytest.mark.parametrize("voice", [None, 0])
    def test_the_first_is_upstreams_prompt(self, greedy, audio, system, voice):
        speech = None if voice is None else audio[voice]
        session = greedy.session(system, speech)
        chunks = say(session, audio[1])
        prompt = greedy.get_spoken_dialogue_sft_prompt(audio[1], system, speech)
        assert torch.equal(session.ids, from_scratch(greedy, prompt, REPLY))
        assert session.prefilled == groups(prompt)
        assert len(chunks) == REPLY

    def test_later_ones_equal_a_whole_prefill(self, greedy, audio):
        session = greedy.session("Be brief.", audio[0])
        say(session, audio[1])
        for turn in (2, 0, 1):
            said = session.ids
            prompt = assert_goes_on(greedy, session, said, audio[turn])
            # The last group said has not been fed yet.
            assert session.prefilled == groups(prompt) - groups(said) + 1

    @pytest.mark.parametrize(
        ("name", "new", "closing"),
        [("im_end", 4, "\n"), ("eostm", 4, "<|im_end|>\n"), ("sosp", 6, "<|eostm|><|im_end|>\n")],
    )
    def test_a_reply_is_closed_once(self, greedy, audio, name, new, closing):
        token = getattr(greedy.tokenizer.special, name)
        session = insistent(greedy, token).session()
        turn = tokens(greedy.get_spoken_dialogue_sft_prompt(audio[1]))
        between = greedy.tokenizer.encode(closing)
        limits = {"max_new_tokens": 6, "min_new_tokens": 3}
        assert len(list(session.stream(audio[1], **limits))) == new
        said = tokens(session.ids)
        assert said[: len(turn)] == turn
        assert said[-1] == token
        list(session.stream(audio[1], **limits))
        assert tokens(session.ids)[:-new] == [*said, *between, *turn]

    def test_a_new_turn_stops_the_running_one(self, greedy, audio):
        session = greedy.session()
        running = started(session, audio[1], 5)
        assert_goes_on(greedy, session, session.ids, audio[2])
        assert list(running) == []

    def test_closing_keeps_what_was_decoded(self, greedy, audio):
        session, whole = greedy.session(), greedy.session()
        say(whole, audio[1])
        started(session, audio[1], 5).close()
        assert torch.equal(session.ids, whole.ids[:, : -(REPLY - 5) * GROUP])

    def test_a_context_that_is_full(self, greedy, audio):
        limit_context(greedy, 90)
        session = greedy.session()
        say(session, audio[1], 8)
        said = session.ids
        problem = r"has \d+ groups \(.*\) and the model's context is 90"
        with pytest.raises(PromptError, match=problem):
            session.stream(torch.zeros(24000 * 20))
        assert torch.equal(session.ids, said)
        say(session, torch.zeros(24000), 8)
        assert torch.equal(session.ids[:, : said.shape[1]], said)

    def test_the_context_may_be_filled_to_the_last_group(self, greedy, audio):
        limit_context(greedy, groups(greedy.get_spoken_dialogue_sft_prompt(audio[1])) + 3)
        session = greedy.session()
        assert len(list(session.stream(audio[1]))) == 3
        with pytest.raises(PromptError, match="start a new one"):
            session.stream(torch.cat([torch.zeros(24000), torch.zeros(24000 * 20)]))


class TestInterrupt:
    @pytest.mark.parametrize(("played_ms", "heard"), PATCHES_HEARD.items())
    def test_keeps_what_was_heard(self, greedy, audio, played_ms, heard):
        session = greedy.session("Be brief.", audio[0])
        say(session, audio[1])
        before, spoken = session.ids, patch_positions(greedy, session)
        session.interrupt(played_ms)
        kept = groups(before) if heard is None else spoken[heard]
        assert torch.equal(session.ids, before[:, : kept * GROUP])
        prompt = assert_goes_on(greedy, session, before[:, : kept * GROUP], audio[2])
        # The last group of a whole reply has not been fed yet.
        assert session.prefilled == groups(prompt) - min(kept, groups(before) - 1)

    def test_twice_keeps_the_shorter(self, greedy, audio):
        session = greedy.session()
        say(session, audio[1])
        before, spoken = session.ids, patch_positions(greedy, session)
        for played, heard in ((5, 5), (2, 2), (9, 2)):
            session.interrupt(played * PATCH_MS)
            assert groups(session.ids) == spoken[heard]
        assert_goes_on(greedy, session, before[:, : spoken[2] * GROUP], audio[2])

    def test_before_any_turn_changes_nothing(self, greedy, audio):
        session = greedy.session("Be brief.", audio[0])
        session.interrupt(0)
        say(session, audio[1], NEXT)
        prompt = greedy.get_spoken_dialogue_sft_prompt(audio[1], "Be brief.", audio[0])
        assert torch.equal(session.ids, from_scratch(greedy, prompt))

    @pytest.mark.parametrize(("taken", "heard"), [(0, 0), (1, 0), (14, 2), (14, 100)])
    def test_in_the_middle_of_a_stream(self, greedy, audio, taken, heard):
        session = greedy.session()
        running = started(session, audio[1], taken)
        before, spoken = session.ids, patch_positions(greedy, session, reply=taken)
        kept = spoken[heard] if heard < len(spoken) else groups(before)
        session.interrupt(heard * PATCH_MS)
        assert list(running) == []
        assert torch.equal(session.ids, before[:, : kept * GROUP])
        assert_goes_on(greedy, session, before[:, : kept * GROUP], audio[2])

    def test_while_another_thread_decodes(self, greedy, audio, monkeypatch):
        """The event loop interrupts while a worker is in the middle of a group."""
        inside, session = threading.Event(), greedy.session()
        watch(monkeypatch, LM, "step", lambda *_: inside.set(), lambda *_: time.sleep(0.05))

        async def break_in() -> int:
            stream = session.astream(audio[1], max_new_tokens=REPLY)
            consumer = asyncio.create_task(collected(stream))
            while not inside.is_set():
                await asyncio.sleep(0)
            session.interrupt(0)
            return len(await consumer)

        assert asyncio.run(break_in()) <= 2
        said = session.ids
        assert groups(said) < groups(greedy.get_spoken_dialogue_sft_prompt(audio[1])) + 3
        assert_goes_on(greedy, session, said, audio[2])


def test_reset_keeps_the_voice_and_its_cache(greedy, audio):
    session, fresh = greedy.session("Be brief.", audio[0]), greedy.session("Be brief.", audio[0])
    opening = groups(session.ids)
    assert opening > 0
    say(fresh, audio[2], NEXT)
    greedy.engine.steps.prefixes.clear()
    say(session, audio[1])
    session.reset()
    assert groups(session.ids) == opening
    say(session, audio[2], NEXT)
    assert torch.equal(session.ids, fresh.ids)
    assert session.prefilled == fresh.prefilled - opening


class TestDraws:
    def test_a_seed_fixes_the_audio(self, model, audio):
        def heard(seed: int | None) -> tuple[str, Tensor]:
            session = model.session(seed=seed)
            chunks = [*say(session, audio[1], 20), *say(session, audio[2], 20)]
            wav = torch.cat([chunk.audio for chunk in chunks])
            return "".join(chunk.text for chunk in chunks), wav

        (text, wav), (again, same_wav), (_, other), (_, fresh) = map(heard, (4, 4, 5, None))
        assert (text, wav.tolist()) == (again, same_wav.tolist())
        assert len({tuple(audio.tolist()) for audio in (wav, other, fresh)}) == 3

    def test_none_repeats_after_an_interruption(self, model, audio, monkeypatch):
        draws, session = list[tuple[int, int]](), model.session(seed=4)

        def record(_lm: LM, state: Any, slots: Tensor, *_: Any) -> None:
            draws.append((int(state.seeds[slots]), int(state.draws[slots])))

        watch(monkeypatch, LM, "sample_text", record)
        for undo in (partial(session.interrupt, 0), partial(session.interrupt, 200), session.reset):
            say(session, audio[1], 8)
            undo()
        say(session, audio[1], 8)
        assert draws == [(4, draw) for draw in range(32)]
