"""What speech sounds like, by networks whose weights come with their packages.

    Resemblyzer  whose voice it is: GE2E (Wan et al., arXiv:1710.10467), weights in its wheel
    dnsmos       how good it sounds: DNSMOS P.835 (Reddy et al., arXiv:2110.01763) and P.808 (Reddy
                 et al., arXiv:2010.15258), weights in speechmos' wheel

Neither needs a text or another recording. Both are of the extra `quality`.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.resample import resample
from mimo_fast.errors import AudioError, EvaluationError

RATE = 16_000
"""Samples a second that both networks hear."""

EXTRA = "pip install 'mimo-fast[quality]'"

SCORES = {"ovrl": "ovrl_mos", "sig": "sig_mos", "bak": "bak_mos", "p808": "p808_mos"}
"""Names of the scores -> speechmos' own."""


def required(module: str, what: str) -> Any:
    """A module of the extra `quality`.

    Raises:
        EvaluationError: it, or a package that it needs, is not installed; one line says how.
    """
    try:
        with warnings.catch_warnings():
            # Resemblyzer takes a function by the name that it had in an older SciPy.
            warnings.simplefilter("ignore", DeprecationWarning)
            return import_module(module)
    except ImportError as error:
        raise EvaluationError(f"{what} needs the package {error.name}: {EXTRA}") from error


class Resemblyzer:
    """Speech -> an embedding float32 [256] of its voice, of length 1; no value is negative.

    Two are compared by their dot product, the cosine. Silence is cut and the level raised, as the
    package does before it embeds.

    Raises:
        EvaluationError: the package is not installed.
    """

    def __init__(self) -> None:
        package = required("resemblyzer", "Resemblyzer")
        self._encoder, self._prepared = package.VoiceEncoder("cpu", False), package.preprocess_wav

    def __call__(self, audio: Path) -> Any:
        """The embedding of a recording.

        Raises:
            AudioError: it cannot be read, or nobody speaks in it.
        """
        return self.embedding(load_audio(audio, RATE), RATE)

    def embedding(self, wav: Tensor, rate: int) -> Any:
        """The embedding of samples [n].

        Raises:
            AudioError: nobody speaks in them.
        """
        samples = _samples(wav, rate)
        speech = self._prepared(samples) if samples.any() else samples[:0]
        if not len(speech):
            raise AudioError("nobody speaks in the recording: its voice has no embedding")
        return self._encoder.embed_utterance(speech)


def dnsmos(wav: Tensor, rate: int) -> dict[str, float]:
    """Mean opinion scores, 1 to 5, that listeners are predicted to give samples [n].

    The network hears nine seconds: what is shorter is repeated, of what is longer the mean is taken
    over windows that begin a second apart.

    Returns:
        "ovrl" overall, "sig" of the speech, "bak" of the background (P.835), and "p808".

    Raises:
        AudioError: there are no samples.
        EvaluationError: the package is not installed.
    """
    package = required("speechmos.dnsmos", "DNSMOS")
    if not len(wav):
        raise AudioError("there is no speech to judge: it holds no samples")
    found = package.run(_samples(wav, rate), RATE)
    return {name: float(found[theirs]) for name, theirs in SCORES.items()}


def _samples(wav: Tensor, rate: int) -> Any:
    """Samples as numpy's, within full scale, at the networks' rate."""
    return resample(wav.to("cpu", torch.float32), rate, RATE).clamp(-1, 1).numpy()
