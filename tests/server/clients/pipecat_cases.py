"""Stock Pipecat: its realtime service in a pipeline with a microphone, its TTS and STT services."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from client_cases import RATE, Server, main, quiet, recording, said, until
from loguru import logger
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMRunFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import (
    LLMContextAggregatorPair,
    LLMUserAggregatorParams,
)
from pipecat.services.openai.realtime import events
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.services.openai.stt import OpenAIRealtimeSTTService, OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_input import BaseInputTransport
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner

logger.remove()

LOW_RATE = 16000
"""What Pipecat's own voice activity detector hears."""


class Microphone(BaseInputTransport):
    """Frames of 20 ms in real time: what is to be said, silence otherwise."""

    def __init__(self, rate: int = RATE) -> None:
        super().__init__(TransportParams(audio_in_enabled=True, audio_in_sample_rate=rate))
        self._rate, self._waiting, self._task = rate, quiet(0), None

    async def start(self, frame: Any) -> None:
        await super().start(frame)
        self._task = self.create_task(self._run())
        await self.set_transport_ready(frame)

    async def cleanup(self) -> None:
        if self._task is not None:
            await self.cancel_task(self._task)
        await super().cleanup()

    def say(self, samples: np.ndarray) -> None:
        if self._rate != RATE:
            at = np.arange(len(samples) * self._rate // RATE) * (RATE / self._rate)
            samples = np.interp(at, np.arange(len(samples)), samples).astype(np.int16)
        self._waiting = np.concatenate([self._waiting, samples])

    async def _run(self) -> None:
        size, began, sent = self._rate // 50, time.monotonic(), 0
        while True:
            now, self._waiting = self._waiting[:size], self._waiting[size:]
            now = np.pad(now, (0, size - len(now)))
            await self.push_audio_frame(as_frame(now, self._rate))
            sent += 1
            await asyncio.sleep(max(0, began + sent / 50 - time.monotonic()))


class Speaker(BaseOutputTransport):
    """Plays in real time; knows how many seconds it has played."""

    def __init__(self) -> None:
        super().__init__(
            TransportParams(
                audio_out_enabled=True,
                audio_out_sample_rate=RATE,
                audio_out_end_silence_secs=0,
                audio_out_auto_silence=False,
            )
        )
        self.seconds = 0.0

    async def start(self, frame: Any) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: Any) -> bool:
        assert (frame.sample_rate, frame.num_channels) == (RATE, 1)
        seconds = len(frame.audio) / 2 / frame.sample_rate
        self.seconds += seconds
        await asyncio.sleep(seconds)
        return True


class Seen(BaseObserver):
    """Every frame of a pipeline, once."""

    def __init__(self) -> None:
        super().__init__()
        self._frames, self._ids, self._from = list[Frame](), set[int](), 0

    async def on_push_frame(self, data: FramePushed) -> None:
        if data.frame.id in self._ids or isinstance(data.frame, InputAudioRawFrame):
            return
        self._ids.add(data.frame.id)
        # A speaker cuts what a service says into frames of its own.
        again = isinstance(data.frame, TTSAudioRawFrame) and isinstance(data.source, Speaker)
        if not again:
            self._frames.append(data.frame)

    def begin(self) -> None:
        """Frames from here on are those that count."""
        self._from = len(self._frames)

    def all(self, kind: type) -> list[Any]:
        return [frame for frame in self._frames[self._from :] if isinstance(frame, kind)]

    def errors(self) -> list[str]:
        return [frame.error for frame in self._frames if isinstance(frame, ErrorFrame)]

    async def one(self, kind: type) -> Any:
        def found() -> Any:
            errors = self.errors()
            assert not errors, errors
            return self.all(kind)

        return (await until(found, kind.__name__, self.names))[0]

    def names(self) -> list[str]:
        return [type(frame).__name__ for frame in self._frames[-12:]]

    def audio(self) -> np.ndarray:
        frames = self.all(TTSAudioRawFrame)
        formats = {(frame.sample_rate, frame.num_channels) for frame in frames}
        assert formats == {(RATE, 1)}, formats
        return np.concatenate([np.frombuffer(frame.audio, "<i2") for frame in frames])

    def text(self) -> str:
        return " ".join("".join(frame.text for frame in self.all(TTSTextFrame)).split())


def as_frame(samples: np.ndarray, rate: int = RATE) -> InputAudioRawFrame:
    return InputAudioRawFrame(audio=samples.tobytes(), sample_rate=rate, num_channels=1)


def as_frames(samples: np.ndarray) -> list[InputAudioRawFrame]:
    size = RATE // 50
    return [as_frame(samples[at : at + size]) for at in range(0, len(samples), size)]


@asynccontextmanager
async def running(*processors: Any, rate: int = RATE) -> AsyncIterator[tuple[Any, Seen]]:
    """A pipeline that has started; it is cancelled at the end."""
    seen, started = Seen(), asyncio.Event()
    params = PipelineParams(audio_in_sample_rate=rate, audio_out_sample_rate=RATE)
    pipeline = Pipeline([*processors])
    worker = PipelineWorker(pipeline, observers=[seen], params=params, cancel_on_idle_timeout=False)
    worker.add_event_handler("on_pipeline_started", lambda *_: started.set())
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    task = asyncio.create_task(runner.run())
    try:
        await until(started.is_set, "start of the pipeline")
        yield worker, seen
    finally:
        await worker.cancel()
        await asyncio.wait_for(task, 30)


def realtime(server: Server, **heard: Any) -> OpenAIRealtimeLLMService:
    properties = events.SessionProperties()
    if heard:
        hearing = events.AudioInput(**heard)
        properties.audio = events.AudioConfiguration(input=hearing)
    settings = OpenAIRealtimeLLMService.Settings(
        model="nano", system_instruction="Be brief.", session_properties=properties
    )
    return OpenAIRealtimeLLMService(api_key="none", base_url=server.realtime, settings=settings)


def check_healthy(service: OpenAIRealtimeLLMService, seen: Seen) -> None:
    """Any error event but two, and any event that its models refuse, ends the receive loop."""
    assert not seen.errors(), seen.errors()
    task = service._receive_task
    assert task is not None
    assert not task.done()


def words_of(context: LLMContext, role: str) -> list[str]:
    messages = [each for each in context.get_messages() if isinstance(each, dict)]
    return [str(each["content"]) for each in messages if each["role"] == role]


async def conversation(server: Server) -> dict[str, Any]:
    """A typed greeting, then a spoken question, its transcript and the spoken answer."""
    heard = events.InputAudioTranscription(model="gpt-4o-transcribe")
    service = realtime(server, transcription=heard)
    context = LLMContext([{"role": "user", "content": "good morning"}])
    pair, microphone, speaker = LLMContextAggregatorPair(context), Microphone(), Speaker()
    stages = microphone, pair.user(), service, speaker, pair.assistant()
    async with running(*stages) as (worker, seen):
        await worker.queue_frames([LLMRunFrame()])
        await seen.one(LLMFullResponseEndFrame)
        await seen.one(BotStoppedSpeakingFrame)
        greeting = seen.text()
        greeted = server.keep("pipecat_greeting", seen.audio())
        seen.begin()
        microphone.say(said("what color is the sea"))
        await seen.one(UserStartedSpeakingFrame)
        await seen.one(UserStoppedSpeakingFrame)
        transcript = (await seen.one(TranscriptionFrame)).text
        await seen.one(LLMFullResponseEndFrame)
        answer = server.keep("pipecat_answer", seen.audio())
        check_healthy(service, seen)
        for role in ("user", "assistant"):
            await until(lambda role=role: len(words_of(context, role)) > 1, f"turns of the {role}")
        return {
            "greeting": greeting,
            "greeting_wav": greeted,
            "transcript": transcript,
            "answer": seen.text(),
            "answer_wav": answer,
            "user": words_of(context, "user"),
            "assistant": words_of(context, "assistant"),
        }


async def interruption(slow: Server) -> dict[str, Any]:
    """A question into a long reply: Pipecat truncates what was not heard, the server cancels."""
    service = realtime(slow)
    context = LLMContext([{"role": "user", "content": "where do you live"}])
    pair, microphone, speaker = LLMContextAggregatorPair(context), Microphone(), Speaker()
    stages = microphone, pair.user(), service, speaker, pair.assistant()
    async with running(*stages) as (worker, seen):
        await worker.queue_frames([LLMRunFrame()])
        await seen.one(BotStartedSpeakingFrame)
        microphone.say(said("what is nine plus two", before=0))
        await seen.one(InterruptionFrame)
        await seen.one(BotStoppedSpeakingFrame)
        first = speaker.seconds
        seen.begin()
        await seen.one(UserStoppedSpeakingFrame)
        await seen.one(LLMFullResponseEndFrame)
        check_healthy(service, seen)
        wav = slow.keep("pipecat_interruption", seen.audio())
        return {"seconds": first, "answer": seen.text(), "answer_wav": wav}


async def local_turns(server: Server) -> dict[str, Any]:
    """Pipecat's own voice activity detection: clear, append, commit and create are the client's."""
    service = realtime(server, turn_detection=False)
    context = LLMContext([{"role": "user", "content": "hello"}])
    detector = SileroVADAnalyzer(sample_rate=LOW_RATE)
    params = LLMUserAggregatorParams(vad_analyzer=detector)
    pair = LLMContextAggregatorPair(context, user_params=params)
    microphone = Microphone(LOW_RATE)
    stages = microphone, pair.user(), service, Speaker(), pair.assistant()
    async with running(*stages, rate=LOW_RATE) as (worker, seen):
        await worker.queue_frames([LLMRunFrame()])
        await seen.one(LLMFullResponseEndFrame)
        await seen.one(BotStoppedSpeakingFrame)
        seen.begin()
        microphone.say(said("thank you"))
        await seen.one(UserStoppedSpeakingFrame)
        await seen.one(LLMFullResponseEndFrame)
        check_healthy(service, seen)
        wav = server.keep("pipecat_local_turns", seen.audio())
        return {"answer": seen.text(), "answer_wav": wav}


async def speech(server: Server) -> dict[str, Any]:
    settings = OpenAITTSService.Settings(model="nano", voice="nova")
    service = OpenAITTSService(api_key="none", base_url=server.http, settings=settings)
    async with running(service) as (worker, seen):
        await worker.queue_frames([TTSSpeakFrame("the dog is big and black")])
        await seen.one(TTSStoppedFrame)
        return {"wav": server.keep("pipecat_speech", seen.audio())}


async def transcript(server: Server) -> dict[str, Any]:
    """Over HTTP: a turn is sent as one WAV."""
    settings = OpenAISTTService.Settings(model="nano")
    service = OpenAISTTService(api_key="none", base_url=server.http, settings=settings)
    async with running(service) as (worker, seen):
        frames = as_frames(recording("please read the small yellow box"))
        turn = [VADUserStartedSpeakingFrame(), *frames, VADUserStoppedSpeakingFrame()]
        await worker.queue_frames(turn)
        return {"text": (await seen.one(TranscriptionFrame)).text}


async def realtime_transcript(server: Server) -> dict[str, Any]:
    """A session that only listens, whose turns the server finds."""
    settings = OpenAIRealtimeSTTService.Settings(model="nano")
    service = OpenAIRealtimeSTTService(
        api_key="none",
        base_url=server.realtime,
        turn_detection={"type": "server_vad"},
        settings=settings,
    )
    async with running(service) as (worker, seen):
        await until(lambda: service._session_ready, "session")
        await worker.queue_frames(as_frames(said("i want no milk and rice")))
        text = (await seen.one(TranscriptionFrame)).text
        assert not seen.errors(), seen.errors()
        return {"text": text}


if __name__ == "__main__":
    main(conversation, interruption, local_turns, speech, transcript, realtime_transcript)
