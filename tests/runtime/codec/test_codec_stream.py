"""Decoding of streams: exact but for the norms over time, at a constant cost, without seams."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import BAD_CODES, snr_db, watch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replays import layered
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mimo_fast.runtime.codec import incremental
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES
from mimo_fast.runtime.codec.state import BLOCK, CONTEXT, RESTART_LIMIT

SAMPLES = 960
WAIT = LOOKAHEAD * PATCH_FRAMES
SIZES = st.lists(st.integers(1, 90), min_size=1, max_size=8)
EDGE = 360
"""Samples of the newest frames that the next two still add to: (n_fft - hop) / 2."""


def stream_in(
    codec, codes: Tensor, sizes: list[int], *, last_by_finish: bool = False, **options
) -> list[Tensor]:
    """What each push of so many frames returned, and finish at the end."""
    stream = codec.stream(**options)
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


def random_codes(config, frames: int, seed: int = 0, codebooks: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = config.codebook_sizes[:codebooks]
    return torch.stack([torch.randint(0, size, (frames,), generator=generator) for size in sizes])


@settings(max_examples=12)
@example([1], 10, False)
@example([182], 10, True)
@given(SIZES, st.integers(2, LOOKAHEAD), st.booleans())
def test_all_but_the_norms_over_time_is_exact(
    model, stream_codes, sizes, lookahead, last_by_finish
):
    """Given the statistics of one-shot decoding; the kit's vocoder looks 2 patches ahead."""
    codec, lengths = model.codec, cut(stream_codes.shape[1], sizes)
    options = {"lookahead": lookahead, "last_by_finish": last_by_finish}
    moments = codec.moments(stream_codes)
    wav = torch.cat(stream_in(codec, stream_codes, lengths, moments=moments, **options))
    assert snr_db(wav, codec.decode(stream_codes)) >= 110


def test_every_dimension_is_exact(loaded):
    """No pooling, pooling by 4, a kernel of twice the stride, a decoder with a window, RMSNorm."""
    codec = loaded.model.codec
    codes = random_codes(codec.config, 120)
    wav = torch.cat(stream_in(codec, codes, cut(120, [7, 1, 30]), moments=codec.moments(codes)))
    assert snr_db(wav, codec.decode(codes)) >= 100


def test_the_published_depth_is_exact_at_ten_patches(deep):
    codes = random_codes(deep.config, 120, codebooks=8)
    want, options = deep.decode(codes), {"moments": deep.moments(codes)}
    snr = []
    for patches in (0, 1, LOOKAHEAD):
        parts = stream_in(deep, codes, cut(120, [4]), lookahead=patches, **options)
        snr.append(snr_db(torch.cat(parts), want))
    assert snr[0] < 40 < snr[1] < 90
    assert snr[2] >= 100
    reach = deep.config.vocoder_layers * deep.config.vocoder_window[1] * deep.config.hop
    assert reach == LOOKAHEAD * PATCH_FRAMES * SAMPLES


def test_context_is_bounded_and_stated(model):
    """Past the ring a stream equals a decoder with a window of CONTEXT positions."""
    codec = copy.copy(model.codec)
    codes = random_codes(codec.config, 900, codebooks=8)
    hidden = codec.dequantize(codes)
    whole, moments = codec.decode_hidden(hidden), codec.moments(codes)
    wav = torch.cat(stream_in(codec, codes, cut(900, [4, 200, 31]), moments=moments))
    codec.decoder = replace(codec.decoder, window=(CONTEXT, 0))
    windowed = codec.decode_hidden(hidden)
    # The windowed decoder's own statistics differ a little: compare where both have the same.
    given = torch.cat(stream_in(codec, codes, [900], moments=codec.moments(codes)))
    assert snr_db(given, windowed) >= 100
    first = CONTEXT // 2 * SAMPLES - WAIT * SAMPLES
    assert snr_db(wav[:first], whole[:first]) >= 100
    assert snr_db(wav, whole) < 80


def test_a_push_returns_what_is_final(model, stream_codes):
    codes = stream_codes.repeat(1, 3)[:, :420]
    stream = model.codec.stream()
    fed = returned = 0
    for chunk in codes.split([7, 50, 1, 41, 120, 3, 80, 60, 58], dim=1):
        wav = stream.push(chunk)
        assert wav.dtype == torch.float32
        fed += chunk.shape[1]
        returned += len(wav)
        assert returned == max(0, (fed - WAIT) * SAMPLES - EDGE)
    assert len(stream.finish()) == WAIT * SAMPLES + EDGE


@pytest.mark.parametrize("lookahead", range(LOOKAHEAD + 1))
def test_first_audio_comes_a_patch_after_the_lookahead(model, stream_codes, lookahead):
    stream = model.codec.stream(lookahead)
    lengths = [len(stream.push(chunk)) for chunk in stream_codes[:, :60].split(PATCH_FRAMES, dim=1)]
    assert next(i for i, length in enumerate(lengths) if length) == lookahead
    assert lengths[lookahead] == PATCH_FRAMES * SAMPLES - EDGE
    assert set(lengths[lookahead + 1 :]) == {PATCH_FRAMES * SAMPLES}


def assert_no_click(parts: list[Tensor]) -> None:
    """Samples where two parts meet differ no more than neighbours elsewhere."""
    parts = [part for part in parts if len(part)]
    jumps = torch.cat(parts).diff().abs()
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)[:-1] - 1
    inside = jumps[torch.ones(len(jumps), dtype=torch.bool).index_fill(0, ends, False)]
    assert jumps[ends].max() <= inside.max()
    assert jumps[ends].square().mean() <= 1.5 * inside.square().mean()


def test_no_click_at_a_seam(model, stream_codes):
    """Samples where two pushes meet differ no more than neighbours elsewhere."""
    for lookahead in (0, 1, 4, LOOKAHEAD):
        parts = stream_in(model.codec, stream_codes, cut(182, [4]), lookahead=lookahead)
        assert_no_click(parts)


class Work(TorchDispatchMode):
    """Counts calls of each op, and bytes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        results = result if isinstance(result, tuple | list) else (result,)
        self.nbytes += sum(t.nbytes for t in results if isinstance(t, Tensor))
        return result


@pytest.mark.slow
def test_the_1000th_chunk_costs_what_the_first_ones_cost(model):
    """Products, calls of every op and bytes produced, from the first chunk after audio began."""
    codec = layered(model.codec)
    codes = random_codes(codec.config, 1000 * PATCH_FRAMES, codebooks=8)
    stream = codec.stream(again=0)
    costs = {}
    for i, chunk in enumerate(codes.split(PATCH_FRAMES, dim=1), start=1):
        if i in (12, 13, 200, 1000):
            with FlopCounterMode(display=False) as flops, Work() as work:
                stream.push(chunk)
            costs[i] = flops.get_total_flops(), work.calls, work.nbytes
        else:
            stream.push(chunk)
    assert costs[12][0] > 0
    assert costs[12] == costs[13] == costs[200] == costs[1000]


def test_a_decoder_position_goes_once_through_each_layer(model, stream_codes, monkeypatch):
    rows = list[int]()
    watch(monkeypatch, incremental, "_decoder_block", lambda *args: rows.append(args[3].shape[1]))
    stream_in(layered(model.codec), stream_codes, cut(182, [4, 20]), again=0)
    assert sum(rows) == 2 * 182
    assert max(rows) <= BLOCK


def test_memory_is_allocated_once(model, stream_codes):
    stream = model.codec.stream()
    before, config = stream.nbytes, model.codec.config
    assert before >= 2 * 4 * config.decoder_layers * config.dim * (CONTEXT + BLOCK)
    state = stream.state()

    def places() -> list[int]:
        tensors = state.tensors
        kept = (tensors.decoder.k, tensors.vocoder.v, tensors.added, tensors.tail)
        return [tensor.data_ptr() for tensor in kept]

    first = places()
    for chunk in stream_codes.repeat(1, 4).split(30, dim=1):
        stream.push(chunk)
        # Codes may wait before the first sample, and those of a young stream are kept.
        assert stream.nbytes <= before + (WAIT + RESTART_LIMIT) * config.dim * 4
    assert stream.nbytes == before
    assert places() == first
    stream.close()
    assert stream.nbytes == 0
    with pytest.raises(ValueError, match="closed"):
        stream.push(stream_codes)


def test_what_a_stream_cannot_do(model):
    for lookahead in (-1, 11):
        with pytest.raises(ValueError, match="lookahead must be between 0 and 10"):
            model.codec.stream(lookahead)
    codec = copy.copy(model.codec)
    codec.config = replace(codec.config, decoder_causal=False)
    with pytest.raises(ValueError, match="decode it at once"):
        codec.stream()


def test_finish_and_reset_start_anew(model, stream_codes):
    stream = model.codec.stream()
    stream.push(stream_codes[:, :100])
    stream.reset()
    first = torch.cat((stream.push(stream_codes[:, :60]), stream.finish()))
    second = torch.cat((stream.push(stream_codes[:, :60]), stream.finish()))
    assert torch.equal(first, second)
    assert len(first) == 60 * SAMPLES
    for empty in (stream.finish(), model.codec.stream().finish()):
        assert (empty.shape, empty.dtype) == ((0,), torch.float32)


def test_finish_with_the_last_codes_equals_one_shot_when_they_are_all(model, stream_codes):
    for frames in (1, 2, 30, 182):
        codes = stream_codes[:, :frames]
        assert snr_db(model.codec.stream().finish(codes), model.codec.decode(codes)) >= 110


@pytest.mark.parametrize(("codes", "message"), BAD_CODES)
def test_bad_codes_do_not_harm_a_stream(model, stream_codes, codes, message):
    stream = model.codec.stream()
    parts = [stream.push(stream_codes[:, :45])]
    for call in (stream.push, stream.finish):
        with pytest.raises(ValueError, match=message):
            call(codes)
    parts += [stream.push(stream_codes[:, 45:50]), stream.finish()]
    want = stream_in(model.codec, stream_codes[:, :50], [45, 5])
    assert torch.equal(torch.cat(parts), torch.cat(want))


def test_streams_do_not_share_state(model, stream_codes):
    ours, theirs = stream_codes[:, :90], stream_codes[:, 90:180].roll(7, 1)
    alone = [torch.cat(stream_in(model.codec, codes, [30, 30, 30])) for codes in (ours, theirs)]
    first, second = model.codec.stream(), model.codec.stream()
    chunks = zip(ours.split(30, dim=1), theirs.split(30, dim=1), strict=True)
    pairs = [(first.push(chunk), second.push(other)) for chunk, other in chunks]
    pairs.append((first.finish(), second.finish()))
    for parts, want in zip(zip(*pairs, strict=True), alone, strict=True):
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
    want = stream_in(model.codec, stream_codes[:, :90], [30, 30, 30])
    assert torch.equal(torch.cat(parts), torch.cat(want))
