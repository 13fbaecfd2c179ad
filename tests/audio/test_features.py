"""Resampling and log-mel against formulas written a second time and upstream's own output."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import kit_config, refuses, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_memory, peak_memory_alone
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from mimo_fast.audio import mel as features
from mimo_fast.audio import resample as resampling
from mimo_fast.audio.files import load_audio
from mimo_fast.audio.mel import log_mel
from mimo_fast.audio.resample import resample, resample_blocks
from mimo_fast.config import CodecConfig
from mimo_fast.errors import AudioError

SMALL_RATIOS = [(n, 24000) for n in (8000, 11025, 16000, 22050, 32000, 44100, 48000, 192000)]
SMALL_RATIOS += [(24000, 8000), (24000, 16000), (24000, 44100)]
COPRIME = [(44101, 24000), (11127, 24000), (24000, 44101)]
COPRIME += [(7999, 8000), (767999, 1000), (1000, 15013)]


@pytest.fixture(scope="module")
def config() -> CodecConfig:
    return CodecConfig.from_dict(kit_config("codec"))


@pytest.fixture(scope="module")
def upstream(kit: Path) -> dict[str, Tensor]:
    return load_file(kit / "golden/codec.safetensors")


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=seeded(seed)) * 2 - 1


def dense_resample(wav: Tensor, source: int, target: int, dtype: torch.dtype) -> Tensor:
    """One strided convolution with the whole filter table, computed in `dtype`."""
    divisor = math.gcd(source, target)
    orig, new = source // divisor, target // divisor
    base = min(orig, new) * 0.99
    width = math.ceil(6 * orig / base)
    times = torch.arange(-width, width + orig, dtype=dtype) / orig
    t = (torch.arange(0, -new, -1, dtype=dtype) / new)[:, None] + times
    t = (t * base).clamp(-6, 6)
    window = torch.cos(t * math.pi / 6 / 2).square()
    t = t * math.pi
    kernel = torch.where(t == 0, torch.ones_like(t), torch.sin(t) / t) * window * (base / orig)
    padded = torch.nn.functional.pad(wav, (width, width + orig))
    frames = padded.unfold(0, 2 * width + orig, orig).to(dtype)
    return (frames @ kernel.T).reshape(-1)[: math.ceil(new * len(wav) / orig)].float()


def sample_at(wav: Tensor, positions: Tensor, source: int, target: int) -> Tensor:
    """The band-limited interpolation itself, in float64: no phases, periods or tables."""
    cutoff = min(source, target) * 0.99
    t = (torch.arange(len(wav)).double() / source - positions.double()[:, None] / target) * cutoff
    window = torch.where(t.abs() < 6, torch.cos(t * math.pi / 12).square(), 0.0)
    return (torch.sinc(t) * window * (cutoff / source)) @ wav.double()


@pytest.mark.parametrize(("source", "target"), SMALL_RATIOS)
@pytest.mark.parametrize("n", [1, 7, 4001])
def test_resample_equals_the_dense_formula(source, target, n):
    wav = noise(n)
    out = resample(wav, source, target)
    assert out.dtype == torch.float32
    assert_close(out, dense_resample(wav, source, target, torch.float32), rtol=0, atol=1e-6)
    assert_close(out, dense_resample(wav, source, target, torch.float64), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("source", "target"), [(2003, 1999), (5003, 1009), (1000, 7013)])
def test_large_tables_equal_the_dense_formula_in_float64(source, target):
    wav = noise(9001)
    expected = dense_resample(wav, source, target, torch.float64)
    assert_close(resample(wav, source, target), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [*SMALL_RATIOS, *COPRIME])
def test_resample_interpolates(source, target, monkeypatch):
    monkeypatch.setattr(resampling, "RESAMPLE_SPAN", 1000)
    wav = noise(3000)
    out = resample(wav, source, target)
    positions = torch.linspace(0, len(out) - 1, 500).long()
    expected = sample_at(wav, positions, source, target).float()
    tolerance = 1e-6 if (source, target) in COPRIME else 2e-5
    assert_close(out[positions], expected, rtol=0, atol=tolerance)


rates = st.one_of(st.sampled_from([8000, 16000, 24000, 44100, 48000]), st.integers(1000, 60000))


@settings(deadline=None, max_examples=40)
@given(source=rates, target=rates, n=st.integers(1, 3000))
def test_length(source, target, n):
    assert resample(noise(n), source, target).shape == (-(-target * n // source),)


@settings(deadline=None, max_examples=30)
@given(rate=rates, n=st.integers(0, 500))
def test_equal_rates_are_the_identity(rate, n):
    assert torch.equal(resample(noise(n), rate, rate), noise(n))


@settings(deadline=None, max_examples=30)
@given(source=rates, target=rates, a=st.floats(-4, 4, width=32), b=st.floats(-4, 4, width=32))
def test_linearity(source, target, a, b):
    x, y = noise(600, seed=1), noise(600, seed=2)
    combined = a * resample(x, source, target) + b * resample(y, source, target)
    assert_close(resample(a * x + b * y, source, target), combined, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(rates, rates, st.lists(st.integers(0, 900), max_size=6), st.integers(1, 3000))
def test_blocks_give_what_one_piece_gives(source, target, sizes, span):
    wav = noise(sum(sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "RESAMPLE_SPAN", span)
        pieces = list(resample_blocks(wav.split(sizes) if sizes else [], source, target))
    joined = torch.cat([torch.empty(0), *pieces])
    assert_close(joined, resample(wav, source, target), rtol=0, atol=1e-6)


def test_a_low_tone_keeps_its_frequency_and_level():
    tone = torch.sin(2 * math.pi * 440 * torch.arange(44101) / 44101)
    expected = torch.sin(2 * math.pi * 440 * torch.arange(24000) / 24000)
    assert_close(resample(tone, 44101, 24000)[100:-100], expected[100:-100], rtol=0, atol=2e-3)


def test_leading_dimensions_and_other_float_types():
    wav = noise(2 * 3 * 500).reshape(2, 3, 500)
    out = resample(wav, 16000, 24000)
    assert out.shape == (2, 3, 750)
    assert torch.equal(out[1, 2], resample(wav[1, 2], 16000, 24000))
    assert resample(wav[:0], 16000, 24000).shape == (0, 3, 750)
    assert resample(wav.double().requires_grad_(), 16000, 24000).dtype == torch.float32


@pytest.mark.parametrize("rate", [0, -16000, 999, 768001, 24000.0, "24000", None, True])
def test_rates_outside_the_range_are_refused(rate):
    refuses("whole number from 1000 to 768000", resample, noise(10), rate, 24000, kind=AudioError)
    refuses("the target rate is", resample, noise(10), 24000, rate, kind=AudioError)


def test_numpy_rates_do_not_overflow():
    assert len(resample(noise(200_000), np.int32(16000), np.int32(24000))) == 300_000


def test_integer_samples_are_refused():
    refuses("float32", resample, torch.zeros(10, dtype=torch.int16), 16000, 24000, kind=AudioError)


def test_coprime_rates_stay_in_little_memory():
    wav = noise(44101 * 4)
    assert (
        peak_memory(lambda: resample(wav, 44101, 24000)) < 100 * 2**20
    )  # torchaudio's table: 4.2 GB


def test_resampled_kit_equals_upstream(audio, upstream):
    assert_close(load_audio(audio[1], 24000), upstream["wav24k.1"], rtol=0, atol=1e-6)


def mel_by_hand(wav: Tensor, config: CodecConfig) -> np.ndarray:
    """The mel spectrogram [T, n_mels] in float64 without the logarithm."""
    half = config.n_fft // 2
    padded = np.pad(wav.double().numpy(), half, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.window) / config.window)
    starts = range(0, len(wav) + 1, config.hop)
    spectra = np.stack([np.abs(np.fft.rfft(padded[s : s + config.n_fft] * window)) for s in starts])
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (config.f_min, config.f_max))
    corners = 700 * (10 ** (np.linspace(low, high, config.n_mels + 2) / 2595) - 1)
    hertz = np.linspace(0, config.sample_rate / 2, half + 1)
    triangles = [corners[i : i + 3] for i in range(config.n_mels)]
    bank = [np.interp(hertz, triangle, [0, 1, 0], left=0, right=0) for triangle in triangles]
    return spectra @ np.stack(bank, axis=1)


def worst_error(log: Tensor, linear: np.ndarray) -> float:
    """Largest error relative to its frame's peak; a logarithm magnifies noise in quiet bands."""
    floored = np.maximum(linear, 1e-7)
    error = np.abs(log.double().exp().numpy() - floored)
    return float((error.max(axis=1) / floored.max(axis=1)).max())


@pytest.mark.parametrize("i", [0, 1, 2])
def test_log_mel_equals_upstream_on_the_linear_scale(i, audio, config, upstream):
    mel = log_mel(load_audio(audio[i], 24000), config)
    assert (mel.shape, mel.dtype) == (upstream[f"mel.{i}"].shape, torch.float32)
    assert worst_error(mel, upstream[f"mel.{i}"].double().exp().numpy()) < 2e-6


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="upstream's transform was MKL's")
def test_log_mel_equals_upstream(kit, audio):
    """With MKL's processor-independent code, as on the machine that wrote the kit."""
    code = """if True:
        import json, sys
        from safetensors.torch import load_file
        from mimo_fast.audio.files import load_audio
        from mimo_fast.audio.mel import log_mel
        from mimo_fast.config import CodecConfig
        kit, *audio = sys.argv[1:]
        config = CodecConfig.from_dict(json.load(open(kit + "/checkpoint/codec/config.json")))
        upstream = load_file(kit + "/golden/codec.safetensors")
        for i, path in enumerate(audio):
            mel = log_mel(load_audio(path, 24000), config)
            print((mel - upstream[f"mel.{i}"]).abs().max().item())
    """
    command = [sys.executable, "-c", code, str(kit), *map(str, audio)]
    environment = os.environ | {"MKL_CBWR": "COMPATIBLE"}
    root = Path(__file__).parents[2]
    options = {"capture_output": True, "text": True, "check": True}
    result = subprocess.run(command, env=environment, cwd=root, **options)
    errors = [float(line) for line in result.stdout.split()]
    assert len(errors) == 3
    assert max(errors) <= 1e-4


@pytest.mark.parametrize("n", [481, 960, 961, 2399, 2400, 24000])
def test_log_mel_equals_the_formula(n, config):
    mel = log_mel(noise(n), config)
    assert mel.shape == (1 + n // config.hop, config.n_mels)
    assert (
        worst_error(mel, mel_by_hand(noise(n), config)) < 3e-5
    )  # upstream's filter corners are float32


def test_log_mel_in_blocks_equals_one_shot(config, monkeypatch):
    wav = noise(24000)
    monkeypatch.setattr(features, "MEL_BLOCK", 10**6)
    whole = log_mel(wav, config)
    for block in (1, 7, 50, 100, 101):
        monkeypatch.setattr(features, "MEL_BLOCK", block)
        assert_close(log_mel(wav, config), whole, rtol=0, atol=1e-5)


LONG_AUDIO = """
import torch
from helpers import kit_config
from mimo_fast.config import CodecConfig
from mimo_fast.audio.mel import log_mel
torch.set_num_threads(1)
config, wav = CodecConfig.from_dict(kit_config("codec")), torch.randn(24000 * 240)
"""


@pytest.mark.slow
def test_log_mel_of_long_audio_stays_in_little_memory(config):
    samples = 24000 * 240
    own = 4 * samples + 4 * config.n_mels * samples // config.hop
    peak = peak_memory_alone(LONG_AUDIO, "log_mel(wav, config)")
    assert peak < own + 80 * 2**20  # in one shot: 260 MB more


@pytest.mark.parametrize("n", [1, 2, 240, 479, 480])
def test_short_audio_is_padded_to_the_least_that_reflects(n, config):
    padded = torch.cat([noise(n), torch.zeros(481 - n)])
    assert torch.equal(log_mel(noise(n), config), log_mel(padded, config))
    assert log_mel(noise(n), config).shape == (3, config.n_mels)


def test_silence_is_the_floor(config):
    mel = log_mel(torch.zeros(2400), config)
    assert_close(mel, torch.full((11, config.n_mels), math.log(1e-7)))


SHAPED = torch.zeros(1, 2400), torch.zeros(2400).short(), torch.tensor(0.5)
NO_AUDIO = [*((wav, "float samples") for wav in SHAPED), (torch.zeros(0), "no samples")]


@pytest.mark.parametrize(("wav", "says"), NO_AUDIO)
def test_log_mel_refuses_other_layouts_and_empty_audio(wav, says, config):
    refuses(says, log_mel, wav, config, kind=AudioError)
