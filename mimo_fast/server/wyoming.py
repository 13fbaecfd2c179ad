"""The Wyoming protocol, by which Home Assistant transcribes and speaks.

    describe                                  -> info
    audio-start, audio-chunk ..., audio-stop  -> transcript-start, -chunk ..., transcript, -stop
    synthesize                                -> audio-start, audio-chunk ..., audio-stop
    synthesize-start, -chunk ..., -stop       -> the same while the text comes, synthesize-stopped

Events are lines of JSON, which data and payload may follow. The package wyoming makes those that
are sent; those that come are read here, within bounds.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from ipaddress import ip_address, ip_network
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from wyoming.asr import Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event, async_write_event
from wyoming.info import AsrModel, AsrProgram, Attribution, Info, TtsProgram, TtsVoice
from wyoming.ping import Pong
from wyoming.tts import SynthesizeStopped

import mimo_fast
from mimo_fast.server.checks import Json, mapping, refusal, text
from mimo_fast.server.errors import ApiError, as_api_error, full
from mimo_fast.server.json_values import parse_json
from mimo_fast.server.limits import ARRIVAL, CALM, SESSION_WAIT, STILL, Places
from mimo_fast.server.logs import log, log_failure, request_id, words_wanted
from mimo_fast.server.models import find_model
from mimo_fast.server.protocols import STALL
from mimo_fast.server.security import Rates
from mimo_fast.server.service import ASR, TTS, Service
from mimo_fast.server.settings import Settings
from mimo_fast.server.speech import PATIENCE, Manner, Narrator
from mimo_fast.server.transcriptions import Asked, Found, Work, language_of, transcribe
from mimo_fast.server.voices import ALIASES
from mimo_fast.server.wyoming_parts import Form, Recording, Text

MOST_LINE, MOST_DATA, MOST_PAYLOAD = 1 << 16, 1 << 20, 1 << 20
"""Bytes of an event's parts."""

PART = 1 << 14
"""Bytes of a chunk of speech."""

LINGER = 1.0
"""Seconds that a connection may take to end."""


class Wyoming:
    """The listener.

    Args:
        app: the application of `create_app`, whose service, places and limits it shares.
        bound: a socket that listens.
    """

    def __init__(self, app: Starlette, bound: socket.socket) -> None:
        self._app, self._bound = app, bound
        self._settings: Settings = app.state.settings
        self._connections = dict[asyncio.Task[None], _Connection]()
        self._rates = Rates(self._settings.max_rate)
        allowed = self._settings.wyoming_clients
        self._allowed = [ip_network(each, strict=False) for each in allowed]

    async def start(self) -> None:
        self._server = await asyncio.start_server(
            self._connected, sock=self._bound, limit=MOST_LINE
        )

    async def close(self) -> None:
        """Ends all connections."""
        self._server.close()
        for connection in self._connections.values():
            await connection.stop()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait([*self._connections], timeout=LINGER)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = (writer.get_extra_info("peername") or ("",))[0]
        crowded = len(self._connections) >= self._settings.max_connections
        if crowded or self._app.state.stopping or not self._may(peer) or self._rates.wait(peer):
            writer.transport.abort()
            return
        connection = _Connection(self._app, reader, writer, peer, self._rates)
        self._connections[task] = connection
        try:
            await connection.run()
        finally:
            del self._connections[task]

    def _may(self, peer: str) -> bool:
        try:
            address = ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        address = address if mapped is None else mapped
        return address.is_loopback or any(address in network for network in self._allowed)


class _Connection:
    """One client, with one request at a time."""

    def __init__(
        self,
        app: Starlette,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: str,
        rates: Rates,
    ) -> None:
        self._rates = rates
        self._state, self._reader, self._writer, self._peer = app.state, reader, writer, peer
        self._service: Service = app.state.service
        self._settings: Settings = app.state.settings
        self._language: str | None = None
        self._model = self._service.name
        self._hearing: Recording | None = None
        self._reading: Text | None = None
        self._work: asyncio.Task[None] | None = None
        self._sent = monotonic()
        self._stack = AsyncExitStack()
        self._handlers: dict[str, Callable[[Json, bytes], Awaitable[None]]] = {
            "describe": self._describe,
            "ping": self._ping,
            "transcribe": self._transcribe,
            "audio-start": self._audio_start,
            "audio-chunk": self._audio_chunk,
            "audio-stop": self._audio_stop,
            "synthesize": self._synthesize,
            "synthesize-start": self._synthesize_start,
            "synthesize-chunk": self._synthesize_chunk,
            "synthesize-stop": self._synthesize_stop,
        }

    async def run(self) -> None:
        """Reads until the client leaves; then nothing of it is left."""
        request_id.set(f"wyo_{uuid4().hex}")
        words_wanted.set(self._settings.log_words)
        begun, self._problem = perf_counter(), ""
        try:
            await self._read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as error:
            await self._report(error)
        finally:
            await self._end()
            seconds = round(perf_counter() - begun, 3)
            problem = self._problem or None
            log("wyoming", client=self._peer, seconds=seconds, problem=problem)

    async def _read(self) -> None:
        while True:
            # While the model works it is the client who waits.
            waits = None if self._work is not None and not self._work.done() else PATIENCE
            try:
                async with asyncio.timeout(waits):
                    line = await self._reader.readline()
            except TimeoutError:
                problem = f"no event came for {PATIENCE:.0f} s"
                raise ApiError(problem, 408, "timeout") from None
            except ValueError:
                problem = f"an event's line has more than {MOST_LINE} bytes"
                raise ApiError(problem, 400, "invalid_event") from None
            if not line:
                return
            kind, data, payload = await self._event(line)
            if not kind.endswith("-chunk") and (wait := self._rates.wait(self._peer)):
                raise full("too many events: slow down, or raise --max-rate", wait)
            handler = self._handlers.get(kind)
            # As the protocol has it, what is unknown is no error.
            if handler is not None:
                try:
                    await handler(data, payload)
                except ApiError as error:
                    await self._report(error)
                    if self._work is None or self._work.done():
                        await self._let_go()

    async def _event(self, line: bytes) -> tuple[str, Json, bytes]:
        try:
            event = parse_json(line)
            if not isinstance(event, dict) or not isinstance(event.get("type"), str):
                raise ValueError("an event is an object with a type")
            data = event.get("data") or {}
            async with asyncio.timeout(ARRIVAL):
                more = await self._exactly(event.get("data_length"), MOST_DATA)
                payload = await self._exactly(event.get("payload_length"), MOST_PAYLOAD)
            data = mapping(data, "data") | (mapping(parse_json(more), "data") if more else {})
        except ValueError as error:
            raise ApiError(f"no event: {error}"[:200], 400, "invalid_event") from None
        except TimeoutError:
            raise ApiError("an event did not come to its end", 408, "timeout") from None
        return event["type"], data, payload

    async def _exactly(self, size: Any, most: int) -> bytes:
        if size is None or (size == 0 and isinstance(size, int)):
            return b""
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= most:
            raise ValueError(f"a part has {str(size)[:20]} bytes, {most} are the most")
        return await self._reader.readexactly(size)

    async def _report(self, error: BaseException) -> None:
        found = as_api_error(error)
        self._problem = found.code or "unknown"
        self._state.metrics.failed(found.code)
        if found.status >= 500 and not isinstance(error, ApiError):
            log_failure(error)
        with suppress(ConnectionError, TimeoutError):
            await self._send(Error(found.message, found.code).event())

    async def _send(self, event: Event) -> None:
        self._sent = monotonic()
        async with asyncio.timeout(STALL):
            await async_write_event(event, self._writer)

    async def _end(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
        await self._let_go()
        self._writer.close()
        with suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(LINGER):
                await self._writer.wait_closed()
        self._writer.transport.abort()

    # As `limits.Session`: the server stops between two replies.

    @property
    def calm(self) -> bool:
        works = self._service.worker.streams > 0
        return monotonic() - self._sent > (STILL if works else CALM)

    async def stop(self) -> None:
        if self._work is not None:
            self._work.cancel()
        # The reader sees its end.
        self._writer.close()

    # Requests

    async def _take_place(self, places: Places) -> None:
        """Holds one until `_leave_place`."""
        if self._state.stopping:
            raise ApiError("the server is stopping", 503, "server_stopping")
        if self._work is not None:
            # Its client may know of its end before it has let go of everything.
            await asyncio.wait([self._work], timeout=SESSION_WAIT)
        if self._hearing or self._reading or not (self._work is None or self._work.done()):
            raise ApiError("one request at a time: wait for its end", 409, "busy")
        self._work = None
        await self._stack.enter_async_context(places.place())
        await self._stack.enter_async_context(self._state.keeper.used())
        self._state.live.add(self)

    def _begin(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Does the work of a request beside reading."""

        async def run() -> None:
            begun, status = perf_counter(), 200
            try:
                await work()
            except (ConnectionError, TimeoutError):
                status = 499
                self._writer.transport.abort()
            except asyncio.CancelledError:
                status = 499
                raise
            except Exception as error:
                status = as_api_error(error).status
                await self._report(error)
            finally:
                self._state.metrics.answered(f"wyoming/{name}", status, perf_counter() - begun)
                await self._let_go()

        self._work = asyncio.create_task(run())

    async def _let_go(self) -> None:
        """Forgets what has come of a request, and leaves its place."""
        if self._hearing is not None:
            self._hearing.close()
        self._hearing = self._reading = None
        await self._stack.aclose()
        self._state.live.discard(self)

    async def _describe(self, data: Json, payload: bytes) -> None:
        await self._send(self._info().event())

    async def _ping(self, data: Json, payload: bytes) -> None:
        said = data.get("text")
        await self._send(Pong(said[:256] if isinstance(said, str) else None).event())

    def _info(self) -> Info:
        service = self._service
        attribution = Attribution("Xiaomi MiMo", "https://github.com/XiaomiMiMo/MiMo-Audio")
        known = ["en"] if service.model.tokenizer.trained_words else ["en", "zh"]

        def about(name: str, what: str) -> dict[str, Any]:
            version = mimo_fast.__version__
            return {
                "name": name,
                "attribution": attribution,
                "installed": True,
                "description": what,
                "version": version,
            }

        clones = service.knows(TTS, "prompt_speech")
        voices = [
            TtsVoice(**about(voice.name, voice.name), languages=known)
            for voice in self._state.voices
            if (clones if voice.path is not None else voice.name not in ALIASES)
        ]
        models = [AsrModel(**about(name, name), languages=known) for name in service.models]
        program = about("mimo-fast", "MiMo-Audio")
        hears = AsrProgram(**program, models=models, supports_transcript_streaming=True)
        speaks = TtsProgram(**program, voices=voices, supports_synthesize_streaming=True)
        return Info(
            asr=[hears] if service.knows(ASR) else [],
            tts=[speaks] if service.knows(TTS) else [],
        )

    # Transcripts

    async def _transcribe(self, data: Json, payload: bytes) -> None:
        name = data.get("name")
        service = self._service if name is None else find_model(self._service, name, "name")
        self._language, self._model = language_of(service, data.get("language")), service.name

    async def _audio_start(self, data: Json, payload: bytes) -> None:
        form = Form(data)
        await self._take_place(self._state.sessions)
        self._hearing = Recording(form, self._settings.max_audio_seconds)

    async def _audio_chunk(self, data: Json, payload: bytes) -> None:
        if self._hearing is None:
            # A refused recording goes on for a while.
            return
        if data:
            self._hearing.check(Form(data))
        self._hearing.add(payload)

    async def _audio_stop(self, data: Json, payload: bytes) -> None:
        hearing, self._hearing = self._hearing, None
        if hearing is not None:
            self._begin("transcribe", lambda: self._write_down(hearing))

    async def _write_down(self, hearing: Recording) -> None:
        work, found, language = Work(), Found(), self._language
        # The model may have been loaded again since it was named.
        service = self._service.called(self._model)
        try:
            await self._send(TranscriptStart(language=language).event())
            if hearing.seconds:
                file = hearing.finish()
                asked = Asked(file, "json", True, language, None, None)
                most = self._settings.max_audio_seconds + 1
                async with aclosing(transcribe(service, asked, found, work, most)) as words:
                    async for new in words:
                        await self._send(TranscriptChunk(new).event())
            await self._send(Transcript(found.text, language=language).event())
            await self._send(TranscriptStop().event())
        finally:
            for stream in work:
                stream.cancel()
            hearing.close()

    # Speech

    def _manner(self, data: Json) -> Manner:
        given = data.get("voice") or {}
        name = mapping(given, "voice").get("name") or "default"
        voice = self._state.voices.find(name)
        if voice is None:
            raise refusal(f"there is no voice {str(name)[:60]!r}: describe lists them", "voice")
        if voice.path is not None and not self._service.knows(TTS, "prompt_speech"):
            raise refusal(f"{self._service.name} speaks with one voice alone", "voice")
        return Manner(voice.path, None, "pcm", 1.0, None)

    async def _synthesize(self, data: Json, payload: bytes) -> None:
        if self._reading is not None:
            # The text once more, for servers that do not know streaming.
            return
        said = text(data.get("text"), "text", self._settings.max_text_chars)
        self._service.check_words(said, "text")
        manner = self._manner(data)
        await self._take_place(self._state.requests)
        reading = Text(manner, self._settings.max_text_chars, streams=False)
        reading.add(said)
        reading.end()
        self._begin("synthesize", lambda: self._say(reading))

    async def _synthesize_start(self, data: Json, payload: bytes) -> None:
        manner = self._manner(data)
        await self._take_place(self._state.sessions)
        reading = self._reading = Text(manner, self._settings.max_text_chars, streams=True)
        self._begin("synthesize", lambda: self._say(reading))

    async def _synthesize_chunk(self, data: Json, payload: bytes) -> None:
        reading = self._reading
        if reading is None:
            return
        try:
            reading.add(text(data.get("text"), "text", self._settings.max_text_chars))
        except ApiError:
            # What came before is said.
            self._reading = None
            reading.end()
            raise

    async def _synthesize_stop(self, data: Json, payload: bytes) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.end()

    async def _say(self, reading: Text) -> None:
        rate, sent, begun = self._service.sample_rate, 0, False
        form = {"rate": rate, "width": 2, "channels": 1}
        narrator = Narrator(self._service, reading.manner)
        while (sentence := await reading.next()) is not None:
            if not narrator.says(sentence):
                continue
            async with aclosing(narrator.say(sentence)) as parts:
                async for part in parts:
                    if not begun:
                        begun = True
                        await self._send(AudioStart(**form, timestamp=0).event())
                    for at in range(0, len(part), PART):
                        ms = 1000 * sent // (2 * rate)
                        piece = part[at : at + PART]
                        await self._send(AudioChunk(**form, audio=piece, timestamp=ms).event())
                        sent += len(piece)
        if not begun:
            await self._send(AudioStart(**form, timestamp=0).event())
        await self._send(AudioStop(timestamp=1000 * sent // (2 * rate)).event())
        if reading.streams:
            await self._send(SynthesizeStopped().event())
