"""Upstream's names for what this package calls otherwise: thin views, nothing is computed twice.

`MimoAudio` hands them out (`model.model`, `model.mimo_audio_tokenizer`, `model.mel_transform`). The
classes that upstream's users make themselves are imported from here:

    from mimo_fast.upstream import InputSegment, StreamingCache, StreamingConfig

docs/differences.md lists what is deliberately different.
"""

from mimo_fast.upstream.codec import StreamingCache, StreamingConfig
from mimo_fast.upstream.segments import InputSegment, StreamingInputSegment

__all__ = ["InputSegment", "StreamingCache", "StreamingConfig", "StreamingInputSegment"]
