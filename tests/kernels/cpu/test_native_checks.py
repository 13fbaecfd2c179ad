"""What the native kernels are given is checked before they read or write by address."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import gaussian

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.codec_stack import CodecStack
from mimo_fast.kernels.cpu.transformer import PatchDecoder, Transformer
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.rope import rope_table
from mimo_fast.quantization import Format, quantize
from mimo_fast.sampling import GREEDY, sampler_tensors

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)

DIM, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 32, 4, 2, 8, 10


def weight(rows: int, columns: int) -> Weight:
    return Weight.stack([gaussian(rows, columns)])


def layer(**changed) -> tuple:
    """Of a transformer, with some parts changed."""
    parts = {
        "attention_norm": torch.ones(DIM),
        "qkv": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM),
        "out": weight(DIM, HEADS * HEAD_DIM),
        "ffn_norm": torch.ones(DIM),
        "gate_up": weight(96, DIM),
        "down": weight(DIM, 48),
    }
    return tuple((parts | changed).values())


def transformer(*layers: tuple, **changed) -> Transformer:
    options = {
        "norm": torch.ones(DIM),
        "eps": 1e-5,
        "table": rope_table(HEAD_DIM, 1e4, POSITIONS),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
    }
    return Transformer(layers or (layer(),), **(options | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"attention_norm": torch.ones(DIM + 8)},
        {"qkv": weight(72, DIM)},
        {"qkv": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM + 8)},
        {"out": weight(DIM, 40)},
        {"gate_up": weight(95, DIM)},
        {"down": weight(DIM, 56)},
        {"down": weight(DIM + 8, 48)},
        {"down": Weight((gaussian(DIM, 48),), (torch.ones(DIM - 1),))},
        {"down": Weight((gaussian(16, 48), gaussian(16, 40)), (None, None))},
    ],
)
def test_layers_must_fit(changed):
    transformer()
    with pytest.raises(ValueError, match=r"not|other|fit"):
        transformer(layer(), layer(**changed))


def test_heads_must_fit():
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        transformer(heads=5)
    with pytest.raises(ValueError, match="takes small float32"):
        transformer(table=rope_table(12, 1e4, POSITIONS))


def cache(**changed) -> torch.Tensor:
    shape = {"layers": 1, "slots": 3, "kv_heads": KV_HEADS, "capacity": 6, "head_dim": HEAD_DIM}
    return torch.zeros(*(shape | changed).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, DIM + 1)}, r"x is .*\[2, 33\]"),
        ({"x": torch.zeros(2, DIM).double()}, "x is torch.float64"),
        ({"x": torch.zeros(2, 1, DIM)}, "x is"),
        ({"slots": torch.tensor([0, 3])}, "slot 3 of row 1 is not below 3"),
        ({"slots": torch.tensor([-1, 0])}, "slot -1 of row 0"),
        ({"slots": torch.tensor([0])}, r"not int64 \[2\]"),
        ({"slots": torch.tensor([0, 1]).int()}, "not int64"),
        ({"starts": torch.zeros(4).long()[::2]}, "not int64"),
        ({"k": cache(layers=2), "v": cache(layers=2)}, "other layers"),
        ({"k": cache(kv_heads=4), "v": cache(kv_heads=4)}, "kv_heads and head_dim"),
        ({"k": cache(head_dim=16), "v": cache(head_dim=16)}, "kv_heads and head_dim"),
        ({"k": cache().double(), "v": cache().double()}, "torch.float64"),
        ({"v": cache(capacity=7)}, "one layout"),
        ({"v": cache().transpose(1, 2).contiguous().transpose(1, 2)}, "one layout"),
    ],
)
def test_a_step_must_fit(changed, message):
    arguments = {
        "x": torch.zeros(2, DIM),
        "k": cache(),
        "v": cache(),
        "slots": torch.tensor([0, 1]),
        "starts": torch.tensor([0, 0]),
    }
    model = transformer()
    model.step(**arguments)
    with pytest.raises(ValueError, match=message):
        model.step(**(arguments | changed))


def test_an_encoded_sequence_must_fit():
    model = transformer()
    assert model.encode(torch.zeros(2, POSITIONS, DIM), True).shape == (2, POSITIONS, DIM)
    with pytest.raises(ValueError, match="longer than the table"):
        model.encode(torch.zeros(2, POSITIONS + 1, DIM), True)
    for x in (torch.zeros(2, 3, DIM + 8), torch.zeros(3, DIM), torch.zeros(2, 3, DIM).half()):
        with pytest.raises(ValueError, match="x is"):
            model.encode(x, True)


def test_a_patch_must_fit():
    step = torch.tensor([[0, 1], [0, 2], [0, 20], [20, 12], [19, 11]])
    rows = gaussian(32, DIM)

    def decoder(heads=rows, embeddings=rows, step=step) -> PatchDecoder:
        return PatchDecoder(transformer(), heads, embeddings, [step], 2, 3)

    settings, index = sampler_tensors([GREEDY] * 2), torch.arange(2)
    good = decoder()
    assert good.decode(torch.zeros(2, DIM), settings, index, index).shape == (2, 2, 3)
    for bad in ({"heads": rows[:, :24]}, {"embeddings": rows[:30]}, {"heads": rows.half()}):
        with pytest.raises(ValueError, match="heads and embeddings"):
            decoder(**bad)
    for row, value in ((0, 2), (0, -1), (1, 3), (2, 21), (2, -1), (3, 0)):
        other = step.clone()
        other[row, 1] = value
        with pytest.raises(ValueError, match="a head is"):
            decoder(step=other)
    with pytest.raises(ValueError, match="int64"):
        decoder(step=step.int())
    with pytest.raises(ValueError, match="local is"):
        good.decode(torch.zeros(2, DIM + 8), settings, index, index)
    with pytest.raises(ValueError, match="not of 2 rows"):
        good.decode(torch.zeros(2, DIM), settings, index, torch.arange(3))


def test_a_product_must_fit():
    w = quantize(gaussian(10, 256), Format.parse("int4"))
    x = torch.zeros(2, 256)
    native.quantized_matmul(x, w)
    other = quantize(gaussian(10, 256), Format.parse("int4"))
    for bad, options, message in (
        (torch.zeros(2, 128), {}, "256 wide"),
        (x, {"norm": RMSNorm(torch.ones(128), 1e-5)}, "norm is not 256"),
    ):
        with pytest.raises(ValueError, match=message):
            native.quantized_matmul(bad, w, **options)
    for changed in (
        {"scales": other.scales.float()},
        {"scales": other.scales[:9]},
        {"scales": other.scales.T.contiguous().T},
        {"zeros": other.zeros[:, :1]},
        {"bias": torch.zeros(9)},
    ):
        with pytest.raises(ValueError, match=r"does not read the weight|rows|shaped"):
            native.quantized_matmul(x, replace(other, **changed))
    with pytest.raises(ValueError, match="even number"):
        native.quantized_matmul(
            x, quantize(gaussian(9, 256), Format.parse("int4")), None, None, True
        )


def test_a_copied_weight_is_read_where_it_lies():
    """The native view is of one weight's memory."""
    w = quantize(gaussian(10, 256), Format.parse("int8"))
    x = gaussian(2, 256, 1)
    want = native.quantized_matmul(x, w)
    assert native.VIEW in vars(w)
    for copied in (copy.deepcopy(w), copy.copy(w), pickle.loads(pickle.dumps(w)), replace(w)):
        assert native.VIEW not in vars(copied)
        assert torch.equal(native.quantized_matmul(x, copied), want)
    copied = copy.deepcopy(w)
    copied.scales.zero_()
    assert native.quantized_matmul(x, copied).abs().max() == 0
    assert torch.equal(native.quantized_matmul(x, w), want)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("heads", "qkv is"),
        ("cache type", "float16"),
        ("table", "table is not"),
        ("slot", "slot 2 of row 0"),
        ("layout", "one layout"),
        ("head_dim", "multiple of 8"),
    ],
)
def test_attention_must_fit(what, message):
    dh = 12 if what == "head_dim" else 16
    k, v = torch.zeros(2, 2, 5, dh), torch.zeros(2, 2, 5, dh)
    qkv, table = torch.zeros(1, 1, 8 * dh), rope_table(dh, 1e4, 5)
    slots, starts, heads = torch.tensor([1]), torch.tensor([0]), 4
    if what != "head_dim":
        native.decode_attention(qkv, table, LayerKV(k, v), slots, starts, heads)
    if what == "heads":
        heads = 6
    elif what == "cache type":
        k, v = k.half(), v.half()
    elif what == "table":
        table = table[..., :-1]
    elif what == "slot":
        slots = slots + 1
    elif what == "layout":
        v = torch.zeros(2, 5, 2, dh).transpose(1, 2)
    with pytest.raises(ValueError, match=message):
        native.decode_attention(qkv, table, LayerKV(k, v), slots, starts, heads)


def test_sampling_must_fit():
    logits, index, settings = torch.zeros(3, 7), torch.arange(3), sampler_tensors([GREEDY] * 3)
    native.sample_text(logits, settings, index, index, None, 0)
    with pytest.raises(ValueError, match="not of 3 rows"):
        native.sample_text(logits, settings, index, torch.arange(2), None, 0)
    for banned in (torch.zeros(6).bool(), torch.zeros(7), torch.zeros(2, 7).bool()):
        with pytest.raises(ValueError, match="banned"):
            native.sample_text(logits, settings, index, index, banned, 0)
    with pytest.raises(ValueError, match="no ids"):
        native.sample_text(torch.zeros(3, 0), settings, index, index, None, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, DIM).double()}, "x is"),
        ({"table": torch.zeros(2, 3, 4)}, "table is not"),
        ({"k": torch.zeros(1, 4, 5, 16)}, "a buffer is"),
        ({"v": torch.zeros(1, 4, 6, 8)}, "a buffer is"),
        ({"slots": torch.tensor([0, 5])}, "slot 5 of row 1 is not below 5"),
        ({"slots": torch.tensor([0.0, 1.0])}, "slots are not"),
        ({"visible": torch.ones(2, 4).bool()}, "visible is not"),
    ],
)
def test_a_codec_stack_must_fit(changed, message):
    norm = (torch.ones(DIM), torch.zeros(DIM))
    parts = (norm, weight(3 * DIM, DIM), weight(DIM, DIM), norm, weight(48, DIM), weight(DIM, 48))
    stack = CodecStack([parts], HEADS, 1e-5)
    arguments = {
        "x": torch.zeros(2, DIM),
        "table": torch.zeros(2, 2, 4),
        "k": torch.zeros(1, 4, 5, 8),
        "v": torch.zeros(1, 4, 5, 8),
        "slots": torch.tensor([0, 1]),
        "visible": torch.ones(2, 5).bool(),
    }
    stack.run(**arguments)
    with pytest.raises(ValueError, match=message):
        stack.run(**(arguments | changed))
    sequences = {"sequences": [arguments["x"]], "table": arguments["table"], "window": (-1, 2)}
    stack.run_sequences(**sequences)
    for changed_too, why in (
        ({"sequences": [torch.zeros(2, DIM), torch.zeros(1, DIM)]}, "2 rows for 3"),
        ({"sequences": [torch.zeros(2, DIM + 8)]}, "x is"),
        ({"sequences": [torch.zeros(2, DIM).double()]}, "x is"),
        ({"table": torch.zeros(2, 2, 5)}, "table is not"),
        ({"skip_layer": 2}, "no such layer"),
    ):
        with pytest.raises(ValueError, match=why):
            stack.run_sequences(**(sequences | changed_too))
    for i, bad in (
        (1, weight(2 * DIM, DIM)),
        (1, Weight.stack([gaussian(3 * DIM, DIM).half()])),
        (3, (torch.ones(DIM - 8), None)),
        (3, (torch.ones(DIM), torch.ones(2 * DIM)[::2])),
        (5, weight(8, 48)),
    ):
        with pytest.raises(ValueError, match="not"):
            CodecStack([(*parts[:i], bad, *parts[i + 1 :])], HEADS, 1e-5)
