"""Streams fed patch by patch replay graphs, and give the samples that they give without."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from helpers import in_threads, slow_after, write_pair
from replays import Counted, layered
from test_codec_stream import cut, random_codes, stream_in
from torch import Tensor

import mimo_fast
from mimo_fast.runtime.codec.geometry import (
    LOOKAHEAD,
    PATCH_FRAMES,
    default_lookahead,
    elastic_reach,
)
from mimo_fast.runtime.codec.graphs import StreamGraphs, usual_shapes
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.offload import offload
from mimo_fast.runtime.engine.voicing import ReplyReader, Voicing, voice
from mimo_fast.runtime.lm.decode import Group

STATED = {"streaming_moments": [[0.1, 1.2], [-0.2, 0.8]], "vocoder_num_layers": 3}


def graphed(codec: Codec) -> tuple[Codec, Counted]:
    """A copy with stand-ins for CUDA graphs, which decodes nothing again, as on a GPU."""
    codec, counted = copy.copy(codec), Counted()
    codec.again = 0
    codec.stream_graphs = StreamGraphs(codec, counted)
    return codec, counted


@pytest.fixture(scope="module")
def deep(deep) -> Codec:
    """The shared one, which decodes nothing again, as on a GPU."""
    codec = layered(deep)
    codec.again = 0
    return codec


@pytest.fixture(scope="module", params=["kit", "stated", "late"])
def plain(request, tmp_path_factory) -> Codec:
    """The kit's codec, one with stated moments, one that first decodes two vocoder blocks."""
    if request.param == "kit":
        codec = layered(request.getfixturevalue("model").codec)
    else:
        changed = STATED if request.param == "stated" else {"avg_pooler": 4}
        pair = write_pair(tmp_path_factory.mktemp(request.param), {}, changed)
        codec = layered(mimo_fast.load(*pair, device="cpu").codec)
    codec.again = 0
    return codec


def wait(codec: Codec) -> int:
    """Code frames that wait before the first decode."""
    return default_lookahead(codec.config) * PATCH_FRAMES


def warmed(codec: Codec) -> int:
    """Graphs that are captured ahead of time for one stream."""
    exact, elastic = default_lookahead(codec.config), elastic_reach(codec.config)
    return sum(len(usual_shapes(codec.config, patches)) for patches in {exact, elastic})


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert [len(part) for part in got] == [len(part) for part in want]
    assert all(map(torch.equal, got, want))


def test_the_waits_differ(plain):
    assert (default_lookahead(plain.config) == LOOKAHEAD) == (plain.config.moments is None)


def test_shapes_are_few(model, deep):
    """First, next and last; of elastic streams a first and a ramp beside those with statistics."""
    assert [len(usual_shapes(model.codec.config, patches)) for patches in (10, 2)] == [3, 5]
    # Where exact streams hold back as much as elastic ones they share all but the first.
    assert len(usual_shapes(deep.config, LOOKAHEAD)) == 5


@pytest.mark.parametrize("more", slow_after(4, [-5, 0, 1, 160, 4, 12, 281]))
def test_patch_by_patch_every_chunk_is_a_replay(plain, more):
    """From the first decode on, and at the end, but not for a rest of less than a patch."""
    codec, counted = graphed(plain)
    total = wait(codec) + more
    codes, sizes = random_codes(codec.config, total), cut(total, [PATCH_FRAMES])
    same(stream_in(codec, codes, sizes), stream_in(plain, codes, sizes))
    assert counted.replays == (more // PATCH_FRAMES + 1 if more > 0 else 0)
    assert counted.captures == min(counted.replays, 3)


MIXED = [4] * 14 + [7] + [4] * 9 + [1, 3, 50] + [4] * 6


@pytest.mark.parametrize("sizes", slow_after(1, [MIXED, [30, 4], [60, 4, 4], [160, 4, 4]]))
def test_pushes_of_any_size_mix_with_replays(plain, sizes):
    codec, counted = graphed(plain)
    lengths = cut(400, sizes)
    codes = random_codes(codec.config, 400)
    for last_by_finish in (False, True):
        counted.replays = 0
        got = stream_in(codec, codes, lengths, last_by_finish=last_by_finish)
        same(got, stream_in(plain, codes, lengths, last_by_finish=last_by_finish))
        assert (not last_by_finish) <= counted.replays <= lengths.count(PATCH_FRAMES) + 1


def test_graphs_serve_streams_that_are_decoded_again_and_that_are_not(plain):
    """One row serves both in turn; a chunk is a replay where a stream is not decoded again."""
    codec, counted = graphed(plain)
    codes, sizes = random_codes(codec.config, 280), cut(280, [PATCH_FRAMES])
    replays = []
    for again in (256, 0):
        counted.replays = 0
        got = stream_in(codec, codes, sizes, again=again)
        same(got, stream_in(plain, codes, sizes, again=again))
        replays.append(counted.replays)
    assert counted.captures == 3
    # At least the chunks after the 256th frame, and the end.
    assert 7 <= replays[0] < replays[1] == (280 - wait(codec)) // PATCH_FRAMES + 1


def test_streams_take_turns_over_rows_that_keep_no_trace(plain):
    codec, counted = graphed(plain)
    codec.warmup(2, progress=False)
    assert counted.captures == warmed(codec)
    total = wait(codec) + 40
    sizes = cut(total, [PATCH_FRAMES])
    for seed in range(3):
        ours, theirs = (random_codes(codec.config, total, 2 * seed + i) for i in range(2))
        want = [stream_in(plain, codes, sizes) for codes in (ours, theirs)]
        streams, parts = [codec.stream(), codec.stream()], [[], []]
        pool = streams[0].state().pool
        assert [stream.state().row for stream in streams] == [0, 1]
        for pushes in zip(ours.split(sizes, dim=1), theirs.split(sizes, dim=1), strict=True):
            for stream, got, push in zip(streams, parts, pushes, strict=True):
                got.append(stream.push(push))
        for i in range(2):
            # In every other round the first is dropped before its end.
            if i or seed % 2:
                parts[i].append(streams[i].finish())
                same(parts[i], want[i])
        streams[0].close()
        streams[0].close()
        assert pool.used == 1
        del stream, streams
        gc.collect()
        assert pool.used == 0
    assert counted.captures == warmed(codec)
    assert counted.replays == 2 * 3 * 10 + 4


def test_streams_too_many_have_pools_of_their_own(plain):
    """Twice as many rows each time; they are given back, but those that were asked for."""
    codec, counted = graphed(plain)
    codec.warmup(1, progress=False)
    streams = [codec.stream() for _ in range(5)]
    pools = {id(stream.state().pool): stream.state().pool for stream in streams}
    assert [pool.capacity for pool in pools.values()] == [1, 1, 2, 4]
    assert counted.captures == warmed(codec)
    codes = random_codes(codec.config, wait(codec) + 4)
    want = plain.stream().push(codes)
    assert all(torch.equal(stream.push(codes), want) for stream in streams)
    # A graph a pool, for the first chunk.
    assert counted.captures == warmed(codec) + 3
    for stream in streams:
        stream.close()
        assert stream.nbytes == 0
    with pytest.raises(ValueError, match="closed"):
        streams[0].push(random_codes(codec.config, 4))
    again = codec.stream()
    assert again.state().pool is next(iter(pools.values()))
    assert len(codec.stream_graphs._graphs[default_lookahead(codec.config)]) == 1
    again.close()
    codec.warmup(1, progress=False)
    assert counted.captures == warmed(codec) + 3


def test_threads_push_at_the_same_time(plain):
    codec, counted = graphed(plain)
    total = wait(codec) + 60
    sizes = cut(total, [PATCH_FRAMES])
    codes = [random_codes(codec.config, total, seed) for seed in range(4)]
    found = in_threads(lambda i: stream_in(codec, codes[i], sizes), 4)
    for i in range(4):
        same(found[i], stream_in(plain, codes[i], sizes))
    assert counted.replays == 4 * 16


def test_what_was_not_captured_goes_without(plain):
    """Another look-ahead, layers in host memory or other layers."""
    codec, counted = graphed(plain)
    codes, lengths = random_codes(codec.config, 60), cut(60, [PATCH_FRAMES])
    ours, theirs = (stream_in(each, codes, lengths, lookahead=4) for each in (codec, plain))
    same(ours, theirs)
    other = copy.copy(codec)
    other.config = replace(codec.config, decoder_layers=1)
    other.decoder = replace(codec.decoder, layers=codec.decoder.layers[:1])
    stream_in(other, codes, lengths)
    codec.vocoder = offload(codec.vocoder, codec.device)
    codec.warmup(2, progress=False)
    stream_in(codec, codes, lengths)
    assert counted.captures == counted.replays == 0


@pytest.mark.parametrize("lookahead", ["exact", "elastic"])
def test_graphs_serve_statistics_of_any_source(plain, lookahead):
    """One set of graphs, statistics of one stream after those of another."""
    codec, counted = graphed(plain)
    codes = [random_codes(codec.config, 84, seed) for seed in range(3)]
    sizes = cut(84, [PATCH_FRAMES])
    captured = None
    for i in (0, 1, 2):
        options = {"lookahead": lookahead, "moments": codec.moments(codes[i - 1])}
        before = counted.replays
        same(
            stream_in(codec, codes[i], sizes, **options),
            stream_in(plain, codes[i], sizes, **options),
        )
        # Every patch from the first samples on, and the end.
        held = elastic_reach(codec.config) if lookahead == "exact" else 1
        assert counted.replays - before == len(sizes) - held + 1
        captured = captured or counted.captures
        assert counted.captures == captured
    # With others, the samples are others.
    here, there = (
        torch.cat(
            stream_in(codec, codes[0], sizes, lookahead=lookahead, moments=codec.moments(each))
        )
        for each in codes[1:]
    )
    assert not torch.equal(here, there)


def assert_elastic_replays(source: Codec, sizes: list[int], known: bool) -> None:
    """Streams of 26 patches and half of one give what they give without graphs."""
    codec, counted = graphed(source)
    codes, lengths = random_codes(codec.config, 106, 5, 8), cut(106, sizes)
    moments = codec.moments(codes[:, :80]) if known else None
    options = {"lookahead": "elastic", "moments": moments}
    for last_by_finish in (False, True):
        counted.replays = 0
        options["last_by_finish"] = last_by_finish
        got, want = (stream_in(each, codes, lengths, **options) for each in (codec, source))
        same(got, want)
        if sizes == [4]:
            # All but the patch that waits and a rest of less than a patch.
            assert counted.replays == 26 - last_by_finish
    assert counted.captures <= 4 + (elastic_reach(codec.config) > 1)


@pytest.mark.parametrize("sizes", slow_after(1, [[4], [9, 4], [4, 8], [1], [160, 4], MIXED]))
@pytest.mark.parametrize("known", [False, True])
def test_elastic_streams_replay_what_they_give_without(plain, sizes, known):
    assert_elastic_replays(plain, sizes, known)


@pytest.mark.parametrize("sizes", slow_after(1, [[4], [9, 4], [4, 8, 4]]))
def test_one_graph_serves_all_of_a_long_ramp(deep, sizes):
    assert_elastic_replays(deep, sizes, known=True)


def test_an_elastic_stream_that_ends_in_its_ramp(deep):
    """Its last chunk has no graph; the state serves the next stream as if nothing had been."""
    codec, counted = graphed(deep)
    for frames in (4, 8, 12, 36, 84):
        codes, sizes = random_codes(codec.config, frames, frames, 8), cut(frames, [PATCH_FRAMES])
        counted.replays = 0
        got = stream_in(codec, codes, sizes, lookahead="elastic")
        same(got, stream_in(deep, codes, sizes, lookahead="elastic"))
        assert counted.replays == frames // PATCH_FRAMES - 1 + (frames >= 80)


def test_a_user_in_inference_mode_spoils_no_state(plain):
    codec, _ = graphed(plain)
    codes, lengths = random_codes(codec.config, 60), cut(60, [PATCH_FRAMES])
    with torch.inference_mode():
        first = stream_in(codec, codes, lengths)
    gc.collect()
    same(stream_in(codec, codes, lengths), first)


def test_a_reply_gives_its_row_back_at_once(model):
    codec, counted = graphed(model.codec)
    spoken = Group(model.lm.empty_id, torch.zeros(8, PATCH_FRAMES, dtype=torch.int64), False)
    reply = Voicing(ReplyReader(model.tokenizer, True), codec)
    for _ in range(LOOKAHEAD + 3):
        (made,) = voice([reply], [spoken])
        reply.accept(made.reading)
    pool = reply._stream.state().pool
    assert pool.used == 1
    reply.close()
    assert pool.used == 0
    assert counted.replays == 3
    again = Voicing(ReplyReader(model.tokenizer, True), codec)
    for group in (spoken, replace(spoken, finished=True)):
        (made,) = voice([again], [group])
        again.accept(made.reading)
    # At its end, too.
    assert pool.used == 0
