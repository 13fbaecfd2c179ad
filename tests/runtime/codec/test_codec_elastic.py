"""Elastic look-ahead: heard after two patches, never dry at half of real time, exact in the end."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import slow_after, snr_db
from hypothesis import given
from hypothesis import strategies as st
from test_codec_stream import EDGE, SAMPLES, assert_no_click, cut, random_codes, stream_in
from torch import Tensor

import mimo_fast
from mimo_fast.bench.player import play
from mimo_fast.runtime.codec import together
from mimo_fast.runtime.codec.geometry import (
    LOOKAHEAD,
    PATCH_FRAMES,
    elastic_reach,
    elastic_rows,
    patch_rows,
)
from mimo_fast.runtime.codec.incremental import codes_to_decode
from mimo_fast.runtime.codec.state import NormStatistics

PATCH = PATCH_FRAMES * SAMPLES
RATE = 24000


def of_reach(layers: int, window: int, pool: int) -> SimpleNamespace:
    """The part of a codec's config that the schedule depends on."""
    return SimpleNamespace(
        vocoder_layers=layers, vocoder_window=(40, window), pool=pool, decoder_stride=2
    )


@given(st.integers(0, 20), st.integers(0, 12), st.sampled_from([1, 2, 4]), st.integers(1, 60))
def test_the_schedule(layers, window, pool, patches):
    """A patch in hand at first, half a patch more for each that comes, up to the reach."""
    config = of_reach(layers, window, pool)
    patch, reach = patch_rows(config), elastic_reach(config)
    assert reach <= LOOKAHEAD
    frames = patches * patch
    held, before = elastic_rows(config, frames), elastic_rows(config, frames - patch)
    assert before <= held <= reach * patch
    assert held == min(reach, max(1, patches / 2)) * patch
    # Nothing that was released is held back again, whatever the sizes of pushes.
    for some in range(frames - patch, frames):
        assert (
            elastic_rows(config, some)
            <= elastic_rows(config, some + 1)
            <= (elastic_rows(config, some) + 1)
        )


@given(st.integers(0, 20), st.integers(0, 12), st.floats(0, 0.5), st.data())
def test_nothing_runs_dry_down_to_half_of_real_time(layers, window, factor, data):
    """Groups take what they like, up to half of what they play, while the first samples play."""
    config = of_reach(layers, window, 2)
    patch, hop = patch_rows(config), PATCH // patch_rows(config)
    time, returned, arrivals = 0.0, 0, []
    for patches in range(1, 41):
        worst = st.sampled_from([0.0, 0.25, 1.0])
        time += factor * data.draw(worst, "share of the longest") * PATCH / RATE
        frames = patches * patch
        final = max(0, (frames - elastic_rows(config, frames)) * hop - EDGE)
        arrivals.append((time, final - returned))
        returned = final
    assert arrivals[1][1] > 0
    assert min(samples for _, samples in arrivals) >= 0
    assert not play(arrivals, RATE).underruns


def test_the_listener_of_a_slower_model_does_run_dry():
    """The player would not notice a schedule that holds back too much."""
    config = of_reach(16, 10, 2)
    patch, returned, arrivals = patch_rows(config), 0, []
    for patches in range(1, 41):
        final = max(0, patches * patch - elastic_rows(config, patches * patch)) * 240
        arrivals.append((0.7 * patches * PATCH / RATE, final - returned))
        returned = final
    assert play(arrivals, RATE).underruns


@pytest.mark.parametrize("known", [False, True])
def test_first_audio_comes_with_the_second_patch(model, deep, known):
    for codec in (model.codec, deep):
        codes, reach = random_codes(codec.config, 120, 0, 8), elastic_reach(codec.config)
        moments = codec.moments(codes) if known else None
        sizes = cut(120, [PATCH_FRAMES])
        parts = stream_in(codec, codes, sizes, lookahead="elastic", moments=moments)
        lengths = [len(part) for part in parts]
        assert lengths[:2] == [0, PATCH - EDGE]
        assert set(lengths[2 : 2 * reach]) <= {PATCH // 2}
        assert set(lengths[2 * reach : -1]) == {PATCH}
        assert lengths[-1] == reach * PATCH + EDGE
        assert sum(lengths) == 120 * SAMPLES


@pytest.mark.parametrize("sizes", slow_after(1, [[4], [1], [13, 1, 30], [80, 4]]))
@pytest.mark.parametrize("last_by_finish", [False, True])
def test_after_the_ramp_it_is_exact_streaming(deep, sizes, last_by_finish):
    """Given the same statistics: before it, samples lack frames that the vocoder would see."""
    codes, lengths = random_codes(deep.config, 120, 1, 8), cut(120, sizes)
    options = {"moments": deep.moments(codes), "last_by_finish": last_by_finish}
    exact = torch.cat(stream_in(deep, codes, lengths, **options))
    parts = stream_in(deep, codes, lengths, lookahead="elastic", weight=math.inf, **options)
    wav = torch.cat(parts)
    # What was final when half of all frames so far filled the vocoder's reach.
    begun = LOOKAHEAD * PATCH
    assert snr_db(wav[begun:], exact[begun:]) >= 110
    if max(sizes) <= PATCH_FRAMES:
        assert 30 < snr_db(wav[:begun], exact[:begun]) < 80


def test_each_patch_of_the_ramp_is_nearer_to_exact_streaming(deep):
    """More is held back for each: what lacks frames of one patch's look-ahead lacks the most."""
    errors = []
    for seed in range(2):
        codes = random_codes(deep.config, 60, seed, 8)
        options, sizes = {"moments": deep.moments(codes)}, cut(60, [PATCH_FRAMES])
        exact = torch.cat(stream_in(deep, codes, sizes, **options))
        parts = stream_in(deep, codes, sizes, lookahead="elastic", weight=math.inf, **options)
        difference = (torch.cat(parts) - exact).double().square()[: 3 * PATCH]
        errors.append(difference.view(3, -1).mean(1))
    first, second, third = torch.stack(errors).mean(0)
    assert first > 5 * second > 25 * third


def test_no_click_where_pushes_of_a_ramp_meet(deep):
    """Samples at seams differ no more than neighbours elsewhere."""
    codes = random_codes(deep.config, 182, 3, 8)
    for known in (None, deep.moments(codes)):
        parts = stream_in(deep, codes, cut(182, [4]), lookahead="elastic", moments=known)
        assert_no_click(parts)


def test_a_vocoder_that_reaches_one_patch_is_exact_at_once(deep):
    codec = copy.copy(deep)
    codec.config = replace(codec.config, vocoder_layers=1)
    codec.vocoder = replace(codec.vocoder, layers=codec.vocoder.layers[:1])
    codes = random_codes(codec.config, 60, 0, 8)
    options, sizes = {"moments": codec.moments(codes)}, cut(60, [PATCH_FRAMES])
    exact = stream_in(codec, codes, sizes, **options)
    elastic = stream_in(codec, codes, sizes, lookahead="elastic", weight=math.inf, **options)
    assert [len(part) for part in elastic] == [len(part) for part in exact]
    assert snr_db(torch.cat(elastic), torch.cat(exact)) >= 110


def test_totals_are_the_statistics_of_all_that_was_said(model, deep):
    """Exact or elastic, whole or in pushes; those of several streams add up."""
    for codec, sizes in ((model.codec, (4, 50, 182)), (deep, (50,))):
        codes = random_codes(codec.config, 182, 2, 8)
        want = codec.moments(codes)
        for options in ({}, {"moments": want}, {"lookahead": "elastic"}):
            for size in sizes:
                stream = codec.stream(**options)
                assert stream.totals is None
                for chunk in codes.split(size, dim=1):
                    stream.push(chunk)
                stream.finish()
                totals = stream.totals
                rows = torch.tensor([182 * 2, 182 * 4 + 1])
                assert torch.equal(totals[:, 0].long(), rows)
                mean, square = totals[:, 1] / rows, totals[:, 2] / rows
                for got, pair in zip(zip(mean, square, strict=True), want, strict=True):
                    tolerance = 0.02 * float(pair[1]) ** 0.5
                    assert abs(float(got[0]) - float(pair[0])) < tolerance
                    assert abs(float(got[1]) - float(got[0]) ** 2 - float(pair[1])) < (
                        0.05 * float(pair[1])
                    )
        stream.finish()
        assert stream.totals is None


@pytest.fixture(scope="module")
def sentences(model) -> list[Tensor]:
    """Codes of sentences in one voice."""
    files = sorted(Path(__file__).parents[2].glob("words/*.flac"))[:6]
    return [model.codec.encode(mimo_fast.load_audio(file, RATE), 8) for file in files]


def test_known_statistics_bring_the_first_patch_nearer(model, sentences):
    """Those of the sentence before, against one-shot decoding, on average."""
    codec, first = model.codec, PATCH - EDGE
    found = {"none": 0.0, "known": 0.0}
    for i, codes in enumerate(sentences):
        want, sizes = codec.decode(codes)[:first], cut(codes.shape[1], [PATCH_FRAMES])
        known = codec.moments(sentences[i - 1])
        for name, moments in (("none", None), ("known", known)):
            parts = stream_in(codec, codes, sizes, lookahead="elastic", moments=moments)
            found[name] += snr_db(torch.cat(parts)[:first], want) / len(sentences)
    assert found["known"] > found["none"] + 5


def test_known_statistics_count_for_less_as_the_stream_goes(model, stream_codes, sentences):
    """Of another speaker, even: at the end the stream is nearer to one-shot decoding by its own."""
    codec, sizes = model.codec, cut(182, [PATCH_FRAMES])
    known, want = codec.moments(sentences[0]), codec.decode(stream_codes)
    found = []
    for weight in (50, math.inf):
        options = {"lookahead": "elastic", "moments": known, "weight": weight}
        wav = torch.cat(stream_in(codec, stream_codes, sizes, **options))
        found.append(snr_db(wav[100 * SAMPLES :], want[100 * SAMPLES :]))
    assert found[0] > found[1] + 3


def test_statistics_of_no_weight_are_none(model, stream_codes):
    codec, sizes = model.codec, cut(60, [4])
    codes = stream_codes[:, :60]
    options = {"moments": codec.moments(stream_codes), "weight": 0}
    here = stream_in(codec, codes, sizes, lookahead="elastic", **options)
    there = stream_in(codec, codes, sizes, lookahead="elastic")
    assert all(map(torch.equal, here, there))


def test_a_calibration_serves_elastic_streams_alone(model, stream_codes):
    codec, sizes = copy.copy(model.codec), cut(60, [4])
    codes = stream_codes[:, :60]
    codec.calibration = codec.moments(stream_codes)
    same = stream_in(codec, codes, sizes), stream_in(model.codec, codes, sizes)
    assert all(map(torch.equal, *same))
    here = stream_in(codec, codes, sizes, lookahead="elastic")
    given_them = {"lookahead": "elastic", "moments": codec.calibration}
    assert all(map(torch.equal, here, stream_in(model.codec, codes, sizes, **given_them)))
    others = torch.cat(stream_in(model.codec, codes, sizes, lookahead="elastic"))
    assert not torch.equal(torch.cat(here), others)


def test_what_an_elastic_stream_does_not_take(model, stream_codes):
    codec, known = model.codec, model.codec.moments(stream_codes)
    for weight in (-1, math.nan):
        with pytest.raises(ValueError, match="weight must be 0 code frames or more"):
            codec.stream("elastic", known, weight)
    with pytest.raises(TypeError, match="lookahead must be"):
        codec.stream("elastically")
    with pytest.raises(ValueError, match="of a codec that pools otherwise"):
        codec.stream("elastic", NormStatistics(None, known.to_mel))
    wide = NormStatistics((torch.zeros(3), torch.ones(3)), known.to_mel)
    for odd in (wide, NormStatistics(known.unpool, (known.to_mel[0],)), NormStatistics(3, 4)):
        with pytest.raises(ValueError, match="a mean and a variance each"):
            codec.stream("elastic", odd)


@pytest.mark.parametrize(("lookahead", "anew"), [("elastic", False), ("exact", True)])
@pytest.mark.parametrize("patches", [13, 22])
def test_the_end_of_an_elastic_stream_is_not_decoded_again(monkeypatch, lookahead, anew, patches):
    """What it holds back has been heard to end with the newest statistics; an exact one has not."""
    with mimo_fast.load("nano", "nano", device="cpu") as nano:
        codec, made = nano.codec, []

        def noted(*arguments):
            made.append(codes_to_decode(*arguments))
            return made[-1]

        monkeypatch.setattr(together, "codes_to_decode", noted)
        codes = random_codes(codec.config, patches * PATCH_FRAMES)
        stream_in(codec, codes, cut(codes.shape[1], [PATCH_FRAMES]), lookahead=lookahead)
    assert made[-1][1] is anew
    assert any(again for _, again in made)
