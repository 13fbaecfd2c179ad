"""The session core with nano, on no wire at all: turns, speculation, barge-in, memory."""

import asyncio
from dataclasses import replace

import pytest
import torch
from speech import RATE, pcm, question, silence, turn
from wires import dialogue, speak

from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.hearing import Detection
from mimo_fast.server.realtime.items import Item, Said
from mimo_fast.server.realtime.responses import Manner

COUNT = "one two three four five six seven eight nine ten"
TURN = ["speech_started", "speech_stopped", "committed", "item_added", "item_done"]
REPLY = ["response_created", "response_begun", "said", "response_ended"]


def typed(text: str, id: str = "typed") -> Item:
    return Item(id, "user", [Said(text)])


def running(service) -> int:
    """Requests of the engine that have not ended."""
    return len(service.model.engine._requests)


async def settled(service) -> None:
    """Returns when the compute thread has done all that it was asked for."""
    async with asyncio.timeout(5):
        await asyncio.sleep(0)
        await service.worker.call(lambda: None)
        while service.worker.streams or running(service):
            await asyncio.sleep(0.01)


class TestTurns:
    def test_a_spoken_turn_is_answered(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await speak(core, turn())
            (response, before) = await log.until("response_ended")
            assert log.names() == [*TURN, *REPLY]
            item = log.all("committed")[0][0]
            assert before == item
            assert {each[0] for each in log.all("speech_started")} == {item}
            assert response.status == "completed"
            assert log.text(response) == "seven"
            assert response.item.text == "seven"
            assert len(log.audio(response)) % 2 == 0
            assert response.ask.reply.ms == pytest.approx(len(log.audio(response)) / 48)
            await core.close()

        asyncio.run(run())

    def test_the_reply_is_there_before_the_turn_is_over(self, service):
        """It was begun at the pause, and comes as soon as it may."""

        async def run() -> None:
            core, log = dialogue(service)
            await core.set_hearing(None, Detection(silence_ms=1500))
            await speak(core, turn(200, 600), pace=1.0)
            guess = core._guess
            assert guess is not None
            assert not log.all("response_created")
            # Nothing but the end of the turn is waited for.
            async with asyncio.timeout(20):
                while not any(sound.audio for sound in guess.response.stream._items):
                    await asyncio.sleep(0.01)
            steps = service.worker.steps
            await speak(core, pcm(silence(1200)), pace=8.0)
            (response, _) = await log.until("response_ended")
            assert response is guess.response
            assert service.worker.steps > steps
            assert response.latency["first_audio_ms"] >= 0
            assert log.text(response) == "seven"
            await core.close()

        asyncio.run(run())

    @pytest.mark.slow
    def test_going_on_drops_it(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await core.set_hearing(None, Detection(silence_ms=900))
            await speak(core, turn(200, 500), pace=2.0)
            early = core._guess
            assert early is not None
            await speak(core, turn(0, 1200), pace=2.0)
            (response, _) = await log.until("response_ended")
            assert response is not early.response
            assert early.response.ask.reply.dropped
            assert len(log.all("response_created")) == len(log.all("committed")) == 1
            # The model has heard one turn, of both questions.
            (exchange,) = core._mind._session.exchanges
            assert exchange.said.codes.shape[1] / 25 > 1.5 * len(question()) / RATE
            await settled(service)
            await core.close()

        asyncio.run(run())

    def test_turns_by_hand_wait(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await core.set_hearing(None, None)
            await core.hear(turn())
            assert log.events == []
            await core.commit()
            assert log.names() == TURN[2:]
            await core.respond()
            (response, before) = await log.until("response_ended")
            assert before == log.all("committed")[0][0]
            assert log.text(response) == "seven"
            with pytest.raises(ApiError, match="too small"):
                await core.commit()
            await core.close()

        asyncio.run(run())

    def test_what_was_said_is_transcribed(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            core.set_manner(Manner(), replace(core.turns, transcribes=True))
            await speak(core, turn())
            (item, text, seconds) = await log.until("transcribed")
            assert item == log.all("committed")[0][0]
            assert text == "what is three plus four"
            assert "".join(each[1] for each in log.all("transcribing")) == text
            assert 1.0 < seconds < 3.5
            assert core.conversation.get(item).text == text
            await log.until("response_ended")
            await core.close()

        asyncio.run(run())

    def test_nothing_is_heard_in_what_is_committed_after_a_turn(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            core.set_manner(Manner(), replace(core.turns, transcribes=True, answers=False))
            await speak(core, turn(after=520))
            (first, text, _) = await log.until("transcribed")
            await core.commit()
            assert text == "what is three plus four"
            (second, text, seconds) = await log.until("transcribed", 2)
            assert second != first
            assert text == core.conversation.get(second).text == ""
            assert 0.1 < seconds < 0.5
            await core.close()

        asyncio.run(run())


def test_audio_that_waits_is_listened_to_together(service, monkeypatch):
    """One push a burst, however small its parts; what is asked next waits for it."""

    async def run() -> None:
        core, log = dialogue(service)
        pushed, push = [], core._hearing.push
        monkeypatch.setattr(core._hearing, "push", lambda data: pushed.append(data) or push(data))
        data = turn()
        for at in range(0, len(data), 480):
            await core.hear(data[at : at + 480])
        await core.heard()
        assert b"".join(pushed) == data
        assert len(pushed) < len(data) / 480 / 10
        assert log.names()[:2] == TURN[:2]
        await core.close()

    asyncio.run(run())


class TestBargeIn:
    def test_speech_interrupts_and_what_was_not_heard_is_forgotten(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            log.most = 3
            await core.set_hearing(None, Detection(silence_ms=400))
            await speak(core, turn(200, 700), pace=8.0)
            await log.until("said", 3)
            await speak(core, pcm(torch.cat((silence(60), question()[: RATE * 3 // 4]))))
            (response, _) = await log.until("response_ended")
            assert (response.status, response.reason) == ("cancelled", "turn_detected")
            assert response.item.status == "incomplete"
            told, log.most = len(log.all("said")), None
            log.open.set()
            core.truncate(response.item.id, 10)
            assert core.conversation.get(response.item.id).text == ""
            await settled(service)
            exchange = core._mind._turns[-1].exchange
            assert exchange is response.ask.reply.exchange
            # The patch that was being played is kept.
            empty = service.model.empty_token
            assert int((exchange.reply[0, ::4] == empty).sum()) == 1
            assert torch.equal(core._mind._session.exchanges[-1].reply, exchange.reply)
            assert len(log.all("said")) == told
            await core.close()

        asyncio.run(run())

    @pytest.mark.slow
    def test_a_reply_that_is_not_to_be_interrupted(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            core.set_manner(Manner(), replace(core.turns, interrupts=False))
            log.open.clear()
            await core.add(typed("hello"))
            await core.respond()
            await log.until("said")
            await speak(core, turn(), pace=8.0)
            await log.until("committed")
            assert len(log.all("response_created")) == 1
            log.open.set()
            # The turn is answered once the reply is over.
            (response, _) = await log.until("response_ended", 2)
            assert [each[0].status for each in log.all("response_ended")] == ["completed"] * 2
            assert log.text(response) == "seven"
            await core.close()

        asyncio.run(run())

    def test_truncation_ends_a_reply_in_progress(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            log.most = 2
            await core.add(typed("hello"))
            await core.respond()
            await log.until("said", 2)
            (response, *_) = log.all("said")[0]
            told = log.text(response)
            core.truncate(response.item.id, 0)
            assert (response.status, response.reason) == ("cancelled", "client_cancelled")
            assert response.item.text == ""
            log.most = None
            log.open.set()
            await settled(service)
            assert log.text(response) == told
            # A client that is late knows of more than was heard.
            core.truncate(response.item.id, response.ask.reply.sent_ms)
            assert response.item.text == ""
            await core.close()

        asyncio.run(run())

    @pytest.mark.slow
    def test_truncation_refuses_what_is_not_there(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await core.add(typed("hello"))
            await core.respond()
            (response, _) = await log.until("response_ended")
            for id, ms, problem in (
                ("none", 10, "there is no item"),
                ("typed", 10, "only replies with audio"),
                (response.item.id, response.ask.reply.sent_ms + 10_000, "ms of audio, less than"),
            ):
                with pytest.raises(ApiError, match=problem):
                    core.truncate(id, ms)
            text = response.item.text
            core.truncate(response.item.id, response.ask.reply.ms)
            assert response.item.text == text
            core.truncate(response.item.id, response.ask.reply.ms / 2)
            assert len(response.item.text) < len(text)
            await core.close()

        asyncio.run(run())


class TestReplies:
    def test_a_typed_question_is_answered_by_voice(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await core.add(typed("What is three plus four?"))
            await core.respond()
            (response, before) = await log.until("response_ended")
            assert before == "typed"
            assert log.text(response) == "seven"
            assert response.ask.usage.audio_in > 5
            await core.close()

        asyncio.run(run())

    @pytest.mark.slow
    def test_in_text_only(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await core.add(typed("What is three plus four?"))
            await core.respond(Manner(speaks=False))
            (response, _) = await log.until("response_ended")
            assert log.text(response) == "seven"
            assert log.audio(response) == b""
            await core.close()

        asyncio.run(run())

    @pytest.mark.slow
    def test_one_at_a_time_and_some_beside_it(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await core.add(typed("What is three plus four?"))
            await core.respond()
            with pytest.raises(ApiError, match="active response already") as caught:
                await core.respond()
            assert caught.value.code == "conversation_already_has_active_response"
            hello = [Item("x", "user", [Said("hello")])]
            for _ in range(4):
                await core.respond(Manner(speaks=False), items=hello, aside=True)
            with pytest.raises(ApiError, match="beside the conversation"):
                await core.respond(items=hello, aside=True)
            await log.until("response_ended", 5)
            texts = sorted(log.text(each[0]) for each in log.all("response_ended"))
            assert texts == ["hello how are you"] * 4 + ["seven"]
            assert [item.text for item in core.conversation.items] == [
                "What is three plus four?",
                "seven",
            ]
            await core.close()

        asyncio.run(run())

    @pytest.mark.slow
    def test_cancelled_at_any_moment(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            with pytest.raises(ApiError, match="Cancellation failed"):
                core.cancel()
            await core.add(typed(COUNT))
            for moment in (0.0, 0.02, 0.1):
                await core.respond()
                await asyncio.sleep(moment)
                if core._speaking.active is None:
                    continue
                core.cancel()
                (response, _) = log.all("response_ended")[-1]
                assert (response.status, response.reason) == ("cancelled", "client_cancelled")
                await settled(service)
            count = len(log.events)
            await asyncio.sleep(0.1)
            assert len(log.events) == count
            await core.close()

        asyncio.run(run())

    @pytest.mark.slow
    def test_a_limit_is_said(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            await core.add(typed("What is three plus four?"))
            await core.respond(Manner(most=2))
            (response, _) = await log.until("response_ended")
            assert (response.status, response.reason) == ("incomplete", "max_output_tokens")
            await core.close()

        asyncio.run(run())

    def test_an_error_ends_the_reply_alone(self, service, monkeypatch):
        async def run() -> None:
            core, log = dialogue(service)
            await core.add(typed("hello"))
            with monkeypatch.context() as broken:
                broken.setattr(core._mind, "_follow", lambda ask: 1 / 0)
                await core.respond()
                (response, _) = await log.until("response_ended")
            assert response.status == "failed"
            assert response.error.code == "internal_error"
            assert "division" not in response.error.message
            await core.respond()
            (response, _) = await log.until("response_ended", 2)
            assert response.status == "completed"
            await core.close()

        asyncio.run(run())


class TestSlowAndGone:
    def test_a_slow_reader_pauses_the_reply(self, service):
        async def run() -> None:
            core, log = dialogue(service)
            log.open.clear()
            await core.add(typed(COUNT))
            await core.respond()
            await log.until("said")
            steps = -1
            async with asyncio.timeout(20):
                # Until nothing more is computed.
                while steps != service.worker.steps:
                    steps = service.worker.steps
                    await asyncio.sleep(0.3)
            assert len(log.all("said")) == 1
            assert core._speaking.active is not None
            log.open.set()
            await log.until("response_ended")
            await core.close()

        asyncio.run(run())

    @pytest.mark.parametrize("moment", [0.0, 0.05, 0.3])
    def test_who_leaves_is_let_go_of_within_a_group(self, service, moment):
        async def run() -> None:
            core, log = dialogue(service)
            core.set_manner(Manner(), replace(core.turns, transcribes=True))
            await speak(core, turn(), pace=16.0)
            await core.add(typed(COUNT))
            await core.respond(items=[typed(COUNT)], aside=True)
            await asyncio.sleep(moment)
            log.open.clear()
            steps = service.worker.steps
            await core.close()
            # The step in progress, and one that closes each of three streams.
            assert service.worker.steps - steps <= 4
            await settled(service)

        asyncio.run(run())


@pytest.mark.slow
def test_silence_after_a_reply_is_answered_once(service):
    async def run() -> None:
        core, log = dialogue(service)
        core.set_manner(Manner(), replace(core.turns, idle_ms=100))
        await core.add(typed("hello"))
        await core.respond()
        (response, _) = await log.until("response_ended")
        assert response.status == "completed"
        (item, start, end) = await log.until("timed_out")
        assert start <= end
        assert (await log.until("committed"))[0] == item
        (second, before) = await log.until("response_ended", 2)
        assert before == item
        assert second.status == "completed"
        await speak(core, turn())
        await log.until("response_ended", 3)
        await core.close()

    asyncio.run(run())
