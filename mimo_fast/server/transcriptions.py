"""`/v1/audio/transcriptions`: a recording of any length in words.

file -> blocks -> pieces, cut at pauses (threads) -> words, pieces as rows of one batch -> answer

What is held is a block, the pieces in progress and the words.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from mimo_fast.architectures import LANGUAGES, language_code
from mimo_fast.sampling import fresh_seed
from mimo_fast.server.checks import Json, number, one_of, refusal
from mimo_fast.server.checks import text as checked_text
from mimo_fast.server.errors import ApiError
from mimo_fast.server.models import find_model
from mimo_fast.server.requests import (
    FIELD,
    FIELDS,
    SSE,
    Streamed,
    as_events,
    begun,
    content_type,
    read_seed,
    usage_of,
)
from mimo_fast.server.service import Counted, Read, Service
from mimo_fast.server.worker import Stream
from mimo_fast.text.transcript import (
    NO_SPACES,
    Transcript,
    TranscriptSegment,
    as_srt,
    as_vtt,
    join,
)

FORMS = ("json", "text", "srt", "verbose_json", "vtt")


@dataclass
class Asked:
    """A request, read.

    Args:
        language: a code of `LANGUAGES`; None where the client does not say.
        temperature: None for the task's own.
    """

    file: UploadFile
    form: str
    streams: bool
    language: str | None
    temperature: float | None
    seed: int | None


Work = deque[Stream[str | Counted]]
"""The pieces of a recording that are worked on, in order."""


@dataclass
class Found:
    """A transcript that grows, and what it took.

    Attributes:
        text: What has been said, pieces joined.
    """

    text: str = ""
    segments: list[TranscriptSegment] = field(default_factory=list)
    seconds: float = 0.0
    groups_in: int = 0
    groups_out: int = 0


async def transcriptions(request: Request) -> Response:
    """The words of an uploaded recording."""
    state = request.app.state
    service: Service = state.service
    form = await _form(request)
    work, found = Work(), Found()

    def leave() -> None:
        for stream in work:
            stream.cancel()
        for _, each in form.multi_items():
            if isinstance(each, UploadFile):
                each.file.close()

    try:
        service = find_model(service, form.get("model", service.name))
        asked = read_form(service, form)
        words = transcribe(service, asked, found, work, state.settings.max_audio_seconds)
        if asked.streams:
            parts = await begun(words)
            return Streamed(as_events(_events(parts, found)), SSE, leave)
        async with aclosing(words):
            async for _ in words:
                pass
    except BaseException:
        leave()
        raise
    leave()
    return _answer(found, asked)


async def _events(words: AsyncGenerator[str, None], found: Found) -> AsyncGenerator[Json, None]:
    async with aclosing(words):
        async for delta in words:
            yield {"type": "transcript.text.delta", "delta": delta}
    yield {"type": "transcript.text.done", "text": found.text, "usage": _tokens(found)}


async def _form(request: Request) -> FormData:
    kind = content_type(request)
    if kind != "multipart/form-data":
        problem = f"the body is {kind or 'of no type'}; send the file as multipart/form-data"
        raise ApiError(problem, 415, "unsupported_type")
    try:
        return await request.form(max_files=1, max_fields=FIELDS, max_part_size=FIELD)
    except HTTPException as error:
        raise ApiError(f"the form cannot be read: {error.detail}", 400, "invalid_form") from None


def read_form(service: Service, form: FormData) -> Asked:
    """A request's fields, checked.

    Raises:
        ApiError: one of them is wrong, or nothing that this model can do.
    """
    file = form.get("file")
    if not isinstance(file, UploadFile):
        problem = "file must be an uploaded recording"
        raise refusal(problem, "file", "missing_required_parameter")
    asked_for = form.getlist("timestamp_granularities[]") or form.getlist("timestamp_granularities")
    for each in asked_for:
        if each == "word":
            problem = (
                "this model does not say when words were said; leave 'word' out of "
                "timestamp_granularities[] and use the segments of verbose_json"
            )
            raise refusal(problem, "timestamp_granularities[]", "unsupported_value")
        one_of(each, "timestamp_granularities[]", ("segment",))
    if (prompt := form.get("prompt")) is not None:
        checked_text(prompt, "prompt", FIELD)
    temperature, seed = form.get("temperature"), form.get("seed")
    return Asked(
        file,
        one_of(form.get("response_format") or "json", "response_format", FORMS),
        one_of(str(form.get("stream") or "false").lower(), "stream", ("true", "false")) == "true",
        language_of(service, form.get("language")),
        None if temperature is None else number(_number(temperature), "temperature", 0, 1),
        read_seed({"seed": None if seed is None else _number(seed)}),
    )


def _number(value: Any) -> Any:
    """A form's text as the number that it is."""
    with_point = re.fullmatch(r"\s*[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})\s*", str(value))
    if with_point is None:
        return value
    return float(value) if "." in str(value) else int(value)


def language_of(service: Service, value: Any) -> str | None:
    if value is None or value == "":
        return None
    code = checked_text(value, "language", 100).lower()
    known = language_code(code)
    least = ("en",) if service.model.tokenizer.trained_words else tuple(LANGUAGES)
    if known not in least:
        raise refusal(f"language is {code!r}; {service.name} transcribes {least}", "language")
    return known


async def transcribe(
    service: Service, asked: Asked, found: Found, work: Work, most: float
) -> AsyncGenerator[str, None]:
    """What is said, as it is found: texts that join to `found.text`.

    As many pieces are worked on at once as the model has rows for.
    """
    slots, read = service.model.setup.max_batch, Read()
    seed = fresh_seed() if asked.seed is None else asked.seed
    # Starlette has spooled the upload to the disk, which is read in threads.
    shown = 0
    try:
        async with aclosing(service.pieces(asked.file.file, most, read)) as pieces:
            ended = False
            while work or not ended:
                while not ended and len(work) < slots:
                    piece = await anext(pieces, None)
                    found.seconds = read.samples / service.sample_rate
                    if piece is None:
                        ended = True
                        break
                    how = seed, asked.language, asked.temperature
                    work.append(service.words(piece, *how))
                if not work:
                    break
                before, words = found.text, ""
                async for item in work[0]:
                    if isinstance(item, Counted):
                        found.segments.append(item.segment)
                        found.groups_in += item.groups_in
                        found.groups_out += item.groups_out
                        words = item.segment.text
                    else:
                        words += item
                    # Space at its end may be all that follows.
                    found.text = join(before, words.strip())
                    if found.text[shown:]:
                        yield found.text[shown:]
                        shown = len(found.text)
                work.popleft()
    finally:
        for stream in work:
            stream.cancel()


def _answer(found: Found, asked: Asked) -> Response:
    whole_text = Transcript(found.text, tuple(found.segments), found.seconds)
    writers: dict[str, tuple[Callable[[Transcript], str], str]] = {
        "text": (lambda transcript: f"{transcript.text}\n", "text/plain"),
        "srt": (as_srt, "application/x-subrip"),
        "vtt": (as_vtt, "text/vtt"),
    }
    if asked.form in writers:
        write, media = writers[asked.form]
        return PlainTextResponse(write(whole_text), media_type=media)
    if asked.form == "json":
        return JSONResponse({"text": found.text, "usage": _tokens(found)})
    seconds = round(found.seconds, 3)
    return JSONResponse(
        {
            "task": "transcribe",
            "language": _heard_in(found.text, asked.language),
            "duration": seconds,
            "text": found.text,
            "segments": [_segment(i, each) for i, each in enumerate(found.segments)],
            "usage": {"type": "duration", "seconds": round(seconds)},
        }
    )


def _heard_in(text: str, language: str | None) -> str:
    """The language of a transcript by its letters, unless the client said it."""
    if language is not None:
        return LANGUAGES[language]
    low, high = NO_SPACES[0]
    chinese = sum(low <= ord(letter) <= high for letter in text)
    return LANGUAGES["zh" if 2 * chinese > len(text) else "en"]


def _segment(index: int, segment: TranscriptSegment) -> Json:
    """A segment as OpenAI has it; figures that this model does not give are null.

    It has `confidence`, `warning` and `finish_reason` besides, where they say something.
    """
    found: Json = {
        "id": index,
        "seek": 0,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": None,
        "compression_ratio": None,
        "no_speech_prob": None,
    }
    if segment.confidence is not None:
        found["confidence"] = round(segment.confidence, 3)
    if segment.warning is not None:
        found["warning"] = segment.warning
    if segment.finish_reason != "stop":
        found["finish_reason"] = segment.finish_reason
    return found


def _tokens(found: Found) -> Json:
    return {"type": "tokens", **usage_of(found.groups_in, found.groups_out)}
