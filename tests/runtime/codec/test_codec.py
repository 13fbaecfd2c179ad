"""The codec's building blocks against independent formulas, its segmentation, its errors."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import BAD_CODES, fault, gaussian, snr_db
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.mel import log_mel
from mimo_fast.errors import AudioError
from mimo_fast.runtime.codec.layers import (
    CodecStack,
    TransposedConv,
    inverse_stft,
    overlap_add,
    split_lengths,
)
from mimo_fast.runtime.codec.network import DECODE_SEGMENT, ENCODE_SEGMENT

SAMPLES = 960


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_segments_cover_everything_and_only_the_last_is_short(total, segment):
    lengths = split_lengths(total, segment)
    assert sum(lengths) == total
    assert all(length == segment for length in lengths[:-1])
    assert all(0 < length <= segment for length in lengths)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12))
def test_overlap_add_places_frame_t_at_t_hops(count, size, hop):
    hop = min(hop, size)
    frames = torch.arange(count * size, dtype=torch.float32).view(count, size)
    want = torch.zeros((count - 1) * hop + size)
    for t in range(count):
        want[t * hop : t * hop + size] += frames[t]
    assert torch.equal(overlap_add(frames, hop), want)


@pytest.mark.parametrize("frames", [1, 2, 3, 50])
@pytest.mark.parametrize(("n_fft", "hop"), [(960, 240), (64, 16), (48, 24)])
def test_inverse_stft(frames, n_fft, hop):
    """Against a loop over frames and, inside 50 frames, against torch.istft."""
    generator = torch.Generator().manual_seed(frames)
    log_magnitude = torch.randn(frames, n_fft // 2 + 1, generator=generator)
    phase = torch.randn(frames, n_fft // 2 + 1, generator=generator) * 2
    window = torch.hann_window(n_fft)
    got = inverse_stft(torch.cat((log_magnitude, phase), dim=1), window, hop)
    assert got.shape == (frames * hop,)
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    spectrum = torch.polar(log_magnitude.double().exp(), phase.double())
    whole, weight = torch.zeros(2, (frames - 1) * hop + n_fft, dtype=torch.float64)
    for t in range(frames):
        part = slice(t * hop, t * hop + n_fft)
        whole[part] += torch.fft.irfft(spectrum[t]) * window.double()
        weight[part] += window.double() ** 2
    trim = (n_fft - hop) // 2
    want = (whole / weight)[trim : trim + frames * hop]
    assert snr_db(got, want) > 100
    if frames == 50:
        # torch.istft trims n_fft / 2 at the start, "same" padding (n_fft - hop) / 2.
        library = torch.istft(spectrum.T, n_fft, hop, n_fft, window.double(), center=True)
        assert snr_db(got[hop // 2 :][: len(library)], library) > 100


def test_inverse_stft_clips_magnitudes_at_100():
    head = torch.zeros(4, 2 * 33)
    loud, limit = head.clone(), head.clone()
    loud[:, 5], limit[:, 5] = 50.0, math.log(100.0)
    window = torch.hann_window(64)
    torch.testing.assert_close(inverse_stft(loud, window, 16), inverse_stft(limit, window, 16))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (4, 2), (5, 3), (1, 1)])
def test_transposed_conv_normalises_before_it_trims(kernel, stride):
    generator = torch.Generator().manual_seed(kernel)
    weight = torch.randn(6, 4, kernel, generator=generator)
    x = torch.randn(9, 6, generator=generator)
    bias, norm_weight, norm_bias = (torch.randn(4, generator=generator) for _ in range(3))
    full = torch.zeros((9 - 1) * stride + kernel, 4, dtype=torch.float64)
    for t in range(9):
        for k in range(kernel):
            full[t * stride + k] += x[t].double() @ weight[:, :, k].double()
    full += bias.double()
    full = (full - full.mean()) / (full.var(correction=0) + 1e-5).sqrt()
    full = full * norm_weight.double() + norm_bias.double()
    got = TransposedConv(weight, bias, norm_weight, norm_bias, stride)(x)
    assert got.shape == (9 * stride, 4)
    assert snr_db(got, full[: 9 * stride]) > 100


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "window", [(-1, -1), (5, 3), (0, 0), (-1, 4), (4, -1), (-1, 0), (500, 500)]
)
def test_stack_sees_its_window(model, causal, window):
    """A negative side of the window is unlimited, and a causal stack sees nothing later."""
    layers = model.codec.vocoder.layers[:1]
    stack = CodecStack(layers, model.codec.config.vocoder_heads, 10000.0, causal, window)
    x = gaussian(40, model.codec.config.vocoder_dim).requires_grad_()
    stack(x)[20].sum().backward()
    reached = set(x.grad.abs().sum(-1).nonzero().flatten().tolist())
    left, right = window
    first = 0 if left < 0 else max(0, 20 - left)
    last = 20 if causal else 39 if right < 0 else min(39, 20 + right)
    assert reached == set(range(first, last + 1))


def test_skip_layer_adds_its_output_to_the_last(model):
    stack = model.codec.encoder
    x, options = gaussian(12, model.codec.config.dim), (stack.heads, stack.rope_theta)
    first_two = CodecStack(stack.layers[:2], *options, stack.causal, stack.window)
    torch.testing.assert_close(stack(x, 2), stack(x) + first_two(x))
    assert torch.equal(stack(x, None), stack(x))


@pytest.fixture(scope="module")
def speech(audio) -> Tensor:
    return load_audio(audio[0], 24000)


@pytest.mark.parametrize("n", [1, 100, 479, 480, 481, 959, 960, 961, 1920, 24000, 24001])
def test_a_code_frame_for_every_960_samples_begun(model, speech, n):
    """Shorter audio is padded to 3 mel frames."""
    codes = model.codec.encode(speech[:n])
    mel_frames = 1 + max(n, 481) // 240
    assert codes.shape == (12, -(-mel_frames // 4))
    assert codes.dtype == torch.int64


@pytest.mark.parametrize("n_q", [1, 3, 8, 12, None])
def test_fewer_codebooks_are_the_first_rows(model, golden, speech, n_q):
    codes = model.codec.encode(speech, n_q)
    assert torch.equal(codes, golden.get("codec:codes.0")[:n_q])


@pytest.mark.parametrize("n_q", [0, -1, 13])
def test_a_number_of_codebooks_that_there_is_not(model, speech, n_q):
    with pytest.raises(ValueError, match="n_q must be between 1 and 12"):
        model.codec.encode(speech, n_q)


@pytest.mark.parametrize("shape", [(), (2, 4800), (1, 1, 4800), (0,)])
def test_a_waveform_of_another_shape(model, shape):
    message = fault(lambda: model.codec.encode(torch.zeros(shape)), AudioError)
    assert ("no samples" in message) == (shape == (0,))


def test_encode_leaves_no_gradient_graph(model, speech):
    assert not model.codec.decode(model.codec.encode(speech[:4800], 8)).requires_grad


def long_speech(speech: Tensor, seconds: float) -> Tensor:
    n = int(seconds * 24000)
    return speech.repeat(-(-n // len(speech)))[:n]


def padded_segment(codec, mel: Tensor) -> Tensor:
    """A last segment as upstream encodes it: padded to a full one with zeros, then cut."""
    frames = -(-len(mel) // 2)
    x = F.pad(mel.T, (0, ENCODE_SEGMENT - len(mel)))[None]
    x = F.gelu(F.conv1d(x, *codec.conv1, padding=1))
    x = F.gelu(F.conv1d(x, *codec.conv2, padding=1, stride=2))[0].T[:frames]
    x = codec.encoder_norm(codec.encoder(x, codec.config.skip_layer))
    if frames % 2:
        x = torch.cat((x, x[-1:]))
    return codec.pool_norm(F.gelu(F.conv1d(x.T[None], codec.pool_conv, stride=2)[0].T))


@pytest.mark.parametrize("last_frames", [1, 2, 3, 4, 5, 150])
def test_more_than_60_seconds_are_encoded_in_segments(model, speech, last_frames):
    codec = model.codec
    mel = log_mel(long_speech(speech, 63), codec.config)[: ENCODE_SEGMENT + last_frames]
    hidden = codec.encode_mel(mel)
    first, last = (
        codec.encode_mel(mel[:ENCODE_SEGMENT]),
        padded_segment(codec, mel[ENCODE_SEGMENT:]),
    )
    assert (len(first), len(last)) == (1500, -(-last_frames // 4))
    torch.testing.assert_close(hidden, torch.cat((first, last)), rtol=0, atol=1e-5)


def test_encode_of_more_than_60_seconds(model, speech):
    codec, wav = model.codec, long_speech(speech, 61)
    codes, mel = codec.encode(wav, 3), log_mel(wav, codec.config)
    assert codes.shape == (3, 1500 + -(-(len(mel) - ENCODE_SEGMENT) // 4))
    for part, frames in ((codes, mel), (codes[:, :1500], mel[:ENCODE_SEGMENT])):
        assert torch.equal(part, codec.quantize(codec.encode_mel(frames), 3))


def test_decode_of_more_than_60_seconds(model, golden):
    codes = golden.get("codec:stream_codes").repeat(1, 9)[:, : DECODE_SEGMENT + 7]
    wav = model.codec.decode(codes)
    assert wav.shape == ((DECODE_SEGMENT + 7) * SAMPLES,)
    assert wav.dtype == torch.float32
    first, last = (model.codec.decode(part) for part in codes.split(DECODE_SEGMENT, dim=1))
    assert torch.equal(wav, torch.cat((first, last)))


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("codebooks", [1, 8, 12])
def test_decode_of_few_frames_and_codebooks(model, golden, codebooks, frames):
    wav = model.codec.decode(golden.get("codec:codes.0")[:codebooks, :frames])
    assert wav.shape == (frames * SAMPLES,)
    assert wav.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_codes_of_any_integer_type(model, golden, dtype):
    """64 frames of the 64-row codebook: as a byte mask the codes would index silently wrong."""
    codes = golden.get("codec:codes.2")[:8, :64].long()
    assert torch.equal(model.codec.decode(codes.to(dtype)), model.codec.decode(codes))


@pytest.mark.parametrize(("codes", "message"), BAD_CODES)
def test_codes_that_cannot_be_decoded(model, codes, message):
    assert re.search(message, fault(lambda: model.codec.decode(codes), ValueError))
