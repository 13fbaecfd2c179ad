"""A stream is at least as close to one-shot decoding as upstream's, whatever the chunks."""

import pytest
import torch
from helpers import slow_after, snr_db, watch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_codec_stream import cut
from test_codec_stream import stream_in as stream_parts
from torch import Tensor

from benchmarks.studies.codec_stream import upstream_stream
from mimo_fast.runtime.codec import incremental

FRAMES = 182


@pytest.fixture(scope="module")
def codes(golden) -> Tensor:
    return golden.get("codec:stream_codes")


@pytest.fixture(scope="module")
def oneshot(golden) -> Tensor:
    return golden.get("codec:stream_oneshot")


def stream_in(codec, codes: Tensor, sizes: list[int], *, last_by_finish: bool = False) -> Tensor:
    """The whole waveform from pushes of so many frames, cycled until the codes are spent."""
    options = {"last_by_finish": last_by_finish}
    return torch.cat(stream_parts(codec, codes, cut(codes.shape[1], sizes), **options))


@pytest.mark.parametrize("size", [4, 25])
def test_upstreams_windows_give_the_kits_streams(model, golden, codes, size):
    want = golden.get(f"codec:stream_wav.{size}")
    assert snr_db(upstream_stream(model.codec, codes, size), want) >= 100


@pytest.mark.parametrize(
    "size",
    slow_after(6, [4, 7, 25, 60, 92, 160, 1, 14, 28, 36, 40, 44, 52, 80, 100, 120, 146, 150, 181]),
)
def test_chunks_of_any_size_are_as_close_as_upstreams(model, codes, oneshot, size):
    ours = snr_db(stream_in(model.codec, codes, [size]), oneshot)
    theirs = snr_db(upstream_stream(model.codec, codes, size), oneshot)
    assert ours >= theirs + (0.1 if size < 150 else -0.01)


@settings(max_examples=10)
@example([1], False)
@example([4], True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.booleans())
def test_mixed_chunks_are_as_close_as_upstreams_patches(
    model, golden, codes, oneshot, sizes, last_by_finish
):
    wav = stream_in(model.codec, codes, sizes, last_by_finish=last_by_finish)
    assert snr_db(wav, oneshot) >= snr_db(golden.get("codec:stream_wav.4"), oneshot)


def test_codes_pushed_at_once_are_decoded_as_in_one_shot(model, codes):
    wav = stream_in(model.codec, codes, [FRAMES])
    assert snr_db(wav, model.codec.decode(codes)) >= 110


def test_a_push_decodes_at_most_two_others_again(model, codes, monkeypatch):
    """Of equal pushes the third decodes all three, and no later one decodes any again."""
    rows = list[int]()
    watch(monkeypatch, incremental, "_decoder_block", lambda *args: rows.append(len(args[2])))
    stream, done = model.codec.stream(), list[int]()
    for chunk in codes.repeat(1, 3).split(60, dim=1):
        rows.clear()
        stream.push(chunk)
        done.append(sum(rows) // 2)
    assert done == [60, 120, 180, 60, 60, 60, 60, 60, 60, 6]
