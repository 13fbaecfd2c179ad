"""The cases: every op of mimo_fast/kernels at the published dimensions, as a table.

An op's name starts with the part of the model that it is measured for. M is rows of x: streams at
decode, positions in prefill, frames in the codec. Formats are those of weights or caches;
activations are bfloat16, as in the published checkpoints, except where an op is float32 by
contract. One function for each op defines its arguments, bytes and FLOP; `table` lists the
arguments of all cases.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
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


Make = Callable[[torch.device], Any]


def kernels(name: str) -> ModuleType:
    """A module of mimo_fast.kernels, imported when a case needs it.

    `--compare` runs this file with older packages, and leaves out what they lack.
    """
    return importlib.import_module(f"mimo_fast.kernels.{name}")


# Attention, and what is appended to a cache.


def _width(config: TransformerConfig) -> int:
    return (config.heads + 2 * config.kv_heads) * config.head_dim


def _rotations(dim: int, theta: float, positions: int = POSITIONS) -> Make:
    return lambda device: kernels("rope").rope_table(dim, theta, positions, device)


def _cache(config: TransformerConfig, slots: int, positions: int, form: str) -> Make:
    kv = kernels("kv_cache")
    shape = (slots, config.kv_heads, positions, config.head_dim)

    def make(device: torch.device) -> Any:
        k, v = (normal(device, *shape, seed=seed) for seed in (1, 2))
        if not CACHES[form]:
            return kv.LayerKV(k, v)
        (k, k_scales), (v, v_scales) = kv.quantize_heads(k), kv.quantize_heads(v)
        return kv.LayerKV(k, v, k_scales, v_scales)

    return make


def _all(count: int, value: int) -> Make:
    return lambda device: torch.full((count,), value, device=device)


def _appended(cache: Any, first: int, count: int) -> Outputs:
    """The part of the cache that an append wrote; scales are float32."""
    tensors = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return tuple(x[:, :, first : first + count] for x in tensors if x is not None)


def decode_attention(
    part: str, config: TransformerConfig, form: str, context: int, m: int
) -> Benchmark | None:
    module, attended = kernels("decode_attention"), config.heads * config.head_dim
    stored = (config.kv_heads, config.head_dim, SIZE, CACHES[form])
    read = module.decode_attention_bytes([context] * m, *stored)
    if m * module.decode_attention_bytes([context], *stored) > CACHE_LIMIT:
        return None
    inputs = {
        "qkv": (m, 1, _width(config)),
        "slots": lambda device: torch.arange(m, device=device),
        "table": _rotations(config.head_dim, config.rope_theta),
        "cache": _cache(config, m, context, form),
        "starts": _all(m, context - 1),
        "heads": config.heads,
        "max_length": context,
    }
    nbytes = m * (_width(config) + attended) * SIZE + 4 * config.head_dim + read
    special = {
        "form": form,
        "reference": lambda max_length, **inputs: module.decode_attention_ref(**inputs),
        "collect": lambda inputs, y: (y, *_appended(inputs["cache"], context - 1, 1)),
        "has_native": not CACHES[form],
    }
    op, run, flop = f"{part}.decode_attention", module.decode_attention, 4 * m * context * attended
    return of_op(op, run, {"M": m, "S": context}, inputs, nbytes, flop, **special)


def rotary_attention(m: int) -> Benchmark:
    module, t = kernels("attention"), LM.group_size
    heads, kv_heads, dh = ENCODER.heads, ENCODER.kv_heads, ENCODER.head_dim
    inputs = {"qkv": (m, t, _width(ENCODER)), "table": _rotations(dh, ENCODER.rope_theta, t)}
    inputs |= {"heads": heads, "kv_heads": kv_heads, "causal": LM.patch_encoder_causal}
    nbytes = module.rotary_attention_bytes(m, t, heads, kv_heads, dh, SIZE)
    op, flop = "patch_encoder.rotary_attention", 4 * m * t * t * heads * dh
    return of_op(op, module.rotary_attention, {"M": m, "T": t}, inputs, nbytes, flop)


def _attended(t: int, s: int) -> int:
    """Keys of the newest t of s positions; on average one sees half of the new ones."""
    return t * (s - t) + t * (t + 1) // 2


def attention(
    op: str, heads: int, kv_heads: int, dh: int, causal: bool, t: int, s: int
) -> Benchmark:
    module, kv = kernels("attention"), (1, kv_heads, s, dh)
    inputs = {"q": (1, heads, t, dh), "k": kv, "v": kv, "causal": causal}
    nbytes = module.attention_bytes(1, t, s, heads, kv_heads, dh, SIZE)
    flop = 4 * _attended(t, s) * heads * dh
    return of_op(op, module.attention, {"T": t, "S": s}, inputs, nbytes, flop)


def cached_prefill_attention(form: str, t: int, s: int) -> Benchmark:
    """The same from the cache; its positions are read on the device."""
    module, heads, dh = kernels("prefill_attention"), BACKBONE.heads, BACKBONE.head_dim
    inputs = {
        "q": (1, t, heads, dh),
        "cache": _cache(BACKBONE, 1, s, form),
        "slots": lambda device: torch.zeros(1, t, dtype=torch.int64, device=device),
        "positions": lambda device: torch.arange(s - t, s, device=device)[None],
    }
    stored = (heads, BACKBONE.kv_heads, dh, SIZE, CACHES[form])
    nbytes, flop = module.prefill_attention_bytes(t, s - t, *stored), 4 * _attended(t, s)
    op, run = "backbone.cached_prefill_attention", module.prefill_attention
    return of_op(op, run, {"T": t, "S": s}, inputs, nbytes, flop * heads * dh, form=form)


def kv_append(form: str, t: int) -> Benchmark:
    module, dh = kernels("rope"), BACKBONE.head_dim
    heads = BACKBONE.heads + 2 * BACKBONE.kv_heads
    inputs = {
        "qkv": (1, t, _width(BACKBONE)),
        "cache": _cache(BACKBONE, 1, 2 * t, form),
        "table": _rotations(dh, BACKBONE.rope_theta),
        "slots": _all(1, 0),
        "starts": _all(1, t),
        "heads": BACKBONE.heads,
    }
    work = module.rope_bytes(t, heads, dh, SIZE), 3 * t * heads * dh
    special = {"collect": lambda inputs, q: (q, *_appended(inputs["cache"], t, t)), "form": form}
    return of_op("backbone.kv_append", module.rope_append, {"T": t}, inputs, *work, **special)


def rope(t: int) -> Benchmark:
    module, heads, dh = kernels("rope"), CODEC.decoder_heads, CODEC.dim // CODEC.decoder_heads
    inputs = {"x": (t, heads, dh), "table": _rotations(dh, CODEC.rope_theta, t)}
    work = module.rope_bytes(t, heads, dh, SIZE), 3 * t * heads * dh
    return of_op("codec.rope", module.rope, {"T": t, "H": heads, "Dh": dh}, inputs, *work)


def window_attention(t: int) -> Benchmark:
    module, (left, right) = kernels("window_attention"), CODEC.vocoder_window
    heads, dh = CODEC.vocoder_heads, CODEC.vocoder_dim // CODEC.vocoder_heads
    inputs = dict.fromkeys("qkv", (heads, t, dh)) | {"left": left, "right": right}
    work = (
        module.window_attention_bytes(heads, t, dh, SIZE),
        4 * t * (left + right + 1) * heads * dh,
    )
    op, run = "vocoder.window_attention", module.window_attention
    return of_op(op, run, {"T": t, "H": heads}, inputs, *work)


# Norms, SwiGLU, embeddings, codebooks: bound by memory, except the search.


def rms_norm(part: str, dim: int, m: int) -> Benchmark:
    module, inputs = kernels("norm"), {"x": (m, dim), "weight": (dim,), "eps": EPS}
    work = module.norm_bytes(m, dim, SIZE), 4 * m * dim
    return of_op(f"{part}.rms_norm", module.rms_norm, {"M": m, "D": dim}, inputs, *work)


def layer_norm(part: str, dim: int, m: int) -> Benchmark:
    module, inputs = kernels("norm"), {"x": (m, dim), "weight": (dim,), "bias": (dim,), "eps": 1e-5}
    work = module.norm_bytes(m, dim, SIZE) + dim * SIZE, 7 * m * dim
    return of_op(f"{part}.layer_norm", module.layer_norm, {"M": m, "D": dim}, inputs, *work)


def swiglu(part: str, width: int, m: int) -> Benchmark:
    module, inputs = kernels("swiglu"), {"gate_up": (m, 2 * width)}
    work = module.swiglu_bytes(m, width, SIZE), 5 * m * width
    return of_op(f"{part}.swiglu", module.swiglu, {"M": m, "F": width}, inputs, *work)


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
    dims = {"M": m, "C": channels, "G": group}
    work = module.patch_embed_bytes(*dims.values(), dim, SIZE), m * channels * group * dim
    return of_op("patch_encoder.patch_embed", module.patch_embed, dims, inputs, *work)


def input_embed(form: str, m: int) -> Benchmark:
    """Text rows, the more expensive kind where one is packed; every fourth of many is audio."""
    module, dim, audio = kernels("text_embed"), BACKBONE.dim, m // 4
    row_bytes = dim * SIZE if form == "dense" else dim + 2

    def text(device: torch.device) -> Tensor:
        ids = integers(device, TABLE_ROWS - 1, m) + 1
        ids[:audio] = EMPTY_ID
        return ids

    def packed(device: torch.device) -> Any:
        # Of float32: on a CPU a weight of bfloat16 is packed for products, of which no rows can be
        # taken.
        return random_weight(form, (TABLE_ROWS,), dim, torch.float32, device)

    table = (TABLE_ROWS, dim) if form == "dense" else packed
    inputs = {"text": text, "patches": (m, dim), "table": table, "empty_id": EMPTY_ID}
    work = module.input_embed_bytes(audio, m - audio, dim, SIZE, row_bytes), m * dim
    op, run = "backbone.input_embed", module.input_embed
    return of_op(op, run, {"M": m, "D": dim}, inputs, *work, form=form)


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

    inputs, dims = {"x": frames, "codebooks": _codebooks}, {"T": t, "Q": len(BOOKS)}
    work = module.rvq_encode_bytes(t, CODEC.dim, BOOKS), 2 * t * CODEC.dim * sum(BOOKS)
    more = {"dtype": torch.float32, "reference": reference, "check": check}
    return of_op("codec.rvq_encode", module.rvq_encode, dims, inputs, *work, **more)


def rvq_decode(t: int) -> Benchmark:
    module = kernels("rvq")

    def codes(device: torch.device) -> Tensor:
        return torch.stack([integers(device, size, t, seed=i) for i, size in enumerate(BOOKS)])

    def reference(codes: Tensor, codebooks: Any) -> Tensor:
        return module.rvq_decode_ref(codes, codebooks.books)

    inputs, dims = {"codes": codes, "codebooks": _codebooks}, {"T": t, "Q": len(BOOKS)}
    work = module.rvq_decode_bytes(t, CODEC.dim, len(BOOKS)), t * CODEC.dim * len(BOOKS)
    more = {"dtype": torch.float32, "reference": reference}
    return of_op("codec.rvq_decode", module.rvq_decode, dims, inputs, *work, **more)


# Samplers, with the settings of upstream's tasks.


def _seeds(m: int) -> dict[str, Make]:
    """Seeds and draws of rows."""
    return {
        "seeds": lambda device: integers(device, 2**62, m, seed=1),
        "draws": lambda device: integers(device, 10**6, m, seed=2),
    }


def sample_text(name: str, m: int) -> Benchmark:
    module, size, sampler = kernels("sample_text"), LM.vocab_size, TEXT_SAMPLERS[name]
    inputs = {
        "logits": lambda device: normal(device, m, size, scale=3.0),
        **_seeds(m),
        "settings": lambda device: sampler_tensors([sampler] * m, device),
    }
    nbytes, flop = m * size * SIZE, 2 * m * size
    if name != "greedy":
        cuts = bool(sampler.top_k), sampler.top_p is not None
        nbytes = module.sample_text_bytes(m, size, SIZE, *cuts)
        flop += DRAW_FLOP * m * size
    op, run, dims = "backbone.sample_text", module.sample_text, {"M": m, "V": size}
    return of_op(op, run, dims, inputs, nbytes, flop, form=name)


def patch_noise(m: int) -> Benchmark:
    module, size, group = kernels("sample_codes"), sum(LM.code_sizes), LM.group_size
    inputs = {**_seeds(m), "group_size": group, "size": size}
    work = module.patch_noise_bytes(m, group, size), DRAW_FLOP * m * group * size
    op, dims = "patch_decoder.patch_noise", {"M": m, "G": group, "V": size}
    return of_op(op, module.patch_noise, dims, inputs, *work, dtype=torch.float32)


def sample_codes(m: int) -> Benchmark:
    module, dim, size, group = kernels("sample_codes"), DECODER.dim, sum(LM.code_sizes), STEP + 1
    layout = (LM.code_sizes, LM.empty_codes, LM.delays, group)

    def small(count: int) -> Make:
        # Small integers times a power of two: logits are exact in any order of summation, and so is
        # the draw.
        return lambda device: ((integers(device, 5, count, dim, seed=count) - 2) / 4).to(DTYPE)

    def noise(device: torch.device) -> Tensor:
        seeds, draws = (make(device) for make in _seeds(m).values())
        return module.patch_noise(seeds, draws, group, size)

    def codes(device: torch.device) -> Tensor:
        return torch.zeros(m, LM.channels, group, dtype=torch.int64, device=device)

    inputs = {
        "hidden": small(m),
        "heads": small(size),
        "embeddings": (size, dim),
        "step": lambda device: module.code_steps(*layout, device)[STEP],
        "settings": lambda device: sampler_tensors([SPEECH] * m, device),
        "noise": noise,
        "codes": codes,
    }
    step = module.code_steps(*layout)[STEP]
    active = step.last - step.first
    work = module.sample_codes_bytes(m, step, dim, dim, SIZE), 2 * m * active * dim
    op, run, dims = (
        "patch_decoder.sample_codes",
        module.sample_codes,
        {"M": m, "V": active, "D": dim},
    )
    return of_op(op, run, dims, inputs, *work, collect=lambda inputs, x: (x, inputs["codes"]))


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
