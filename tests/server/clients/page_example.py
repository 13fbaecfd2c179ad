"""Runs an example of docs/server.md as it stands, with sounds of a test for its sound card or room.

    python page_example.py EXAMPLE.py WAV

What is said to it is a question of tests/words; what it says goes to WAV. It is ended as by Ctrl-C.
"""

import asyncio
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import soundfile
from client_cases import LIMIT, RATE, said, until

QUESTION = "what color is the sea"


class SoundCard:
    """`pyaudio` of a test: a microphone that asks once, and a loudspeaker."""

    paContinue = 0

    def __init__(self) -> None:
        self.played = list[bytes]()

    def get_format_from_width(self, width: int) -> int:
        assert width == 2
        return 8

    def open(self, **options: Any) -> Any:
        assert options["channels"] == 1
        assert options["rate"] == RATE, options
        if options.get("input"):
            return Microphone(options["frames_per_buffer"], options["stream_callback"])
        nothing = {name: lambda: None for name in ("start_stream", "stop_stream", "close")}
        return SimpleNamespace(**nothing, write=self.write)

    def write(self, data: bytes) -> None:
        time.sleep(len(data) / 2 / RATE)
        self.played.append(data)

    def audio(self) -> np.ndarray:
        return np.frombuffer(b"".join(self.played), "<i2")


class Microphone:
    """Frames in real time, until it is stopped."""

    def __init__(self, size: int, hear: Any) -> None:
        self._size, self._hear, self._open = size, hear, True

    def start_stream(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        samples, at, began = said(QUESTION), 0, time.monotonic()
        while self._open:
            now = samples[at : at + self._size]
            now = np.pad(now, (0, self._size - len(now)))
            at += self._size
            self._hear(now.tobytes(), self._size, {}, 0)
            time.sleep(max(0, began + at / RATE - time.monotonic()))

    def stop_stream(self) -> None:
        self._open = False

    def close(self) -> None:
        self._open = False


def end_when_answered(card: SoundCard) -> None:
    """Presses Ctrl-C once what is played has stopped for a second."""
    end, played = time.monotonic() + LIMIT, 0
    while time.monotonic() < end and (played == 0 or len(card.played) > played):
        played = len(card.played)
        time.sleep(1)
    signal.raise_signal(signal.SIGINT)


def run_with_sound_card(example: Path) -> np.ndarray:
    card, module = SoundCard(), ModuleType("pyaudio")
    module.paContinue, module.PyAudio = SoundCard.paContinue, lambda: card
    sys.modules["pyaudio"] = module
    threading.Thread(target=end_when_answered, args=[card], daemon=True).start()
    with suppress(KeyboardInterrupt):
        runpy.run_path(str(example), run_name="__main__")
    return card.audio()


async def run_without_room(example: Path) -> np.ndarray:
    """An agent's entry with a microphone and a loudspeaker where LiveKit has a room."""
    from livekit.agents import AgentSession, utils
    from livekit.agents.types import NOT_GIVEN
    from livekit_cases import Microphone, Speaker, texts_of

    microphone, speaker, sessions = Microphone(), Speaker(), list[AgentSession]()
    begin = AgentSession.start

    async def start(session: AgentSession, agent: Any, **options: Any) -> Any:
        session.input.audio, session.output.audio = microphone, speaker
        sessions.append(session)
        return await begin(session, agent, **options, record=False)

    AgentSession.start = start
    entry = runpy.run_path(str(example), run_name="example")["talk"]
    async with utils.http_context.open():
        await entry(SimpleNamespace(room=NOT_GIVEN))
        (session,) = sessions
        before = len(speaker.audio)
        microphone.say(said(QUESTION))

        def answered() -> bool:
            return [role for role, _ in texts_of(session.history)].count("assistant") > 1

        await until(answered, "answer", lambda: texts_of(session.history))
        await session.aclose()
    return np.concatenate(speaker.audio[before:])


def main() -> None:
    example, target = Path(sys.argv[1]), sys.argv[2]
    if "livekit" in example.read_text(encoding="utf-8"):
        audio = asyncio.run(run_without_room(example))
    else:
        audio = run_with_sound_card(example)
    soundfile.write(target, audio, RATE)


if __name__ == "__main__":
    main()
