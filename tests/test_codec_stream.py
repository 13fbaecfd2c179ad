"""Decoding codes as they come: any chunks, bounded work, errors that do no harm, streams that share nothing."""

import pytest
import torch
from helpers import BAD_CODES, snr_db
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.runtime.codec_stream import CONTEXT, LOOKAHEAD

SAMPLES = 960


def stream_in(model, codes: Tensor, sizes: list[int], *, last_by_finish: bool = False) -> list[Tensor]:
    """What each push of so many frames returned, and finish at the end."""
    stream = model.codec.stream()
    chunks = list(codes.split(sizes, dim=1))
    last = chunks.pop() if last_by_finish else None
    return [*(stream.push(chunk) for chunk in chunks), stream.finish(last)]


def cut(total: int, sizes: list[int]) -> list[int]:
    """Sizes, cycled, until they cover total."""
    lengths = []
    while total:
        lengths.append(min(total, sizes[len(lengths) % len(sizes)]))
        total -= lengths[-1]
    return lengths


@pytest.fixture(scope="module")
def stream_codes(golden) -> Tensor:
    return golden.get("codec:stream_codes")


@pytest.fixture(scope="module")
def upstream_snr(golden) -> float:
    """How close upstream's streaming decode comes to its one-shot decode, a patch at a time."""
    return snr_db(golden.get("codec:stream_wav.4"), golden.get("codec:stream_oneshot"))


@settings(max_examples=8)
@given(st.lists(st.integers(4, 60), min_size=1, max_size=12), st.booleans())
def test_any_chunks_of_patches_or_more_are_as_close_to_one_shot_as_upstream(
    model, golden, stream_codes, upstream_snr, sizes, last_by_finish
):
    lengths = cut(stream_codes.shape[1], sizes)
    wav = torch.cat(stream_in(model, stream_codes, lengths, last_by_finish=last_by_finish))
    # Both are float32: fed the same patches, the two differ in the sixth digit.
    assert snr_db(wav, golden.get("codec:stream_oneshot")) >= upstream_snr - 1e-3


@settings(max_examples=4)
@example([1, 3])
@given(st.lists(st.integers(1, 60), min_size=4, max_size=8))
def test_any_chunks_give_every_sample_once(model, golden, stream_codes, upstream_snr, sizes):
    parts = stream_in(model, stream_codes, cut(stream_codes.shape[1], sizes))
    # Less than a patch at a time is up to 0.2 dB worse, upstream too: the norms over time see more short windows.
    assert snr_db(torch.cat(parts), golden.get("codec:stream_oneshot")) >= upstream_snr - 0.25


def test_a_push_returns_at_most_what_it_was_fed_and_holds_back_the_lookahead(model, stream_codes):
    codes = stream_codes.repeat(1, 3)[:, :420]
    stream = model.codec.stream()
    fed = returned = 0
    for chunk in codes.split([7, 50, 1, 41, 120, 3, 80, 60, 58], dim=1):
        wav = stream.push(chunk)
        fed += chunk.shape[1]
        returned += len(wav)
        assert returned == max(0, fed - LOOKAHEAD) * SAMPLES
        assert len(wav) <= chunk.shape[1] * SAMPLES
    assert len(stream.finish()) == LOOKAHEAD * SAMPLES


def test_what_is_decoded_again_is_bounded(model, stream_codes, monkeypatch):
    """However long the stream, a push decodes the context and what it was fed."""
    decoded = []
    decode_hidden = model.codec.decode_hidden
    monkeypatch.setattr(model.codec, "decode_hidden", lambda x: decoded.append(len(x)) or decode_hidden(x))
    stream = model.codec.stream()
    for chunk in stream_codes.repeat(1, 4).split(60, dim=1):
        stream.push(chunk)
    stream.finish()
    assert len(decoded) == 14
    assert max(decoded) <= CONTEXT + 60
    assert decoded[-1] <= CONTEXT + 60


def test_finish_starts_anew(model, stream_codes):
    stream = model.codec.stream()
    first = torch.cat((stream.push(stream_codes[:, :60]), stream.finish()))
    second = torch.cat((stream.push(stream_codes[:, :60]), stream.finish()))
    assert torch.equal(first, second)
    assert len(first) == 60 * SAMPLES
    assert len(stream.finish()) == 0


def test_finish_without_codes_is_empty(model):
    wav = model.codec.stream().finish()
    assert wav.shape == (0,)
    assert wav.dtype == torch.float32


def test_finish_with_the_last_codes_equals_one_shot_when_they_are_all(model, stream_codes):
    assert torch.equal(model.codec.stream().finish(stream_codes[:, :30]), model.codec.decode(stream_codes[:, :30]))


@pytest.mark.parametrize(("codes", "message"), BAD_CODES)
def test_bad_codes_do_not_harm_a_stream(model, stream_codes, codes, message):
    stream = model.codec.stream()
    parts = [stream.push(stream_codes[:, :45])]
    with pytest.raises(ValueError, match=message):
        stream.push(codes)
    with pytest.raises(ValueError, match=message):
        stream.finish(codes)
    parts += [stream.push(stream_codes[:, 45:50]), stream.finish()]
    want = stream_in(model, stream_codes[:, :50], [45, 5])
    assert torch.equal(torch.cat(parts), torch.cat(want))


def test_streams_do_not_share_state(model, stream_codes):
    ours, theirs = stream_codes[:, :90], stream_codes[:, 90:180].roll(7, 1)
    alone = [torch.cat(stream_in(model, codes, [30, 30, 30])) for codes in (ours, theirs)]
    streams = [model.codec.stream() for _ in range(2)]
    together: list[list[Tensor]] = [[], []]
    for start in range(0, 90, 30):
        for stream, codes, parts in zip(streams, (ours, theirs), together, strict=True):
            parts.append(stream.push(codes[:, start : start + 30]))
    for stream, parts, want in zip(streams, together, alone, strict=True):
        parts.append(stream.finish())
        assert torch.equal(torch.cat(parts), want)


def test_a_chunk_is_not_kept_by_reference(model, stream_codes):
    """The caller may reuse its buffer, and what was returned does not change."""
    stream, buffer = model.codec.stream(), torch.empty(8, 30, dtype=torch.int64)
    parts = []
    for start in range(0, 90, 30):
        buffer[:] = stream_codes[:, start : start + 30]
        parts.append(stream.push(buffer))
        buffer.zero_()
    parts.append(stream.finish())
    assert torch.equal(torch.cat(parts), torch.cat(stream_in(model, stream_codes[:, :90], [30, 30, 30])))
