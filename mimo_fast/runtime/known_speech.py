"""`KnownSpeech`: codes and words of recordings that come again, such as those of examples."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from mimo_fast.text.prompt import Speech

Found = TypeVar("Found")

MOST = 512
"""Recordings that are remembered: sixteen sets of sixteen examples. 30 s of speech have 48 kB."""


class KnownSpeech:
    """What a pipeline has found of recordings, by their samples; the oldest use goes first.

    Of several threads that ask for the same at once, one finds it.
    """

    def __init__(self) -> None:
        self._codes = OrderedDict[bytes, Speech]()
        self._words = OrderedDict[bytes, str]()
        self._lock = threading.RLock()

    def speeches(
        self, waves: Sequence[Tensor], encode: Callable[[Sequence[Tensor]], Sequence[Speech]]
    ) -> list[Speech]:
        """Codes of waveforms [n]; those that are not known are encoded in one call."""
        keys = [_key(wav) for wav in waves]
        with self._lock:
            new = {key: wav for key, wav in zip(keys, waves, strict=True) if key not in self._codes}
            if new:
                for key, speech in zip(new, encode([*new.values()]), strict=True):
                    # Codes of a graph are on the device, whose memory is for the next ones.
                    self._codes[key] = Speech(speech.codes.cpu(), speech.closed)
            found = [_used(self._codes, key) for key in keys]
            _forget(self._codes)
        return found

    def words(self, wav: Tensor, hear: Callable[[Tensor], str]) -> str:
        """Words of a waveform [n]."""
        key = _key(wav)
        with self._lock:
            if key not in self._words:
                self._words[key] = hear(wav)
            found = _used(self._words, key)
            _forget(self._words)
        return found


def _key(wav: Tensor) -> bytes:
    return hashlib.blake2b(wav.contiguous().numpy().tobytes(), digest_size=16).digest()


def _used(known: OrderedDict[bytes, Found], key: bytes) -> Found:
    known.move_to_end(key)
    return known[key]


def _forget(known: OrderedDict[bytes, Any]) -> None:
    while len(known) > MOST:
        known.popitem(last=False)
