"""Steady noise under speech is made quieter; clean speech is not touched."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.noise import (
    FLOOR,
    LEAST,
    NOISY,
    WINDOW,
    decibels_over,
    quieter_noise,
    with_noise_at,
)

RATE = 24_000
WORDS = Path(__file__).parents[1] / "words"


def spoken(name: str = "what_is_your_name", pad: int = 4800) -> tuple[Tensor, list]:
    wav = load_audio(WORDS / f"{name}.flac", RATE)
    loud = (wav.abs() > 0.02 * wav.abs().max()).nonzero()
    wav = wav[int(loud[0]) : int(loud[-1])]
    return torch.nn.functional.pad(wav, (pad, pad)), [(pad, pad + len(wav))]


def noise_for(wav: Tensor, stretches: list, decibels: float, seed: int = 1) -> Tensor:
    """White noise, so far below the speech."""
    speech = torch.cat([wav[a:b] for a, b in stretches]).square().mean().sqrt()
    drawn = torch.randn(len(wav), generator=torch.Generator().manual_seed(seed))
    return drawn * speech * 10 ** (-decibels / 20)


@pytest.mark.parametrize("decibels", [5, 10, 15])
@pytest.mark.parametrize("pad", [600, 4800])
@pytest.mark.parametrize("level", [1.0, 1e-3])
def test_noise_gets_quieter_and_speech_stays(decibels, pad, level):
    wav, stretches = spoken(pad=pad)
    noise = noise_for(wav, stretches, decibels)
    found = quieter_noise(level * (wav + noise), stretches) / level
    quiet = found[: pad - 100]
    # All of the noise that is alone goes down to the floor, or nearly.
    fell = float(quiet.square().mean() / noise[: len(quiet)].square().mean())
    assert FLOOR**2 * 0.9 <= fell < 0.45
    error, before = (float((x - wav).square().mean()) for x in (found, wav + noise))
    assert error < 0.75 * before


@pytest.mark.parametrize("decibels", [NOISY + 3, 40, 100])
def test_clean_speech_is_not_touched(decibels):
    wav, stretches = spoken()
    wav = wav + noise_for(wav, stretches, decibels)
    assert quieter_noise(wav, stretches) is wav


def test_where_nothing_tells_the_noise_nothing_is_done():
    wav, stretches = spoken(pad=LEAST - 1)
    wav = wav + noise_for(wav, stretches, 5)
    assert quieter_noise(wav, stretches) is wav
    assert quieter_noise(wav, [(0, len(wav))]) is wav


@pytest.mark.parametrize("samples", [LEAST + 1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW + 77])
def test_any_length(samples):
    wav = noise_for(torch.ones(samples), [(0, samples)], 0)
    found = quieter_noise(wav, [(0, 1)])
    assert len(found) == samples
    assert bool(found.isfinite().all())
    assert float(found.square().mean()) < float(wav.square().mean())


def test_pauses_tell_the_noise_too():
    wav, [(start, end)] = spoken()
    both = torch.cat((wav[start:end], torch.zeros(7200), wav[start:end]))
    stretches = [(0, end - start), (end - start + 7200, len(both))]
    noisy = both + noise_for(both, stretches, 10)
    found = quieter_noise(noisy, stretches)
    assert float((found - both).square().mean()) < 0.75 * float((noisy - both).square().mean())


def test_decibels():
    wav, stretches = spoken()
    noise = noise_for(wav, stretches, 12)
    speech = torch.cat([(wav + noise)[a:b] for a, b in stretches])
    assert decibels_over(speech, [noise[:4800]]) == pytest.approx(12, abs=0.5)
    assert decibels_over(speech, [torch.zeros(10)]) > 100
    assert decibels_over(torch.zeros(10), [noise]) < -100


def test_noise_at_several_gains():
    wav, stretches = spoken()
    noisy = wav + noise_for(wav, stretches, 10)
    found = with_noise_at((FLOOR, 1.0, 0.1), noisy, stretches)
    assert torch.equal(found[0], quieter_noise(noisy, stretches))
    assert torch.allclose(found[1], noisy, atol=1e-5)
    powers = [float(each[: stretches[0][0]].square().mean()) for each in found]
    assert powers[2] < powers[0] < powers[1]
    assert with_noise_at((FLOOR, 1.0), wav, stretches) == []
