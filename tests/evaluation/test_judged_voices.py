"""Voices and sound, by the packages' own networks on recordings of two speakers."""

import builtins
import sys
from pathlib import Path

import numpy
import pytest
import torch

from mimo_fast.audio.files import load_audio
from mimo_fast.errors import AudioError, EvaluationError
from mimo_fast.evaluation import voices
from mimo_fast.evaluation.voices import Resemblyzer, dnsmos

WORDS = Path(__file__).parents[1] / "words"
ONE, OTHER = WORDS / "thank_you.flac", WORDS / "where_is_my_room.flac"


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("resemblyzer")
    return Resemblyzer()


@pytest.mark.slow
def test_one_voice_is_nearer_to_itself_than_to_another(encoder):
    rms, again, slt = encoder(ONE), encoder(OTHER), encoder(WORDS.parent / "foreign/glacier.flac")
    assert rms.shape == (256,)
    assert numpy.linalg.norm(rms) == pytest.approx(1, abs=1e-5)
    assert rms @ again > 0.75 > rms @ slt
    # Whatever the rate and the level.
    wav = load_audio(ONE, 24000)
    assert encoder.embedding(wav, 24000) @ rms > 0.98
    assert encoder.embedding(wav / 20, 24000) @ rms > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("wav", [torch.zeros(0), torch.zeros(24000)])
def test_silence_has_no_voice(encoder, wav):
    with pytest.raises(AudioError, match="nobody speaks"):
        encoder.embedding(wav, 24000)


@pytest.mark.slow
def test_noise_sounds_worse_than_speech():
    pytest.importorskip("speechmos")
    wav = load_audio(OTHER, 16000)
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    clean, noisy = dnsmos(wav, 16000), dnsmos(wav + 0.05 * noise, 16000)
    assert set(clean) == {"ovrl", "sig", "bak", "p808"}
    assert all(1 <= value <= 5 for value in clean.values())
    assert noisy["ovrl"] < clean["ovrl"] - 0.5
    # What is beyond full scale is cut, as a file would be.
    assert dnsmos(3 * wav / wav.abs().max(), 16000)["ovrl"] > 1
    with pytest.raises(AudioError, match="no samples"):
        dnsmos(wav[:0], 16000)


@pytest.mark.parametrize(
    ("package", "measure"),
    [("resemblyzer", Resemblyzer), ("speechmos.dnsmos", lambda: dnsmos(torch.ones(9), 16000))],
)
def test_a_missing_package_is_one_line(monkeypatch, package, measure):
    taken, real = package.partition(".")[0], builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.partition(".")[0] == taken:
            raise ModuleNotFoundError(f"No module named {taken!r}", name=taken)
        return real(name, *rest)

    for name in [*sys.modules]:
        if name.partition(".")[0] == taken:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(voices, "import_module", refuse)
    with pytest.raises(EvaluationError) as error:
        measure()
    assert str(error.value).endswith(f"the package {taken}: pip install 'mimo-fast[quality]'")
