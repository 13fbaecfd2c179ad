"""Rows of a pool: chunks of several streams are one computation, each with the samples it has
alone."""

import copy
import gc
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import slow_after, snr_db, watch, write_pair
from replays import Counted, layered
from test_codec_stream import cut, random_codes, stream_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mimo_fast
from mimo_fast.errors import NumericError
from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.runtime.codec import incremental, layers, together
from mimo_fast.runtime.codec.graphs import StreamGraphs, usual_shapes
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.pools import CodecPool, CodecPools
from mimo_fast.runtime.codec.state import NormStatistics, untouched_zeros
from mimo_fast.runtime.codec.together import Push

FORMS = {
    "kit": {},
    "no pooling": {"avg_pooler": 1, "ln_type": "RMSNorm", "vocoder_attn_window_size": [12, 3]},
    "wide": {"d_model": 96, "decoder_kernel_size": 4, "decoder_attn_window_size": [24, 0]},
    "long kernel": {"decoder_kernel_size": 6, "vocoder_num_layers": 5, "ln_type": "RMSNorm"},
    "stated": {"streaming_moments": [[0.1, 1.2], [-0.2, 0.8]], "vocoder_num_layers": 3},
    "one frame": {"avg_pooler": 1, "vocoder_attn_window_size": [1, 1], "decoder_layers": 1},
}


@pytest.fixture(scope="module", params=slow_after(3, [*FORMS]))
def codec(request, tmp_path_factory) -> Codec:
    pair = write_pair(tmp_path_factory.mktemp("rows"), {}, FORMS[request.param])
    return layered(mimo_fast.load(*pair, device="cpu").codec)


@pytest.fixture(scope="module")
def kit(model) -> Codec:
    codec = layered(model.codec)
    codec.again = 0
    return codec


def in_turns(
    codec: Codec, codes: list[Tensor], sizes: list[list[int]], options: list[dict], seed: int
) -> list[list[Tensor]]:
    """Streams advanced in random company; some end with their last codes, some after them."""
    rng, found = random.Random(seed), [list[Tensor]() for _ in codes]
    streams = [codec.stream(**each) for each in options]
    pushes = [list(each.split(size, dim=1)) for each, size in zip(codes, sizes, strict=True)]
    waiting = set(range(len(codes)))
    while waiting:
        asked = []
        for i in rng.sample(sorted(waiting), rng.randint(1, len(waiting))):
            part = pushes[i].pop(0) if pushes[i] else None
            last = part is None or (not pushes[i] and i % 2 == 0)
            asked.append((i, Push(streams[i], part, last)))
            waiting -= {i} if last else set()
        for (i, _), wav in zip(asked, codec.advance([push for _, push in asked]), strict=True):
            assert isinstance(wav, Tensor), wav
            found[i].append(wav)
    return found


def drawn(codec: Codec, rng: random.Random, known: NormStatistics) -> tuple[list[int], dict]:
    """Sizes of a stream's pushes, and its options."""
    total = rng.choice([1, 5, 43, 44, 70, 100, 130])
    sizes = cut(total, rng.choice([[4], [4], [4], [9, 4], [1, 3], [50]]))
    lookahead = rng.choice(["exact", "elastic", "elastic", 0, 1, 3])
    options = rng.choice([{}, {"moments": known}, {"moments": known, "weight": 30.0}])
    return sizes, {"lookahead": lookahead, "again": rng.choice([0, 0, 256]), **options}


@pytest.fixture(autouse=True)
def together_by_default(monkeypatch):
    """Several rows at once, as on a GPU with `NewPath.CODEC_ROWS`."""
    monkeypatch.setattr(together, "most_rows", lambda codec: together.MOST_ROWS)


def row_by_row(inner: Any) -> Any:
    """A product that a row has alone: a library's order of sums goes by the number of rows."""

    def product(x: Tensor, weight: Any, *, residual: Tensor | None = None) -> Tensor:
        lines = x.flatten(0, -2).split(1)
        others = [None] * len(lines) if residual is None else residual.flatten(0, -2).split(1)
        parts = [
            inner(line, weight, residual=other) for line, other in zip(lines, others, strict=True)
        ]
        return torch.cat(parts).unflatten(0, x.shape[:-1])

    return product


@pytest.mark.parametrize("seed", slow_after(1, [*range(6)]))
def test_one_row_at_a_time_has_the_bits_of_a_lone_stream(codec, seed, monkeypatch):
    monkeypatch.setattr(together, "most_rows", lambda codec: 1)
    in_company(codec, seed, torch.equal)


@pytest.mark.parametrize("seed", slow_after(1, [*range(6)]))
def test_a_stream_in_any_company_sounds_as_alone(codec, seed, monkeypatch):
    for module in (layers, incremental):
        monkeypatch.setattr(module, "matmul", row_by_row(matmul))
    in_company(codec, seed, lambda got, want: snr_db(got, want) >= 120)


def in_company(codec: Codec, seed: int, alike: Callable[[Tensor, Tensor], bool]) -> None:
    """Seven streams advanced together, compared with each alone."""
    rng, known = random.Random(seed), codec.moments(random_codes(codec.config, 60))
    drawings = [drawn(codec, rng, known) for _ in range(7)]
    sizes, options = zip(*drawings, strict=True)
    codes = [random_codes(codec.config, sum(size), seed + i) for i, size in enumerate(sizes)]
    before = codec.calls
    found = in_turns(codec, codes, list(sizes), list(options), seed)
    shared, before = codec.calls - before, codec.calls
    for i, got in enumerate(found):
        want = stream_in(codec, codes[i], sizes[i], last_by_finish=i % 2 == 0, **options[i])
        assert [len(part) for part in got] == [len(part) for part in want]
        assert alike(torch.cat(got), torch.cat(want))
    assert shared <= codec.calls - before


class Products(TorchDispatchMode):
    """Counts products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def spoken(codec: Codec, count: int, patches: int) -> list:
    """Streams that have been given so many patches each."""
    streams = [codec.stream("elastic") for _ in range(count)]
    for i in range(patches):
        codec.advance([Push(each, patch(codec, n, i)) for n, each in enumerate(streams)])
    return streams


def patch(codec: Codec, stream: int, number: int) -> Tensor:
    return random_codes(codec.config, 4, 100 * stream + number, 8)


def test_weights_are_read_once_for_all_streams(kit):
    """The same products for one stream and for 64, none of them once a stream."""
    found = []
    for count in (1, 64):
        streams, before = spoken(kit, count, 8), kit.calls
        pushes = [Push(each, patch(kit, n, 8)) for n, each in enumerate(streams)]
        with Products() as products:
            kit.advance(pushes)
        assert kit.calls == before + 1
        found.append(products.calls)
    for op in ("mm", "addmm", "_fft_c2r", "index_put_", "native_layer_norm"):
        assert found[0][op] == found[1][op], op
    assert found[0]["addmm"] + found[0]["mm"] > 0


def test_ages_share_what_has_one_shape(kit):
    """Streams in their first patch, their ramp and steady state: three computations."""
    codec = kit
    ages = [spoken(codec, count, age) for age, count in ((1, 3), (2, 2), (9, 4))]
    streams = [stream for group in ages for stream in group]
    before = codec.calls
    codec.advance([Push(each, patch(codec, n, 9)) for n, each in enumerate(streams)])
    assert codec.calls == before + 3


@pytest.fixture
def graphed(kit) -> tuple[Codec, Counted]:
    codec, counted = copy.copy(kit), Counted()
    codec.pools = CodecPools()
    codec.stream_graphs = StreamGraphs(codec, counted, together=True)
    return codec, counted


def test_a_tick_of_64_streams_is_one_replay(graphed, kit):
    codec, counted = graphed
    codec.warmup(64, progress=False)
    shapes = sum(len(usual_shapes(codec.config, patches)) for patches in (10, 2))
    assert counted.captures == 7 * shapes
    streams = [codec.stream("elastic") for _ in range(64)]
    ticks = []
    for i in range(7):
        counted.replays, before = 0, codec.calls
        codec.advance([Push(each, patch(codec, n, i)) for n, each in enumerate(streams)])
        assert codec.calls - before == counted.replays
        ticks.append(counted.replays)
    assert ticks == [0, *[1] * 6]
    counted.replays = 0
    codec.advance([Push(each, None, True) for each in streams[:33]])
    assert counted.replays == 1
    # Six of them, of two ages.
    codec.advance([Push(each, patch(codec, n, 0)) for n, each in enumerate(streams[:3])])
    counted.replays = 0
    chosen = [*streams[:3], *streams[61:]]
    codec.advance([Push(each, patch(codec, n, 7)) for n, each in enumerate(chosen)])
    assert counted.replays == 2
    assert counted.captures == 7 * shapes


def test_graphs_of_rows_in_random_company(graphed, kit):
    """Padded with a scratch row that holds what is not finite, as other rows may."""
    codec, counted = graphed
    codec.warmup(6, progress=False)
    for graphs in codec.stream_graphs._graphs.values():
        pool = graphs[0].pool
        for _, tensor in pool.tensors.named():
            if tensor.is_floating_point():
                tensor[pool.scratch] = torch.nan
    rng = random.Random(1)
    known = codec.moments(random_codes(codec.config, 60))
    options = [
        {"lookahead": rng.choice(["exact", "elastic"]), "moments": rng.choice([None, known])}
        for _ in range(6)
    ]
    sizes = [cut(total, [4]) for total in (60, 84, 70, 20, 90, 48)]
    codes = [random_codes(codec.config, sum(size), i) for i, size in enumerate(sizes)]
    found = in_turns(codec, codes, sizes, options, 3)
    assert 0 < counted.replays < sum(map(len, sizes))
    for i, got in enumerate(found):
        want = stream_in(kit, codes[i], sizes[i], last_by_finish=i % 2 == 0, **options[i])
        assert snr_db(torch.cat(got), torch.cat(want)) >= 120


@pytest.mark.parametrize("graphs", [False, True])
def test_codes_that_are_none_end_one_stream_alone(graphed, kit, graphs):
    codec = graphed[0] if graphs else kit
    if graphs:
        codec.warmup(4, progress=False)
    streams = spoken(codec, 4, 6)
    wrong = patch(codec, 1, 6)
    wrong[3, 2] = -1
    pushes = [Push(each, patch(codec, n, 6)) for n, each in enumerate(streams)]
    pushes[1] = Push(streams[1], wrong)
    found = codec.advance(pushes)
    assert isinstance(found[1], NumericError)
    alone = spoken(kit, 4, 6)
    for n in (0, 2, 3):
        assert snr_db(found[n], alone[n].push(patch(codec, n, 6))) >= 120
    # The row that it had serves the next stream.
    row = streams[1].state().row
    streams[1].close()
    fresh = codec.stream("elastic")
    assert fresh.state().row == row
    codes = random_codes(codec.config, 40, 9, 8)
    got = [*(fresh.push(part) for part in codes.split(4, dim=1)), fresh.finish()]
    want = stream_in(kit, codes, [4] * 10, lookahead="elastic")
    assert snr_db(torch.cat(got), torch.cat(want)) >= 120


def test_a_stream_is_advanced_once_a_call_and_by_its_codec(kit, model):
    stream = kit.stream()
    with pytest.raises(ValueError, match="two pushes"):
        kit.advance([Push(stream, patch(kit, 0, i)) for i in range(2)])
    (found,) = model.codec.advance([Push(stream, patch(kit, 0, 0))])
    assert isinstance(found, ValueError)


def test_pools_grow_and_shrink_while_streams_go_on(kit):
    codec = copy.copy(kit)
    codec.pools = CodecPools()
    streams = [codec.stream(1) for _ in range(20)]
    pool = streams[0].state().pool
    most, full = pool.capacity, pool.nbytes
    assert 20 <= most <= 30
    codes = [random_codes(codec.config, 60, i, 8) for i in range(20)]
    parts = {i: [streams[i].push(codes[i][:, :30])] for i in range(20)}
    # All but three are dropped, the first rows among them.
    kept = (7, 13, 19)
    for i in range(10):
        if i not in kept:
            streams[i].close()
    streams = [stream if i in kept else None for i, stream in enumerate(streams)]
    gc.collect()
    assert pool.used == 3
    assert pool.capacity <= 8
    assert pool.nbytes <= full * 8 / most
    for i in kept:
        parts[i].append(streams[i].push(codes[i][:, 30:]))
        want = stream_in(kit, codes[i], [30, 30], lookahead=1)
        assert snr_db(torch.cat(parts[i]), torch.cat(want[:2])) >= 120
        streams[i].close()
    assert pool.nbytes == 0


def test_a_stream_decoded_again_computes_the_vocoder_from_where_it_matters(kit, monkeypatch):
    """Frames of the waveform are computed again only as far as the windows reach."""
    frames = list[int]()
    watch(monkeypatch, incremental, "_vocode", lambda *args: frames.append(args[3].shape[1]))
    codes = random_codes(kit.config, 200, 4, 8)
    stream, counted = kit.stream(again=256), []
    for part in codes.split(4, dim=1):
        frames.clear()
        stream.push(part)
        counted.append(sum(frames))
    config = kit.config
    rows = config.pool * config.decoder_stride
    left, pending = config.vocoder_window[0], 40 * rows
    # Pending ones, a patch that was held back, and what either sees; with the end of a block among
    # them the pending ones twice.
    most = pending + 4 * rows + (config.vocoder_layers + 1) * left
    assert max(counted) <= most + pending < 0.6 * 200 * rows
    assert sum(found <= most for found in counted) > 0.6 * len(counted)


def test_rows_do_not_move_while_no_more_streams_come_than_were_expected(kit, monkeypatch):
    """To move the rows of many streams would make all of them wait."""
    codec, moves = copy.copy(kit), list[int]()
    codec.pools = CodecPools()
    codec.pools.expected = 20
    watch(monkeypatch, CodecPool, "_move", lambda pool, capacity: moves.append(capacity))
    streams = [codec.stream(1) for _ in range(20)]
    pool = streams[0].state().pool
    for stream in streams[1:]:
        stream.close()
    streams[1:] = [codec.stream(1) for _ in range(19)]
    assert moves == [pool.capacity] == [20]
    # One more than that moves them once, and they move back once.
    streams.append(codec.stream(1))
    for stream in streams[1:]:
        stream.close()
    assert moves == [20, 30, 20]
    streams[0].close()
    assert moves == [20, 30, 20, 0]
    assert pool.nbytes == 0


def test_a_model_expects_as_many_streams_as_it_has_slots(model):
    assert len(model.pipeline.engine.slots) == model.codec.pools.expected > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (3,), (5, 2, 7), (0, 4)])
def test_untouched_zeros(dtype, shape):
    found = untouched_zeros(shape, dtype, torch.device("cpu"))
    assert (found.dtype, found.shape) == (dtype, torch.Size(shape))
    assert not found.any()
    assert not found.numel() or found.data_ptr() % 64 == 0
    found += 1
    assert found.sum() == found.numel()
