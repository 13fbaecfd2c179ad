"""Sessions: turns that prefill themselves alone, and interruptions that forget what was not
heard."""

import asyncio
import copy
import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_fast import LM, Chunk, MimoAudio, MiMoStopper, PromptError, Session, generate
from mimo_fast.kernels.matmul.product import Weight

GROUP = 4
PATCH_MS = 160
REPLY, NEXT = 24, 8


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
    return generate(
        model, prompt, stopping_criteria=[stopper], max_new_tokens=new, min_new_tokens=new
    )


def closed(model: MimoAudio, said: Tensor, audio: Any) -> Tensor:
    """What has been said, its last reply broken off, and a new turn: the next prompt."""
    closing = model.pack(["<|eostm|>", "<|im_end|>\n"])
    return torch.cat((said, closing, model.get_spoken_dialogue_sft_prompt(audio)), dim=1)


def patch_positions(reply: Tensor, empty: int) -> list[int]:
    """Groups of a reply that are patches."""
    return [i for i, token in enumerate(tokens(reply)) if token == empty]


class TestTurns:
    @pytest.mark.parametrize("system", [None, "", "Be brief."])
    @pytest.mark.parametrize("voice", [None, 0])
    def test_the_first_is_upstreams_prompt(
        self, greedy: MimoAudio, audio: list[Path], system: str | None, voice: int | None
    ) -> None:
        speech = None if voice is None else audio[voice]
        session = greedy.session(system, speech)
        chunks = say(session, audio[1])
        prompt = greedy.get_spoken_dialogue_sft_prompt(audio[1], system, speech)
        assert torch.equal(session.ids, from_scratch(greedy, prompt, REPLY))
        assert session.prefilled == groups(prompt)
        assert len(chunks) == REPLY

    def test_later_ones_equal_a_whole_prefill(self, greedy: MimoAudio, audio: list[Path]) -> None:
        session = greedy.session("Be brief.", audio[0])
        say(session, audio[1])
        for turn in (2, 0, 1):
            said = session.ids
            say(session, audio[turn], NEXT)
            prompt = closed(greedy, said, audio[turn])
            assert torch.equal(session.ids, from_scratch(greedy, prompt))
            # The last group said has not been fed yet.
            assert session.prefilled == groups(prompt) - groups(said) + 1

    @pytest.mark.parametrize(
        ("name", "new", "closing"),
        [("im_end", 4, "\n"), ("eostm", 4, "<|im_end|>\n"), ("sosp", 6, "<|eostm|><|im_end|>\n")],
    )
    def test_a_reply_is_closed_once(
        self, greedy: MimoAudio, audio: list[Path], name: str, new: int, closing: str
    ) -> None:
        token = getattr(greedy.tokenizer.special, name)
        session = insistent(greedy, token).session()
        turn, between = (
            tokens(greedy.get_spoken_dialogue_sft_prompt(audio[1])),
            greedy.tokenizer.encode(closing),
        )
        assert len(list(session.stream(audio[1], max_new_tokens=6, min_new_tokens=3))) == new
        said = tokens(session.ids)
        assert said[: len(turn)] == turn
        assert said[-1] == token
        list(session.stream(audio[1], max_new_tokens=6, min_new_tokens=3))
        assert tokens(session.ids)[:-new] == [*said, *between, *turn]

    def test_a_new_turn_stops_the_running_one(self, greedy: MimoAudio, audio: list[Path]) -> None:
        session = greedy.session()
        running = session.stream(audio[1], max_new_tokens=REPLY, min_new_tokens=REPLY)
        for _ in range(5):
            next(running)
        said = session.ids
        say(session, audio[2], NEXT)
        assert list(running) == []
        assert torch.equal(session.ids, from_scratch(greedy, closed(greedy, said, audio[2])))

    def test_closing_keeps_what_was_decoded(self, greedy: MimoAudio, audio: list[Path]) -> None:
        session, whole = greedy.session(), greedy.session()
        say(whole, audio[1])
        running = session.stream(audio[1], max_new_tokens=REPLY, min_new_tokens=REPLY)
        for _ in range(5):
            next(running)
        running.close()
        assert torch.equal(session.ids, whole.ids[:, : -(REPLY - 5) * GROUP])

    def test_a_context_that_is_full(self, greedy: MimoAudio, audio: list[Path]) -> None:
        greedy.lm = copy.copy(greedy.lm)
        greedy.lm.config = dataclasses.replace(greedy.lm.config, max_positions=90)
        session = greedy.session()
        say(session, audio[1], 8)
        said = session.ids
        with pytest.raises(
            PromptError,
            match=r"has \d+ groups \(.*\) and the model's context is 90",
        ):
            session.stream(torch.zeros(24000 * 20))
        assert torch.equal(session.ids, said)
        say(session, torch.zeros(24000), 8)
        assert torch.equal(session.ids[:, : said.shape[1]], said)

    def test_the_context_may_be_filled_to_the_last_group(
        self, greedy: MimoAudio, audio: list[Path]
    ) -> None:
        greedy.lm = copy.copy(greedy.lm)
        prompt = greedy.get_spoken_dialogue_sft_prompt(audio[1])
        greedy.lm.config = dataclasses.replace(greedy.lm.config, max_positions=groups(prompt) + 3)
        session = greedy.session()
        assert len(list(session.stream(audio[1]))) == 3
        with pytest.raises(PromptError, match="start a new one"):
            session.stream(torch.cat([torch.zeros(24000), torch.zeros(24000 * 20)]))


class TestInterrupt:
    @pytest.mark.parametrize(
        ("played_ms", "heard"),
        [
            (0, 0),
            (-5, 0),
            (1, 1),
            (80, 1),
            (PATCH_MS, 1),
            (PATCH_MS + 1, 2),
            (3 * PATCH_MS, 3),
            (999.5, 7),
        ],
    )
    def test_keeps_what_was_heard(
        self, greedy: MimoAudio, audio: list[Path], played_ms: float, heard: int
    ) -> None:
        session = greedy.session("Be brief.", audio[0])
        say(session, audio[1])
        before = session.ids
        start = groups(before) - REPLY
        spoken = patch_positions(before[:, start * GROUP :], greedy.empty_token)
        assert len(spoken) > heard
        session.interrupt(played_ms)
        kept = start + spoken[heard]
        assert torch.equal(session.ids, before[:, : kept * GROUP])
        say(session, audio[2], NEXT)
        prompt = closed(greedy, before[:, : kept * GROUP], audio[2])
        assert torch.equal(session.ids, from_scratch(greedy, prompt))
        assert session.prefilled == groups(prompt) - kept

    @pytest.mark.parametrize("played_ms", [1e6, math.inf])
    def test_beyond_the_end_keeps_all(
        self, greedy: MimoAudio, audio: list[Path], played_ms: float
    ) -> None:
        session = greedy.session()
        say(session, audio[1])
        said = session.ids
        session.interrupt(played_ms)
        assert torch.equal(session.ids, said)
        say(session, audio[2], NEXT)
        assert torch.equal(session.ids, from_scratch(greedy, closed(greedy, said, audio[2])))

    def test_twice_keeps_the_shorter(self, greedy: MimoAudio, audio: list[Path]) -> None:
        session = greedy.session()
        say(session, audio[1])
        start, before = groups(session.ids) - REPLY, session.ids
        spoken = patch_positions(before[:, start * GROUP :], greedy.empty_token)
        for played, heard in ((5, 5), (2, 2), (9, 2)):
            session.interrupt(played * PATCH_MS)
            assert groups(session.ids) == start + spoken[heard]
        say(session, audio[2], NEXT)
        prompt = closed(greedy, before[:, : (start + spoken[2]) * GROUP], audio[2])
        assert torch.equal(session.ids, from_scratch(greedy, prompt))

    def test_before_any_turn_changes_nothing(self, greedy: MimoAudio, audio: list[Path]) -> None:
        session = greedy.session("Be brief.", audio[0])
        session.interrupt(0)
        say(session, audio[1], NEXT)
        prompt = greedy.get_spoken_dialogue_sft_prompt(audio[1], "Be brief.", audio[0])
        assert torch.equal(session.ids, from_scratch(greedy, prompt))

    @pytest.mark.parametrize(("taken", "heard"), [(0, 0), (1, 0), (14, 2), (14, 100)])
    def test_in_the_middle_of_a_stream(
        self, greedy: MimoAudio, audio: list[Path], taken: int, heard: int
    ) -> None:
        session = greedy.session()
        running = session.stream(audio[1], max_new_tokens=REPLY, min_new_tokens=REPLY)
        for _ in range(taken):
            next(running)
        before, start = session.ids, groups(session.ids) - taken
        spoken = patch_positions(before[:, start * GROUP :], greedy.empty_token)
        kept = start + (spoken[heard] if heard < len(spoken) else taken)
        session.interrupt(heard * PATCH_MS)
        assert list(running) == []
        assert torch.equal(session.ids, before[:, : kept * GROUP])
        say(session, audio[2], NEXT)
        prompt = closed(greedy, before[:, : kept * GROUP], audio[2])
        assert torch.equal(session.ids, from_scratch(greedy, prompt))

    def test_while_another_thread_decodes(
        self, greedy: MimoAudio, audio: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A listener breaks in: the event loop interrupts while a worker is in the middle of a
        group."""
        inside, step = threading.Event(), LM.step

        def slow(lm: LM, *arguments: Any) -> None:
            inside.set()
            step(lm, *arguments)
            threading.Event().wait(0.05)

        monkeypatch.setattr(LM, "step", slow)
        session = greedy.session()

        async def break_in() -> int:
            async def consume() -> int:
                return len(
                    [chunk async for chunk in session.astream(audio[1], max_new_tokens=REPLY)]
                )

            consumer = asyncio.create_task(consume())
            while not inside.is_set():
                await asyncio.sleep(0)
            session.interrupt(0)
            return await consumer

        assert asyncio.run(break_in()) <= 2
        said = session.ids
        assert groups(said) < groups(greedy.get_spoken_dialogue_sft_prompt(audio[1])) + 3
        say(session, audio[2], NEXT)
        assert torch.equal(session.ids, from_scratch(greedy, closed(greedy, said, audio[2])))


def test_reset_keeps_the_voice_and_its_cache(greedy: MimoAudio, audio: list[Path]) -> None:
    session, fresh = greedy.session("Be brief.", audio[0]), greedy.session("Be brief.", audio[0])
    opening = groups(session.ids)
    assert opening > 0
    say(fresh, audio[2], NEXT)
    greedy.engine.prefixes.clear()
    say(session, audio[1])
    session.reset()
    assert groups(session.ids) == opening
    say(session, audio[2], NEXT)
    assert torch.equal(session.ids, fresh.ids)
    assert session.prefilled == fresh.prefilled - opening


class TestDraws:
    def test_a_seed_fixes_the_audio(self, model: MimoAudio, audio: list[Path]) -> None:
        def heard(seed: int | None) -> tuple[str, Tensor]:
            session = model.session(seed=seed)
            chunks = [*say(session, audio[1], 20), *say(session, audio[2], 20)]
            return "".join(chunk.text for chunk in chunks), torch.cat(
                [chunk.audio for chunk in chunks]
            )

        (text, wav), (again, same_wav), (_, other), (_, fresh) = map(heard, (4, 4, 5, None))
        assert (text, wav.tolist()) == (again, same_wav.tolist())
        assert len({tuple(audio.tolist()) for audio in (wav, other, fresh)}) == 3

    def test_none_repeats_after_an_interruption(
        self, model: MimoAudio, audio: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws, sample_text = list[tuple[int, int]](), LM.sample_text

        def recording(lm: LM, state: Any, slots: Tensor, *arguments: Any) -> Tensor:
            draws.append((int(state.seeds[slots]), int(state.draws[slots])))
            return sample_text(lm, state, slots, *arguments)

        monkeypatch.setattr(LM, "sample_text", recording)
        session = model.session(seed=4)
        forget: list[Callable[[], None]] = [
            lambda: session.interrupt(0),
            lambda: session.interrupt(200),
            session.reset,
        ]
        for undo in forget:
            say(session, audio[1], 8)
            undo()
        say(session, audio[1], 8)
        assert draws == [(4, draw) for draw in range(32)]
