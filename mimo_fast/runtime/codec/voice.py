"""`Voice`: what is known of the voice of a reply before its first patch."""

from __future__ import annotations

from torch import Tensor

from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.prior import statistics_of
from mimo_fast.runtime.codec.state import NormStatistics

PROMPT_FRAMES = 250
"""Code frames of a voice prompt that are measured, its last 10 s: enough, and quickly done."""


class Voice:
    """Norm statistics of one voice: of all that it has said or, before that, of its prompt.

    Args:
        prompt: codes [C, T] of speech in this voice.
        heard: sums [2, 3] of what it has said, see `CodecStream.totals`.
    """

    def __init__(self, prompt: Tensor | None = None, heard: Tensor | None = None) -> None:
        self._prompt, self._heard = prompt, heard
        self._codec: Codec | None = None
        self._measured: NormStatistics | None = None

    @property
    def heard(self) -> Tensor | None:
        """Sums [2, 3] of all finished replies, None before the first."""
        return self._heard

    def known(self, codec: Codec) -> NormStatistics | None:
        """Its statistics, None if there are none. A prompt is measured at the first call."""
        self._belong_to(codec)
        if self._heard is not None:
            return statistics_of(codec.config, self._heard)
        if self._measured is None and self._prompt is not None:
            self._measured = codec.moments(self._prompt[:, -PROMPT_FRAMES:])
        return self._measured

    def add(self, codec: Codec, totals: Tensor) -> None:
        """Adds the sums of a reply."""
        self._belong_to(codec)
        self._heard = totals if self._heard is None else self._heard.to(totals.device) + totals

    def _belong_to(self, codec: Codec) -> None:
        """Forgets what another codec measured."""
        if self._codec is not None and self._codec is not codec:
            self._heard = self._measured = None
        self._codec = codec
