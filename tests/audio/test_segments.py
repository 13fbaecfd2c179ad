"""Recordings cut at their pauses: times, levels, lengths, whatever blocks they come in."""

import importlib.util
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from mimo_fast.audio import voice_activity
from mimo_fast.audio.files import audio_blocks, load_audio
from mimo_fast.audio.segments import (
    LONG_PAUSE,
    LOUDNESS,
    PAD,
    PEAK,
    SHIFT,
    Cutting,
    Piece,
    _Cutter,
    levelled,
    pieces_of,
    prepare_speech,
)
from mimo_fast.audio.voice_activity import FRAME, VoiceActivity
from mimo_fast.audio.writing import save_wav
from mimo_fast.errors import MimoFastError

RATE = 24_000
WORDS = Path(__file__).parents[1] / "words"
NAMES = ("thank_you", "six_five_zero", "what_is_your_name")


def said(name: str) -> Tensor:
    """A sentence without the silence around it."""
    wav = load_audio(WORDS / f"{name}.flac", RATE)
    loud = (wav.abs() > 0.02 * wav.abs().max()).nonzero()
    return wav[int(loud[0]) : int(loud[-1])]


def silence(seconds: float) -> Tensor:
    return torch.zeros(round(seconds * RATE))


def recording(pauses: tuple[float, ...]) -> tuple[Tensor, list[tuple[float, float]]]:
    """Sentences with pauses before, between and after them -> waveform, and their seconds."""
    parts, times, position = [silence(pauses[0])], [], len(silence(pauses[0]))
    for name, pause in zip(NAMES, pauses[1:], strict=True):
        wav = said(name)
        times.append((position / RATE, (position + len(wav)) / RATE))
        parts += [wav, silence(pause)]
        position += sum(map(len, parts[-2:]))
    return torch.cat(parts), times


def rms(wav: Tensor) -> float:
    return float(wav.square().mean().sqrt())


APART = Cutting(merges=False)


def cut(wav: Tensor, cutting: Cutting = APART, block: int = 65536) -> list[Piece]:
    return list(pieces_of(wav.split(block), RATE, cutting))


@pytest.mark.parametrize("gain", [1.0, 1e-2, 3e-3])
@pytest.mark.parametrize("pauses", [(0.5, 1.0, 0.6, 0.5), (3.0, 5.0, 0.5, 0.0)])
def test_pieces_are_where_somebody_speaks(pauses, gain):
    wav, times = recording(pauses)
    found = cut(gain * wav)
    assert len(found) == len(times)
    for piece, (start, end) in zip(found, times, strict=True):
        assert abs(piece.start - start) < 0.2
        assert abs(piece.end - end) < 0.2
        assert len(piece.wav) / RATE < end - start + 0.6


def test_blocks_changenullcontext():
    wav, _ = recording((0.7, 0.9, 0.5, 0.3))
    want = cut(wav, block=len(wav))
    for block in (997, 12_000, 24_001):
        got = cut(wav, block=block)
        assert [(p.start, p.end) for p in got] == [(p.start, p.end) for p in want]
        assert all(torch.equal(a.wav, b.wav) for a, b in zip(got, want, strict=True))


def test_short_pauses_are_merged_up_to_a_length():
    wav, times = recording((0.5, 0.6, 0.6, 0.5))
    assert len(cut(wav, Cutting(longest=30))) == 1
    whole = cut(wav, Cutting(longest=30))[0]
    assert whole.end - whole.start == pytest.approx(times[-1][1] - times[0][0], abs=0.2)
    two = cut(wav, Cutting(longest=times[1][1] - times[0][0] + 0.3))
    assert len(two) == 2
    # A long pause ends a piece, whatever its length.
    assert len(cut(recording((0.5, 4.0, 4.0, 0.5))[0], Cutting(longest=30))) == 3


def test_speech_without_a_pause_is_cut_all_the_same():
    wav = torch.cat([said(name) for name in NAMES * 3])
    found = cut(wav, Cutting(longest=2.0))
    assert len(found) >= len(wav) / RATE / 2.0
    assert all(piece.end - piece.start < 2.1 for piece in found)
    # Nothing is lost, and nothing said twice.
    gaps = [b.start - a.end for a, b in pairwise(found)]
    assert all(-0.01 < gap < 0.5 for gap in gaps)


def test_levels_are_set():
    wav, _ = recording((0.5, 1.0, 0.6, 0.5))
    want = cut(wav)
    for gain, offset in ((1e-2, 0.0), (3.0, 0.0), (0.3, 0.2)):
        for piece, other in zip(cut(gain * wav + offset), want, strict=True):
            assert float(piece.wav.abs().max()) <= PEAK + 1e-6
            loud, wanted = (float(each.wav.square().mean().sqrt()) for each in (piece, other))
            assert loud == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("wav", [torch.zeros(0), torch.zeros(RATE), torch.full((RATE,), 0.3)])
def test_silence_has_no_pieces_and_no_level(wav):
    assert cut(wav) == []
    assert levelled(wav).isfinite().all()
    assert float(levelled(wav).abs().amax() if len(wav) else 0) < 1e-3


def test_loudness_is_that_of_the_speech():
    tone = torch.sin(torch.arange(RATE) * 0.3)
    wav = torch.cat((silence(3), 1e-3 * tone))
    got = levelled(wav, 1e-3 * tone)
    assert float(got[-RATE:].square().mean().sqrt()) == pytest.approx(LOUDNESS, rel=0.01)


def test_a_microphones_blocks_are_answered_soon():
    """Live pieces come once it has been silent for as long as is asked for."""
    wav, times = recording((0.3, 3.0, 3.0, 3.0))
    blocks, given = wav.split(2400), 0

    def counted():
        nonlocal given
        for block in blocks:
            given += len(block)
            yield block

    cutting = Cutting(merges=True, waits=0.6)
    for piece, (_, end) in zip(pieces_of(counted(), RATE, cutting), times, strict=True):
        assert piece.end < given / RATE < end + 0.6 + 0.7


def test_what_is_held_does_not_grow():
    cutter = _Cutter(RATE, Cutting(longest=8, merges=False))
    wav, _ = recording((0.5, 1.0, 0.6, 0.5))
    held = []
    for _ in range(6):
        for block in wav.split(RATE):
            list(cutter.push(block))
            held.append(len(cutter._audio) / RATE)
    assert max(held) < 8
    assert max(held[-20:]) <= max(held[:20]) + 1


# Reading in blocks


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [24_000, 44_100])
def test_blocks_of_a_file_join_to_what_is_loaded(tmp_path, channels, rate):
    wav = torch.rand(channels, 200_000, generator=torch.Generator().manual_seed(1)) - 0.5
    if channels == 2:
        wav[1] = -wav[0]  # cancels out: one channel is taken
    soundfile.write(tmp_path / "a.wav", wav.T.numpy(), rate, subtype="FLOAT")
    sources = [tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes()]
    for source in sources:
        with pytest.warns(UserWarning, match="alone") if channels == 2 else nullcontext():
            want = load_audio(source, RATE)
        with pytest.warns(UserWarning, match="alone") if channels == 2 else nullcontext():
            blocks = list(audio_blocks(source, RATE))
        assert torch.equal(torch.cat(blocks), want)
        assert len(blocks) > 1 or rate != RATE


# The detector


def test_the_detector_is_the_packages_own(tmp_path):
    found = importlib.util.find_spec("silero_vad")
    assert found is not None
    package = Path(found.submodule_search_locations[0])
    theirs = torch.jit.load(package / "data" / "silero_vad.jit")
    wav = load_audio(WORDS / "six_five_zero.flac", 16_000)
    wav = torch.cat((torch.zeros(3000), wav))[: (3000 + len(wav)) // FRAME * FRAME]
    with torch.no_grad():
        want = torch.stack([theirs(frame[None], 16_000)[0, 0] for frame in wav.split(FRAME)])
    for size in (len(wav), FRAME, 1777):
        ours = VoiceActivity()
        got = torch.cat([ours.push(part) for part in wav.split(size)])
        assert torch.allclose(got, want, atol=1e-4)
    assert float(want.max()) > 0.9
    assert float(want[:5].max()) < 0.1


def test_a_missing_package_names_the_fix(monkeypatch):
    monkeypatch.setattr(voice_activity, "PACKAGE", "no_such_package")
    voice_activity._network.cache_clear()
    with pytest.raises(MimoFastError, match="pip install 'silero-vad"):
        VoiceActivity()
    voice_activity._network.cache_clear()


def test_a_written_recording_is_read_like_its_samples(tmp_path):
    wav, _ = recording((0.5, 1.0, 0.6, 0.5))
    save_wav(tmp_path / "a.wav", wav, RATE)
    got = list(pieces_of(audio_blocks(tmp_path / "a.wav", RATE), RATE, Cutting(merges=False)))
    assert [(p.start, p.end) for p in got] == [(p.start, p.end) for p in cut(wav)]


@pytest.mark.parametrize("block", [7000, 10**9])
def test_noisy_pieces_can_be_heard_again(block):
    wav, times = recording((1.0, 1.0, 0.6, 1.0))
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(2))
    assert all(piece.again == () for piece in cut(wav, block=block))
    found = cut(wav + 0.3 * rms(wav) * noise, block=block)
    assert len(found) == len(times)
    for piece in found:
        quieter, later = piece.again
        shift = round(SHIFT * RATE)
        assert torch.equal(later[shift:], quieter)
        assert not later[:shift].any()
        assert len(quieter) == len(piece.wav)
        # Where nobody speaks, before the first word.
        before, after = (rms(each[: round(0.05 * RATE)]) for each in (piece.wav, quieter))
        assert after < 0.8 * before
        assert rms(quieter) == pytest.approx(rms(piece.wav), rel=0.1)


@pytest.mark.parametrize("gain", [1.0, 3e-3])
def test_a_prepared_recording_is_its_speech(gain):
    wav, times = recording((3.0, 0.5, 5.0, 3.0))
    found = prepare_speech(gain * wav + 0.01, RATE)
    ends = [times[0][0] - PAD, times[1][1] + PAD], [times[2][0] - PAD, times[2][1] + PAD]
    # The pause of half a second is kept, that of five is not.
    want = sum(end - start for start, end in ends)
    assert len(found) / RATE == pytest.approx(want, abs=0.4)
    assert rms(found) == pytest.approx(LOUDNESS, rel=0.3)
    assert abs(float(found.mean())) < 1e-3


@pytest.mark.parametrize("pause", [LONG_PAUSE - 0.6, LONG_PAUSE + 1])
def test_long_pauses_alone_are_cut(pause):
    wav, _ = recording((0.0, 0.3, pause, 0.0))
    found = len(prepare_speech(wav, RATE)) / RATE
    whole = len(wav) / RATE
    want = whole if pause < LONG_PAUSE else whole - pause + 2 * PAD
    assert found == pytest.approx(want, abs=0.4)


def test_what_nobody_says_is_left_as_it_is():
    rng = torch.Generator().manual_seed(1)
    tone = 0.1 * torch.sin(torch.arange(3 * RATE) * 0.2)
    for wav in (tone, torch.zeros(RATE), 1e-3 * torch.randn(2 * RATE, generator=rng)):
        assert torch.equal(prepare_speech(wav), wav)


def test_preparing_twice_changes_little():
    once = prepare_speech(recording((2.0, 0.5, 4.0, 2.0))[0])
    twice = prepare_speech(once)
    assert abs(len(once) - len(twice)) <= 0.15 * RATE
    assert rms(twice) == pytest.approx(rms(once), rel=0.05)
