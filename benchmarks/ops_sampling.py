"""Samplers at the published vocabulary and code sizes, with the settings of upstream's tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPE, LM, STREAMS, integers, normal, op_case
from benchmarks.harness import Case, Inputs
from mimo_fast.kernels.sample_codes import (
    code_steps,
    patch_noise,
    patch_noise_bytes,
    patch_noise_ref,
    sample_codes,
    sample_codes_bytes,
    sample_codes_ref,
)
from mimo_fast.kernels.sample_text import sample_text, sample_text_bytes, sample_text_ref
from mimo_fast.sampling import (
    DEFAULT_GLOBAL_SAMPLER,
    GREEDY,
    TASK_SAMPLERS,
    MiMoSampler,
    sampler_tensors,
)

TEXT_SAMPLERS = {
    "greedy": GREEDY,
    "top-p": TASK_SAMPLERS["spoken_dialogue"]["global"],
    "top-k": DEFAULT_GLOBAL_SAMPLER,
}
SPEECH = TASK_SAMPLERS["spoken_dialogue"]["local"]
STEP = LM.group_size - 1
"""The first step of a patch at which as many heads are active as ever are; it has both of the large
ones."""

DRAW_FLOP = 200
"""Of one Gumbel number: 10 rounds of Philox and two logarithms."""


def cases() -> Iterator[Case]:
    for name, sampler in TEXT_SAMPLERS.items():
        for rows in STREAMS:
            yield _text(rows, name, sampler)
    for rows in STREAMS:
        yield _noise(rows)
    for rows in STREAMS:
        yield _codes(rows)


def _seeds(device: torch.device, rows: int) -> tuple[Tensor, Tensor]:
    """Seeds and draws of rows."""
    return integers(device, 2**62, rows, seed=1), integers(device, 10**6, rows, seed=2)


def _text(rows: int, name: str, sampler: MiMoSampler) -> Case:
    size = LM.vocab_size

    def make(device: torch.device) -> Inputs:
        seeds, draws = _seeds(device, rows)
        return {
            "logits": normal(device, rows, size, scale=3.0),
            "seeds": seeds,
            "draws": draws,
            "settings": sampler_tensors([sampler] * rows, device),
        }

    top_k, top_p = bool(sampler.top_k), sampler.top_p is not None
    noise = 0 if name == "greedy" else DRAW_FLOP
    return op_case(
        "backbone.sample_text",
        sample_text,
        sample_text_ref,
        make,
        m=rows,
        shape=f"M={rows} V={size}",
        form=name,
        nbytes=rows * size * DTYPE.itemsize
        if name == "greedy"
        else sample_text_bytes(rows, size, DTYPE.itemsize, top_k, top_p),
        flop=rows * size * (2 + noise),
    )


def _noise(rows: int) -> Case:
    size = sum(LM.code_sizes)

    def make(device: torch.device) -> Inputs:
        seeds, draws = _seeds(device, rows)
        return {"seeds": seeds, "draws": draws, "group_size": LM.group_size, "size": size}

    return op_case(
        "patch_decoder.patch_noise",
        patch_noise,
        patch_noise_ref,
        make,
        m=rows,
        dtype=torch.float32,
        shape=f"M={rows} G={LM.group_size} V={size}",
        nbytes=patch_noise_bytes(rows, LM.group_size, size),
        flop=DRAW_FLOP * rows * LM.group_size * size,
    )


def _codes(rows: int) -> Case:
    dim, table, group = LM.patch_decoder.dim, sum(LM.code_sizes), LM.group_size
    steps = code_steps(LM.code_sizes, LM.empty_codes, LM.delays, group)

    def make(device: torch.device) -> Inputs:
        # Small integers times a power of two: logits are exact in any order of summation, and so is
        # the draw.
        hidden, heads = (integers(device, 5, n, dim, seed=n) - 2 for n in (rows, table))
        seeds, draws = _seeds(device, rows)
        return {
            "hidden": hidden.to(DTYPE) / 16,
            "heads": heads.to(DTYPE),
            "embeddings": normal(device, table, dim),
            "step": code_steps(LM.code_sizes, LM.empty_codes, LM.delays, group, device)[STEP],
            "settings": sampler_tensors([SPEECH] * rows, device),
            "noise": patch_noise(seeds, draws, group, table),
            "codes": torch.zeros(rows, LM.channels, group, dtype=torch.int64, device=device),
        }

    def collect(inputs: Inputs, x: Any) -> tuple[Tensor, ...]:
        return x, inputs["codes"]

    active = steps[STEP].last - steps[STEP].first
    return op_case(
        "patch_decoder.sample_codes",
        sample_codes,
        sample_codes_ref,
        make,
        m=rows,
        collect=collect,
        shape=f"M={rows} V={active} D={dim}",
        flop=2 * rows * active * dim,
        nbytes=sample_codes_bytes(rows, steps[STEP], dim, dim, DTYPE.itemsize),
    )
