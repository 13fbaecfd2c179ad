"""A question to a server by voice and its answer, through the stock openai SDK.

    pip install 'openai[realtime]'
    mimo-fast serve                                               # in another terminal
    python examples/realtime_client.py [QUESTION.wav] [-o answer.wav] [--url http://127.0.0.1:8000]

The recording is sent as a microphone would send it; the server finds where the turn ends. The
answer is written to a file, and played where `sounddevice` can. A key is taken from OPENAI_API_KEY.
"""

import argparse
import base64
import os
import wave
from pathlib import Path

import soundfile
from openai import OpenAI

import mimo_fast

try:
    import sounddevice
except (ImportError, OSError):  # It needs PortAudio.
    sounddevice = None

QUESTION = Path(mimo_fast.__file__).parent / "assets" / "question.wav"
RATE = 24000


def samples_of(path: str) -> bytes:
    """16-bit samples of a recording and the silence after it, which ends a turn."""
    wav = mimo_fast.load_audio(path, RATE).clamp(-1, 1)
    return (wav * 32767).short().numpy().tobytes() + bytes(2 * RATE)


def ask(client: OpenAI, question: str) -> tuple[str, str, bytes]:
    """What was heard, the answer's words and its samples."""
    heard, words, audio = "", "", b""
    with client.realtime.connect(model="nano") as talk:
        hearing = {"transcription": {"model": "whisper-1"}}
        talk.session.update(session={"type": "realtime", "audio": {"input": hearing}})
        data = samples_of(question)
        for at in range(0, len(data), RATE):
            piece = base64.b64encode(data[at : at + RATE]).decode()
            talk.input_audio_buffer.append(audio=piece)
        answered = False
        for event in talk:
            if event.type == "error":
                raise SystemExit(event.error.message)
            if event.type == "conversation.item.input_audio_transcription.completed":
                heard = event.transcript
            elif event.type == "response.output_audio_transcript.done":
                words = event.transcript
            elif event.type == "response.output_audio.delta":
                audio += base64.b64decode(event.delta)
            answered = answered or event.type == "response.done"
            if answered and heard:
                break
    return heard, words, audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default=str(QUESTION))
    parser.add_argument("-o", "--output", default="answer.wav")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    key = os.environ.get("OPENAI_API_KEY", "none")
    base = f"{args.url.rstrip('/').removesuffix('/v1')}/v1"
    heard, words, audio = ask(OpenAI(base_url=base, api_key=key), args.question)
    print(f"you:    {heard}")
    print(f"answer: {words}")
    with wave.open(args.output, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(audio)
    if sounddevice is not None:
        sounddevice.play(soundfile.read(args.output)[0], RATE, blocking=True)


if __name__ == "__main__":
    main()
