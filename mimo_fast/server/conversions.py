"""`/v1/audio/conversions`: speech into speech by example (few-shot).

instruction, examples (before, after, words after), recording -> the recording, done likewise

OpenAI's API has nothing like it: the endpoint is this server's own. Its fields are those of a form,
its answers those of `/v1/audio/speech`. What it does is `runtime/conversion.py`.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from mimo_fast.audio.segments import levelled
from mimo_fast.errors import AudioError
from mimo_fast.json_files import shown
from mimo_fast.runtime.conversion import NAME as TASK
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.runtime.examples import SECONDS, Example, ExampleSet, check_sound
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
from mimo_fast.text.few_shot import MAX_EXAMPLES

FIELDS_OF_EXAMPLE = "example_before[]", "example_after[]", "example_text[]"


@dataclass(frozen=True)
class Asked:
    """A request, read.

    Args:
        examples: with their instruction.
        recording: float32 [n] as it was decoded.
        form: a key of `FORMS`.
        events: whether the answer is server-sent events.
        seed: of all draws; None draws one.
    """

    examples: ExampleSet
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
        converter = service.model.converter(asked.examples, adapter=service.adapter)
        return converter.stream(asked.recording, seed=asked.seed)

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

    parts = service.threads.encode(samples(), form, service.sample_rate, mark=service.marked)
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
    examples = await _examples(request, service, form)
    form_of = one_of(form.get("response_format") or "wav", "response_format", FORMS)
    answer = one_of(form.get("stream_format") or "audio", "stream_format", ("audio", "sse"))
    given = form.get("seed")
    seed = int(given) if isinstance(given, str) and given.isdigit() else given
    recording = await _decoded(service, form.get("file"), "file")
    drawn = read_seed({"seed": seed})
    return Asked(examples, recording, form_of, answer == "sse", drawn)


async def _examples(request: Request, service: Service, form: FormData) -> ExampleSet:
    """The examples of a form, decoded, or the set that it names."""
    longest = request.app.state.settings.max_text_chars
    instruction, name = form.get("instruction"), form.get("examples")
    if instruction is not None or name is None:
        instruction = checked_text(instruction, "instruction", longest)
        if not instruction.strip():
            raise refusal("instruction is empty", "instruction")
    before, after, words = (form.getlist(each) for each in FIELDS_OF_EXAMPLE)
    if name is not None:
        if before or after or words:
            problem = "examples names a set: leave out the fields of other examples"
            raise refusal(problem, "examples")
        found = request.app.state.examples.find(name)
        if found is None:
            problem = f"there is no set of examples {shown(name)}"
            raise refusal(f"{problem}; GET /v1/audio/examples lists those there are", "examples")
        given: ExampleSet = await service.threads.decode(found.read)
        return replace(given, instruction=instruction or given.instruction)
    if not len(before) == len(after) == len(words) <= MAX_EXAMPLES:
        rule = f"as many of each of {', '.join(FIELDS_OF_EXAMPLE)}, {MAX_EXAMPLES} at most"
        counts = f"{len(before)}, {len(after)} and {len(words)}"
        problem = f"an example has three fields: send {rule}, not {counts}"
        raise refusal(problem, FIELDS_OF_EXAMPLE[0])
    examples = list[Example]()
    for i in range(len(before)):
        said = checked_text(words[i], f"example_text[{i}]", longest).strip()
        if not said:
            problem = f"example_text[{i}] is empty: send the words of example_after[{i}]"
            raise refusal(problem, f"example_text[{i}]")
        source = await _decoded(service, before[i], f"example_before[{i}]")
        target = await _decoded(service, after[i], f"example_after[{i}]")
        examples.append(Example(levelled(source), levelled(target), said))
    return ExampleSet(tuple(examples), instruction)


async def _decoded(service: Service, file: Any, param: str) -> Tensor:
    """An uploaded recording -> float32 [n]."""
    if not isinstance(file, UploadFile):
        problem = f"{param} must be an uploaded recording"
        raise refusal(problem, param, "missing_required_parameter")

    def read() -> Tensor:
        wav = decode(file.file, service.sample_rate, SECONDS, param, "cut it")
        check_sound(wav, param)
        return wav

    try:
        return await service.threads.decode(read)
    except AudioError as error:
        raise ApiError(str(error), 400, "invalid_audio", param) from error
