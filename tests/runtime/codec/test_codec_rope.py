"""The codec as shipped: rotary frequencies rounded to bfloat16, in every path that rotates.

Ground truth is golden/shipped: upstream's code in float32 with exact weights and rounded buffers.
Beyond it stands a transformer in plain torch that reads upstream's tensors by name.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import KIT, KIT_PAIR, refuses, snr_db, write_pair
from replays import Counted, layered
from safetensors.torch import load_file
from test_codec_stream import cut, random_codes, stream_in
from torch import Tensor

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.kernels.cpu import library as native
from mimo_fast.runtime.codec.encoder_graphs import BUCKETS, EncoderGraphs, PaddedEncoder
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.layers import LayerByLayer
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.offload import offload

SHIPPED = load_file(KIT / "shipped" / "codec.safetensors")
RECORDINGS = [KIT / "audio" / f"{name}.wav" for name in ("en_f_16k", "en_m_24k", "zh_24k_stereo")]
"""In the order of the kit's codes."""


@pytest.fixture(scope="module")
def shipped() -> Codec:
    return mimo_fast.load(*KIT_PAIR, device="cpu", codec_rope="bfloat16").codec


@pytest.fixture(scope="module")
def exact(model) -> Codec:
    return model.codec


def recording(i: int) -> Tensor:
    """The i-th, or for 3 all of them in turn for 40 s."""
    if i < 3:
        return load_audio(RECORDINGS[i], 24000)
    return torch.cat([recording(j) for j in range(3)]).repeat(8)[:960_000]


@pytest.mark.parametrize("i", range(4))
def test_codes_are_upstreams(shipped, exact, i):
    wav, want = recording(i), SHIPPED[f"codes.{i}"].long()
    assert torch.equal(shipped.encode(wav), want)
    # The kit tells the two apart.
    assert not torch.equal(exact.encode(wav), want)


@pytest.mark.parametrize("i", range(3))
def test_waveforms_are_upstreams(shipped, exact, i):
    codes, want = SHIPPED[f"codes.{i}"][:8].long(), SHIPPED[f"wav_dec8.{i}"]
    assert snr_db(shipped.decode(codes), want) >= 80
    assert snr_db(exact.decode(codes), want) < 80


def rotations(width: int, theta: float, positions: Tensor) -> Tensor:
    """Unit complex numbers [T, Dh / 2] of frequencies that were rounded to bfloat16."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    rounded = (1 / theta**exponents).bfloat16().double()
    angles = positions.double()[:, None] * rounded
    return torch.polar(torch.ones_like(angles), angles)


def by_hand(
    tensors: dict[str, Tensor], name: str, layers: int, heads: int, x: Tensor, visible: Tensor
) -> Tensor:
    """The output of each layer [L, T, D] of a stack of pre-norm layers with LayerNorm and GELU."""
    turn = rotations(x.shape[1] // heads, 10000.0, torch.arange(len(x)))[:, None]

    def linear(part: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{part}.weight"], tensors.get(f"{part}.bias"))

    def norm(part: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], tensors[f"{part}.weight"], tensors[f"{part}.bias"])

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first.double(), second.double()) * turn
        return torch.cat((turned.real, turned.imag), dim=-1).float()

    outputs = []
    for i in range(layers):
        layer = f"{name}.{i}"
        normed = norm(f"{layer}.self_attn_layer_norm", x)
        q, k, v = (
            linear(f"{layer}.self_attn.{part}_proj", normed).unflatten(1, (heads, -1))
            for part in "qkv"
        )
        scores = torch.einsum("thd,shd->hts", rotated(q), rotated(k)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        attended = torch.einsum("hts,shd->thd", weights, v).flatten(1)
        x = x + linear(f"{layer}.self_attn.out_proj", attended)
        hidden = F.gelu(linear(f"{layer}.fc1", norm(f"{layer}.final_layer_norm", x)))
        x = x + linear(f"{layer}.fc2", hidden)
        outputs.append(x)
    return torch.stack(outputs)


def seen(length: int, left: int, right: int) -> Tensor:
    """Which keys each query sees; a negative reach has no limit."""
    ahead = torch.arange(length) - torch.arange(length)[:, None]
    return ((left < 0) | (ahead >= -left)) & ((right < 0) | (ahead <= right))


STACKS = {
    "encoder": ("encoder.layers", "encoder_layers", "encoder_heads", "dim", (-1, -1)),
    "decoder": ("decoder.layers", "decoder_layers", "decoder_heads", "dim", (-1, 0)),
    "vocoder": (
        "decoder.vocoder.layers",
        "vocoder_layers",
        "vocoder_heads",
        "vocoder_dim",
        (40, 10),
    ),
}


@pytest.mark.parametrize("part", STACKS)
@pytest.mark.parametrize("length", [1, 2, 47, 641])
def test_stacks_are_those_by_hand(shipped, exact, part, length):
    name, layers, heads, width, window = STACKS[part]
    config = shipped.config
    x = torch.randn(length, getattr(config, width), generator=torch.Generator().manual_seed(length))
    stack, tensors = getattr(shipped, part), load_file(KIT_PAIR[1] / "model.safetensors")
    counts = getattr(config, layers), getattr(config, heads)
    outputs = by_hand(tensors, name, *counts, x, seen(length, *window))
    assert snr_db(stack(x), outputs[-1]) >= 110
    assert snr_db(stack(x, 1), outputs[-1] + outputs[0]) >= 110
    if length > 100:
        assert snr_db(getattr(exact, part)(x), outputs[-1]) < 90


@pytest.mark.parametrize(("frames", "sizes", "lookahead"), [(121, [4], 10), (255, [1, 90, 7], 2)])
def test_streams_are_one_shot(shipped, exact, frames, sizes, lookahead):
    """Given the norms' statistics, for as long as the decoder sees all of the stream."""
    codes = random_codes(shipped.config, frames, seed=frames)
    moments, lengths = shipped.moments(codes), cut(frames, sizes)
    options = {"moments": moments, "lookahead": lookahead}
    wav = torch.cat(stream_in(shipped, codes, lengths, **options))
    assert snr_db(wav, shipped.decode(codes)) >= 100
    assert snr_db(torch.cat(stream_in(exact, codes, lengths, **options)), wav) < 80


@pytest.mark.slow
def test_long_streams_are_one_shot(tmp_path):
    """Positions go on beyond any ring buffer, where a window bounds what the decoder sees."""
    changed = {"decoder_attn_window_size": [48, 0], "rope_frequencies": "bfloat16"}
    codec = mimo_fast.load(*write_pair(tmp_path, {}, changed), device="cpu").codec
    codes = random_codes(codec.config, 1103)
    options = {"moments": codec.moments(codes), "lookahead": 2}
    wav = torch.cat(stream_in(codec, codes, cut(1103, [150, 33, 64]), **options))
    assert snr_db(wav, codec.decode(codes)) >= 100


def test_the_native_stack_and_layers_one_by_one_agree(shipped):
    codes = random_codes(shipped.config, 140)
    plain = copy.copy(shipped)
    for part in ("decoder", "vocoder"):
        stack = replace(getattr(shipped, part))
        assert stack.rounding == torch.bfloat16
        assert stack.fused == native.available()
        stack.__dict__["executor"] = LayerByLayer(stack)
        setattr(plain, part, stack)
    wavs = [
        torch.cat(stream_in(codec, codes, cut(140, [8]), moments=shipped.moments(codes)))
        for codec in (shipped, plain)
    ]
    assert snr_db(*wavs) >= 100


def test_graphs_of_streams_give_what_streams_without_give(shipped):
    plain, graphed = layered(shipped), layered(shipped)
    plain.again = graphed.again = 0
    counted = Counted()
    graphed.stream_graphs = StreamGraphs(graphed, counted)
    codes = random_codes(shipped.config, 120)
    parts = [stream_in(codec, codes, cut(120, [4])) for codec in (plain, graphed)]
    assert all(map(torch.equal, *parts))
    assert counted.replays > 10


@pytest.mark.parametrize("samples", [1, 961, 24001, 59607])
def test_encoder_graphs_give_upstreams_codes(shipped, exact, samples):
    graphed, counted = copy.copy(shipped), Counted()
    graphed.encoder_graphs = EncoderGraphs(graphed, counted)
    wav = recording(1)[:samples]
    assert torch.equal(graphed.encode(wav), shipped.encode(wav))
    assert counted.replays == 1
    tables = [PaddedEncoder(codec, BUCKETS[0], 8)._angles for codec in (shipped, exact)]
    assert not torch.equal(*tables)


def test_an_offloaded_encoder_keeps_its_frequencies(shipped):
    kept = copy.copy(shipped)
    kept.encoder = offload(shipped.encoder, shipped.device)
    assert torch.equal(kept.encode(recording(1)), SHIPPED["codes.1"].long())


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_devices_round_alike(head_dim):
    """No frequency is so near a tie that a last bit of float32 would round it otherwise."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = 10000.0**-exponents
    for factor in (1 - 2**-21, 1 + 2**-21):
        moved = (frequencies * factor).float().bfloat16()
        # One, the first of them, is its own rounding whatever its last bit is.
        assert torch.equal(moved, frequencies.float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rope", ["exact", "bfloat16"])
def test_rounding_is_no_matter_of_the_dtype(dtype, rope):
    codec = mimo_fast.load(*KIT_PAIR, device="cpu", dtype=dtype, codec_rope=rope).codec
    for stack in (codec.encoder, codec.decoder, codec.vocoder):
        assert stack.rounding == (torch.float32 if rope == "exact" else torch.bfloat16)
    assert codec.encode(recording(0)).shape == (12, 47)


def test_the_option_overrides_what_is_stated(tmp_path):
    pair = write_pair(tmp_path, {}, {"rope_frequencies": "bfloat16"})
    found = [mimo_fast.load(*pair, device="cpu", codec_rope=asked) for asked in (None, "exact")]
    assert [model.codec.config.rope_frequencies for model in found] == ["bfloat16", "exact"]
    # Saved sessions go from one to the other.
    assert found[0].codec.fingerprint == found[1].codec.fingerprint
    wav = recording(3)[: 24000 * 8]
    assert not torch.equal(*(model.codec.encode(wav) for model in found))


@pytest.mark.parametrize("wrong", ["rounded", "", "bf16", "EXACT"])
def test_a_wrong_option_is_refused(wrong):
    message = "codec_rope must be 'exact' or 'bfloat16' or None, not"
    refuses(message, mimo_fast.load, *KIT_PAIR, device="cpu", codec_rope=wrong)
    refuses(message, mimo_fast.MimoAudio, *KIT_PAIR, "cpu", codec_rope=wrong)
