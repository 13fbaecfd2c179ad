"""The watermark: heard by the library's own networks, the same in a stream, found in a part."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import seeded, snr_db
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import WORDS, sentences

from benchmarks.transformations import RATE
from mimo_fast.audio.files import load_audio
from mimo_fast.audio.resample import resample
from mimo_fast.errors import AudioError, MarkingError
from mimo_fast.marking import network
from mimo_fast.marking.watermark import (
    THRESHOLD,
    Found,
    MarkStream,
    find_watermark,
    find_watermark_in,
    watermark,
)


@pytest.fixture(scope="module")
def sentence():
    return load_audio(WORDS / "what_is_nine_plus_two.flac", RATE)


@pytest.fixture(scope="module")
def library():
    """The networks' own code, without the package around it, and with its weights."""
    place = Path(importlib.util.find_spec("perth").submodule_search_locations[0])
    folder = place / "perth_net" / "perth_net_implicit"
    spec = importlib.util.spec_from_file_location(
        "perth_networks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["perth_networks"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = importlib.import_module("perth_networks.config").default_hp
    found = {}
    for name, kind in (("encoder", "Encoder"), ("decoder", "Decoder")):
        made = getattr(importlib.import_module(f"perth_networks.model.{name}"), kind)
        found[name] = made(settings.hidden_size, network.BINS).eval().requires_grad_(False)
        stored = network.weights()
        found[name].load_state_dict(
            {key.partition(".")[2]: stored[key] for key in stored if key.startswith(name)}
        )
    assert (settings.sample_rate, settings.hop_size, settings.n_fft) == (
        network.RATE,
        network.HOP,
        network.WINDOW,
    )
    return found


def test_networks_are_the_librarys(library, sentence):
    levels = network.levels(network.spectrum(resample(sentence, RATE, network.RATE)))
    marked, _ = library["encoder"](levels[None])
    mine = levels[: network.BINS] + network.raised(levels[: network.BINS]) / network.RANGE
    torch.testing.assert_close(mine, marked[0, : network.BINS], rtol=0, atol=1e-6)
    for given_ in (levels, marked[0], levels.clamp(max=0.5)):
        theirs = float(library["decoder"](given_[None]).clamp(0, 1))
        assert network.marked(given_) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_marked_speech_has_its_length_and_is_told_from_other(sentence, rate):
    wav = resample(sentence, RATE, rate)
    marked = watermark(wav, rate)
    assert marked.shape == wav.shape
    assert marked.dtype == torch.float32
    assert float(marked.abs().max()) <= 1
    assert torch.equal(marked, watermark(wav, rate))
    assert find_watermark(marked, rate).confidence > 0.98
    assert find_watermark(wav, rate).confidence < 0.1
    # Of flite's speech nearly all power is in the mark's band.
    assert 7 < snr_db(marked, wav) < 12


def test_a_mark_is_never_beyond_full_scale_and_silence_stays(sentence):
    loud = sentence / sentence.abs().max()
    assert float(watermark(loud, RATE).abs().max()) <= 1
    assert not watermark(torch.zeros(RATE), RATE).any()
    quiet = torch.randn(RATE, generator=seeded(0)) * 2**-15
    assert float(watermark(quiet, RATE).abs().max()) < 2**-11
    assert find_watermark(torch.zeros(RATE), RATE).score == 0
    pause = torch.cat([sentence, torch.zeros(RATE), sentence])
    inner = slice(len(sentence) + RATE // 10, len(sentence) + RATE * 9 // 10)
    assert not watermark(pause, RATE)[inner].any()


@pytest.mark.parametrize("samples", [0, 1, 239, 240, 241, 5000])
def test_short_sounds(samples):
    wav = torch.randn(samples, generator=seeded(samples)) / 10
    assert watermark(wav, RATE).shape == wav.shape
    assert 0 <= find_watermark(wav, RATE).confidence <= 1


@settings(max_examples=6)
@given(
    st.lists(st.integers(0, 9000), max_size=12), st.sampled_from([24_000, 16_000, 22_050, 48_000])
)
def test_a_stream_is_one_shot(lengths, rate):
    wav = load_audio(WORDS / "thank_you.flac", rate)
    stream, parts, start = MarkStream(rate), [], 0
    for length in (*lengths, len(wav)):
        parts.append(stream.push(wav[start : start + length]))
        start = min(start + length, len(wav))
        # What is held is less than the delay.
        assert start - sum(map(len, parts)) <= stream.delay * rate
    parts.append(stream.finish())
    torch.testing.assert_close(torch.cat(parts), watermark(wav, rate), rtol=0, atol=2e-6)


def test_the_delay_is_the_context():
    assert MarkStream(RATE).delay == pytest.approx(0.21)


def test_a_long_recording_is_the_same_in_blocks(sentence):
    """5 s and more are marked in blocks, at whose ends there is the same context."""
    long = torch.cat([sentence] * 4)
    marked = watermark(long, RATE)
    stream = MarkStream(RATE)
    parts = [stream.push(part) for part in long.split(7000)]
    whole = torch.cat([*parts, stream.finish()])
    torch.testing.assert_close(whole, marked, rtol=0, atol=2e-6)


def test_a_stream_begins_again(sentence):
    stream = MarkStream(RATE)
    once = torch.cat([stream.push(sentence), stream.finish()])
    assert torch.equal(once, torch.cat([stream.push(sentence), stream.finish()]))


def test_a_mark_in_a_part_is_found_and_where():
    plain, own = (torch.cat(list(sentences(every))[:3]) for every in (10, 7))
    start = len(plain) / RATE
    found = find_watermark(torch.cat([plain, watermark(own, RATE), plain]), RATE)
    assert found.confidence > 0.98
    assert found.marked
    assert start - 1 <= found.start < found.end <= start + len(own) / RATE + 1
    assert not find_watermark(plain, RATE).marked


@settings(max_examples=3)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=8))
def test_blocks_of_any_size_are_searched_alike(lengths):
    wav = resample(torch.cat(list(sentences(10))), RATE, network.RATE)
    parts, start = [], 0
    for length in (*lengths, len(wav)):
        parts.append(wav[start : start + length])
        start += length
    assert find_watermark_in(parts) == find_watermark_in([wav])


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_confidence_is_between_0_and_1_and_grows_with_the_score(one, other):
    low, high = (Found(score, 0, 4) for score in sorted((one, other)))
    assert 0 < low.confidence <= high.confidence < 1
    assert low.marked <= high.marked
    assert high.marked == (high.confidence >= THRESHOLD)


def test_what_cannot_be_marked_is_said(sentence, monkeypatch):
    with pytest.raises(AudioError, match="8000 is least"):
        watermark(sentence, 4_000)
    for wrong in (sentence[None], sentence.short(), torch.tensor([float("nan")] * 9)):
        with pytest.raises(AudioError):
            watermark(wrong, RATE)
        with pytest.raises(AudioError):
            find_watermark(wrong, RATE)
    network.weights.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MarkingError, match=r"pip install 'mimo-fast\[mark\]'"):
        watermark(sentence, RATE)
