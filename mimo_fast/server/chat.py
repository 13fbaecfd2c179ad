"""`/v1/chat/completions`: a conversation in text and speech, answered in text or speech.

messages -> turns (recordings decoded, earlier answers by id) -> `Mind` -> chunks or one answer
"""

from __future__ import annotations

import base64
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast.json_files import shown
from mimo_fast.runtime.pipeline import MAX_NEW_TOKENS
from mimo_fast.server.audio import Encoder
from mimo_fast.server.checks import (
    Json,
    boolean,
    mapping,
    number,
    one_of,
    refusal,
    whole,
)
from mimo_fast.server.messages import MOST_MESSAGES, Heard, Turns, read_messages
from mimo_fast.server.models import find_model
from mimo_fast.server.realtime.mind import Ask, Mind, Piece
from mimo_fast.server.requests import (
    SEEDS,
    SSE,
    Streamed,
    as_events,
    begun,
    find_voice,
    read_json,
    read_seed,
)
from mimo_fast.server.service import Service
from mimo_fast.server.worker import Stream

FORMS = {"wav": "wav", "mp3": "mp3", "flac": "flac", "opus": "opus", "aac": "aac", "pcm16": "pcm"}
"""OpenAI's names of audio in chats -> ours."""

REFUSED = ("stop", "logit_bias", "prediction", "web_search_options", "functions", "tools")
"""What asks for something that this model cannot do, where it is not empty."""

FALSE = ("logprobs", "top_logprobs", "frequency_penalty", "presence_penalty")
"""The same, where it is not false or 0."""

LEFT_OUT = "x-mimo-fast-left-out"
"""Header that names what of a request this model has no place for."""

ID = re.compile("audio_[0-9a-f]{24}")
"""An answer's id."""


class Answers:
    """Earlier answers by their ids, for an hour; the oldest go where they are many."""

    MOST = 500
    SECONDS = 3600

    def __init__(self) -> None:
        self._kept = OrderedDict[str, tuple[int, Heard]]()

    def keep(self, audio_id: str, expires: int, heard: Heard) -> None:
        now = time()
        while self._kept and (
            len(self._kept) >= self.MOST or next(iter(self._kept.values()))[0] < now
        ):
            self._kept.popitem(last=False)
        self._kept[audio_id] = expires, heard

    def find(self, audio_id: str) -> Heard | None:
        found = self.kept(audio_id)
        return found and found[1]

    def kept(self, audio_id: str) -> tuple[int, Heard] | None:
        """An answer, and when it expires."""
        found = self._kept.get(audio_id)
        return found if found and found[0] > time() else None


Kept = tuple[int, Heard]
"""When an answer expires, and the answer."""

Elsewhere = Callable[[list[str]], Awaitable[dict[str, Kept]]]
"""Finds answers by their ids in other processes."""


@dataclass(frozen=True)
class Wanted:
    """How a conversation is to be answered.

    Args:
        form: of the audio, a key of `FORMS`; None for an answer in text.
    """

    turns: Turns
    form: str | None
    voice: Path | None
    most: int | None
    seed: int | None
    temperature: float | None
    top_p: float | None
    choices: int
    streams: bool
    with_usage: bool

    def ask(self, index: int, adapter: str | None) -> Ask:
        turns = self.turns
        seed = None if self.seed is None else (self.seed + index) % SEEDS
        return Ask(
            turns.before,
            turns.said,
            turns.instructions,
            self.voice,
            self.form is not None,
            self.most,
            seed=seed,
            temperature=self.temperature,
            top_p=self.top_p,
            adapter=adapter,
        )


async def chat(request: Request) -> Response:
    """An answer to a conversation."""
    state, body = request.app.state, await read_json(request)
    service: Service = find_model(state.service, body.get("model", state.service.name))
    if not hasattr(state, "answers"):
        state.answers = Answers()
    if state.elsewhere is not None:
        await _fetch(body, state.answers, state.elsewhere)
    wanted = await _read(request, body, state.answers)
    headers = {LEFT_OUT: ", ".join(left)} if (left := list(_left_out(service, wanted))) else {}
    answer = _Answer(service, wanted, state.answers)
    if not wanted.streams:
        return JSONResponse(await answer.whole(), headers=headers)
    parts = await begun(answer.chunks())
    return Streamed(_sse(parts), SSE, answer.leave, headers)


async def _fetch(body: Json, answers: Answers, elsewhere: Elsewhere) -> None:
    """Keeps answers that a conversation refers to and another process has given."""
    messages = body.get("messages")
    named = []
    for message in messages[:MOST_MESSAGES] if isinstance(messages, list) else ():
        audio = message.get("audio") if isinstance(message, dict) else None
        audio_id = audio.get("id") if isinstance(audio, dict) else None
        if isinstance(audio_id, str) and ID.fullmatch(audio_id) and not answers.kept(audio_id):
            named.append(audio_id)
    if named:
        for audio_id, (expires, heard) in (await elsewhere(named)).items():
            answers.keep(audio_id, expires, heard)


async def _sse(parts: AsyncGenerator[Json, None]) -> AsyncGenerator[str, None]:
    async with aclosing(as_events(parts)) as events:
        async for event in events:
            yield event
    yield "data: [DONE]\n\n"


def _left_out(service: Service, wanted: Wanted) -> Iterator[str]:
    """What of a request this model was not trained for, and does not see."""
    return (
        name
        for name, given, task, option in (
            ("instructions", wanted.turns.instructions, "spoken_dialogue_sft", "system_prompt"),
            ("earlier turns", wanted.turns.before, "spoken_dialogue_sft_multiturn", None),
        )
        if given and not service.knows(task, option)
    )


async def _read(request: Request, body: Json, answers: Answers) -> Wanted:
    settings, service = request.app.state.settings, request.app.state.service
    _refuse(body)
    modalities = body.get("modalities") or ["text"]
    if not isinstance(modalities, list) or not set(map(str, modalities)) <= {"text", "audio"}:
        problem = f"modalities is {shown(modalities)}; it may hold 'text' and 'audio'"
        raise refusal(problem, "modalities")
    form, voice = None, None
    if "audio" in modalities:
        if body.get("audio") is None:
            problem = "modalities has 'audio'; say in audio which voice and format"
            raise refusal(problem, "audio", "missing_required_parameter")
        audio = mapping(body["audio"], "audio")
        form = one_of(audio.get("format") or "wav", "audio.format", FORMS)
        voice = find_voice(request, audio.get("voice"), "audio.voice")
    options = body.get("stream_options")
    options = {} if options is None else mapping(options, "stream_options")
    name = (
        "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    )
    most = _optional(body, name, 1, 2**62)
    return Wanted(
        await read_messages(service, settings, body.get("messages"), answers.find),
        form,
        voice,
        None if most is None or most > MAX_NEW_TOKENS else most,
        read_seed(body),
        None
        if body.get("temperature") is None
        else number(body["temperature"], "temperature", 0, 2),
        None if body.get("top_p") is None else number(body["top_p"], "top_p", 0, 1),
        1 if body.get("n") is None else whole(body["n"], "n", 1, settings.max_choices),
        boolean(body.get("stream") or False, "stream"),
        boolean(options.get("include_usage") or False, "stream_options.include_usage"),
    )


def _optional(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    return None if body.get(name) is None else whole(body[name], name, least, most)


def _refuse(body: Json) -> None:
    """Raises ApiError for what would otherwise be left out in silence."""
    for name in (*REFUSED, *FALSE):
        if body.get(name):
            problem = f"{name} is not supported by this model; leave it out"
            raise refusal(problem, name, "unsupported_parameter")
    if body.get("tool_choice") not in (None, "none", "auto"):
        problem = "tool_choice: this model calls no tools; leave it out"
        raise refusal(problem, "tool_choice", "unsupported_parameter")
    form = body.get("response_format")
    if form is not None and mapping(form, "response_format").get("type") != "text":
        problem = "response_format: this model answers in words; leave it out"
        raise refusal(problem, "response_format", "unsupported_parameter")


@dataclass
class _Choice:
    """One answer, as it grows."""

    index: int
    ask: Ask
    audio_id: str
    expires: int
    words: str = ""
    audio: list[bytes] = field(default_factory=list)

    def finish(self) -> str:
        return "stop" if self.ask.finish_reason in (None, "stop") else "length"


class _Answer:
    """The answers to one request."""

    def __init__(self, service: Service, wanted: Wanted, answers: Answers) -> None:
        self._service, self._wanted, self._answers = service, wanted, answers
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time())
        self._stream: Stream[Piece] | None = None
        self._done = list[_Choice]()

    def leave(self) -> None:
        """Lets go of the model; for a client that has gone."""
        if self._stream is not None:
            self._stream.cancel()

    async def whole(self) -> Json:
        """An object `chat.completion`."""
        choices = list[Json]()
        for index in range(self._wanted.choices):
            choice = self._begin(index)
            async with aclosing(self._deltas(choice)) as deltas:
                async for delta in deltas:
                    data = delta.get("audio", {}).get("data")
                    if data is not None:
                        choice.audio.append(data)
            message: Json = {"role": "assistant", "content": None, "refusal": None}
            if self._wanted.form is None:
                message["content"] = choice.words.strip()
            else:
                message["audio"] = {
                    "id": choice.audio_id,
                    "data": base64.b64encode(b"".join(choice.audio)).decode(),
                    "expires_at": choice.expires,
                    "transcript": choice.words.strip(),
                }
            found = {"index": index, "message": message, "finish_reason": choice.finish()}
            choices.append(found | {"logprobs": None})
        about = {"id": self._id, "object": "chat.completion", "created": self._created}
        return about | {
            "model": self._service.name,
            "choices": choices,
            "usage": self._usage(),
        }

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """Objects `chat.completion.chunk`."""
        for index in range(self._wanted.choices):
            choice, first = self._begin(index), True
            async with aclosing(self._deltas(choice)) as deltas:
                async for delta in deltas:
                    if first:
                        start = {"role": "assistant", "content": "", "refusal": None}
                        yield self._chunk(index, start)
                        first = False
                    if "data" in (audio := delta.get("audio", {})):
                        audio["data"] = base64.b64encode(audio["data"]).decode()
                    yield self._chunk(index, delta)
            if self._wanted.form is not None:
                # Alone in the last delta of the audio.
                last = {"id": choice.audio_id, "expires_at": choice.expires}
                yield self._chunk(index, {"audio": last})
            yield self._chunk(index, {}, choice.finish())
        if self._wanted.with_usage:
            yield self._about() | {"choices": [], "usage": self._usage()}

    def _begin(self, index: int) -> _Choice:
        expires = int(time()) + Answers.SECONDS
        ask = self._wanted.ask(index, self._service.adapter)
        return _Choice(index, ask, f"audio_{secrets.token_hex(12)}", expires)

    async def _deltas(self, choice: _Choice) -> AsyncGenerator[Json, None]:
        """The parts of one answer: text, or words and bytes of audio."""
        threads, form = self._service.threads, self._wanted.form
        service = self._service
        encoder = (
            None if form is None else Encoder(FORMS[form], service.sample_rate, mark=service.marked)
        )
        self._stream = stream = reply(self._service, choice.ask)
        try:
            async for piece in stream:
                text = piece.text if choice.words else piece.text.lstrip()
                choice.words += text
                if encoder is None:
                    if text:
                        yield {"content": text}
                    continue
                about = {"id": choice.audio_id}
                if text:
                    yield {"audio": about | {"transcript": text}}
                if piece.audio is not None and (data := await threads.push(encoder, piece.audio)):
                    yield {"audio": about | {"data": data}}
            if encoder is not None:
                async for data in threads.finish(encoder):
                    yield {"audio": {"id": choice.audio_id, "data": data}}
            self._end(choice)
        finally:
            stream.cancel()
            if encoder is not None:
                encoder.close()

    def _end(self, choice: _Choice) -> None:
        self._done.append(choice)
        if self._wanted.form is not None:
            heard = Heard(choice.ask.reply, choice.words.strip())
            self._answers.keep(choice.audio_id, choice.expires, heard)

    def _about(self) -> Json:
        about = {"id": self._id, "object": "chat.completion.chunk", "created": self._created}
        return about | {"model": self._service.name}

    def _chunk(self, index: int, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._about() | {"choices": [choice]}

    def _usage(self) -> Json:
        """Groups of the model, as tokens: a word's part, or 160 ms of speech."""
        used = [choice.ask.usage for choice in self._done]
        first = used[0]
        text_out, audio_out = (sum(getattr(each, name) for each in used) for name in _OUT)
        prompt, reply = first.text_in + first.audio_in, text_out + audio_out
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
            "prompt_tokens_details": {
                "text_tokens": first.text_in,
                "audio_tokens": first.audio_in,
                "cached_tokens": first.cached,
            },
            "completion_tokens_details": {"text_tokens": text_out, "audio_tokens": audio_out},
        }


_OUT = "text_out", "audio_out"


def reply(service: Service, ask: Ask) -> Stream[Piece]:
    """The reply to a conversation, in text or in speech."""

    def start() -> Iterator[Piece | None]:
        with closing(Mind(service.model).answer(ask)) as pieces:
            for piece in pieces:
                heard = piece.audio is not None and len(piece.audio)
                yield piece if piece.text or heard else None

    def seconds(piece: Piece) -> float:
        return 0.0 if piece.audio is None else len(piece.audio) / service.sample_rate

    return service.worker.stream(start, seconds=seconds)
