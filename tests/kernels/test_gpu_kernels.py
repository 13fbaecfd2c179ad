"""Kernels on a GPU: python -m pytest -m gpu tests/kernels/test_gpu_kernels.py

Every op of the benchmarks' quick selection and every configuration of the published model; what
can be is run on a CPU too, to test the tests.
"""

from dataclasses import replace

import pytest
import torch
from helpers import seeded
from replays import repeated
from replies import GREEDILY, SAMPLED, Drawn, drawn
from torch import Tensor

from benchmarks.harness import Benchmark, normal, prepare
from benchmarks.ops import select
from benchmarks.synthetic import random_weight
from mimo_fast.bench.schedule import ScheduledLM
from mimo_fast.bench.synthetic import preset_configs, random_codec, random_lm
from mimo_fast.config import LMConfig
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.defaults import ENVIRONMENT as EXPERIMENTAL
from mimo_fast.kernels.dispatch import ENVIRONMENT as KERNELS
from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import Limits, Samplers
from mimo_fast.runtime.lm.graphs import ENVIRONMENT, Graphs


def row_counts(case: Benchmark) -> bool:
    """Few rows, one tile of rows, and several: the kernels' three ways."""
    return case.m in (1, 4, 16, 64)


PRODUCTS = [*select("backbone.qkv"), *select("patch_decoder.down")]
PRODUCTS = [case for case in PRODUCTS if row_counts(case)]
DISTINCT = {(case.op, case.format, case.shape): case for case in [*select(quick=True), *PRODUCTS]}
OPS = list(DISTINCT.values())
CHEAP = 2**20


def name_of(case: Benchmark) -> str:
    return f"{case.op}-{case.format}-{case.shape}".replace(" ", ",")


def check_op(case: Benchmark, provider: str, device: torch.device) -> None:
    """Raises `Refused` for a result that is wrong, by the harness's own check."""
    (ours,) = (p for p in case.providers if p.name == provider)
    with torch.no_grad():
        prepare(case, ours, case.make(device), device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", OPS, ids=name_of)
def test_op_equals_its_reference(case):
    check_op(case, "ours-gpu", torch.device("cuda"))


@pytest.mark.parametrize("case", [c for c in OPS if c.nbytes < CHEAP], ids=name_of)
def test_cheap_op_equals_its_reference_on_a_cpu(case):
    check_op(case, "ours-cpu", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("rows", [1024, 3072, 22016])
def test_a_row_of_a_product_is_the_same_whatever_rows_come_with_it(form, rows):
    device, columns = torch.device("cuda"), 4096
    if cuda.library() is None:
        pytest.skip("the CUDA kernels were not built")
    weight = random_weight(form, (rows,), columns, torch.bfloat16, device)
    x, norm = normal(device, 64, columns), RMSNorm(normal(device, columns, seed=1), 1e-6)
    together = matmul(x, weight, norm=norm)
    for m in (1, 8, 9, 33):
        assert torch.equal(matmul(x[:m], weight, norm=norm), together[:m])


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int4", "int8", "dense"])
@pytest.mark.parametrize("shape", [(1024, 1024), (3072, 1024), (22016, 4096), (4096, 11008)])
def test_tiles_of_rows_give_a_row_the_bits_that_it_has_alone(monkeypatch, form, shape):
    """By csrc/cuda/row_tiles.cu, in each of its configurations that the device takes."""
    device, (rows, columns) = torch.device("cuda"), shape
    if cuda.library() is None:
        pytest.skip("the CUDA kernels were not built")
    monkeypatch.setenv(EXPERIMENTAL, "1")
    weight = random_weight(form, (rows,), columns, torch.bfloat16, device)
    x, norm = normal(device, 256, columns), RMSNorm(normal(device, columns, seed=1), 1e-6)
    alone = torch.cat([matmul(row[None], weight, norm=norm) for row in x])
    for m in (8, 9, 16, 17, 64, 100, 127, 128, 129, 200, 256):
        assert torch.equal(matmul(x[:m], weight, norm=norm), alone[:m])
    matrix = weight.blocks[0] if form == "dense" else weight
    refused = 0
    for variant in range(1, cuda.library().mimo_fast_row_tiles_variants()):
        got = torch.full_like(alone, torch.nan)
        try:
            cuda.row_tiles(x, matrix, norm, None, False, got, variant=variant)
        except RuntimeError:
            refused += 1
            continue
        assert torch.equal(got, alone), variant
    assert refused < 7


def shortened(preset: str, layers: int) -> LMConfig:
    """A preset with so many layers in each transformer."""
    config, _ = preset_configs(preset)
    parts = ("backbone", "patch_encoder", "patch_decoder")
    return replace(config, **{x: replace(getattr(config, x), layers=layers) for x in parts})


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "nf4"])
def test_published_dimensions_in_bfloat16(device, monkeypatch, quantization, int8_cache):
    """Every kernel configuration of the 7B runs; on a CPU the preset is the tiny one."""
    config = shortened("7b" if device.type == "cuda" else "tiny", 2)
    lm = ScheduledLM.of(random_lm(config, quantization, torch.bfloat16, device), 8)
    # Two words and three patches of every row, whatever the model would rather say.
    lm.follow([5, 6, lm.empty_id, lm.empty_id, lm.empty_id])
    shape = (config.channels + 1, 40 * config.group_size)
    ids = torch.randint(min(config.code_sizes) - 1, shape, generator=seeded(0))
    ids[0] = torch.tensor([5, lm.empty_id]).repeat_interleave(config.group_size).repeat(20)
    prefilled = []
    for kernels in ("torch", ""):
        monkeypatch.setenv(KERNELS, kernels)
        state = lm.new_state([0], 40, int8_cache)
        lm.prefill(ids, state, 0)
        prefilled.append(state.hidden[0].double())
    state = lm.new_state([0], 40, int8_cache)
    capture = repeated if device.type == "cpu" else None
    Graphs(lm, state, capture, prompts=True).prefill(ids, 0)
    prefilled.append(state.hidden[0].double())
    plain, *ours = prefilled
    for hidden in ours:
        # A wrong stride or scale gives a difference of the order of the values.
        assert (hidden - plain).norm() < 0.05 * plain.norm()
    # In 16 bits a prompt as a graph rounds otherwise than kernel by kernel: both ways begin alike.
    monkeypatch.setenv(EXPERIMENTAL, "0")
    runs = [(1, SAMPLED), (2, GREEDILY), (8, SAMPLED)] if device.type == "cuda" else [(2, SAMPLED)]
    for rows, samplers in runs:
        drawn_with = []
        for without in ("", "1"):
            monkeypatch.setenv(ENVIRONMENT, without)
            engine = Engine(lm, rows, 48, quantized_cache=int8_cache)
            if device.type == "cpu" and not without:
                engine.decoder.graphs = Graphs(lm, engine.state, repeated)
            drawn_with.append(_replies(engine, ids, rows, samplers))
        assert drawn_with[0] == drawn_with[1], f"{rows} rows: graphs draw otherwise"
        codes = torch.tensor([row[-1][1] for row in drawn_with[0]]).view(rows, config.channels, -1)
        assert bool((codes >= 0).all())
        assert bool((codes.amax((0, 2)) < torch.tensor(config.code_sizes)).all())


def _replies(engine: Engine, ids: Tensor, rows: int, samplers: Samplers) -> list[Drawn]:
    replies = []
    for row in range(rows):
        sequence = engine.sequence(row)
        sequence.add(ids)
        replies.append(engine.start(sequence, Limits(5), samplers))
    return [drawn(list(reply)) for reply in replies]


def test_the_whole_codec_in_bfloat16(device):
    _, config = preset_configs("7b" if device.type == "cuda" else "tiny")
    codec = random_codec(config, None, torch.bfloat16, device)
    wav = 0.1 * torch.randn(2 * config.sample_rate, generator=seeded(0))
    codes = codec.encode(wav, 8)
    assert codes.shape[0] == 8
    for row, size in zip(codes, config.codebook_sizes, strict=False):
        assert int(row.min()) >= 0
        assert int(row.max()) < size
    whole = codec.decode(codes)
    stream = codec.stream()
    *chunks, last = codes.split(8, dim=1)
    streamed = torch.cat([*(stream.push(chunk) for chunk in chunks), stream.finish(last)])
    assert streamed.shape == whole.shape
    assert bool(whole.isfinite().all())
    assert bool(streamed.isfinite().all())
