"""The Triton kernels between the products, on a GPU: correctness, times, and what PDL saves.

python -m benchmarks.studies.glue [-o FILE.json]

Everything is timed inside CUDA graphs of many launches, with early launches (PDL, dispatch.py) on
and off in the same run (`MIMO_FAST_PDL`), and both must give the same bits. Each kernel is also
compared with its reference in plain torch. Chains are the purpose: four layers of the patch decoder
in int8 and of the backbone in int4, products and attention alternating, so every boundary counts.
Their replays are compared bit for bit with the first, since a missing wait would show as a race. A
line is printed as soon as it is known; what there is no time for is named at the end.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.synthetic import random_weight
from mimo_fast.bench.timing import percentile
from mimo_fast.config import LMConfig, TransformerConfig
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.decode_attention import decode_attention, decode_attention_ref
from mimo_fast.kernels.dispatch import (
    ENVIRONMENT,
    PDL_ENVIRONMENT,
    early_launch,
    jit,
    tl,
    triton,
)
from mimo_fast.kernels.rope import rope_table
from mimo_fast.kernels.sample import NEAR, near_gumbel
from mimo_fast.kernels.sample_codes import (
    code_steps,
    patch_noise,
    patch_noise_ref,
    sample_codes,
    sample_codes_ref,
)
from mimo_fast.kernels.sample_text import sample_text, sample_text_ref
from mimo_fast.runtime.lm.state import KVCache
from mimo_fast.runtime.lm.transformer import (
    LayerWeights,
    TransformerWeights,
    cached_attend,
    self_attend,
    transformer,
)
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors

DEVICE, DTYPE = "cuda", torch.bfloat16
SECONDS = 60.0
REPLAYS = 15
RACES = 200
"""Replays of a chain whose results are compared."""

SPEECH = MiMoSampler(True, 0.9, None, 0.95)
WORDS = MiMoSampler(True, 0.6, None, 0.95)
TOP_K = MiMoSampler(True, 0.6, 50, 0.95)

CHAIN_ERROR = 0.03
"""Bound on the error of several bfloat16 layers against plain torch, over the largest value."""

Run = Callable[[], Tensor]


@contextmanager
def early(on: bool) -> Iterator[None]:
    before = os.environ.get(PDL_ENVIRONMENT)
    os.environ[PDL_ENVIRONMENT] = "1" if on else "0"
    try:
        yield
    finally:
        os.environ.pop(PDL_ENVIRONMENT)
        if before is not None:
            os.environ[PDL_ENVIRONMENT] = before


def captured(run: Run, calls: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of so many calls, and the last one's result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = run()
    return graph, result


def seconds(graph: torch.cuda.CUDAGraph, calls: int) -> dict[str, float]:
    graph.replay()
    taken = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e-3 / calls)
    return {f"p{share}": percentile(taken, share / 100) for share in (10, 50, 90)}


class Study:
    """Collects rows, prints each, and knows how much time is left."""

    def __init__(self, limit: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self._end = time.monotonic() + limit

    def measure(
        self, name: str, run: Run, check: Callable[[Tensor], dict[str, Any]], calls: int = 50
    ) -> None:
        if time.monotonic() > self._end:
            self.skipped.append(name)
            return
        row: dict[str, Any] = {"name": name, "calls": calls}
        results = {}
        try:
            for label, on in (("off", False), ("on", True)):
                with early(on):
                    graph, result = captured(run, calls)
                    row[label] = seconds(graph, calls)
                    results[label] = result.clone()
            row["same_bits"] = torch.equal(results["on"], results["off"])
            row |= check(results["on"])
        except Exception as error:  # The other lines run even if one fails.
            row["failed"] = f"{type(error).__name__}: {error}"[:500]
        self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), device=DEVICE).to(DTYPE)


def closeness(got: Tensor, exact: Tensor, eager: Tensor) -> dict[str, Any]:
    """Largest errors, over the largest value; right where at most twice that of eager bfloat16."""
    scale = exact.abs().max().item()
    error, eager_error = ((x.float() - exact).abs().max().item() / scale for x in (got, eager))
    return {"error": error, "eager_error": eager_error, "ok": error <= 2 * eager_error}


def equality(got: Tensor, want: Tensor) -> dict[str, Any]:
    return {"differing": int((got != want).sum()), "of": got.numel(), "ok": torch.equal(got, want)}


def published() -> LMConfig:
    text = files("mimo_fast").joinpath("presets/7b-lm.json").read_text(encoding="utf-8")
    return LMConfig.from_dict(json.loads(text))


def filled_cache(config: TransformerConfig, rows: int, capacity: int) -> KVCache:
    cache = KVCache.allocate(config, rows, capacity, DTYPE, torch.device(DEVICE))
    for part, seed in zip(cache.parts, (1, 2), strict=True):
        part.normal_(generator=generator(seed))
    return cache


def attention(
    study: Study, name: str, config: TransformerConfig, rows: int, length: int, capacity: int
) -> None:
    """One layer of one kind: `length` positions with the new one."""
    config = replace(config, layers=1)
    width = (config.heads + 2 * config.kv_heads) * config.head_dim
    qkv, cache = random(rows, 1, width), filled_cache(config, rows, capacity).layer(0)
    table = rope_table(config.head_dim, config.rope_theta, capacity, DEVICE)
    slots = torch.arange(rows, device=DEVICE)
    starts = torch.full((rows,), length - 1, device=DEVICE)

    def run() -> Tensor:
        return decode_attention(
            qkv, table, cache, slots, starts, config.heads, capacity, fixed=True
        )

    def check(got: Tensor) -> dict[str, Any]:
        exact_cache = replace(cache, k=cache.k.float(), v=cache.v.float())
        arguments = (slots, starts, config.heads)
        exact = decode_attention_ref(qkv.float(), table, exact_cache, *arguments)
        return closeness(got, exact, decode_attention_ref(qkv, table, cache, *arguments))

    study.measure(f"{name} attention rows={rows} length={length}", run, check)


def codes(study: Study, config: LMConfig, rows: int, sampler: MiMoSampler, at: int) -> None:
    """One step with its heads; logits of small integers are the same in any order of summation."""
    steps = code_steps(
        config.code_sizes, config.empty_codes, config.delays, config.group_size, DEVICE
    )
    dim, table = config.patch_decoder.dim, sum(config.code_sizes)
    integers = [
        torch.randint(-2, 3, (n, dim), generator=generator(n), device=DEVICE).to(DTYPE)
        for n in (rows, table)
    ]
    hidden, heads = integers[0] * 2.0**-5, integers[1]
    embeddings = random(table, dim)
    settings = sampler_tensors([sampler] * rows, DEVICE)
    seeds = torch.arange(rows, device=DEVICE) + 7
    draws = torch.arange(rows, device=DEVICE)
    noise = patch_noise(seeds, draws, config.group_size, table)
    written = torch.full((rows, config.channels, config.group_size), -1, device=DEVICE)

    def run() -> Tensor:
        return sample_codes(hidden, steps[at], heads, settings, noise, written, embeddings)

    def check(got: Tensor) -> dict[str, Any]:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        want = torch.full_like(written, -1)
        exact = sample_codes_ref(
            hidden, steps[at], heads, settings, noise, want, embeddings.float()
        )
        same = {"noise_differs": int((noise != patch_noise_ref(seeds, draws, 4, table)).sum())}
        near = torch.allclose(got.float(), exact, rtol=2**-8, atol=1e-6)
        found = equality(written, want)
        return same | found | {"ok": found["ok"] and near}

    k = "" if sampler.top_k is None else f" top_k={sampler.top_k}"
    study.measure(f"sample_codes step={at} rows={rows}{k}", run, check)


def text(study: Study, config: LMConfig, rows: int, name: str, sampler: MiMoSampler) -> None:
    logits = random(rows, config.vocab_size, seed=rows) * 3
    settings = replace(sampler_tensors([sampler] * rows, DEVICE), all_greedy=sampler is GREEDY)
    settings = replace(settings, any_top_k=sampler.top_k is not None)
    seeds, draws = torch.arange(rows, device=DEVICE) + 3, torch.arange(rows, device=DEVICE)
    banned = torch.zeros(rows, config.vocab_size, dtype=torch.bool, device=DEVICE)

    def run() -> Tensor:
        return sample_text(logits, settings, seeds, draws, banned)

    def check(got: Tensor) -> dict[str, Any]:
        return equality(got, sample_text_ref(logits, settings, seeds, draws, banned))

    study.measure(f"sample_text {name} rows={rows}", run, check, calls=10)


def weights(config: TransformerConfig, form: str, layers: int) -> TransformerWeights:
    """Random ones."""

    def product(*blocks: int, columns: int, bias: bool = False, seed: int) -> Any:
        return random_weight(form, blocks, columns, DTYPE, DEVICE, bias, seed)

    def layer(i: int) -> LayerWeights:
        attended = config.heads * config.head_dim
        kv = config.kv_heads * config.head_dim
        return LayerWeights(
            attention_norm=random(config.dim, seed=i),
            qkv=product(attended, kv, kv, columns=config.dim, bias=True, seed=4 * i),
            out=product(config.dim, columns=attended, seed=4 * i + 1),
            ffn_norm=random(config.dim, seed=i + 1),
            gate_up=product(config.ffn_dim, config.ffn_dim, columns=config.dim, seed=4 * i + 2),
            down=product(config.dim, columns=config.ffn_dim, seed=4 * i + 3),
        )

    return TransformerWeights(tuple(map(layer, range(layers))), random(config.dim, seed=99))


def without_triton(run: Run) -> Tensor:
    os.environ[ENVIRONMENT] = "torch"
    try:
        return run()
    finally:
        os.environ.pop(ENVIRONMENT)


def chain(
    study: Study, name: str, config: TransformerConfig, form: str, length: int, capacity: int
) -> None:
    """Layers at one position of one row, as they follow each other: products and attention."""
    config = replace(config, layers=4)
    layers, cache = weights(config, form, config.layers), filled_cache(config, 1, capacity)
    table = rope_table(config.head_dim, config.rope_theta, capacity, DEVICE)
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    starts = torch.full((1,), length - 1, device=DEVICE)
    attend = cached_attend(config, table, cache, slots, starts, capacity, fixed=True)
    x = random(1, 1, config.dim)

    def run() -> Tensor:
        return transformer(x, layers, config.norm_eps, attend)

    def check(got: Tensor) -> dict[str, Any]:
        graph, result = captured(run, 4)
        races = 0
        for _ in range(RACES):
            result.fill_(torch.nan)
            graph.replay()
            races += not torch.equal(result, got)
        want = without_triton(run).float()
        error = (got.float() - want).abs().max().item() / want.abs().max().item()
        right = races == 0 and error < CHAIN_ERROR
        return {"layers": config.layers, "races": races, "error": error, "ok": right}

    study.measure(name, run, check, calls=10)


def encoder(study: Study, config: LMConfig, form: str) -> None:
    """The patch encoder without its embedding: G rows at once, all layers."""
    own = config.patch_encoder
    layers = weights(own, form, own.layers)
    table = rope_table(own.head_dim, own.rope_theta, config.group_size, DEVICE)
    attend = self_attend(own, table, config.patch_encoder_causal)
    x = random(1, config.group_size, own.dim)

    def run() -> Tensor:
        return transformer(x, layers, own.norm_eps, attend)

    def check(got: Tensor) -> dict[str, Any]:
        want = without_triton(run).float()
        error = (got.float() - want).abs().max().item() / want.abs().max().item()
        return {"layers": own.layers, "error": error, "ok": error < CHAIN_ERROR}

    study.measure(f"patch encoder {form}", run, check, calls=10)


@jit
def near_noise_kernel(worst_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Multiples of 257 lie all over 32 bits, with both ends.
    word = o.to(tl.uint32) * 257
    rest = 1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    exact = -tl.log(-tl.log(rest))
    error = tl.abs(near_gumbel(word).to(tl.float64) - exact)
    tl.store(worst_ptr + tl.program_id(0), tl.max(error, axis=0))


def near_noise(study: Study) -> None:
    """The fast noise of 2^24 words against the exact."""
    programs = 1 << 14
    worst = torch.empty(programs, dtype=torch.float64, device=DEVICE)
    near_noise_kernel[(programs,)](worst, BLOCK=1024)
    error = worst.max().item()
    study.add({"name": "near_gumbel", "worst": error, "bound": NEAR, "ok": error < NEAR / 10})


def everything(study: Study, config: LMConfig) -> None:
    near_noise(study)
    decoder, steps = config.patch_decoder, config.patch_steps
    chain(study, "patch decoder int8, 4 layers", decoder, "int8", 6, steps)
    chain(study, "backbone int4, 4 layers at 1024", config.backbone, "int4", 1024, 4096)
    for rows in (1, 8):
        attention(study, "patch decoder", decoder, rows, 6, steps)
    for length, capacity in ((254, 1024), (2048, 4096)):
        for rows in (1, 8):
            attention(study, "backbone", config.backbone, rows, length, capacity)
    for rows in (1, 8):
        codes(study, config, rows, SPEECH, at=3)
        codes(study, config, rows, SPEECH, at=7)
    for rows in (1, 16, 64):
        text(study, config, rows, "top_p", WORDS)
    encoder(study, config, "dense")
    codes(study, config, 1, TOP_K, at=3)
    for name, sampler in (("greedy", GREEDY), ("top_k, top_p", TOP_K)):
        text(study, config, 1, name, sampler)
    chain(study, "patch decoder dense, 4 layers", decoder, "dense", 6, steps)


def main() -> int:
    parser = argparse.ArgumentParser(description="The Triton kernels between the products.")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing after these")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device")
    start, study = time.monotonic(), Study(arguments.seconds)
    with early(True):
        can = "launch_pdl" in early_launch(torch.zeros(1, device=DEVICE), "rms_norm")
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "early_launches": can,
        "cuda_kernels": cuda.state(),
    }
    print(json.dumps(about), flush=True)
    with torch.no_grad():
        everything(study, published())
    wrong = [
        row["name"]
        for row in study.rows
        if "failed" in row or not (row.get("same_bits", True) and row["ok"])
    ]
    took = time.monotonic() - start
    end = {"seconds": took, "skipped": study.skipped, "wrong": wrong}
    print(json.dumps(end), flush=True)
    if arguments.output:
        record = {"kind": "glue", **about, **end, "rows": study.rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
