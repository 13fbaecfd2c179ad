"""Chunks of a small codec's streams in one native call, against `decode_rows` in plain torch."""

import copy
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers import snr_db, write_pair
from test_small_codec import NANO

import mimo_fast
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.codec_decoder import Buffers, Chunk, CodecDecoder
from mimo_fast.runtime.codec.fused import buffers_of, fused_decoder
from mimo_fast.runtime.codec.geometry import patch_rows, vocoder_frames
from mimo_fast.runtime.codec.incremental import RowNumbers, Shape, decode_rows
from mimo_fast.runtime.codec.layers import CodecStack, LayerByLayer
from mimo_fast.runtime.codec.pools import CodecPool, CodecState
from mimo_fast.runtime.codec.prior import know
from mimo_fast.runtime.codec.schedule import Known, Schedule
from mimo_fast.runtime.codec.state import SETTLING, WHOLE_UTTERANCE, NormStatistics, Rows

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)

QUESTION = Path(mimo_fast.__file__).parent / "assets" / "question.wav"

CODECS = {
    "kit": {},
    "nano": NANO | {"nfft": 960, "hop_length": 240, "window_size": 960, "stride_size": 2},
    "rms": NANO | {"ln_type": "RMSNorm", "decoder_attn_window_size": [20, 0]},
    "unpooled": {"avg_pooler": 1, "vocoder_attn_window_size": [3, 5], "vocoder_num_layers": 3},
    "wide": {"decoder_kernel_size": 7, "vocoder_attn_window_size": [9, 0], "vocoder_num_layers": 1},
}

RANDOM_DB = 108
"""Random weights make float32's rounding louder than trained ones do: `decode_rows` itself is at
112 to 120 dB with its stacks in native calls and in plain torch."""


def load(directory, changed: dict):
    return mimo_fast.load(*write_pair(directory, {}, changed), device="cpu").codec


@pytest.fixture(params=CODECS, scope="module")
def codec(request, tmp_path_factory):
    return load(tmp_path_factory.mktemp(request.param), CODECS[request.param])


@pytest.fixture(scope="module")
def decoder(codec) -> CodecDecoder:
    made = fused_decoder(codec)
    assert made is not None
    return made


@dataclass
class Lane:
    """One stream: its state, computed natively, and what it is fed."""

    codec: object
    schedule: Schedule
    statistics: NormStatistics | None
    weight: float
    again: int
    state: CodecState = field(init=False)
    buffers: Buffers = field(init=False)

    def __post_init__(self) -> None:
        config = self.codec.config
        form = config, self.schedule.lookahead, torch.float32, self.codec.device
        self.state = CodecPool(*form, threading.Lock()).take()
        self.state.decode_again(self.again, SETTLING)
        know(config, self.state, self.statistics, self.weight)
        self.buffers = buffers_of(self.state.tensors)

    def begin_again(self) -> None:
        Rows.of([0], self.codec.device).rewind(self.state.tensors)
        self.state.frames = 0

    def lookahead(self, codes: int) -> int:
        config = self.codec.config
        return self.schedule.rows(config, self.state.frames + vocoder_frames(config, codes))

    def chunk(self, hidden: torch.Tensor, ended: bool) -> Chunk:
        state, known = self.state, [*Known].index(self.schedule.known)
        settled = ended or state.largest >= WHOLE_UTTERANCE
        counts = state.frames, state.committed, self.lookahead(len(hidden))
        return Chunk(self.buffers, 0, hidden, *counts, known, ended, settled)

    def plainly(self, hidden: torch.Tensor, ended: bool) -> torch.Tensor:
        state, config = self.state, self.codec.config
        before, new = (state.frames, state.committed), len(hidden)
        shape = Shape.of(config, self.schedule, before, new, anew=False, ended=ended)
        settled = ended or state.largest >= WHOLE_UTTERANCE
        numbers = [[before[0] - before[1]], [self.schedule.known], [settled]]
        rows = Rows.of([0], self.codec.device)
        found = decode_rows(
            self.codec,
            state.tensors,
            rows,
            hidden[None],
            RowNumbers(torch.tensor(numbers, dtype=torch.int64)),
            shape,
        )
        state.frames += vocoder_frames(config, new)
        state.committed += shape.decided
        return found[0]


def statistics(codec, seed: int) -> NormStatistics:
    codes = torch.stack(
        [
            torch.randint(0, size, (30,), generator=torch.Generator().manual_seed(seed))
            for size in codec.config.codebook_sizes
        ]
    )
    return codec.moments(codes)


def lanes(codec, count: int, seed: int) -> list[list[Lane]]:
    """Streams of all kinds, in pairs: one to compute natively, one plainly."""
    pick, found = random.Random(seed), []
    for i in range(count):
        known = [*Known][i % 3]
        lookahead = pick.choice([0, 1, 2, 10, "elastic"])
        given = None if known is Known.NOTHING and lookahead != "elastic" else statistics(codec, i)
        schedule = Schedule.of(codec.config, lookahead, known)
        weight = float("inf") if known is Known.GIVEN else 7.0
        again = pick.choice([0, 256])
        found.append([Lane(codec, schedule, given, weight, again) for _ in range(2)])
    return found


def hidden_of(codec, length: int, pick: random.Random) -> torch.Tensor:
    generator = torch.Generator().manual_seed(pick.randrange(10**9))
    sizes = codec.config.codebook_sizes
    codes = torch.stack([torch.randint(0, size, (length,), generator=generator) for size in sizes])
    return codec.dequantize(codes)


def advance(decoder, streams: list[Lane], parts: list[torch.Tensor], ended: list[bool]):
    chunks = [lane.chunk(part, end) for lane, part, end in zip(streams, parts, ended, strict=True)]
    found = decoder.decode(chunks)
    for lane, each in zip(streams, found, strict=True):
        lane.state.frames, lane.state.committed = each.frames, each.committed
    return [each.samples for each in found]


def plain(monkeypatch, lane: Lane, part: torch.Tensor, end: bool) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(CodecStack, "executor", property(LayerByLayer))
        return lane.plainly(part, end)


@pytest.mark.parametrize("seed", range(2))
def test_chunks_of_any_streams_are_those_of_plain_torch(codec, decoder, seed, monkeypatch):
    """Openings, chunks of any size and ends, side by side; samples, then states."""
    pick, pairs = random.Random(seed), lanes(codec, 6, seed)
    heard = [([], []) for _ in pairs]
    live = [*range(len(pairs))]
    while live:
        joining = [i for i in live if pick.random() < 0.7] or live[:1]
        parts, ended = [], []
        for i in joining:
            begun = pairs[i][0].state.frames > 0
            longest = pick.choice([4, 4, 9, 40, 160])
            length = pick.randrange(0 if begun else 1, longest + 1)
            parts.append(hidden_of(codec, length, pick))
            ended.append(begun and pick.random() < 0.2)
            for lane in pairs[i]:
                lane.state.largest = max(lane.state.largest, length)
        found = advance(decoder, [pairs[i][0] for i in joining], parts, ended)
        for i, part, end, samples in zip(joining, parts, ended, found, strict=True):
            heard[i][0].append(samples)
            heard[i][1].append(plain(monkeypatch, pairs[i][1], part, end))
            assert heard[i][0][-1].shape == heard[i][1][-1].shape
            left, right = (lane.state for lane in pairs[i])
            assert (left.frames, left.committed) == (right.frames, right.committed)
            assert torch.equal(left.tensors.position, right.tensors.position)
            assert torch.equal(left.tensors.frame, right.tensors.frame)
            if end:
                live.remove(i)
    for (left, right), (got, want) in zip(pairs, heard, strict=True):
        assert snr_db(torch.cat(got), torch.cat(want)) > RANDOM_DB
        for norm in ("unpool", "to_mel"):
            one, other = (getattr(lane.state.tensors, norm)[0] for lane in (left, right))
            # Of the sums of means, which cancel, no more can be asked than of those of squares.
            assert bool(((one - other).abs() <= 1e-6 * other.abs().amax(1, keepdim=True)).all())


def test_speech_of_the_small_pair_is_that_of_plain_torch(monkeypatch):
    codec = mimo_fast.load("nano", device="cpu").codec
    decoder = fused_decoder(codec)
    codes = codec.encode(mimo_fast.load_audio(QUESTION, codec.sample_rate))
    parts, schedule = codec.dequantize(codes).split(4), Schedule.of(codec.config, 1, Known.NOTHING)
    left, right = (Lane(codec, schedule, None, 0.0, 0) for _ in range(2))
    got, want = [], []
    for i, part in enumerate(parts):
        ended = i == len(parts) - 1
        got += advance(decoder, [left], [part.contiguous()], [ended])
        want.append(plain(monkeypatch, right, part, ended))
    assert snr_db(torch.cat(got), torch.cat(want)) > 120


def test_a_stream_has_the_same_bits_in_any_company(codec, decoder):
    """Alone and among others, by one thread and by several."""
    threads = torch.get_num_threads()
    results = []
    try:
        for company in (False, True):
            torch.set_num_threads(3 if company else 1)
            pick = random.Random(5)
            streams = [pair[0] for pair in lanes(codec, 5, 9)]
            sizes = [[3, 0, 9], [40, 4, 4], [1, 70, 2], [8, 8, 8], [2, 4, 4]]
            heard = [[] for _ in streams]
            for turn in range(3):
                parts = [hidden_of(codec, size[turn], pick) for size in sizes]
                ended = [turn == 2] * 5
                groups = [[*range(5)]] if company else [[i] for i in range(5)]
                for group in groups:
                    found = advance(
                        decoder,
                        [streams[i] for i in group],
                        [parts[i] for i in group],
                        [ended[i] for i in group],
                    )
                    for i, samples in zip(group, found, strict=True):
                        heard[i].append(samples)
            results.append([torch.cat(each) for each in heard])
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(*results, strict=True):
        assert len(left)
        assert torch.equal(left, right)


@pytest.mark.parametrize("pieces", [[30, 2, 100, 3, 65, 50], [4] * 30, [200, 50]])
def test_decoding_again_from_the_start_is_that_of_plain_torch(codec, decoder, pieces, monkeypatch):
    """With frames = 0 all codes come again; nothing of the state has been zeroed."""
    pick = random.Random(1)
    schedule = Schedule.of(codec.config, 1, Known.NOTHING)
    left, right = (Lane(codec, schedule, None, 0.0, 256) for _ in range(2))
    past, got, want = [], [], []
    for turn, size in enumerate(pieces):
        past.append(hidden_of(codec, size, pick))
        again = turn % 3 == 1
        part = torch.cat(past) if again else past[-1]
        if again:
            left.state.frames = 0
            right.begin_again()
        ended = turn == len(pieces) - 1
        got += advance(decoder, [left], [part], [ended])
        want.append(plain(monkeypatch, right, part, ended))
        assert got[-1].shape == want[-1].shape
    assert snr_db(torch.cat(got), torch.cat(want)) > RANDOM_DB


def test_a_pool_is_read_by_its_strides(codec, decoder):
    """Rows of tensors [rows, ...], keys and values [layers, rows, ...]; rows between them stay."""
    pick = random.Random(3)
    schedule = Schedule.of(codec.config, 1, Known.NOTHING)
    parts = [hidden_of(codec, size, pick) for size in (12, 4)]
    lone = [Lane(codec, schedule, None, 0.0, 0) for _ in parts]
    want = advance(decoder, lone, parts, [False] * 2)
    pool = {}
    for name, tensor in lone[0].buffers._tensors.items():
        shape = (4, *tensor.shape[1:])
        if tensor.ndim == 5:
            filled = torch.full((shape[1], 4, *shape[2:]), 7.0).transpose(0, 1)
        else:
            filled = torch.full(shape, 7, dtype=tensor.dtype)
        if name.endswith("_expected"):
            filled[:] = tensor
        pool[name] = filled
    before = {name: tensor[[1, 2]].clone() for name, tensor in pool.items()}
    buffers = Buffers(**pool)
    chunks = [
        lane.chunk(part, False)._replace(
            buffers=buffers, row=row, frames=0, committed=0, lookahead=ahead
        )
        for lane, part, row, ahead in zip(
            lone, parts, (3, 0), [patch_rows(codec.config)] * 2, strict=True
        )
    ]
    found = decoder.decode(chunks)
    for each, samples in zip(found, want, strict=True):
        assert torch.equal(each.samples, samples)
    for name, tensor in pool.items():
        assert torch.equal(tensor[[1, 2]], before[name])


def test_a_copy_reads_its_own_weights(codec, decoder):
    pick = random.Random(4)
    schedule, part = Schedule.of(codec.config, 0, Known.NOTHING), hidden_of(codec, 9, pick)

    def decoded(by: CodecDecoder) -> torch.Tensor:
        return advance(by, [Lane(codec, schedule, None, 0.0, 0)], [part], [True])[0]

    want = decoded(decoder)
    other = copy.deepcopy(decoder)
    assert torch.equal(decoded(other), want)
    other._arguments[7].blocks[0].neg_()
    assert not torch.equal(decoded(other), want)
    assert torch.equal(decoded(decoder), want)


def test_what_does_not_fit_is_refused(codec, decoder):
    lane = Lane(codec, Schedule.of(codec.config, 1, Known.NOTHING), None, 0.0, 0)
    good = lane.chunk(hidden_of(codec, 4, random.Random(0)), False)
    for change, message in (
        ({"row": 1}, "row 1"),
        ({"hidden": good.hidden[:, :-1]}, "hidden is"),
        ({"hidden": good.hidden.double()}, "hidden is"),
        ({"lookahead": 10**6}, "held back"),
        ({"frames": 1}, "whole codes|no whole"),
        ({"committed": 10**6}, "committed"),
        ({"known": 3}, "known"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.decode([good._replace(**change)])
    with pytest.raises(ValueError, match="of one row"):
        decoder.decode([good, good])
    tensors = lane.buffers._tensors
    other = Buffers(**tensors | {"tail": tensors["tail"][:, :, 1:].contiguous()})
    with pytest.raises(ValueError, match="tail is"):
        decoder.decode([good._replace(buffers=other)])
    with pytest.raises(ValueError, match="not contiguous"):
        Buffers(**tensors | {"prior": tensors["prior"].float()})
    assert decoder.decode([]) == []


def test_what_it_does_not_know_goes_elsewhere(tmp_path, monkeypatch):
    assert fused_decoder(load(tmp_path / "odd", {"nfft": 481, "window_size": 481})) is None
    small = load(tmp_path / "small", {})
    with monkeypatch.context() as patch:
        patch.setenv("MIMO_FAST_KERNELS", "torch")
        assert fused_decoder(load(tmp_path / "torch", {})) is None
    assert fused_decoder(small) is not None


IN_SET = """
import sys, torch, mimo_fast
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.codec_decoder import Chunk
from mimo_fast.runtime.codec.fused import buffers_of, fused_decoder
codec = mimo_fast.load(sys.argv[1], sys.argv[2], device="cpu").codec
stream = codec.stream(1)
state = stream.state()
buffers, decoder, heard = buffers_of(state.tensors), fused_decoder(codec), []
for i, hidden in enumerate(torch.load(sys.argv[3]).split(7)):
    chunk = Chunk(buffers, 0, hidden, state.frames, state.committed, 16, 0, i == 4, i == 4)
    (found,) = decoder.decode([chunk])
    state.frames, state.committed = found.frames, found.committed
    heard.append(found.samples)
torch.save((native.compiled().instruction_set(), torch.cat(heard)), sys.argv[4])
"""


def test_sets_of_instructions_agree(tmp_path):
    pair = write_pair(tmp_path / "pair", {}, NANO)
    codec = mimo_fast.load(*pair, device="cpu").codec
    torch.save(hidden_of(codec, 35, random.Random(2)), tmp_path / "hidden")
    found = {}
    for name in native.compiled().instruction_sets():
        environment = {**os.environ, "MIMO_FAST_CPU": name, "OMP_NUM_THREADS": "1"}
        arguments = *map(str, pair), str(tmp_path / "hidden"), str(tmp_path / name)
        run = subprocess.run(
            [sys.executable, "-c", IN_SET, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        used, found[name] = torch.load(tmp_path / name)
        assert used == name
    for samples in found.values():
        assert snr_db(samples, found["portable"]) > RANDOM_DB
