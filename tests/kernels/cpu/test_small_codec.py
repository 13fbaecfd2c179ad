"""A small codec's stacks in native calls, against the same layers in plain torch, alone and in a
stream."""

import threading
from dataclasses import replace

import pytest
import torch
from helpers import gaussian, snr_db, write_pair

import mimo_fast
from mimo_fast.kernels.cpu import codec_stack as small_codec
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu import transformer as small_model
from mimo_fast.runtime.codec.layers import CodecStack, LayerByLayer
from mimo_fast.runtime.codec.offload import offload
from mimo_fast.runtime.codec.state import StackState

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)

NANO = {
    "d_model": 192,
    "encoder_ffn_dim": 512,
    "decoder_layers": 3,
    "decoder_ffn_dim": 512,
    "n_mels": 80,
    "vocoder_dim": 192,
    "vocoder_intermediate_dim": 512,
    "vocoder_attention_heads": 6,
    "vocoder_attn_window_size": [40, 8],
}


def load(directory, changed: dict, **options):
    return mimo_fast.load(*write_pair(directory, {}, changed), device="cpu", **options).codec


@pytest.fixture(params=["kit", "nano", "rms"], scope="module")
def codec(request, tmp_path_factory):
    changed = {"kit": {}, "nano": NANO, "rms": NANO | {"ln_type": "RMSNorm"}}[request.param]
    return load(tmp_path_factory.mktemp(request.param), changed)


def plainly(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(CodecStack, "executor", property(LayerByLayer))
        return call()


def buffer(stack: CodecStack, width: int, places: int) -> StackState:
    shape = (len(stack.layers), stack.heads, places, width // stack.heads)
    return StackState(
        *(gaussian(1, torch.Size(shape).numel(), seed).view(shape) for seed in (5, 6))
    )


def run(stack, x, table, state, slots, visible) -> torch.Tensor:
    return stack.executor.run(x, table, state.k, state.v, slots, visible)


@pytest.mark.parametrize("rows", [1, 2, 5, 32])
@pytest.mark.parametrize("part", ["decoder", "vocoder"])
def test_a_stack_is_that_of_plain_torch(codec, part, rows, monkeypatch):
    """Rows that see any places, one of them its own alone; buffers afterwards too."""
    stack, places = getattr(codec, part), 50
    width = codec.config.dim if part == "decoder" else codec.config.vocoder_dim
    assert stack.fused
    slots = torch.randperm(places, generator=torch.Generator().manual_seed(rows))[:rows]
    visible = gaussian(rows, places, 3) > 0
    visible[0] = False
    visible[torch.arange(rows), slots] = True
    half = width // stack.heads // 2
    angles = gaussian(rows, half, 4)
    table, x = torch.stack((angles.cos(), angles.sin())), gaussian(rows, width, 2)
    buffers = [buffer(stack, width, places) for _ in range(2)]
    got = run(stack, x, table, buffers[0], slots, visible)
    want = plainly(monkeypatch, lambda: run(stack, x, table, buffers[1], slots, visible))
    for each, other in ((got, want), (buffers[0].k, buffers[1].k), (buffers[0].v, buffers[1].v)):
        assert float((each - other).abs().max()) <= 1e-5 * float(other.abs().max())
    again = run(stack, x, table, buffer(stack, width, places), slots, visible)
    assert torch.equal(again, got)


@pytest.mark.parametrize("sizes", [[4], [1, 7, 4], [70]])
def test_a_stream_is_that_of_plain_torch(codec, sizes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = (sizes * 60)[: 140 // sum(sizes) * len(sizes)]
    parts = [
        torch.stack(
            [
                torch.randint(0, most, (size,), generator=generator)
                for most in codec.config.codebook_sizes
            ]
        )
        for size in sizes
    ]

    def streamed() -> torch.Tensor:
        stream = codec.stream(lookahead=1)
        return torch.cat([*(stream.push(part) for part in parts), stream.finish()])

    assert snr_db(streamed(), plainly(monkeypatch, streamed)) > 90


def test_what_it_does_not_know_goes_elsewhere(tmp_path, monkeypatch):
    assert not load(tmp_path / "16", NANO, dtype="bfloat16").decoder.fused
    assert not load(tmp_path / "int8", NANO, quantization={"codec": "int8"}).decoder.fused
    odd = load(tmp_path / "odd", NANO | {"decoder_ffn_dim": 100})
    assert not odd.decoder.fused
    assert odd.vocoder.fused
    assert not offload(odd.vocoder, torch.device("cpu")).fused
    with monkeypatch.context() as patch:
        for kernels in ("torch", "triton"):
            patch.setenv("MIMO_FAST_KERNELS", kernels)
            assert not replace(odd.vocoder).fused
    monkeypatch.setattr(small_model, "SMALL", 1000)
    assert not small_codec.takes_stack(
        [layer.parts for layer in odd.vocoder.layers], odd.vocoder.heads
    )


def test_gelu_and_softmax_far_out(codec):
    """Inputs a thousand times as large as any that are meant: nothing overflows."""
    stack, width = codec.decoder, codec.config.dim
    table = torch.stack(
        (torch.ones(2, width // stack.heads // 2), torch.zeros(2, width // stack.heads // 2))
    )
    visible = torch.tensor([[True, False], [True, True]])
    out = run(
        stack, gaussian(2, width) * 1e3, table, buffer(stack, width, 2), torch.arange(2), visible
    )
    assert out.isfinite().all()


def test_one_thread_is_one_of_this_thread_alone():
    before, inside, others = torch.get_num_threads(), [], []
    with native.one_thread():
        inside.append(torch.get_num_threads())
        other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert inside == [1]
    assert others == [before]
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), native.one_thread():
        raise KeyError
    assert torch.get_num_threads() == before
