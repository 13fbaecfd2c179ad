"""Stock LiveKit Agents without a room: realtime sessions, an agent, its TTS and STT plugins."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
from client_cases import RATE, Server, main, quiet, recording, said, until
from livekit import rtc
from livekit.agents import Agent, AgentSession, llm, stt, utils
from livekit.agents.voice.io import AudioInput, AudioOutput, AudioOutputCapabilities
from livekit.plugins import openai
from openai.types.realtime.realtime_audio_input_turn_detection import ServerVad

LOGGED = list[str]()
"""Warnings and errors: LiveKit logs an event that it cannot use, and goes on."""


class Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            LOGGED.append(f"{record.getMessage()} {record.exc_info}")


for _name in ("livekit.agents", "livekit.plugins.openai"):
    logging.getLogger(_name).addHandler(Keep())
    logging.getLogger(_name).propagate = False


def frames(samples: np.ndarray, milliseconds: int = 20) -> Iterator[rtc.AudioFrame]:
    size = RATE * milliseconds // 1000
    for at in range(0, len(samples), size):
        piece = samples[at : at + size]
        yield rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece))


def turns() -> ServerVad:
    return ServerVad(type="server_vad", silence_duration_ms=500)


class Live:
    """A realtime session, and what it emitted."""

    def __init__(self, session: Any) -> None:
        self.session, self._events, self._from = session, list[tuple[str, Any]](), 0
        self.wire = list[dict[str, Any]]()
        for name in (
            "generation_created",
            "input_speech_started",
            "input_speech_stopped",
            "input_audio_transcription_completed",
            "error",
            "session_reconnected",
        ):
            session.on(name, lambda *values, name=name: self._events.append((name, values)))
        session.on("openai_server_event_received", self.wire.append)

    def begin(self) -> None:
        """Events from here on are those that count."""
        self._from, self.wire_from = len(self._events), len(self.wire)

    wire_from = 0

    def names(self) -> list[str]:
        return [name for name, _ in self._events[self._from :]]

    async def one(self, name: str, suits: Callable[[Any], bool] = lambda _: True) -> Any:
        def found() -> list[Any]:
            errors = [values for each, values in self._events if each == "error"]
            assert not errors, errors
            events = [values for each, values in self._events[self._from :] if each == name]
            return [values[0] for values in events if values and suits(values[0])]

        return (await until(found, name, self.last))[0]

    async def event(self, kind: str) -> dict[str, Any]:
        """The first of this kind on the wire."""

        def found() -> list[dict[str, Any]]:
            return [event for event in self.wire[self.wire_from :] if event["type"] == kind]

        return (await until(found, kind, self.last))[0]

    def last(self) -> list[str]:
        return [event["type"] for event in self.wire[-8:]]

    def hear(self, samples: np.ndarray) -> None:
        for frame in frames(samples):
            self.session.push_audio(frame)


class Answer:
    """What a generation says, as an agent reads it."""

    def __init__(self, generation: Any) -> None:
        self.message_id, self.text, self._audio = "", "", list[np.ndarray]()
        self._task = asyncio.create_task(self._read(generation))

    async def _read(self, generation: Any) -> None:
        async for message in generation.message_stream:
            self.message_id = message.message_id
            await asyncio.gather(self._texts(message), self._sounds(message))

    async def _texts(self, message: Any) -> None:
        async for text in message.text_stream:
            self.text += str(text)

    async def _sounds(self, message: Any) -> None:
        async for frame in message.audio_stream:
            assert (frame.sample_rate, frame.num_channels) == (RATE, 1)
            self._audio.append(np.frombuffer(frame.data, np.int16))

    async def begun(self) -> None:
        await until(lambda: self._audio, "audio")

    async def ended(self) -> "Answer":
        await asyncio.wait_for(self._task, 90)
        self.text = " ".join(self.text.split())
        return self

    @property
    def audio(self) -> np.ndarray:
        return np.concatenate([quiet(0), *self._audio])


@asynccontextmanager
async def live(server: Server, **options: Any) -> AsyncIterator[Live]:
    """A session; nothing may have been warned of, and it must have kept its one connection."""
    LOGGED.clear()
    async with aiohttp.ClientSession() as http:
        model = openai.realtime.RealtimeModel(
            model="nano", base_url=server.http, api_key="none", http_session=http, **options
        )
        found = Live(model.session())
        try:
            await found.event("session.updated")
            yield found
            assert "session_reconnected" not in found.names()
            assert not LOGGED, LOGGED
        finally:
            await found.session.aclose()
            await model.aclose()


async def written(session: Any, text: str) -> Answer:
    """Answer to a typed turn."""
    context = session.chat_ctx.copy()
    context.add_message(role="user", content=text)
    await session.update_chat_ctx(context)
    return Answer(await session.generate_reply())


def texts_of(context: llm.ChatContext) -> list[tuple[str, str | None]]:
    items = [item for item in context.items if item.type == "message"]
    return [(item.role, item.text_content) for item in items]


async def typed(server: Server) -> dict[str, Any]:
    """`generate_reply` with the session that LiveKit asks for by default."""
    async with live(server) as found:
        asked = await found.event("session.updated")
        answer = await (await written(found.session, "what is nine plus two")).ended()
        wav = server.keep("livekit_typed", answer.audio)
        detection = asked["session"]["audio"]["input"]["turn_detection"]["type"]
        context = texts_of(found.session.chat_ctx)
        return {
            "turn_detection": detection,
            "answer": answer.text,
            "answer_wav": wav,
            "context": context,
        }


async def spoken(server: Server) -> dict[str, Any]:
    """A turn that the server's voice activity detection finds, and its transcript."""
    async with live(server, turn_detection=turns()) as found:
        found.hear(said("what color is the sea"))
        answer = await Answer(await found.one("generation_created")).ended()
        heard = await found.one("input_audio_transcription_completed", lambda each: each.is_final)
        order = [each for each in found.names() if "transcription" not in each]
        return {
            "order": order,
            "transcript": heard.transcript,
            "answer": answer.text,
            "answer_wav": server.keep("livekit_spoken", answer.audio),
            "context": texts_of(found.session.chat_ctx),
        }


async def barge_in(slow: Server) -> dict[str, Any]:
    """The user speaks into a reply, which is cancelled and cut to what was heard."""
    async with live(slow, turn_detection=turns()) as found:
        answer = await written(found.session, "where do you live")
        await answer.begun()
        found.begin()
        question = said("what is nine plus two", before=0)
        found.hear(question[:RATE])
        await found.one("input_speech_started")
        done = (await found.event("response.done"))["response"]
        await answer.ended()
        found.session.interrupt()
        found.session.truncate(
            message_id=answer.message_id, modalities=["audio", "text"], audio_end_ms=100
        )
        cut = await found.event("conversation.item.truncated")
        found.hear(question[RATE:])
        second = await Answer(await found.one("generation_created")).ended()
        return {
            "status": [done["status"], done["status_details"]["reason"]],
            "seconds": len(answer.audio) / RATE,
            "cut": [cut["item_id"] == answer.message_id, cut["audio_end_ms"]],
            "answer": second.text,
            "answer_wav": slow.keep("livekit_barge_in", second.audio),
        }


async def interrupted(slow: Server) -> dict[str, Any]:
    """The program ends a reply; as it was never heard it is deleted, and the next one is whole."""
    async with live(slow, turn_detection=None) as found:
        answer = await written(found.session, "where do you live")
        await answer.begun()
        found.session.interrupt()
        await answer.ended()
        done = (await found.event("response.done"))["response"]
        found.session.truncate(
            message_id=answer.message_id, modalities=["audio", "text"], audio_end_ms=0
        )
        deleted = await found.event("conversation.item.deleted")
        second = await Answer(await found.session.generate_reply()).ended()
        return {
            "status": [done["status"], done["status_details"]["reason"]],
            "seconds": [len(each.audio) / RATE for each in (answer, second)],
            "deleted": deleted["item_id"] == answer.message_id,
            "answer": second.text,
        }


class Microphone(AudioInput):
    """Frames of 50 ms in real time: what is to be said, silence otherwise."""

    def __init__(self) -> None:
        super().__init__(label="microphone")
        self._waiting = quiet(0)

    def say(self, samples: np.ndarray) -> None:
        self._waiting = np.concatenate([self._waiting, samples])

    async def __anext__(self) -> rtc.AudioFrame:
        size = RATE // 20
        await asyncio.sleep(0.05)
        now, self._waiting = self._waiting[:size], self._waiting[size:]
        return next(frames(np.pad(now, (0, size - len(now))), 50))


class Speaker(AudioOutput):
    """Plays in real time; keeps what was handed to it."""

    def __init__(self) -> None:
        capabilities = AudioOutputCapabilities(pause=False)
        super().__init__(label="speaker", capabilities=capabilities, sample_rate=RATE)
        self.audio = list[np.ndarray]()
        self._seconds, self._ends, self._timer = 0.0, 0.0, None

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        now = asyncio.get_running_loop().time()
        if self._ends == 0:
            self.on_playback_started(created_at=now)
        self._seconds += frame.duration
        self._ends = max(self._ends, now) + frame.duration
        self.audio.append(np.frombuffer(frame.data, np.int16))

    def flush(self) -> None:
        super().flush()
        if self._ends:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._ends, self._finish, False)

    def clear_buffer(self) -> None:
        if self._ends:
            self._finish(True)

    def _finish(self, interrupted: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        left = max(self._ends - asyncio.get_running_loop().time(), 0.0)
        played = max(self._seconds - left, 0.0)
        self._seconds, self._ends, self._timer = 0.0, 0.0, None
        self.on_playback_finished(playback_position=played, interrupted=interrupted)


async def agent(slow: Server) -> dict[str, Any]:
    """A stock agent, which is interrupted while it speaks and answers what it was asked then."""
    LOGGED.clear()
    async with aiohttp.ClientSession() as http:
        model = openai.realtime.RealtimeModel(
            model="nano",
            base_url=slow.http,
            api_key="none",
            http_session=http,
            turn_detection=turns(),
        )
        # By default it ignores who speaks into the first three seconds of its first reply.
        async with AgentSession(llm=model, aec_warmup_duration=None) as session:
            errors = list[Any]()
            session.on("error", errors.append)
            microphone, speaker = Microphone(), Speaker()
            session.input.audio, session.output.audio = microphone, speaker
            await session.start(Agent(instructions="Be brief."), record=False)
            handle = session.generate_reply(user_input="where do you live")
            await until(lambda: speaker.audio, "audio")
            microphone.say(said("what color is the sea", before=0))
            await handle
            before = len(speaker.audio)

            def complete() -> bool:
                # The transcript of what was asked comes when it is ready.
                roles = [role for role, _ in texts_of(session.history)]
                return roles.count("assistant") == roles.count("user") == 2

            await until(complete, "second answer", lambda: texts_of(session.history))
            audio = np.concatenate(speaker.audio[before:])
            assert not errors, errors
            return {
                "interrupted": handle.interrupted,
                "history": texts_of(session.history),
                "answer_wav": slow.keep("livekit_agent", audio),
            }


async def speech(server: Server) -> dict[str, Any]:
    """The TTS plugin, which asks for MP3 as server-sent events."""
    voice = openai.TTS(model="nano", voice="ash", base_url=server.http, api_key="none")
    frame = await asyncio.wait_for(voice.synthesize("the dog is big and black").collect(), 90)
    assert frame.sample_rate == RATE
    await voice.aclose()
    return {"wav": server.keep("livekit_speech", np.frombuffer(frame.data, np.int16))}


async def transcript(server: Server) -> dict[str, Any]:
    """The STT plugin over HTTP and over a WebSocket, where any error event is final."""
    ears = {"model": "nano", "base_url": server.http, "api_key": "none", "language": "en"}
    async with utils.http_context.open():
        once = openai.STT(**ears)
        turn = [*frames(recording("please read the small yellow box"))]
        event = await asyncio.wait_for(once.recognize(turn), 90)
        assert event.type == stt.SpeechEventType.FINAL_TRANSCRIPT
        live_ears = openai.STT(**ears, use_realtime=True)
        stream, heard = live_ears.stream(), ""
        for frame in frames(said("i want no milk and rice")):
            stream.push_frame(frame)
        async with asyncio.timeout(90):
            async for each in stream:
                if each.type == stt.SpeechEventType.FINAL_TRANSCRIPT:
                    heard = each.alternatives[0].text
                    break
        await stream.aclose()
        await live_ears.aclose()
        return {"text": event.alternatives[0].text, "streamed": heard}


if __name__ == "__main__":
    main(typed, spoken, barge_in, interrupted, agent, speech, transcript)
