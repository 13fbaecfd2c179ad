"""An independent recogniser for generated speech: pocketsphinx with the domain's grammar."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.resample import resample
from mimo_fast.errors import MimoFastError

from .domain import GRAMMAR
from .synthesis import RATE

LISTENING_RATE = 16_000
PEAK, HISS = 0.5, 1e-3
"""Level to which speech is scaled, and of added noise: digital silence upsets the recogniser."""

HUSH = 0.2
"""Seconds of silence before and after, in which the recogniser measures the noise."""

UNHEARD = "40,3,-1,0,0,0,0,0,0,0,0,0,0"
"""`channel` of a recogniser that has heard nothing."""

SETTINGS = {"lw": 9.0, "wip": 0.05, "silprob": 0.3, "maxhmmpf": 3000}
"""Search settings; by default it inserts short words in the silence at the end."""


def recognise(wav: Tensor, sample_rate: int, channel: str | None = None) -> str:
    """Waveform [n] -> the sentence of the domain that the recogniser hears, "" for none.

    channel: as `channel` gave it; without one that of what was heard before, which changes what is
        heard now.
    """
    decoder = _decoder()
    if channel is not None:
        decoder.set_cmn(channel)
    hush = round(HUSH * LISTENING_RATE)
    heard = F.pad(resample(wav.float(), sample_rate, LISTENING_RATE), [hush, hush])
    hiss = torch.randn(len(heard), generator=torch.Generator().manual_seed(0)) * HISS
    heard = heard * (PEAK / max(HISS, float(heard.abs().max()))) + hiss
    decoder.start_utt()
    decoder.process_raw((heard * 2**15).to(torch.int16).numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return "" if found is None else str(found.hypstr)


def channel() -> str:
    """What the recogniser has learned of level and microphone from what it heard."""
    return str(_decoder().get_cmn(True))


class Listener:
    """The recogniser as a plug-in of `mimo-fast eval`.

    It hears each recording as if it were its first, so that an evaluation that was interrupted goes
    on with what it would have heard.
    """

    def __call__(self, audio: Path, language: str) -> str:
        if language != "en":
            raise MimoFastError(f"this recogniser knows English alone, not {language!r:.20}")
        return recognise(load_audio(audio, RATE), RATE, UNHEARD)


def word_errors(got: str, want: str) -> int:
    """Words to insert, delete or replace to make one sentence the other."""
    got_words, want_words = got.split(), want.split()
    row = list(range(len(want_words) + 1))
    for i, word in enumerate(got_words, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(want_words, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def word_error_rate(got: Sequence[str], want: Sequence[str]) -> float:
    """Errors of all sentences over the number of words in the references."""
    errors = sum(word_errors(a, b) for a, b in zip(got, want, strict=True))
    return errors / sum(len(text.split()) for text in want)


@cache
def _decoder() -> Any:
    from pocketsphinx import Decoder

    return Decoder(jsgf=str(GRAMMAR), samprate=LISTENING_RATE, loglevel="FATAL", **SETTINGS)
