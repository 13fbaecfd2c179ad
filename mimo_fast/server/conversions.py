"""`/v1/audio/conversions`: speech into speech by example (few-shot).

instruction, examples (before, after, words after), recording -> the recording, done likewise

OpenAI's API has nothing like it: the endpoint is this server's own. Its fields are those of a form,
its answers those of `/v1/audio/speech`.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from mimo_fast.audio.segments import levelled
from mimo_fast.errors import AudioError
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.server.audio import FORMS, decode
from mimo_fast.server.checks import Json, one_of, refusal
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
from mimo_fast.server.service import Service, heard
from mimo_fast.server.worker import Stream
from mimo_fast.text.tasks import MAX_EXAMPLES

TASK = "in_context_learning_s2s"

SECONDS = 30.0
"""Of one recording; all of them share the model's context."""

LEAST_GROUPS, TIMES = 16, 3
"""A reply has at most so many groups, and so many times those of the longest recording."""


@dataclass(frozen=True)
class Example:
    """What was said before and after, float32 [n], and the words of the latter."""

    before: Tensor
    after: Tensor
    words: str

    def as_task(self) -> dict[str, Any]:
        named = {"input_audio": self.before, "output_audio": self.after}
        return named | {"output_transcription": self.words}


@dataclass(frozen=True)
class Asked:
    """A request, read.

    Args:
        form: a key of `FORMS`.
        events: whether the answer is server-sent events.
        seed: of all draws; None draws one.
    """

    instruction: str
    examples: tuple[Example, ...]
    recording: Tensor
    form: str
    events: bool
    seed: int | None


@dataclass
class Said:
    """What came of it."""

    words: str = ""
    groups: int = 0
    news: list[str] = field(default_factory=list)


async def conversions(request: Request) -> Response:
    """A recording converted as examples show it, in one of six forms or as events."""
    service: Service = request.app.state.service
    if not service.knows(TASK):
        problem = f"{service.name} was not trained to convert speech by example"
        raise ApiError(problem, 400, "unsupported_value")
    form = await _form(request)
    try:
        service = find_model(service, form.get("model", service.name))
        asked = await _read(request, service, form)
    finally:
        for _, each in form.multi_items():
            if isinstance(each, UploadFile):
                each.file.close()
    stream, said = _converted(service, asked), Said()
    try:
        parts = await begun(_encoded(service, stream, asked.form, said))
    except BaseException:
        stream.cancel()
        raise
    if not asked.events:
        return Streamed(parts, FORMS[asked.form].media, stream.cancel)
    return Streamed(as_events(_events(parts, said)), SSE, stream.cancel)


def _converted(service: Service, asked: Asked) -> Stream[Chunk]:
    """The recording as the examples convert theirs."""

    def start() -> Iterator[Chunk]:
        model = service.model
        group = model.group_size * model.codec.config.samples_per_frame
        longest = max(len(asked.recording), *(len(each.after) for each in asked.examples), 0)
        return model.stream(
            TASK,
            asked.instruction,
            [each.as_task() for each in asked.examples],
            asked.recording,
            seed=asked.seed,
            max_new_tokens=LEAST_GROUPS + TIMES * -(-longest // group),
            adapter=service.adapter,
        )

    return service.worker.stream(start, seconds=heard)


async def _encoded(
    service: Service, stream: Stream[Chunk], form: str, said: Said
) -> AsyncGenerator[bytes, None]:
    async def samples() -> AsyncGenerator[Tensor, None]:
        async for chunk in stream:
            said.groups = chunk.timing.groups
            if chunk.text:
                said.words += chunk.text
                said.news.append(chunk.text)
            yield chunk.audio

    parts = service.threads.encode(samples(), form, service.sample_rate)
    try:
        async for part in parts:
            yield part
    finally:
        stream.cancel()


async def _events(parts: AsyncGenerator[bytes, None], said: Said) -> AsyncGenerator[Json, None]:
    async for part in parts:
        if said.news:
            yield {"type": "conversion.text.delta", "delta": "".join(said.news)}
            said.news.clear()
        data = base64.b64encode(part).decode()
        yield {"type": "conversion.audio.delta", "audio": data}
    usage = usage_of(0, said.groups)
    yield {"type": "conversion.done", "text": said.words.strip(), "usage": usage}


async def _form(request: Request) -> FormData:
    kind = content_type(request)
    if kind != "multipart/form-data":
        problem = f"the body is {kind or 'of no type'}; send the files as multipart/form-data"
        raise ApiError(problem, 415, "unsupported_type")
    try:
        return await request.form(
            max_files=2 * MAX_EXAMPLES + 1, max_fields=FIELDS, max_part_size=FIELD
        )
    except HTTPException as error:
        raise ApiError(f"the form cannot be read: {error.detail}", 400, "invalid_form") from None


async def _read(request: Request, service: Service, form: FormData) -> Asked:
    """A request's fields, checked, and its recordings, decoded.

    Raises:
        ApiError: one of them is wrong.
    """
    settings = request.app.state.settings
    instruction = checked_text(form.get("instruction"), "instruction", settings.max_text_chars)
    if not instruction.strip():
        raise refusal("instruction is empty", "instruction")
    names = "example_before[]", "example_after[]", "example_text[]"
    before, after, words = (form.getlist(name) for name in names)
    if not len(before) == len(after) == len(words) <= MAX_EXAMPLES:
        rule = f"as many of each of {', '.join(names)}, {MAX_EXAMPLES} at most"
        found = f"{len(before)}, {len(after)} and {len(words)}"
        raise refusal(f"an example has three fields: send {rule}, not {found}", names[0])
    form_of = one_of(form.get("response_format") or "wav", "response_format", FORMS)
    answer = one_of(form.get("stream_format") or "audio", "stream_format", ("audio", "sse"))
    given = form.get("seed")
    seed = int(given) if isinstance(given, str) and given.isdigit() else given
    examples = list[Example]()
    for i in range(len(before)):
        examples.append(
            Example(
                await _decoded(service, before[i], f"example_before[{i}]"),
                await _decoded(service, after[i], f"example_after[{i}]"),
                checked_text(words[i], f"example_text[{i}]", settings.max_text_chars).strip(),
            )
        )
    recording = await _decoded(service, form.get("file"), "file")
    drawn = read_seed({"seed": seed})
    return Asked(instruction, tuple(examples), recording, form_of, answer == "sse", drawn)


async def _decoded(service: Service, file: Any, param: str) -> Tensor:
    """An uploaded recording -> float32 [n], its level set."""
    if not isinstance(file, UploadFile):
        problem = f"{param} must be an uploaded recording"
        raise refusal(problem, param, "missing_required_parameter")

    def read() -> Tensor:
        return levelled(decode(file.file, service.sample_rate, SECONDS, param, "cut it"))

    try:
        return await service.threads.decode(read)
    except AudioError as error:
        raise ApiError(str(error), 400, "invalid_audio", param) from error
