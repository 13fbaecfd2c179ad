"""What only a GPU can show: python -m pytest -m gpu tests/test_gpu.py

On a CPU, graphs that repeat their work test the tests. Needs neither hypothesis nor soundfile.
"""

import copy
import gc
import wave
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import resident_memory
from replays import Counted, repeated
from replies import SAMPLED, Drawn, RequestSpec, drawn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import mimo_fast
from mimo_fast.kernels.defaults import ENVIRONMENT as EXPERIMENTAL
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.kernels.dispatch import ENVIRONMENT as KERNELS
from mimo_fast.runtime import pipeline
from mimo_fast.runtime.codec.encoder_graphs import EncoderGraphs
from mimo_fast.runtime.codec.geometry import default_lookahead, elastic_reach
from mimo_fast.runtime.codec.graphs import StreamGraphs, usual_shapes
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import HostRead, Limits, Samplers
from mimo_fast.runtime.lm.graphs import ENVIRONMENT, CudaCapture, Graphs, PromptPart, Run
from mimo_fast.runtime.lm.model import LM
from mimo_fast.sampling import MiMoSampler
from mimo_fast.testing import parity as verification
from mimo_fast.testing.parity import STAGES, Golden, verify
from mimo_fast.text.prompt import PackedPrompt

GROUPS = {"cuda": 200, "cpu": 60}
"""Decoded in both ways."""

WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"}
"""torch ops that wait for the device."""

FLAT = Samplers(MiMoSampler(True, 100.0), MiMoSampler(True, 100.0))
"""So hot that every token is about as likely as any other."""

Watched = tuple[Callable[[Callable[[], Any]], Any], list[int]]


@pytest.fixture(scope="module")
def loaded_model(device: torch.device, kit: Path) -> mimo_fast.MimoAudio:
    lm, codec = kit / "checkpoint/lm", kit / "checkpoint/codec"
    return mimo_fast.load(lm, codec, device=device, dtype="float32", max_batch=4, max_seq_len=320)


def unwatched(run: Run) -> tuple[Callable[[], None], Tensor]:
    """`repeated`, its ops as invisible to what watches the host as a graph's kernels."""
    replay, result = repeated(run)

    def hidden() -> None:
        with _disable_current_modes():
            replay()

    return hidden, result


def make_engine(lm: LM, slots: int, capacity: int) -> Engine:
    """An engine that decodes with graphs."""
    engine = Engine(lm, slots, capacity)
    if lm.device.type == "cpu":
        engine.decoder.graphs = Graphs(lm, engine.state, unwatched)
        engine.decoder.predict = True
    assert engine.decoder.graphs is not None
    engine.warmup(progress=False)
    return engine


def asked(golden: Golden, groups: int, samplers: Samplers = SAMPLED) -> list[RequestSpec]:
    """Four prompts of several tasks, each with a seed of its own and a reply of so many groups."""
    names = sorted(golden.meta["prompts"])[:4]
    prompts = [golden.get(f"prompts:{name}").long() for name in names]
    limits = Limits(groups)
    prompts = [ids[:, : 4 * min(ids.shape[1] // 4, 36)] for ids in prompts]
    return [RequestSpec(ids, 7 + i, samplers, limits) for i, ids in enumerate(prompts)]


def together(engine: Engine, requests: list[RequestSpec]) -> list[Drawn]:
    """All replies, decoded in one batch."""
    replies = [request.start(engine) for request in requests]
    for reply in replies:
        reply.prefill()
    got = list(zip(*replies, strict=True))
    return [drawn(list(groups)) for groups in zip(*got, strict=True)]


@pytest.fixture
def recordings(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without soundfile: the kit's resampled audio, and 16-bit 24 kHz recordings as they are."""
    if find_spec("soundfile") is not None:
        return
    tensors = {int(i): golden.tensors[f"codec:wav24k.{i}"] for i in golden.named("codec:wav24k")}
    decoded = {str(golden.audio[i]): tensor for i, tensor in tensors.items()}
    for path in (path for path in golden.audio if str(path) not in decoded):
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getsampwidth()) == (24000, 2)
            data = bytearray(file.readframes(file.getnframes()))
            samples = torch.frombuffer(data, dtype=torch.int16) / 2**15
            decoded[str(path)] = samples.view(-1, file.getnchannels()).mean(dim=1)
    for module in (verification, pipeline):
        monkeypatch.setattr(module, "load_audio", lambda path, rate: decoded[str(path)])


@pytest.mark.parametrize("stage", STAGES)
def test_stage_equals_upstream(loaded_model, golden, recordings, monkeypatch, stage):
    if stage == "resample":
        pytest.importorskip("soundfile")
    if loaded_model.device.type == "cuda":
        monkeypatch.setenv(KERNELS, "triton")
    monkeypatch.setattr(verification, "STAGES", {stage: STAGES[stage]})
    (result,) = verify(loaded_model, golden)
    assert result.ok, f"{result.error} > {result.bound} in {result.worst} of {result.compared}"


def test_the_codec_as_shipped_equals_upstream(device, kit, recordings):
    golden = Golden(kit / "shipped")
    pair = kit / "checkpoint/lm", kit / "checkpoint/codec"
    options = {"max_batch": 1, "max_seq_len": 32, "codec_rope": golden.rope_frequencies}
    shipped = mimo_fast.load(*pair, device=device, dtype="float32", **options)
    for result in verify(shipped, golden):
        assert result.ok, f"{result.error} > {result.bound} in {result.worst}"
    assert golden.compared == golden.tensors.keys()


def test_graph_and_eager_give_the_same_tokens(loaded_model, golden, monkeypatch):
    groups = GROUPS[loaded_model.device.type]
    requests = asked(golden, groups)[:3]
    graphs = together(make_engine(loaded_model.lm, 3, 240), requests)
    monkeypatch.setenv(ENVIRONMENT, "1")
    plain = Engine(loaded_model.lm, 3, 240)
    assert plain.decoder.graphs is None
    assert together(plain, requests) == graphs
    assert all(len(row) == groups for row in graphs)
    # Words and speech have both been drawn, and no two rows alike.
    empty = loaded_model.lm.empty_id
    assert {text == empty for row in graphs for text, _, _ in row} == {True, False}
    assert graphs[0] != graphs[1] != graphs[2]


def test_prompts_as_graphs_give_the_same_tokens(loaded_model, golden, monkeypatch):
    requests = asked(golden, 12)[:3]
    plain = together(make_engine(loaded_model.lm, 3, 240), requests)
    monkeypatch.setenv(EXPERIMENTAL, "1")
    engine = make_engine(loaded_model.lm, 3, 240)
    assert engine.decoder.graphs.takes_prompts
    assert together(engine, requests) == plain


def test_packed_prompts_have_the_bits_of_lone_ones(loaded_model, golden):
    lm, size = loaded_model.lm, loaded_model.lm.config.group_size
    capture = None if lm.device.type == "cuda" else unwatched
    ids = [request.ids for request in asked(golden, 1)]
    states = [lm.new_state([0] * 4, 80) for _ in range(2)]
    packed, lone = (
        Graphs(lm, state, *([] if capture is None else [capture]), prompts=True, packed=True)
        for state in states
    )
    for cut in (30, 5):
        parts = [
            PromptPart(PackedPrompt(each[:, : (cut - i) * size]), i, 0)
            for i, each in enumerate(ids)
        ]
        packed.prefill_parts(parts)
        for part in parts:
            lone.prefill_parts([part])
        for i, part in enumerate(parts):
            length = part.prompt.ids.shape[1] // size
            assert torch.equal(*(state.hidden[i] for state in states))
            for got, want in zip(*(state.cache.parts for state in states), strict=True):
                assert torch.equal(got[:, i, :, :length], want[:, i, :, :length])


def test_a_recording_by_graph_has_the_codes_of_kernels(loaded_model, golden):
    codec = copy.copy(loaded_model.codec)
    capture = CudaCapture() if codec.device.type == "cuda" else unwatched
    name = sorted(golden.named("codec:wav24k"))[0]
    wav = golden.tensors[f"codec:wav24k.{name}"].float()
    for samples in (1, 9_600, min(len(wav), 47_000)):
        codec.encoder_graphs = None
        want = codec.encode(wav[:samples])
        codec.encoder_graphs = EncoderGraphs(codec, capture)
        pending = codec.encode_later(wav[:samples])
        assert torch.equal(pending.on_device(), want)
        assert torch.equal(pending.wait(), want.cpu())


def test_no_two_replays_draw_the_same_numbers(loaded_model, golden):
    """From one state, only the count of draws may change what is drawn, and it must."""
    engine = make_engine(loaded_model.lm, 1, 64)
    reply = asked(golden, 8, FLAT)[0].start(engine)
    next(reply), next(reply)
    state, graphs = engine.state, engine.decoder.graphs
    names = ("lengths", "hidden", "text", "codes", "patches", "draws")
    before = {name: getattr(state, name).clone() for name in names}

    def replay(draws: int) -> tuple[int, tuple[int, ...]]:
        for name, value in before.items():
            getattr(state, name).copy_(value)
        state.draws.add_(draws)
        text = int(graphs.step([0]))
        return text, tuple(graphs.patch([0]).flatten().tolist())

    found = [replay(i) for i in range(48)]
    assert len({codes for _, codes in found}) == 48
    assert len({text for text, _ in found}) > 24
    assert [replay(i) for i in range(4)] == found[:4]
    # Without anything set back, a replay moves the count itself.
    replay(0)
    assert int(state.draws[0]) == int(before["draws"][0]) + 1
    reply.close()


class NoWaiting(TorchDispatchMode):
    """Stands in for CUDA's own check on a CPU: fails at an op that would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_wait(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """(call -> result, failing at any wait but a host read's; host reads of each call)."""
    reads, wait, watching = list[int](), HostRead.wait, False

    def counted(read: HostRead) -> list[int]:
        if not watching:
            return wait(read)
        reads[-1] += 1
        if device.type == "cpu":
            return wait(read)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return wait(read)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def watched(call: Callable[[], Any]) -> Any:
        nonlocal watching
        reads.append(0)
        watching = True
        try:
            if device.type == "cpu":
                with NoWaiting():
                    return call()
            torch.cuda.set_sync_debug_mode("error")
            return call()
        finally:
            watching = False
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(HostRead, "wait", counted)
    return watched, reads


@pytest.mark.parametrize("rows", [1, 3])
def test_a_group_waits_for_the_device_once(loaded_model, golden, one_wait, rows):
    watched, reads = one_wait
    engine = make_engine(loaded_model.lm, rows, 120)
    # As on a GPU.
    engine.decoder.check_codes = False
    replies = [request.start(engine, ahead=1) for request in asked(golden, 60)[:rows]]
    for reply in replies:
        reply.prefill()
        # The first groups set up what later ones find, and each row's first is drawn without a
        # step.
        next(reply), next(reply)
    # All that a consumer does who takes a group of each row.
    got = [watched(lambda: [next(reply) for reply in replies]) for _ in range(40)]
    assert reads == [1] * 40
    silent = {group.text == loaded_model.lm.empty_id for groups in got for group in groups}
    assert silent == {True, False}


def test_the_check_for_waits_sees_one(loaded_model, one_wait):
    watched, _ = one_wait
    value = torch.ones(3, device=loaded_model.device)
    with pytest.raises((RuntimeError, AssertionError), match=r"synchroniz|waits for the device"):
        watched(lambda: value.sum().item())


@pytest.mark.parametrize(
    ("lookahead", "replays"), [("exact", (36, 34, 36)), ("elastic", (45, 43, 45))]
)
def test_a_stream_with_graphs_sounds_as_without(loaded_model, golden, lookahead, replays):
    """Patch by patch, then with other push sizes; streams are used again."""
    plain, codec = copy.copy(loaded_model.codec), copy.copy(loaded_model.codec)
    plain.stream_graphs = None
    # Young streams that are decoded again replay no graph for it.
    plain.again = codec.again = 0
    counted = Counted(CudaCapture() if codec.device.type == "cuda" else repeated)
    codec.stream_graphs = StreamGraphs(codec, counted)
    codec.warmup(2, progress=False)
    codes = golden.get("codec:stream_codes").to(codec.device)
    some = [4] * 45, [4] * 20 + [7, 1] + [4] * 23, [4] * 45
    known = codec.moments(codes[:, :60]) if lookahead == "elastic" else None
    for sizes, count in zip(some, replays, strict=True):
        counted.replays, pushes = 0, codes[:, : sum(sizes)].split(sizes, dim=1)
        # Two at a time, which share memory for what their graphs return.
        streams = [each.stream(lookahead, known) for each in (codec, codec, plain)]
        parts = [[stream.push(push, trusted=True) for stream in streams] for push in pushes]
        parts.append([stream.finish() for stream in streams])
        *found, want = (torch.cat(each) for each in zip(*parts, strict=True))
        assert counted.replays == 2 * count
        for wav in found:
            assert float((wav - want).abs().max()) <= 1e-4 * float(want.abs().max())
        for stream in streams:
            stream.close()
    # First, next and last of each schedule and a ramp, as shared by those that hold back as much,
    # for each number of streams.
    pools = {default_lookahead(codec.config), elastic_reach(codec.config)}
    shapes = sum(len(usual_shapes(codec.config, patches)) for patches in pools)
    buckets = 2 if enabled(NewPath.CODEC_ROWS, codec.device) else 1
    assert counted.captures == buckets * shapes


@pytest.mark.parametrize("graphs", [True, False])
def test_a_row_does_not_depend_on_its_neighbours(loaded_model, golden, monkeypatch, graphs):
    requests = asked(golden, 24)
    if not graphs:
        monkeypatch.setenv(ENVIRONMENT, "1")
    found = {}
    for rows in (1, 3, 4):
        engine = (make_engine if graphs else Engine)(loaded_model.lm, rows, 96)
        found[rows] = together(engine, requests[:rows])
    assert found[4][:3] == found[3]
    assert found[3][:1] == found[1]


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_requests(loaded_model, golden):
    engine, requests = make_engine(loaded_model.lm, 2, 64), asked(golden, 2)

    def held() -> int:
        gc.collect()
        if loaded_model.device.type == "cuda":
            return torch.cuda.memory_allocated()
        return resident_memory()

    after = []
    for i in range(125):
        reply = requests[i % 4].start(engine)
        next(reply)
        if i % 5:
            list(reply)
        reply.close()
        if i in (24, 124):
            after.append(held())
    warm, end = after
    assert end <= 1.02 * warm, f"grew from {warm / 1e6:.1f} to {end / 1e6:.1f} MB over 100 requests"
