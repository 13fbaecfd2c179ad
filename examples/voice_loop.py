"""A spoken dialogue in asyncio: ask, listen, and speak while it answers to interrupt it.

    pip install sounddevice
    python examples/voice_loop.py [--voice WAV] [--model DIR --codec DIR]     # Ctrl-C ends it

Use headphones: what the loudspeaker says must not reach the microphone. A turn begins where the
level rises and ends after 0.6 s of silence; a real application takes a voice activity detector.
"""

import argparse
import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import sounddevice

import mimo_fast

RATE = 24000
BLOCK = RATE // 50  # 20 ms
LOUD = 0.02  # root mean square of a block in which somebody speaks
BEGINS, ENDS = 5, 30  # blocks in a row


async def microphone() -> AsyncIterator[np.ndarray]:
    """Blocks of 20 ms, float32."""
    loop, blocks = asyncio.get_running_loop(), asyncio.Queue[np.ndarray]()

    def heard(data: np.ndarray, frames: int, time: object, status: object) -> None:
        loop.call_soon_threadsafe(blocks.put_nowait, data[:, 0].copy())

    with sounddevice.InputStream(
        samplerate=RATE, channels=1, dtype="float32", blocksize=BLOCK, callback=heard
    ):
        while True:
            yield await blocks.get()


class Speaker:
    """Plays what it is given, and knows how much of it was heard."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting = np.zeros(0, dtype=np.float32)
        self.played = 0
        self.stream = sounddevice.OutputStream(
            samplerate=RATE, channels=1, dtype="float32", callback=self._fill
        )

    def _fill(self, out: np.ndarray, frames: int, time: object, status: object) -> None:
        with self.lock:
            ready, self.waiting = self.waiting[:frames], self.waiting[frames:]
            self.played += len(ready)
        out[:, 0] = np.pad(ready, (0, frames - len(ready)))

    def say(self, samples: np.ndarray) -> None:
        with self.lock:
            self.waiting = np.concatenate([self.waiting, samples])

    def stop(self) -> float:
        """Drops what has not been played -> milliseconds of this reply that were."""
        with self.lock:
            self.waiting = self.waiting[:0]
            heard, self.played = 1000 * self.played / RATE, 0
        return heard

    @property
    def busy(self) -> bool:
        return len(self.waiting) > 0


async def turns(blocks: AsyncIterator[np.ndarray]) -> AsyncIterator[np.ndarray | None]:
    """None as soon as somebody begins to speak, then the recording of the turn."""
    turn, loud, quiet, speaking = list[np.ndarray](), 0, 0, False
    async for block in blocks:
        level = float(np.sqrt(np.mean(block**2)))
        loud, quiet = (loud + 1, 0) if level > LOUD else (0, quiet + 1)
        turn.append(block)
        if not speaking:
            # What was said while it was decided that somebody speaks belongs to the turn.
            turn = turn[-2 * BEGINS :]
            if loud == BEGINS:
                speaking = True
                yield None
        elif quiet == ENDS:
            yield np.concatenate(turn[: 2 - ENDS])
            turn, speaking = [], False


async def answer(session: mimo_fast.Session, turn: np.ndarray, speaker: Speaker) -> None:
    try:
        async for chunk in session.astream(turn, lookahead="elastic"):
            print(chunk.text, end="", flush=True)
            speaker.say(chunk.audio.numpy())
    except (mimo_fast.AudioError, mimo_fast.PromptError) as error:
        print(f"[{error}]", end="")
    print()


async def converse(session: mimo_fast.Session) -> None:
    speaker, reply = Speaker(), None
    with speaker.stream:
        async for turn in turns(microphone()):
            if turn is not None:
                speaker.stop()
                reply = asyncio.create_task(answer(session, turn, speaker))
            elif reply is not None and (speaker.busy or not reply.done()):
                reply.cancel()
                await asyncio.wait([reply])
                # Text, codes and cache are cut to what was heard.
                await asyncio.to_thread(session.interrupt, speaker.stop())
                print("[interrupted]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="directory or hub id; by default nano")
    parser.add_argument("--codec", help="directory or hub id")
    parser.add_argument("--voice", help="a recording of the voice that answers")
    args = parser.parse_args()
    with mimo_fast.load(args.model, args.codec) as model:
        assert model.codec.sample_rate == RATE
        try:
            asyncio.run(converse(model.session(voice=args.voice)))
        except KeyboardInterrupt:
            print("\nbye")


if __name__ == "__main__":
    main()
