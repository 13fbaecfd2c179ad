"""Several recordings encoded in one call: each has the codes that it has alone, bit for bit."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import fault, seeded, slow_after, write_pair
from replays import Counted
from torch import Tensor
from variants import SMALL, WIDE

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.errors import AudioError, NumericError
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.codec_stack import CodecStack as NativeStack
from mimo_fast.runtime.codec.encoder_graphs import EncoderGraphs
from mimo_fast.runtime.codec.layers import LayerByLayer
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.network import PASS_FRAMES, CodecNetwork, MelRow
from mimo_fast.runtime.codec.offload import HostLayers

RATE = 24000
WORDS = Path(__file__).parents[2] / "words"
NEVER = torch.full((3 * RATE,), math.nan)


def in_torch(codec: Codec) -> Codec:
    """A copy whose encoder is computed in torch, as a large one or one on a GPU is."""
    codec = copy.copy(codec)
    codec.encoder = replace(codec.encoder)
    codec.encoder.__dict__["executor"] = LayerByLayer(codec.encoder)
    return codec


VARIANTS = {
    "kit": None,
    "nano": None,
    "in torch": None,
    "bfloat16": None,
    "int8": None,
    "no pooling": (SMALL.lm, SMALL.codec),
    "causal and windowed": (WIDE.lm, WIDE.codec),
    "a window": ({}, {"encoder_attn_window_size": [20, 7], "stride_size": 3}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def codec(request, tmp_path_factory) -> Codec:
    if request.param == "nano":
        return mimo_fast.load(device="cpu").codec
    if request.param in ("kit", "in torch"):
        model = request.getfixturevalue("model")
        return in_torch(model.codec) if request.param == "in torch" else model.codec
    directory = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    pair = write_pair(directory, *(VARIANTS[request.param] or ({}, {})))
    options = {"bfloat16": {"dtype": "bfloat16"}, "int8": {"quantization": {"codec": "int8"}}}
    return mimo_fast.load(*pair, device="cpu", **options.get(request.param, {})).codec


def noise(samples: int, seed: int) -> Tensor:
    """As loud as speech, louder or quieter."""
    level = 0.1 * 4.0 ** float(torch.randn((), generator=seeded(seed)))
    return level * torch.randn(samples, generator=seeded(seed + 1))


def lengths_of(seed: int, count: int, longest: float) -> list[int]:
    """Mostly short: half of them below a tenth of the longest, in seconds."""
    shares = torch.rand(count, generator=seeded(seed)) ** 3
    return [max(1, round(float(share) * longest * RATE)) for share in shares]


def row_of(codec: Codec, wav: Tensor) -> MelRow:
    mel = codec.log_mel(wav)
    (row,) = codec.mel_rows(mel, [len(mel)])
    return row


def assert_as_alone(codec: Codec, waves: list[Tensor]) -> None:
    found = codec.encode_together(waves)
    assert len(found) == len(waves)
    for wav, codes in zip(waves, found, strict=True):
        assert torch.equal(codes, codec.encode(wav))


@pytest.mark.parametrize("seed", slow_after(2, range(12)))
def test_each_has_the_codes_that_it_has_alone(codec, seed):
    lengths = lengths_of(seed, 2 + seed % 6, 8.0)
    assert_as_alone(codec, [noise(n, 100 * seed + i) for i, n in enumerate(lengths)])


def test_outputs_have_the_bits_that_they_have_alone(codec):
    """Codes would hide a difference."""
    rows = [row_of(codec, noise(240 * n, n)) for n in (30, 1, 97, 250, 4)]
    together = codec.encode_rows(rows)
    for row, output in zip(rows, together, strict=True):
        (alone,) = codec.encode_rows([row])
        assert torch.equal(output, alone)
    backwards = codec.encode_rows(rows[::-1])[::-1]
    assert all(map(torch.equal, together, backwards))


def test_neighbours_that_hold_no_numbers_change_nothing(codec):
    wav = noise(2 * RATE, 5)
    first, lost, last = codec.encode_together([wav, NEVER, wav])
    assert isinstance(lost, AudioError)
    assert "NaN" in str(lost)
    for codes in (first, last):
        assert torch.equal(codes, codec.encode(wav))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(model, threads):
    codec, before = model.codec, torch.get_num_threads()
    rows = [row_of(codec, noise(n, n)) for n in (9600, 24000, 481, 60000)]
    convolved = [codec.convolved(row.mel, row.padded) for row in rows]
    want = codec.encoder.run_sequences(convolved, codec.config.skip_layer)
    try:
        torch.set_num_threads(threads)
        if codec.encoder.fused:
            got = codec.encoder.run_sequences(convolved, codec.config.skip_layer)
            assert all(map(torch.equal, got, want))
    finally:
        torch.set_num_threads(before)


def test_the_kit_s_recordings_have_the_kit_s_codes(model, golden, audio):
    waves = [load_audio(file, RATE) for file in audio]
    for i, codes in enumerate(model.codec.encode_together(waves)):
        assert torch.equal(codes, golden.get(f"codec:codes.{i}"))


def test_nano_s_codes_are_those_of_plain_torch():
    """The native call rounds otherwise, by a millionth of the largest output."""
    codec = mimo_fast.load(device="cpu").codec
    waves = [load_audio(file, RATE) for file in sorted(WORDS.glob("*.flac"))]
    assert len(waves) == 24
    for wav, codes in zip(waves, codec.encode_together(waves), strict=True):
        assert torch.equal(codes, in_torch(codec).encode(wav))
        row = row_of(codec, wav)
        (got,), (want,) = codec.encode_rows([row]), in_torch(codec).encode_rows([row])
        assert float((got - want).abs().max()) < 2e-6 * float(want.abs().max())


@pytest.mark.parametrize("plainly", [False, True])
def test_segments_of_long_recordings(model, plainly):
    """Of a recording over 60 s the last segment is encoded as if zero frames followed it; a full
    one and the only one are not."""
    codec = in_torch(model.codec) if plainly else model.codec
    seconds = (2.0, 61.3, 60.0, 121.02, 0.01)
    assert_as_alone(codec, [noise(round(s * RATE), i) for i, s in enumerate(seconds)])


def test_a_pass_holds_a_minute(model, monkeypatch):
    """Or one segment; what is packed is counted, and log-mel is not computed ahead."""
    codec, passes, ahead = model.codec, list[list[int]](), list[int]()
    encode, mel_of, made = codec.encode_rows, codec.log_mel, 0

    def counted(rows):
        passes.append([len(row.mel) for row in rows])
        ahead.append(made)
        return encode(rows)

    def log_mel(wav):
        nonlocal made
        made += 1
        return mel_of(wav)

    monkeypatch.setattr(codec, "encode_rows", counted)
    monkeypatch.setattr(codec, "log_mel", log_mel)
    codec.encode_together([noise(20 * RATE, 0) for _ in range(8)])
    assert [len(each) for each in passes] == [2, 2, 2, 2]
    assert all(sum(each) <= PASS_FRAMES for each in passes)
    assert ahead == [3, 5, 7, 8]
    passes.clear()
    codec.encode_together([noise(RATE, 0) for _ in range(40)])
    assert [len(each) for each in passes] == [40]
    passes.clear()
    codec.encode(noise(130 * RATE, 0))
    assert passes == [[6000], [6000], [1001]]


def test_layers_are_read_once_for_a_pass(model, monkeypatch):
    """Those in host memory are copied once for all recordings, not once for each."""
    codec, copies = in_torch(model.codec), 0
    codec.offload_encoder()
    iterate = HostLayers.__iter__

    def counted(layers):
        nonlocal copies
        for layer in iterate(layers):
            copies += 1
            yield layer

    monkeypatch.setattr(HostLayers, "__iter__", counted)
    waves = [noise(RATE * (1 + i), i) for i in range(8)]
    codec.encode_together(waves)
    together, copies = copies, 0
    for wav in waves:
        codec.encode(wav)
    assert (together, copies) == (len(codec.encoder.layers), 8 * len(codec.encoder.layers))


@pytest.mark.skipif(not native.available(), reason=f"the native kernels are {native.state()}")
def test_a_small_codec_is_one_native_call(model, monkeypatch):
    calls, run = list[int](), NativeStack.run_sequences

    def counted(stack, sequences, *arguments):
        calls.append(len(sequences))
        return run(stack, sequences, *arguments)

    monkeypatch.setattr(NativeStack, "run_sequences", counted)
    assert model.codec.encoder.fused
    model.codec.encode_together([noise(RATE, i) for i in range(8)])
    assert calls == [8]


def test_an_error_is_its_recording_s_own(model, monkeypatch):
    codec, wav = model.codec, noise(RATE, 1)
    others = [torch.zeros(0), torch.zeros(2, 5), torch.zeros(9, dtype=torch.int16), NEVER]
    found = codec.encode_together([wav, *others, wav], 3)
    for codes in (found[0], found[-1]):
        assert torch.equal(codes, codec.encode(wav, 3))
    for each, lost in zip(others, found[1:-1], strict=True):
        assert str(lost) == fault(lambda each=each: codec.encode(each, 3), AudioError)
    assert codec.encode_together([]) == []
    # Of what goes wrong while several are computed, too.
    encode = codec.encode_rows

    def refuses_long(rows):
        if any(len(row.mel) > 200 for row in rows):
            raise MemoryError("too long")
        return encode(rows)

    monkeypatch.setattr(codec, "encode_rows", refuses_long)
    first, lost, last = codec.encode_together([wav, noise(3 * RATE, 2), wav])
    assert isinstance(lost, MemoryError)
    assert torch.equal(first, last)


def test_weights_that_are_not_finite(model):
    codec = in_torch(model.codec)
    weight, bias = codec.conv2
    codec.conv2 = weight.clone().fill_(math.inf), bias
    for lost in codec.encode_together([noise(RATE, 1), noise(9, 1)]):
        assert isinstance(lost, NumericError)
        assert "encoder.conv2" in str(lost)


def test_measured(codec):
    waves = [noise(n, n) for n in (24000, 500, 70000)]
    for wav, (codes, loss) in zip(waves, codec.encode_measured_together(waves, 3), strict=True):
        alone, lost = codec.encode_measured(wav, 3)
        assert torch.equal(codes, alone)
        assert torch.equal(loss, lost)
    first, second = codec.encode_measured_together([torch.zeros(0), waves[0]])
    assert isinstance(first, AudioError)
    assert torch.equal(second[0], codec.encode(waves[0]))


def test_by_graph_each_is_replayed(model):
    """Those that no graph takes go the other way; results are in order."""
    codec, counted = copy.copy(model.codec), Counted()
    codec.encoder_graphs = EncoderGraphs(codec, counted)
    waves = [noise(round(s * RATE), i) for i, s in enumerate((1, 20, 3, 0.001, 3, 17))]
    found = codec.encode_together([*waves, torch.zeros(0)], 8)
    assert counted.replays == 4
    for wav, codes in zip(waves, found[:-1], strict=True):
        assert torch.equal(codes, codec.encode(wav, 8))
    assert isinstance(found[-1], AudioError)


def test_gradients_take_the_way_in_torch(model):
    mel = model.codec.log_mel(noise(RATE, 1)).requires_grad_()
    assert CodecNetwork.encode_mel(model.codec, mel).requires_grad
