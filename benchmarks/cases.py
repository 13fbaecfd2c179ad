"""The cases: every op of mimo_fast/kernels at the published dimensions, as a table.

An op's name starts with the part of the model that it is measured for. M is rows of x: streams at
decode, positions in prefill, frames in the codec. Formats are those of weights or caches;
activations are bfloat16, as in the published checkpoints, except where an op is float32 by
contract. One function for each op defines its arguments, bytes and FLOP; `table` lists the
arguments of all cases.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Inputs, Outputs, integers, normal, of_op
from benchmarks.synthetic import random_weight
from mimo_fast.bench.accuracy import Accuracy, compare_codes
from mimo_fast.bench.synthetic import preset_configs
from mimo_fast.config import TransformerConfig
from mimo_fast.sampling import DEFAULT_GLOBAL_SAMPLER, GREEDY, TASK_SAMPLERS, sampler_tensors

LM, CODEC = preset_configs("7b")
BACKBONE, DECODER, ENCODER = LM.backbone, LM.patch_decoder, LM.patch_encoder
EPS = BACKBONE.norm_eps
DTYPE = torch.bfloat16
SIZE = DTYPE.itemsize

ROWS = (1, 2, 4, 8, 16, 64, 512)
STREAMS = ROWS[:-1]
"""Rows of an op that only decodes; no step has more than 64 streams."""

POSITIONS = 8192
"""Positions of rotation tables: the published model's context."""

CONTEXTS = (256, 1024, 4096, 8192)
"""Positions that a step of the backbone attends to."""

CACHE_LIMIT = 2**30
"""Bytes of one layer's cache up to which all rows and contexts are combined."""

CHUNK = 256
"""Positions of a prefill chunk."""

CACHES = {"bfloat16": False, "int8": True}
TABLE_ROWS = 1024
"""Rows of the text embedding in a case.

A gather costs the same in any table that exceeds the cache, and there are many copies of this one.
"""

EMPTY_ID = 0
BOOKS = [size - 1 for size in LM.code_sizes]
TEXT_SAMPLERS = {
    "greedy": GREEDY,
    "top-p": TASK_SAMPLERS["spoken_dialogue"]["global"],
    "top-k": DEFAULT_GLOBAL_SAMPLER,
}
SPEECH = TASK_SAMPLERS["spoken_dialogue"]["local"]
STEP = LM.group_size - 1
"""The first step of a patch with the most active heads, both large ones among them."""

DRAW_FLOP = 200
"""FLOP of one Gumbel number: 10 rounds of Philox and two logarithms."""


def kernels(name: str) -> ModuleType:
    """A module of mimo_fast.kernels, imported when a case needs it.

    `--compare` runs this file with older packages, and leaves out what they lack.
    """
    return importlib.import_module(f"mimo_fast.kernels.{name}")


# Attention, and what is appended to a cache.


def _width(config: TransformerConfig) -> int:
    return (config.heads + 2 * config.kv_heads) * config.head_dim


def _rotations(dim: int, theta: float, positions: int) -> Callable[[torch.device], Tensor]:
    return lambda device: kernels("rope").rope_table(dim, theta, positions, device)


def _cache(config: TransformerConfig, slots: int, positions: int, form: str) -> Any:
    kv = kernels("kv_cache")
    shape = (slots, config.kv_heads, positions, config.head_dim)

    def make(device: torch.device) -> Any:
        k, v = (normal(device, *shape, seed=seed) for seed in (1, 2))
        if not CACHES[form]:
            return kv.LayerKV(k, v)
        (k, k_scales), (v, v_scales) = kv.quantize_heads(k), kv.quantize_heads(v)
        return kv.LayerKV(k, v, k_scales, v_scales)

    return make


def _appended(cache: Any, first: int, count: int) -> Outputs:
    """The part of the cache that an append wrote; scales are float32."""
    tensors = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return tuple(x[:, :, first : first + count] for x in tensors if x is not None)


def _cached_bytes(config: TransformerConfig, lengths: Sequence[int], form: str) -> int:
    count = kernels("decode_attention").decode_attention_bytes
    return count(lengths, config.kv_heads, config.head_dim, SIZE, CACHES[form])


def decode_attention(
    part: str, config: TransformerConfig, form: str, context: int, rows: int
) -> Benchmark | None:
    if rows * _cached_bytes(config, [context], form) > CACHE_LIMIT:
        return None
    module, attended = kernels("decode_attention"), config.heads * config.head_dim
    inputs = {
        "qkv": (rows, 1, _width(config)),
        "slots": lambda device: torch.arange(rows, device=device),
        "table": _rotations(config.head_dim, config.rope_theta, POSITIONS),
        "cache": _cache(config, rows, context, form),
        "starts": lambda device: torch.full((rows,), context - 1, device=device),
        "heads": config.heads,
        "max_length": context,
    }
    activations = rows * (_width(config) + attended) * SIZE + 4 * config.head_dim
    return of_op(
        f"{part}.decode_attention",
        module.decode_attention,
        rows,
        f"M={rows} S={context}",
        inputs,
        activations + _cached_bytes(config, [context] * rows, form),
        4 * rows * context * attended,
        form=form,
        reference=lambda max_length, **inputs: module.decode_attention_ref(**inputs),
        collect=lambda inputs, y: (y, *_appended(inputs["cache"], context - 1, 1)),
        has_native=not CACHES[form],
    )


def rotary_attention(m: int) -> Benchmark:
    module, t = kernels("attention"), LM.group_size
    heads, kv_heads, dh = ENCODER.heads, ENCODER.kv_heads, ENCODER.head_dim
    inputs = {"qkv": (m, t, _width(ENCODER)), "table": _rotations(dh, ENCODER.rope_theta, t)}
    inputs |= {"heads": heads, "kv_heads": kv_heads, "causal": LM.patch_encoder_causal}
    nbytes = module.rotary_attention_bytes(m, t, heads, kv_heads, dh, SIZE)
    run, flop = module.rotary_attention, 4 * m * t * t * heads * dh
    return of_op("patch_encoder.rotary_attention", run, m, f"M={m} T={t}", inputs, nbytes, flop)


def attention(
    op: str, heads: int, kv_heads: int, dh: int, causal: bool, t: int, s: int
) -> Benchmark:
    """The newest t of s positions; on average a query sees half of the new ones."""
    module, kv = kernels("attention"), (1, kv_heads, s, dh)
    inputs = {"q": (1, heads, t, dh), "k": kv, "v": kv, "causal": causal}
    nbytes = module.attention_bytes(1, t, s, heads, kv_heads, dh, SIZE)
    flop = 4 * (t * (s - t) + t * (t + 1) // 2) * heads * dh
    return of_op(op, module.attention, t, f"T={t} S={s}", inputs, nbytes, flop)


def cached_prefill_attention(form: str, t: int, s: int) -> Benchmark:
    """The same from the cache; its positions are read on the device."""
    module, heads = kernels("prefill_attention"), BACKBONE.heads
    kv_heads, dh = BACKBONE.kv_heads, BACKBONE.head_dim
    inputs = {
        "q": (t, heads, dh),
        "cache": _cache(BACKBONE, 1, s, form),
        "slots": lambda device: torch.zeros(t, dtype=torch.int64, device=device),
        "positions": lambda device: torch.arange(s - t, s, device=device),
    }
    nbytes = module.prefill_attention_bytes(t, s - t, heads, kv_heads, dh, SIZE, CACHES[form])
    flop = 4 * (t * (s - t) + t * (t + 1) // 2) * heads * dh
    op, run, shape = "backbone.cached_prefill_attention", module.prefill_attention, f"T={t} S={s}"
    return of_op(op, run, t, shape, inputs, nbytes, flop, form=form)


def kv_append(form: str, t: int) -> Benchmark:
    module, dh = kernels("rope"), BACKBONE.head_dim
    heads = BACKBONE.heads + 2 * BACKBONE.kv_heads
    inputs = {
        "qkv": (1, t, _width(BACKBONE)),
        "cache": _cache(BACKBONE, 1, 2 * t, form),
        "table": _rotations(dh, BACKBONE.rope_theta, POSITIONS),
        "slots": lambda device: torch.zeros(1, dtype=torch.int64, device=device),
        "starts": lambda device: torch.full((1,), t, device=device),
        "heads": BACKBONE.heads,
    }
    return of_op(
        "backbone.kv_append",
        module.rope_append,
        t,
        f"T={t}",
        inputs,
        module.rope_bytes(t, heads, dh, SIZE),
        3 * t * heads * dh,
        form=form,
        collect=lambda inputs, q: (q, *_appended(inputs["cache"], t, t)),
    )


def rope(t: int) -> Benchmark:
    module, heads, dh = kernels("rope"), CODEC.decoder_heads, CODEC.dim // CODEC.decoder_heads
    inputs = {"x": (t, heads, dh), "table": _rotations(dh, CODEC.rope_theta, t)}
    nbytes, shape = module.rope_bytes(t, heads, dh, SIZE), f"T={t} H={heads} Dh={dh}"
    return of_op("codec.rope", module.rope, t, shape, inputs, nbytes, 3 * t * heads * dh)


def window_attention(t: int) -> Benchmark:
    module, (left, right) = kernels("window_attention"), CODEC.vocoder_window
    heads, dh = CODEC.vocoder_heads, CODEC.vocoder_dim // CODEC.vocoder_heads
    qkv = dict.fromkeys("qkv", (heads, t, dh))
    nbytes = module.window_attention_bytes(heads, t, dh, SIZE)
    flop, inputs = 4 * t * (left + right + 1) * heads * dh, {**qkv, "left": left, "right": right}
    op, run = "vocoder.window_attention", module.window_attention
    return of_op(op, run, t, f"T={t} H={heads}", inputs, nbytes, flop)


# Norms, SwiGLU, embeddings, codebooks: bound by memory, except the search.


def rms_norm(part: str, dim: int, m: int) -> Benchmark:
    module, inputs = kernels("norm"), {"x": (m, dim), "weight": (dim,), "eps": EPS}
    nbytes, shape = module.norm_bytes(m, dim, SIZE), f"M={m} D={dim}"
    return of_op(f"{part}.rms_norm", module.rms_norm, m, shape, inputs, nbytes, 4 * m * dim)


def layer_norm(part: str, dim: int, m: int) -> Benchmark:
    module, inputs = kernels("norm"), {"x": (m, dim), "weight": (dim,), "bias": (dim,), "eps": 1e-5}
    nbytes, shape = module.norm_bytes(m, dim, SIZE) + dim * SIZE, f"M={m} D={dim}"
    return of_op(f"{part}.layer_norm", module.layer_norm, m, shape, inputs, nbytes, 7 * m * dim)


def swiglu(part: str, width: int, m: int) -> Benchmark:
    module, inputs = kernels("swiglu"), {"gate_up": (m, 2 * width)}
    nbytes, shape = module.swiglu_bytes(m, width, SIZE), f"M={m} F={width}"
    return of_op(f"{part}.swiglu", module.swiglu, m, shape, inputs, nbytes, 5 * m * width)


def patch_embed(m: int) -> Benchmark:
    module, sizes = kernels("patch_embed"), LM.code_sizes
    channels, group, dim = LM.channels, LM.group_size, ENCODER.dim

    def codes(device: torch.device) -> Tensor:
        each = [integers(device, size - 1, m, group, seed=c) for c, size in enumerate(sizes)]
        return torch.stack(each, dim=1)

    inputs = {
        "codes": codes,
        "table": (sum(sizes), dim),
        "offsets": lambda device: torch.tensor([0, *sizes[:-1]], device=device).cumsum(0),
        "empty": lambda device: torch.tensor(LM.empty_codes, device=device),
    }
    nbytes = module.patch_embed_bytes(m, channels, group, dim, SIZE)
    flop, shape = m * channels * group * dim, f"M={m} C={channels} G={group}"
    run = module.patch_embed
    return of_op("patch_encoder.patch_embed", run, m, shape, inputs, nbytes, flop)


def input_embed(form: str, rows: int) -> Benchmark:
    """Text rows, the more expensive kind where one is packed; every fourth of many is audio."""
    module, dim, audio = kernels("text_embed"), BACKBONE.dim, rows // 4
    row_bytes = dim * SIZE if form == "dense" else dim + 2

    def text(device: torch.device) -> Tensor:
        ids = integers(device, TABLE_ROWS - 1, rows) + 1
        ids[:audio] = EMPTY_ID
        return ids

    def packed(device: torch.device) -> Any:
        # Of float32: on a CPU a weight of bfloat16 is packed for products, of which no rows can be
        # taken.
        return random_weight(form, (TABLE_ROWS,), dim, torch.float32, device)

    table = (TABLE_ROWS, dim) if form == "dense" else packed
    inputs = {"text": text, "patches": (rows, dim), "table": table, "empty_id": EMPTY_ID}
    nbytes = module.input_embed_bytes(audio, rows - audio, dim, SIZE, row_bytes)
    op, run, shape = "backbone.input_embed", module.input_embed, f"M={rows} D={dim}"
    return of_op(op, run, rows, shape, inputs, nbytes, rows * dim, form=form)


def _codebooks(device: torch.device) -> Any:
    books = (
        normal(device, size, CODEC.dim, dtype=torch.float32, seed=i) * 0.8**i
        for i, size in enumerate(BOOKS)
    )
    return kernels("rvq").Codebooks.pack([*books])


def rvq_encode(t: int) -> Benchmark:
    module = kernels("rvq")

    def frames(device: torch.device) -> Tensor:
        return normal(device, t, CODEC.dim, dtype=torch.float32, scale=2.0)

    def reference(x: Tensor, codebooks: Any) -> Tensor:
        return module.rvq_encode_ref(x, codebooks.books)

    def check(inputs: Inputs, got: Outputs) -> Accuracy:
        want = reference(**inputs)
        if got[0].shape != want.shape:
            return Accuracy(t, 0, 1.0)
        wrong, _ = compare_codes(inputs["x"], inputs["codebooks"].books, got[0], want)
        return Accuracy(wrong, 0, wrong / t)

    inputs = {"x": frames, "codebooks": _codebooks}
    nbytes = module.rvq_encode_bytes(t, CODEC.dim, BOOKS)
    flop, shape = 2 * t * CODEC.dim * sum(BOOKS), f"T={t} Q={len(BOOKS)}"
    more = {"dtype": torch.float32, "reference": reference, "check": check}
    return of_op("codec.rvq_encode", module.rvq_encode, t, shape, inputs, nbytes, flop, **more)


def rvq_decode(t: int) -> Benchmark:
    module = kernels("rvq")

    def codes(device: torch.device) -> Tensor:
        return torch.stack([integers(device, size, t, seed=i) for i, size in enumerate(BOOKS)])

    def reference(codes: Tensor, codebooks: Any) -> Tensor:
        return module.rvq_decode_ref(codes, codebooks.books)

    inputs = {"codes": codes, "codebooks": _codebooks}
    nbytes = module.rvq_decode_bytes(t, CODEC.dim, len(BOOKS))
    flop, shape = t * CODEC.dim * len(BOOKS), f"T={t} Q={len(BOOKS)}"
    more = {"dtype": torch.float32, "reference": reference}
    return of_op("codec.rvq_decode", module.rvq_decode, t, shape, inputs, nbytes, flop, **more)


# Samplers, with the settings of upstream's tasks.


def _seeds(rows: int) -> dict[str, Callable[[torch.device], Tensor]]:
    """Seeds and draws of rows."""
    return {
        "seeds": lambda device: integers(device, 2**62, rows, seed=1),
        "draws": lambda device: integers(device, 10**6, rows, seed=2),
    }


def sample_text(name: str, rows: int) -> Benchmark:
    module, size, sampler = kernels("sample_text"), LM.vocab_size, TEXT_SAMPLERS[name]
    inputs = {
        "logits": lambda device: normal(device, rows, size, scale=3.0),
        **_seeds(rows),
        "settings": lambda device: sampler_tensors([sampler] * rows, device),
    }
    nbytes, flop = rows * size * SIZE, 2 * rows * size
    if name != "greedy":
        cuts = bool(sampler.top_k), sampler.top_p is not None
        nbytes = module.sample_text_bytes(rows, size, SIZE, *cuts)
        flop += DRAW_FLOP * rows * size
    op, run, shape = "backbone.sample_text", module.sample_text, f"M={rows} V={size}"
    return of_op(op, run, rows, shape, inputs, nbytes, flop, form=name)


def patch_noise(rows: int) -> Benchmark:
    module, size, group = kernels("sample_codes"), sum(LM.code_sizes), LM.group_size
    inputs = {**_seeds(rows), "group_size": group, "size": size}
    nbytes, flop = module.patch_noise_bytes(rows, group, size), DRAW_FLOP * rows * group * size
    run, shape = module.patch_noise, f"M={rows} G={group} V={size}"
    about = (rows, shape, inputs, nbytes, flop)
    return of_op("patch_decoder.patch_noise", run, *about, dtype=torch.float32)


def sample_codes(rows: int) -> Benchmark:
    module, dim, size, group = kernels("sample_codes"), DECODER.dim, sum(LM.code_sizes), STEP + 1
    layout = (LM.code_sizes, LM.empty_codes, LM.delays, group)

    def small(count: int) -> Callable[[torch.device], Tensor]:
        # Small integers times a power of two: logits are exact in any order of summation, and so is
        # the draw.
        return lambda device: ((integers(device, 5, count, dim, seed=count) - 2) / 4).to(DTYPE)

    def noise(device: torch.device) -> Tensor:
        seeds, draws = (make(device) for make in _seeds(rows).values())
        return module.patch_noise(seeds, draws, group, size)

    def codes(device: torch.device) -> Tensor:
        return torch.zeros(rows, LM.channels, group, dtype=torch.int64, device=device)

    inputs = {
        "hidden": small(rows),
        "heads": small(size),
        "embeddings": (size, dim),
        "step": lambda device: module.code_steps(*layout, device)[STEP],
        "settings": lambda device: sampler_tensors([SPEECH] * rows, device),
        "noise": noise,
        "codes": codes,
    }
    step = module.code_steps(*layout)[STEP]
    active = step.last - step.first
    return of_op(
        "patch_decoder.sample_codes",
        module.sample_codes,
        rows,
        f"M={rows} V={active} D={dim}",
        inputs,
        module.sample_codes_bytes(rows, step, dim, dim, SIZE),
        2 * rows * active * dim,
        collect=lambda inputs, x: (x, inputs["codes"]),
    )


def table() -> list[tuple[Callable[..., Benchmark | None], Iterable[tuple[Any, ...]]]]:
    """The function that makes an op's cases, and its arguments."""
    backbone = ("backbone.prefill_attention", BACKBONE.heads, BACKBONE.kv_heads, BACKBONE.head_dim)
    heads, frames = CODEC.decoder_heads, (8, 64, 512)
    codec = ("codec.attention", heads, heads, CODEC.dim // heads, CODEC.decoder_causal)
    widths = (("backbone", BACKBONE), ("patch_decoder", DECODER))
    norms = [("codec", CODEC.dim, m) for m in frames]
    # What a stream recomputes for a patch, and 10 s at once.
    norms += [("vocoder", CODEC.vocoder_dim, m) for m in (176, 1024)]
    own = [("patch_decoder", DECODER, "bfloat16", LM.patch_steps, m) for m in STREAMS]
    return [
        (decode_attention, product(["backbone"], [BACKBONE], CACHES, CONTEXTS, STREAMS)),
        (decode_attention, own),
        (rotary_attention, product(ROWS)),
        (attention, [(*backbone, True, CHUNK, s) for s in (CHUNK, 1024, 4096)]),
        (cached_prefill_attention, product(CACHES, [CHUNK], [CHUNK, 1024, 4096])),
        (kv_append, product(CACHES, [CHUNK])),
        (rope, product(frames)),
        # The decoder attends to the past; the encoder both ways.
        (attention, [(*codec, t, max(t, 512)) for t in frames]),
        (window_attention, product((176, 1024))),
        (rms_norm, [(part, config.dim, m) for part, config in widths for m in ROWS]),
        (layer_norm, norms),
        (swiglu, [(part, config.ffn_dim, m) for part, config in widths for m in ROWS]),
        (patch_embed, product(ROWS)),
        (input_embed, product(("dense", "int8"), STREAMS)),
        # A patch, 2.6 s and 20 s of codes.
        (rvq_encode, product((4, 64, 512))),
        (rvq_decode, product((4, 64, 512))),
        (sample_text, product(TEXT_SAMPLERS, STREAMS)),
        (patch_noise, product(STREAMS)),
        (sample_codes, product(STREAMS)),
    ]
