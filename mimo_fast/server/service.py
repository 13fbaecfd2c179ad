"""What a server does with its model, whatever the wire: speak, transcribe, reply.

endpoints, realtime sessions -> Service -> Worker (compute thread) -> MimoAudio
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.runtime.transcription import TranscriptStream
from mimo_fast.server.worker import Priority, Stream, Worker
from mimo_fast.text.transcript import TranscriptSegment


def heard(chunk: Chunk) -> float:
    """Seconds of audio of a chunk."""
    return len(chunk.audio) / chunk.sample_rate


@dataclass
class Service:
    """A model, the thread that computes with it, and what may be asked of it.

    Attributes:
        name: The model's name in `/v1/models`.
        dialogues: Whether replies to texts are the model's own; else a text is said to it.
    """

    model: MimoAudio
    name: str
    worker: Worker = field(default_factory=Worker)

    @property
    def sample_rate(self) -> int:
        return self.model.codec.sample_rate

    def speech(
        self,
        text: str,
        instructions: str | None = None,
        voice: Path | None = None,
        seed: int | None = None,
        priority: Priority = Priority.LISTENER,
    ) -> Stream[Chunk]:
        """A text said, in pieces as far as the model needs that.

        voice: a recording whose voice it has; None for the model's own.
        """

        def start() -> Iterator[Chunk]:
            options: dict[str, Any] = {"instruct": instructions} if instructions else {}
            if voice is not None:
                options |= {"read_text_only": True, "prompt_speech": str(voice)}
            return self.model.stream("tts", text, seed=seed, split=True, **options)

        return self.worker.stream(start, priority=priority, seconds=heard)

    def transcript(
        self, audio: str | Path | bytes | Tensor, seed: int | None = None
    ) -> Stream[TranscriptSegment]:
        """Segments of a recording of any length."""

        def start() -> TranscriptStream:
            return self.model.transcript(audio, seed=seed)

        return self.worker.stream(start, priority=Priority.BATCH)

    def close(self) -> None:
        """Ends what runs, then frees the model."""
        self.worker.close()
        self.model.close()
