"""Measured requests: counts that follow from the schedule, names, cut-off replies; floors against
counted bytes."""

import math
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from time import sleep
from unittest.mock import Mock

import pytest
import torch

from mimo_fast.bench import meters, pipeline
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.floor import GroupWork, patch_work, request_floor, word_work
from mimo_fast.bench.groups import SETTLING, time_groups
from mimo_fast.bench.meters import EnergyMeter
from mimo_fast.bench.pipeline import PROMPTS, TimedRequest, measure, prompt_ids
from mimo_fast.bench.schedule import FREE, spoken_reply, written_reply
from mimo_fast.bench.synthetic import preset_configs, preset_setup, random_lm, weightless_lm
from mimo_fast.bench.target import Target, shortfall, user_speech
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.errors import DeviceMemoryError
from mimo_fast.quantization import QuantizationConfig
from mimo_fast.quantization.formats import stored_tensors
from mimo_fast.runtime.lm.state import KVCache

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
MACHINE = Ceiling(1e9, 1e9, {"float32": 1e9})


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.random("tiny", None, torch.float32, CPU)


def spoken(words: int = 3, patches: int = 12, **options: object) -> TimedRequest:
    return TimedRequest("tts", user_speech(1.0), words, patches, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", PROMPTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_task_has_the_groups_it_was_told_and_audio_for_each_patch(target, task, batch):
    speaks = task in ("tts", "spoken_dialogue")
    request = TimedRequest(task, user_speech(1.0), 3, 12 if speaks else 0)
    metrics = measure(target.sized(batch, 160), request, batch)
    assert (metrics.requests, metrics.text_groups) == (batch, 3 * batch)
    assert metrics.audio_groups == (12 * batch if speaks else 0)
    assert metrics.audio_seconds == pytest.approx(batch * (12 * 0.16 if speaks else 0.96))
    assert metrics.itl is not None
    # A chunk a group, and one more that ends the reply.
    assert metrics.itl.n == batch * (request.words + request.patches)
    for spread in (metrics.ttft, metrics.e2el, metrics.itl):
        assert spread is not None
        assert 0 < spread.p50 <= spread.p95 <= spread.p99
    assert metrics.ttft.n == metrics.e2el.n == batch
    assert metrics.ttft.p99 <= metrics.e2el.p99 <= metrics.wall
    if batch == 1:
        assert metrics.encode + metrics.prefill <= metrics.ttft.p50
    assert metrics.audio_rtf == pytest.approx(metrics.e2el.p50 / (metrics.audio_seconds / batch))
    assert metrics.audio_rtfx == pytest.approx(metrics.audio_seconds / metrics.wall)
    assert metrics.peak_bytes > 1e6
    if speaks:
        assert metrics.audio_ttfp is not None
        assert metrics.ttft.p50 < metrics.audio_ttfp.p50 < metrics.e2el.p50
        assert metrics.audio_underrun >= 0
        assert 0 <= metrics.audio_continuity <= 1
        assert set(metrics.unmeasured) == {"joules"}
    else:
        assert metrics.audio_ttfp is metrics.audio_underrun is metrics.audio_continuity is None
        assert metrics.unmeasured["audio_ttfp"] == "the reply is text"


def test_a_reply_shorter_than_the_look_ahead_measures_no_silence(target):
    short = measure(target.sized(1, 160), spoken(patches=pipeline.LOOKAHEAD))
    assert short.audio_seconds == pytest.approx(pipeline.LOOKAHEAD * 0.16)
    assert short.audio_ttfp is not None
    assert short.audio_underrun is short.audio_continuity is None
    assert "shorter than the look-ahead" in short.unmeasured["audio_underrun"]
    longer = measure(target.sized(1, 160), spoken(patches=pipeline.LOOKAHEAD + 2))
    assert longer.audio_underrun is not None
    assert "audio_underrun" not in longer.unmeasured


def test_names_are_the_fields(target):
    names = asdict(measure(target.sized(1, 160), spoken()))
    wanted = "ttft audio_ttfp itl e2el audio_rtf audio_rtfx audio_underrun audio_continuity"
    assert {*wanted.split()} <= set(names)
    assert set(names["itl"]) == {"p50", "p95", "p99", "n"}


def test_without_a_codec_what_needs_one_is_named(target):
    silent = replace(target, codec=None)
    metrics = measure(silent.sized(1, 160), spoken(patches=4))
    assert metrics.audio_ttfp is metrics.audio_underrun is None
    assert metrics.unmeasured["audio_ttfp"] == "measured without a codec"
    assert metrics.audio_seconds == pytest.approx(4 * 0.16)
    ids = prompt_ids(silent, TimedRequest("asr", user_speech(1.0), 1, 1))
    assert ids.shape == prompt_ids(target, TimedRequest("asr", user_speech(1.0), 1, 1)).shape


def test_a_context_is_filled_with_words_in_front(target):
    ids, short = (prompt_ids(target, spoken(context=context)) for context in (200, 0))
    assert ids.shape[1] == 200 * 4
    assert torch.equal(ids[:, -short.shape[1] :], short)
    assert torch.equal(prompt_ids(target, spoken(context=8)), short)
    assert torch.equal(prompt_ids(target, spoken(context=8, cut=True)), short[:, -8 * 4 :])


def test_a_reply_that_takes_too_long_is_cut_off(target):
    metrics = measure(target.sized(2, 300), spoken(patches=150), batch=2, seconds=0.0, warm=False)
    assert 1 <= metrics.text_groups + metrics.audio_groups < 2 * 153
    assert metrics.audio_seconds == pytest.approx(metrics.audio_groups * 0.16)


def test_rounds_are_separate_requests(target):
    metrics = measure(target.sized(2, 160), spoken(1, 2), batch=2, rounds=2)
    assert (metrics.requests, metrics.audio_groups) == (4, 8)


def test_an_error_in_one_request_ends_all_and_comes_out(target, monkeypatch):
    answer, failed = pipeline._answer, threading.Event()

    def sometimes(target, request, seed, limit, stopped):
        if seed == 1:
            failed.set()
            raise OSError("the cable is out")
        failed.wait()
        return answer(target, request, seed, limit, stopped)

    monkeypatch.setattr(pipeline, "_answer", sometimes)
    with pytest.raises(OSError, match="cable"):
        measure(target.sized(2, 300), spoken(patches=150), batch=2, warm=False)


def test_steady_state_has_all_groups_of_each_kind(target):
    times = time_groups(target.sized(2, 40), 2, 20, 5)
    assert (times.text.n, times.audio.n) == (5, 5)
    # A patch costs eleven steps of the patch decoder more.
    assert times.audio.p50 > times.text.p50
    assert times.prefill > 0


def test_the_reply_follows_the_schedule_and_then_the_model(target):
    lm = target.lm
    lm.follow([5, lm.empty_id, 7])
    state = lm.new_state([0, 0], 4)
    slots, free = torch.arange(2), []
    for draw in range(4):
        state.draws[0], state.draws[1] = draw, 3 - draw
        settings = state.text_sampler.select(slots)
        settings = replace(settings, all_greedy=True, any_top_k=False)
        free.append(lm.sample_text(state, slots, settings).tolist())
    assert [text for text, _ in free[:3]] == [5, lm.empty_id, 7]
    assert [text for _, text in free[1:]] == [7, lm.empty_id, 5]
    assert free[3][0] == free[0][1] == int(lm.text_logits(state.hidden[:1]).argmax())
    assert int(lm.schedule[-1]) == FREE
    with pytest.raises(ValueError, match="exceeds the longest"):
        lm.follow([1] * len(lm.schedule))


def test_schedules_interleave_as_the_model_was_trained():
    assert spoken_reply(12, 6, 1, 2, 9) == [1] * 5 + [2] * 5 + [1] + [2] * 5 + [2] * 2 + [9]
    assert written_reply(3, 1, 9) == [1, 1, 1, 9]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_floors_are_the_bytes_of_the_stored_tensors(quantization):
    config, _ = preset_configs("tiny")
    chosen = QuantizationConfig.parse(quantization)
    shapes = lm_shapes(config)
    stored = stored_tensors(shapes, chosen.formats(shapes) if chosen else {}, torch.float32)

    def count(*prefixes: str) -> int:
        named = {
            name: math.prod(shape) * dtype.itemsize
            for name, (shape, dtype) in stored.items()
            if name.startswith(prefixes) and "layernorm" not in name
        }
        assert named
        return sum(named.values())

    parts = KVCache.allocate(config.backbone, 3, 50, torch.float32, CPU).parts
    cache = sum(part.nbytes for part in parts)
    word = {"backbone": count("model.layers."), "text head": count("lm_head."), "cache": cache}
    # Every codebook's head is read for each frame of a patch.
    decoder = count("local_transformer.layers.") * config.patch_steps
    encoder = "input_local_transformer.layers.", "speech_group_downcast.", "hidden_states_downcast."
    patch = {
        "patch decoder": decoder + count("local_transformer_lm_heads.") * config.group_size,
        "patch encoder": count(*encoder),
    }
    for make in (random_lm, weightless_lm):
        lm = make(config, quantization, torch.float32)
        assert word_work(lm, 50, 3).bytes == word
        small, large = patch_work(lm, 50, 3), patch_work(lm, 50, 3, cache=10**9)
        assert small.bytes == large.bytes == word | patch
        assert small.cached == 0
        # A cache that holds half of the layers spares it in all steps but the first; a large one
        # spares the heads too.
        layers, again = count("local_transformer.layers."), config.patch_steps - 1
        assert patch_work(lm, 50, cache=layers // 2).cached == layers // 2 * again
        heads = count("local_transformer_lm_heads.") * (config.group_size - 1)
        assert large.cached == layers * again + heads


def test_floors_of_the_published_dimensions():
    # From the table of the model's parts: 14.0 GB of backbone and text head, 5.9 GB of patch
    # decoder in bfloat16.
    lm = weightless_lm(preset_configs("7b")[0], None, torch.bfloat16)
    read = patch_work(lm, 0).bytes
    assert read["backbone"] + read["text head"] == pytest.approx(14.0e9, rel=0.01)
    assert read["patch decoder"] == pytest.approx(5.9e9, rel=0.01)
    # Two for a value of two bytes; the patch encoder's matrices serve four frames.
    assert patch_work(lm, 0).flop == pytest.approx(14.0e9 + 5.9e9 + 4 * 0.2e9, rel=0.01)


def test_arithmetic_bounds_what_bytes_do_not(target):
    slow, work = replace(MACHINE, flops={"float32": 1.0}), word_work(target.lm, 10)
    assert work.floor(slow, torch.float32) == work.flop
    assert work.floor(MACHINE, torch.float32) == work.total / 1e9
    kept = patch_work(target.lm, 10, cache=10**6)
    reads = replace(MACHINE, flops={"float32": 1e15})
    assert kept.floor(reads, torch.float32) == (kept.total - kept.cached) / 1e9
    prefill, word, patch = GroupWork.of(target.lm, 2, 30, 10).floors(MACHINE)
    floor = request_floor(MACHINE, target.lm, None, 2, 30, 6, 4)
    assert floor == pytest.approx(2 * prefill + 6 * word + 4 * patch)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch, target):
    monkeypatch.setattr("mimo_fast.bench.target.free_bytes", lambda device: 10**9)
    with pytest.raises(DeviceMemoryError, match=r"needs \d+\.\d GB and cpu has 1\.0 GB free"):
        Target.random("7b", "int4", torch.bfloat16, CPU)
    with pytest.raises(DeviceMemoryError, match="needs"):
        target.sized(64, 10**6)
    setup = preset_setup("7b", "int4", torch.bfloat16)
    assert shortfall(setup, CPU, loaded=True) is None


PEAKS = """
import torch
from mimo_fast.bench.meters import PeakMemory, reset_resident_peak
meter = PeakMemory(torch.device("cpu"))
before = meter.bytes
torch.ones(50 * 2**20)
peak = meter.bytes
print(before, peak, PeakMemory(torch.device("cpu")).bytes if reset_resident_peak() else 0)
"""


def test_the_peak_of_memory_is_that_of_the_work():
    """In a process of its own: a long-lived one may have as much memory to spare."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, peak, after = map(int, done.stdout.split())
    assert 150 * 2**20 < peak - before < 400 * 2**20
    assert after < peak - 150 * 2**20


def test_energy_is_not_made_up():
    meter = EnergyMeter(CPU)
    assert meter.joules is None
    assert meter.unmeasured


def test_energy_is_the_drivers_count(monkeypatch):
    """The driver counts millijoules since it was loaded."""

    class Error(Exception):
        pass

    nvml = Mock(NVMLError=Error)
    nvml.nvmlDeviceGetHandleByUUID = "handle of {}".format
    counter = nvml.nvmlDeviceGetTotalEnergyConsumption
    counter.side_effect = [5000, 7500, Error("Not Supported")]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Mock(uuid="1234"))
    monkeypatch.setattr(meters.shutil, "which", lambda name: None)
    meter = EnergyMeter(torch.device("cuda"))
    assert meter.unmeasured is None
    assert (meter.joules, meter.source) == (2.5, "NVML's counter")
    meter = EnergyMeter(torch.device("cuda"))
    assert (meter.joules, meter.unmeasured) == (None, "NVML: Not Supported")
    assert {call.args for call in counter.call_args_list} == {("handle of b'GPU-1234'",)}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(torch.device("cuda")).unmeasured == "nvidia-ml-py is not installed"


@pytest.mark.parametrize(
    ("written", "watts"), [("300.0\n[N/A]\n500.0\n", 400.0), ("[N/A]\n", None)]
)
def test_without_a_counter_energy_is_power_over_time(monkeypatch, tmp_path, written, watts):
    """A program in nvidia-smi's place, which writes and goes on until it is ended."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{written}'\ntouch {tmp_path}/ready\nexec sleep 60\n")
    tool.chmod(0o755)
    log = meters.PowerLog(str(tool), "GPU-1234")
    while not (tmp_path / "ready").exists():
        sleep(0.01)
    monkeypatch.setattr(meters, "perf_counter", lambda: log._began + 2)
    assert log.joules() == (watts and 2 * watts)
    assert log._process.poll() is not None


def test_settling_groups_need_room(target):
    with pytest.raises(StopIteration):
        time_groups(target.sized(1, 20 + SETTLING), 1, 20, 5)
