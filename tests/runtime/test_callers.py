"""Several threads and tasks at one dialogue or one history: nothing is lost, nothing is mixed."""

import asyncio
import copy
import gc
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_fast import BusyError, Chunk, MimoAudio, Session
from mimo_fast.runtime.engine.engine import Engine

GROUPS = 6


def say(session: Session, audio: Any, groups: int = GROUPS) -> list[Chunk]:
    return list(session.stream(audio, max_new_tokens=groups, min_new_tokens=groups))


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Runs each in a thread of its own, all beginning at once; errors are results."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(number: int, work: Callable[[], Any]) -> None:
        barrier.wait(60)
        try:
            results[number] = work()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def check(session: Session, model: MimoAudio, audio: Path, outcomes: list[Any]) -> None:
    """Each outcome is a whole reply whose turn is in the dialogue, or a refusal."""
    replies = [outcome for outcome in outcomes if isinstance(outcome, list)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, BusyError)]
    assert replies
    assert len(replies) + len(refused) == len(outcomes), outcomes
    assert session.turns == len(replies)
    lone = model.session()
    for reply in replies:
        assert len(reply) == GROUPS
        say(lone, audio)
    # All say the same, so their order does not matter.
    assert torch.equal(session.ids, lone.ids)


class TestDialogue:
    @pytest.mark.parametrize("callers", [2, 5])
    def test_threads_that_speak_at_once(
        self, greedy: MimoAudio, audio: list[Path], callers: int
    ) -> None:
        for _ in range(4):
            session = greedy.session()
            outcomes = together([lambda session=session: say(session, audio[1])] * callers)
            check(session, greedy, audio[1], outcomes)

    def test_tasks_that_speak_at_once(self, greedy: MimoAudio, audio: list[Path]) -> None:
        options = {"max_new_tokens": GROUPS, "min_new_tokens": GROUPS}

        async def speak(session: Session) -> list[Chunk]:
            return [chunk async for chunk in session.astream(audio[1], **options)]

        async def all_at_once(session: Session) -> list[Any]:
            tasks = (speak(session) for _ in range(3))
            return await asyncio.gather(*tasks, return_exceptions=True)

        for _ in range(4):
            session = greedy.session()
            check(session, greedy, audio[1], asyncio.run(all_at_once(session)))

    def test_a_second_caller_is_told_what_to_do(self, greedy: MimoAudio, audio: list[Path]) -> None:
        session = greedy.session()
        running = session.stream(audio[1], max_new_tokens=GROUPS, min_new_tokens=GROUPS)
        first = next(running)
        (error,) = together([lambda: say(session, audio[2])])
        assert isinstance(error, BusyError)
        assert "close that stream, or call interrupt first" in str(error)
        assert len([first, *running]) == GROUPS
        (reply,) = together([lambda: say(session, audio[2])])
        assert len(reply) == GROUPS
        assert session.turns == 2

    def test_a_stream_that_was_dropped_is_in_nobodys_way(
        self, greedy: MimoAudio, audio: list[Path]
    ) -> None:
        session, lone = greedy.session(), greedy.session()
        for one in (session, lone):
            for _ in one.stream(audio[1], max_new_tokens=GROUPS, min_new_tokens=GROUPS):
                break
        gc.collect()
        (reply,) = together([lambda: say(session, audio[2])])
        assert len(reply) == GROUPS
        say(lone, audio[2])
        assert torch.equal(session.ids, lone.ids)

    @pytest.mark.parametrize("seed", range(6))
    def test_everything_at_once(
        self, greedy: MimoAudio, audio: list[Path], tmp_path: Path, seed: int
    ) -> None:
        """Speakers, interruptions, saves and resets of one dialogue from five threads."""
        session, refused = greedy.session(), list[int]()

        def act(number: int) -> None:
            rng = random.Random(10 * seed + number)
            for step in range(6):
                choice = rng.randrange(6)
                try:
                    if choice < 3:
                        taken = rng.randrange(1, GROUPS)
                        stream = session.stream(audio[1], GROUPS, GROUPS)
                        for _ in zip(range(taken), stream, strict=False):
                            pass
                        if choice == 2:
                            stream.close()
                    elif choice == 3:
                        session.interrupt(rng.choice([0, 200, 1e6]))
                    elif choice == 4:
                        path = tmp_path / f"{number}-{step}"
                        session.save(path)
                        assert greedy.restore_session(path).turns <= 6 * 5
                    else:
                        session.reset()
                except BusyError:
                    refused.append(1)

        outcomes = together([lambda number=number: act(number) for number in range(5)])
        assert outcomes == [None] * 5
        # Still a dialogue: a saved copy and the session itself go on alike.
        session.save(tmp_path / "end")
        copied = greedy.restore_session(tmp_path / "end")
        assert [c.text for c in say(session, audio[2])] == [c.text for c in say(copied, audio[2])]
        assert torch.equal(session.ids, copied.ids)
        assert session.ids.shape[1] % 4 == 0

    def test_an_interruption_reaches_a_turn_that_waits_for_its_prefill(
        self, greedy: MimoAudio, audio: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One slot, held by a batch that nobody may push aside."""
        engine = Engine(greedy.lm, 1, 200)
        monkeypatch.setattr(greedy.pipeline, "_engine", engine)
        session, got = greedy.session(), list[Any]()
        monkeypatch.setattr(engine, "_choose_slot", lambda request: None)
        speaker = threading.Thread(target=lambda: got.append(say(session, audio[1])))
        monkeypatch.setattr(engine, "_step", lambda: threading.Event().wait(0.01) or True)
        speaker.start()
        while session.turns == 0:
            pass
        session.interrupt(0)
        speaker.join(60)
        assert got == [[]]
        assert session.turns == 1


class TestHistory:
    def test_threads_that_continue_one_history(self, model: MimoAudio) -> None:
        own, lone = copy.copy(model), copy.copy(model)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "seed": 3}
        for one in (own, lone):
            one.clear_history()
            one.text_dialogue_sft("Hi.", **options)

        def ask() -> str:
            return own.text_dialogue_sft("Hi.", add_history=True, **options)

        outcomes = together([ask] * 4)
        answers = [answer for answer in outcomes if isinstance(answer, str)]
        assert answers
        refused = [error for error in outcomes if isinstance(error, BusyError)]
        assert len(answers) + len(refused) == 4, outcomes
        for _ in answers:
            lone.text_dialogue_sft("Hi.", add_history=True, **options)
        assert own.history is not None
        assert lone.history is not None
        assert torch.equal(own.history, lone.history)

    def test_a_copy_has_a_history_of_its_own(self, model: MimoAudio) -> None:
        own = copy.copy(model)
        own.clear_history()
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "seed": 3}
        own.text_dialogue_sft("Hi.", **options)
        twin, before = copy.copy(own), own.history
        first = own.text_dialogue_sft("And?", add_history=True, **options)
        assert twin.text_dialogue_sft("And?", add_history=True, **options) == first
        assert before is not None
        assert torch.equal(own.history, twin.history)
        assert own.history.shape[1] > before.shape[1]

    def test_a_request_that_is_refused_changes_nothing(
        self, model: MimoAudio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = copy.copy(model)
        own.clear_history()
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "seed": 3}
        own.text_dialogue_sft("Hi.", **options)
        before = own.history
        monkeypatch.setattr(own.engine, "bounds", replace(own.engine.bounds, queue=0))
        with pytest.raises(BusyError):
            own.text_dialogue_sft("And?", add_history=True, **options)
        assert torch.equal(own.history, before)
