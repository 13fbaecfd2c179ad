"""The memory plan: device memory that a model needs, from shapes alone, and settings that fit.

weights  the language model in its formats, without text embeddings that stay in host memory
adapters what requests choose from: factors, and tables and matrices of each adapter's own
codec    encoder (unless in host memory), decoder, float32 codebooks; with graphs, the states of
         `max_batch` streams
cache    KV cache of `max_batch` slots of `max_seq_len` positions, and the rest of the decode state
work     the largest activations, and an allowance for libraries
graphs   what captured prompts and encodes keep: the activations of the largest of each
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mimo_fast.checkpoint.adapters import Change
from mimo_fast.checkpoint.layout import Shapes, codec_shapes, lm_shapes
from mimo_fast.config import OFFLOADABLE, CodecConfig, LMConfig
from mimo_fast.errors import DeviceMemoryError
from mimo_fast.kernels.matmul.adapted import RANKS
from mimo_fast.kernels.matmul.launch import UNPACKED_AT_ONCE
from mimo_fast.quantization.formats import Format, QuantizationConfig, stored_tensors
from mimo_fast.runtime.codec.encoder_graphs import BUCKETS, longest_encode
from mimo_fast.runtime.codec.geometry import streamable
from mimo_fast.runtime.codec.schedule import usual_schedules
from mimo_fast.runtime.codec.state import row_bytes
from mimo_fast.runtime.lm.model import PREFILL_CHUNK
from mimo_fast.runtime.lm.state import kv_bytes

GB = 10**9

LIBRARIES = 400 * 10**6
"""Allowance on a GPU for cuBLAS, cuDNN and the allocator's rounding, in bytes."""

CODEC_SECONDS = 60
"""Longest segment that the codec processes at once, in seconds."""

DEFAULT_BATCH = 4

TABLES = re.compile(r"model\.embed_tokens\.|speech_embeddings\.|local_transformer_lm_heads\.")
"""Tables that a variant has copies of, whatever an adapter changes of them."""

STACKED = re.compile(r"(?<=\.)[qkv]_proj|(?<=\.)(gate|up)_proj")


@dataclass(frozen=True)
class Setup:
    """All that determines how much memory a loaded model takes.

    Attributes:
        formats, codec_formats: Format of each quantized tensor by name.
        kv_cache: None for the activations' type, or "int8".
        offload: Parts in host memory, of OFFLOADABLE.
        mapped: Whether dense weights stay in their memory-mapped file, which a CPU reads in place
            and the system can evict.
        converted, codec_converted: Whether dense weights have another type there, and so are
            copied.
        merged: Names of tensors that an adapter changes: these are no longer the file's.
        adapters: What each adapter changes that is not merged, by the names of tensors.
        graphs: Whether it decodes with CUDA graphs; the states of codec streams then stay
            allocated.
        prompt_graphs, encoder_graphs: Whether prompts, and encodes of recordings, are captured as
            graphs too.
    """

    lm: LMConfig
    codec: CodecConfig
    dtype: torch.dtype
    codec_dtype: torch.dtype
    formats: Mapping[str, Format] = field(default_factory=dict)
    codec_formats: Mapping[str, Format] = field(default_factory=dict)
    max_batch: int = 1
    max_seq_len: int = 8192
    kv_cache: str | None = None
    offload: frozenset[str] = frozenset()
    mapped: bool = False
    converted: bool = False
    codec_converted: bool = False
    merged: frozenset[str] = frozenset()
    adapters: tuple[Mapping[str, Change], ...] = ()
    graphs: bool = False
    prompt_graphs: bool = False
    encoder_graphs: bool = False
    max_load: float | None = None
    max_parked_bytes: int | None = None

    def bytes(self) -> dict[str, int]:
        """Bytes on the device by purpose."""
        parts = {"weights": self._weights()}
        if self.adapters:
            parts["adapters"] = sum(map(self._adapter, self.adapters))
        parts |= {"codec": self._codec(), "cache": self._cache(), "work": self._work()}
        return parts | ({"graphs": self._graphs()} if self.graphs else {})

    @property
    def total(self) -> int:
        return sum(self.bytes().values())

    def _weights(self) -> int:
        shapes = lm_shapes(self.lm)
        if "text_embeddings" in self.offload and not self.lm.tie_embeddings:
            del shapes["model.embed_tokens.weight"]
        return self._stored(shapes, self.formats, self.dtype, self.converted)

    def _adapter(self, changes: Mapping[str, Change]) -> int:
        """Bytes that an adapter has beside the weights, see `quantization/variants.py`."""
        shapes, own, scaled, beside = lm_shapes(self.lm), set[str](), set[str](), 0
        for name, change in changes.items():
            table = TABLES.match(name)
            if table is not None:
                own |= {each for each in shapes if each.startswith(table[0])}
            elif change.a is None or change.base is not None:
                own |= {each for each in shapes if _stack(each) == _stack(name)}
            else:
                rows, columns = shapes[name]
                rank = -(-len(change.a) // RANKS) * RANKS
                beside += rank * (rows + columns) * self.dtype.itemsize
                scaled |= set() if change.magnitude is None else {_stack(name)}
        if "text_embeddings" in self.offload:
            own.discard("model.embed_tokens.weight")
        projected = ("speech_embeddings.", "speech_embeddings_to_local.")
        encoder, decoder = self.lm.patch_encoder.dim, self.lm.patch_decoder.dim
        if encoder != decoder and any(name.startswith(projected) for name in changes):
            beside += sum(self.lm.code_sizes) * decoder * self.dtype.itemsize
        # Factors of DoRA are those of a whole stack, in float32, and so are its biases.
        rows = sum(shape[0] for name, shape in shapes.items() if _stack(name) in scaled)
        beside += rows * (torch.float32.itemsize + self.dtype.itemsize)
        stored = stored_tensors({name: shapes[name] for name in own}, self.formats, self.dtype)
        return beside + sum(math.prod(shape) * kind.itemsize for shape, kind in stored.values())

    def _codec(self) -> int:
        shapes = codec_shapes(self.codec)
        books = {name: shapes.pop(name) for name in list(shapes) if "_codebook." in name}
        if "codec_encoder" in self.offload:
            shapes = {name: at for name, at in shapes.items() if not name.startswith("encoder.")}
        weights = self._stored(shapes, self.codec_formats, self.codec_dtype, self.codec_converted)
        return self._stored(books, {}, torch.float32, False) + weights + self._streams()

    def _streams(self) -> int:
        if not self.graphs or not streamable(self.codec):
            return 0
        exact, _, elastic = usual_schedules(self.codec)
        # One pool serves both where both hold back as much in the end; one row of it pads graphs.
        rows = (
            row_bytes(self.codec, patches, self.codec_dtype)
            for patches in {exact.lookahead, elastic.lookahead}
        )
        return (self.max_batch + 1) * sum(rows)

    def _stored(
        self, shapes: Shapes, formats: Mapping[str, Format], dtype: torch.dtype, converted: bool
    ) -> int:
        if self.mapped and not converted:
            own = formats.keys() | self.merged
            shapes = {name: shape for name, shape in shapes.items() if name in own}
        stored = stored_tensors(shapes, formats, dtype).values()
        return sum(math.prod(shape) * kind.itemsize for shape, kind in stored)

    def _cache(self) -> int:
        config, slots = self.lm, (self.max_batch, self.max_seq_len)
        backbone = kv_bytes(config.backbone, *slots, self.dtype, self.kv_cache == "int8")
        patches = kv_bytes(config.patch_decoder, self.max_batch + 1, config.patch_steps, self.dtype)
        angles = self.max_seq_len * config.backbone.head_dim * 4
        row = config.vocab_size + 2 * config.backbone.dim * self.dtype.itemsize
        return backbone + patches + angles + (self.max_batch + 1) * row

    def _work(self) -> int:
        backbone, codec = self.lm.backbone, self.codec
        prefill = prefill_bytes(self.lm, self.dtype, bool(self.formats) and not self.mapped)
        # Logits and perturbed scores of the text draw, and the partial results of split attention.
        partial = 64 * backbone.heads * (backbone.head_dim + 2) * 4
        draw = self.max_batch * (12 * self.lm.vocab_size + partial)
        encode = encode_bytes(codec, self.codec_dtype, CODEC_SECONDS * codec.sample_rate)
        return 2 * draw + max(prefill, encode) + LIBRARIES

    def _graphs(self) -> int:
        total = 0
        if self.prompt_graphs:
            total += prefill_bytes(self.lm, self.dtype, bool(self.formats))
        if self.encoder_graphs and "codec_encoder" not in self.offload:
            total += encoder_graph_bytes(self.codec, self.codec_dtype)
        return total


def _stack(name: str) -> str:
    """The matrix that a tensor is part of: q, k and v are one, and so are gate and up."""
    return STACKED.sub("", name)


def prefill_bytes(config: LMConfig, dtype: torch.dtype, quantized: bool) -> int:
    """Activations of PREFILL_CHUNK positions of a prompt, which graphs of prompts keep too.

    quantized: whether weights are unpacked for it.
    """
    backbone = config.backbone
    qkv = (backbone.heads + 2 * backbone.kv_heads) * backbone.head_dim
    width = 3 * backbone.ffn_dim + 2 * qkv
    unpacked = min(UNPACKED_AT_ONCE, 2 * backbone.ffn_dim * backbone.dim) if quantized else 0
    return (PREFILL_CHUNK * (width + 4 * backbone.dim) + unpacked) * dtype.itemsize


def encode_bytes(config: CodecConfig, dtype: torch.dtype, samples: int) -> int:
    """Activations of the encoder's layers for so many samples."""
    frames = samples // (config.hop * config.stride)
    return frames * (config.encoder_ffn + 8 * config.dim) * dtype.itemsize


def encoder_graph_bytes(config: CodecConfig, dtype: torch.dtype) -> int:
    """What graphs of the longest encode keep: activations, samples, spectra, attention's mask."""
    samples = longest_encode(config, BUCKETS[-1])
    rows = samples // (config.hop * config.stride) + 1
    spectra = samples // config.hop * (config.n_fft // 2 + 1 + config.n_mels) * 3 * 4
    return encode_bytes(config, dtype, samples) + 4 * samples * 3 + spectra + 5 * rows * rows


def check_memory(setup: Setup, free: int, device: str) -> None:
    """Raises DeviceMemoryError, which names arguments that would fit, unless the setup fits."""
    if setup.total <= free:
        return
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in setup.bytes().items())
    remedy = fitting(setup, free)
    advice = f"{', '.join(remedy)} would fit" if remedy else "no setting would fit"
    raise DeviceMemoryError(
        f"this needs {setup.total / GB:.1f} GB ({parts}) and {device} has {free / GB:.1f} GB "
        f"free: {advice}"
    )


def fitting(setup: Setup, free: int) -> list[str]:
    """The fewest arguments of `load` that make it fit, the least costly first; [] if none do."""
    choices = dict(_savings(setup))

    def total(names: list[str]) -> int:
        changed = setup
        for name in names:
            changed = replace(changed, **choices[name])
        return changed.total

    chosen = list[str]()
    for name in choices:
        argument = name.partition("=")[0]
        chosen = [*(other for other in chosen if other.partition("=")[0] != argument), name]
        if total(chosen) <= free:
            break
    else:
        return []
    for name in list(chosen):
        if total(rest := [other for other in chosen if other != name]) <= free:
            chosen = rest
    return chosen


def _savings(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments that save memory and the fields they change; later values replace earlier ones."""
    if setup.max_batch > 1:
        yield "max_batch=1", {"max_batch": 1}
    if setup.kv_cache is None:
        yield "kv_cache='int8'", {"kv_cache": "int8"}
    for name in () if setup.formats else ("int8", "int4"):
        chosen = QuantizationConfig.parse(name)
        assert chosen is not None
        yield f"quantization={name!r}", {"formats": chosen.formats(lm_shapes(setup.lm))}
    if set(OFFLOADABLE) - setup.offload:
        yield f"offload={list(OFFLOADABLE)}", {"offload": frozenset(OFFLOADABLE)}
    for length in (4096, 2048):
        if setup.max_seq_len > length:
            yield f"max_seq_len={length}", {"max_seq_len": length}


def largest_batch(setup: Setup, free: int) -> int:
    """The largest number of slots, up to DEFAULT_BATCH, that fits; 1 if none does."""
    sizes = range(DEFAULT_BATCH, 1, -1)
    return next((n for n in sizes if replace(setup, max_batch=n).total <= free), 1)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return None
