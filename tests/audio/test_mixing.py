"""Channels that a mean would lose: the strongest is taken alone, with a warning."""

import io
import warnings

import numpy as np
import pytest
import torch
from sounds import encode
from torch.testing import assert_close

from mimo_fast.audio.files import BLOCK, load_audio
from mimo_fast.audio.resample import resample
from mimo_fast.errors import AudioError

RATE = 24000
RNG = np.random.default_rng(0)
# Longer than a block, and quiet at first: no decision of the first block is the right one.
VOICE = (0.2 * RNG.standard_normal(3 * BLOCK // 2)).astype(np.float32)
VOICE[: BLOCK // 2] *= 1e-3
OTHER = (0.2 * RNG.standard_normal(len(VOICE))).astype(np.float32)
SILENT = np.zeros_like(VOICE)


def placed(count: int, at: int) -> list[np.ndarray]:
    return [VOICE if channel == at else SILENT for channel in range(count)]


LOST = {
    "opposite": ([VOICE, -VOICE], 0),
    "opposite, the second louder": ([0.5 * VOICE, -0.6 * VOICE], 1),
    "nearly opposite": ([VOICE, 0.05 * OTHER - 0.9 * VOICE], 0),
    "opposite beside an offset": ([VOICE + 0.3, 0.1 - VOICE], 0),
    "three, one speaks": (placed(3, 2), 2),
    "5.1, the centre speaks": (placed(6, 2), 2),
    "7.1, the centre speaks": (placed(8, 2), 2),
    "quad of two opposite pairs": ([VOICE, -VOICE, 0.5 * VOICE, -0.5 * VOICE], 0),
}
KEPT = {
    "one": [VOICE],
    "the same twice": [VOICE, VOICE],
    "nothing in common": [VOICE, OTHER],
    "the left speaks": [VOICE, SILENT],
    "the right is faint and opposite": [VOICE, -0.1 * VOICE],
    "silence": [SILENT, SILENT],
    "the same eight times": [VOICE] * 8,
}


def sources(channels: list[np.ndarray]) -> dict[str, object]:
    frames = np.stack(channels, axis=1)
    data = encode(frames, RATE, "WAV", "FLOAT")
    return {"file": io.BytesIO(data), "bytes": data, "array": frames.T, "tensor": frames.T.copy()}


@pytest.mark.parametrize("kind", ["file", "bytes", "array", "tensor"])
@pytest.mark.parametrize("case", LOST)
def test_a_mean_that_loses_the_sound_gives_way_to_the_strongest_channel(case, kind):
    channels, strongest = LOST[case]
    source = sources(channels)[kind]
    source = torch.from_numpy(source) if kind == "tensor" else source  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=f"would lose .* channel {strongest + 1} is used alone"):
        wav = load_audio(source, RATE)  # type: ignore[arg-type]
    assert_close(wav, torch.from_numpy(channels[strongest]), rtol=0, atol=0)


@pytest.mark.parametrize("case", KEPT)
def test_ordinary_channels_are_averaged_without_a_word(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (sources(KEPT[case])["bytes"], sources(KEPT[case])["array"]):
            wav = load_audio(source, RATE)  # type: ignore[arg-type]
            expected = torch.from_numpy(np.stack(KEPT[case])).mean(dim=0)
            assert_close(wav, expected, rtol=0, atol=0)


def test_from_a_path_and_at_another_rate(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encode(np.stack([VOICE, -VOICE], axis=1), 44100, "WAV", "FLOAT"))
    with pytest.warns(UserWarning, match=r"a\.wav"):
        wav = load_audio(path, RATE)
    assert_close(wav, resample(torch.from_numpy(VOICE), 44100, RATE), rtol=0, atol=1e-6)


def test_samples_that_are_no_numbers_are_still_an_error():
    bad = np.stack([VOICE, -VOICE])
    bad[0, 5] = np.nan
    with pytest.raises(AudioError, match="NaN or infinite"):
        load_audio(bad, RATE)
