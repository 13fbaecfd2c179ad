"""Text in, audio out over HTTP; recordings in, text out.

    pip install fastapi uvicorn
    python examples/http_endpoint.py [--model DIR --codec DIR] [--port 8000]
    curl -s localhost:8000/speech -H 'content-type: application/json' \\
        -d '{"text": "seven forty two"}' > speech.wav
    curl -s localhost:8000/transcript --data-binary @speech.wav

Callers share one model: their replies are rows of one batch. A caller who goes away stops the
reply within one group, 160 ms of audio. It trusts whoever reaches it, so it listens on this
machine alone.
"""

import argparse
from collections.abc import AsyncIterator

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

import mimo_fast
from mimo_fast.audio.writing import pcm16, wav_header


class Sentence(BaseModel):
    """What to say, and how."""

    text: str = Field(min_length=1, max_length=1000)
    style: str | None = Field(default=None, max_length=200)


MOST_BYTES = 20 * 2**20
"""Of a recording that somebody sends."""


def endpoint(model: mimo_fast.MimoAudio) -> FastAPI:
    app = FastAPI(title="mimo-fast")

    @app.post("/speech")
    async def speech(sentence: Sentence) -> StreamingResponse:
        chunks = model.astream(
            "tts", sentence.text, instruct=sentence.style, split=True, lookahead="elastic"
        )
        try:
            # Waits for the first chunk: an error is still a status then, not a broken file.
            first = await anext(chunks)
        except mimo_fast.BusyError as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from None
        except (mimo_fast.PromptError, ValueError) as error:
            raise HTTPException(422, str(error)) from None

        async def wav() -> AsyncIterator[bytes]:
            yield wav_header(model.codec.sample_rate) + pcm16(first.audio)
            async for chunk in chunks:
                yield pcm16(chunk.audio)

        return StreamingResponse(wav(), media_type="audio/wav")

    @app.post("/transcript")
    async def transcript(request: Request) -> dict[str, str]:
        recording = bytearray()
        async for block in request.stream():
            recording += block
            if len(recording) > MOST_BYTES:
                raise HTTPException(413, f"a recording may have {MOST_BYTES} bytes")
        try:
            words = [chunk.text async for chunk in model.astream("asr", bytes(recording))]
        except mimo_fast.BusyError as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from None
        except (mimo_fast.AudioError, mimo_fast.PromptError) as error:
            raise HTTPException(422, str(error)) from None
        return {"text": "".join(words).strip()}

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="directory or hub id; by default nano")
    parser.add_argument("--codec", help="directory or hub id")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--streams", type=int, default=4, help="replies that are made at once")
    args = parser.parse_args()
    with mimo_fast.load(args.model, args.codec, max_batch=args.streams) as model:
        uvicorn.run(endpoint(model), host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
