"""Streams of a codec whose layers are persistent kernels, on a CPU."""

import copy
import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import products_by_cuda
from engine_codecs import (
    DIM,
    SHARED,
)
from helpers import raising, write_pair
from replays import Counted
from torch import Tensor

import mimo_fast
from mimo_fast.errors import NumericError
from mimo_fast.kernels.cuda.engine_launch import Grid, declared
from mimo_fast.runtime.codec import together
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.persistent import (
    PERSISTENT,
    Persistent,
    PersistentDecoder,
    PersistentVocoder,
    persistent,
)
from mimo_fast.runtime.codec.pools import CodecPools
from mimo_fast.runtime.codec.together import Push


@pytest.fixture(scope="module")
def library(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    return declared(emulated_cuda)


CONFIG = {
    "d_model": DIM,
    "decoder_ffn_dim": 256,
    "decoder_layers": 2,
    "vocoder_dim": 128,
    "vocoder_attention_heads": 8,
    "vocoder_intermediate_dim": 256,
    "vocoder_num_layers": 2,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("codec"), {}, CONFIG)


@pytest.fixture(scope="module")
def today(pair, emulated_cuda) -> Codec:
    """Without the persistent kernel; its weights are joined as on a GPU."""
    with products_by_cuda(emulated_cuda, new_paths=False):
        codec = mimo_fast.load(*pair, device="cpu", dtype="bfloat16").codec
    codec.again = 0
    return codec


@pytest.fixture
def engine(today, library, monkeypatch) -> Codec:
    """Streams of several rows at once, as on a GPU with `NewPath.CODEC_ROWS`."""
    monkeypatch.setattr(together, "most_rows", lambda codec: together.MOST_ROWS)
    codec = copy.copy(today)
    codec.pools = CodecPools()
    stacks, grid = (codec.decoder, codec.vocoder), Grid(9, SHARED, threads=32)
    layers = Persistent(*stacks, codec.dtype, codec.device, grid, library)
    assert layers.decoder is not None
    assert layers.vocoder is not None
    vars(codec)[PERSISTENT] = stacks, layers
    return codec


def random_codes(codec: Codec, frames: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = codec.config.codebook_sizes
    return torch.stack([torch.randint(0, size, (frames,), generator=generator) for size in sizes])


def streamed(codec: Codec, codes: list[Tensor], size: int = 4) -> list[Tensor]:
    """Waveforms of streams that are advanced together; the last push of each ends it."""
    streams, parts = [codec.stream() for _ in codes], [list(each.split(size, 1)) for each in codes]
    found: list[list[Tensor]] = [[] for _ in codes]
    while any(parts):
        asked = [(i, Push(streams[i], own.pop(0), not own)) for i, own in enumerate(parts) if own]
        for (i, _), wav in zip(asked, codec.advance([push for _, push in asked]), strict=True):
            assert isinstance(wav, Tensor), wav
            found[i].append(wav)
    return [torch.cat(own) for own in found]


def counted(layers: PersistentDecoder | PersistentVocoder, monkeypatch) -> list[int]:
    """Rows of each call from now on."""
    rows, run = list[int](), layers.run

    def counting(x: Tensor, *others: Any) -> Any:
        rows.append(x.shape[0] * x.shape[1])
        return run(x, *others)

    monkeypatch.setattr(layers, "run", counting)
    return rows


def check_streams(pair, engine, today, monkeypatch, lengths: list[int], size: int = 4) -> None:
    codes = [random_codes(engine, length, seed) for seed, length in enumerate(lengths)]
    layers = persistent(engine)
    rows = [counted(each, monkeypatch) for each in (layers.decoder, layers.vocoder)]
    got, eager = streamed(engine, codes, size), streamed(today, codes, size)
    assert all(rows)
    plain = mimo_fast.load(*pair, device="cpu").codec
    plain.again = 0
    exact = streamed(plain, codes, size)
    for found, other, want in zip(got, eager, exact, strict=True):
        assert (found - want).norm() <= 2 * (other - want).norm()
    for each, found in zip(codes, got, strict=True):
        assert torch.equal(streamed(engine, [each], size)[0], found)


def test_streams_open_go_on_and_finish(pair, engine, today, monkeypatch):
    check_streams(pair, engine, today, monkeypatch, [48])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "size"), [([60, 48, 56], 4), ([47, 90], 13), ([320], 16), ([3], 4), ([49], 1)]
)
def test_streams_of_any_lengths(pair, engine, today, monkeypatch, lengths, size):
    check_streams(pair, engine, today, monkeypatch, lengths, size)


def test_a_launch_that_gave_up_says_so_once(engine, monkeypatch):
    codes, layers = random_codes(engine, 52, 0), persistent(engine)
    wanted = streamed(engine, [codes])[0]

    launcher = layers.decoder.launcher

    def gives_up(rows: int, given: dict[str, Tensor], outputs: list[Tensor], **fields) -> None:
        launcher.error.fill_(1)
        for output in outputs:
            output.fill_(torch.nan)

    monkeypatch.setattr(launcher, "attempt", gives_up)
    with pytest.warns(UserWarning, match="gave up"), pytest.raises(NumericError, match="gave up"):
        streamed_alone(engine, codes)
    for each in (layers.decoder, layers.vocoder):
        monkeypatch.setattr(each.launcher, "attempt", raising(AssertionError))
    got = streamed(engine, [codes])[0]
    assert (got - wanted).norm() <= 0.1 * wanted.norm()


def streamed_alone(codec: Codec, codes: Tensor) -> Tensor:
    stream = codec.stream()
    return torch.cat([*map(stream.push, codes.split(4, 1)), stream.finish()])


def test_a_copy_has_its_own(engine):
    layers = persistent(engine)
    assert layers is not None
    other = copy.copy(engine)
    assert persistent(other) is layers
    # Nothing asks for one on a CPU.
    other.decoder = replace(engine.decoder)
    assert persistent(other) is None
    assert persistent(engine) is layers


@pytest.mark.slow
def test_graphs_are_captured_anew_after_it_gave_up(engine, monkeypatch):
    capture = Counted()
    graphs = StreamGraphs(engine, capture=capture, together=True)
    engine.stream_graphs = graphs
    codes = random_codes(engine, 60, 0)
    first = streamed_alone(engine, codes)
    before, layers = capture.captures, persistent(engine)
    assert torch.equal(streamed_alone(engine, codes), first)
    assert capture.captures == before > 0
    layers.error.on = False
    streamed_alone(engine, codes)
    assert capture.captures == 2 * before
