"""Decoding codes as they come: each call re-decodes a bounded window and returns what has become final.

The window and its margins are upstream's (`MiMoAudioTokenizer.streaming_decode`): the vocoder looks ahead 10 frames a
layer, so the newest 40 code frames wait for what follows; 250 frames before them give the causal decoder its context.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .codec import Codec

LOOKAHEAD = 40
CONTEXT = 250


class CodecStream:
    """One waveform in progress. Feed codes with `push`, end with `finish`; the parts join without a seam."""

    def __init__(self, codec: "Codec") -> None:
        self._codec = codec
        self._window: Tensor | None = None
        self._done = 0

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        """Codes [n, t] that follow the last ones -> the samples that are now final, float32 [m], m may be 0."""
        window = self._extend(codes)
        final = len(window) - LOOKAHEAD
        if final <= self._done:
            return self._decode(window, self._done)
        wav = self._decode(window, final)
        dropped = max(0, len(window) - CONTEXT)
        self._window = window[dropped:]
        self._done = final - dropped
        return wav

    @torch.no_grad()
    def finish(self, codes: Tensor | None = None) -> Tensor:
        """The last codes, if any -> all samples still waiting for what follows. The stream starts anew after it."""
        window = self._window if codes is None else self._extend(codes)
        wav = torch.zeros(0, device=self._codec.device) if window is None else self._decode(window, len(window))
        self._window, self._done = None, 0
        return wav

    def _extend(self, codes: Tensor) -> Tensor:
        self._codec.check_codes(codes)
        hidden = self._codec.dequantize(codes)
        self._window = hidden if self._window is None else torch.cat((self._window, hidden))
        return self._window

    def _decode(self, window: Tensor, end: int) -> Tensor:
        """Samples of frames _done ... end of the window."""
        if end <= self._done:
            return torch.zeros(0, device=window.device)
        samples = self._codec.config.samples_per_frame
        return self._codec.decode_hidden(window)[self._done * samples : end * samples]
