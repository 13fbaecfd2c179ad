"""Models of any dimensions with random weights made on the device, dense or quantized."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.checkpoint.initialize import TOKEN_IDS, preset_config, write_tokenizer
from mimo_fast.checkpoint.layout import codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig
from mimo_fast.quantization import QuantizationConfig, WeightSource
from mimo_fast.quantization.formats import stored_tensors
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.memory import Setup
from mimo_fast.text.tokenizer import Tokenizer

Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]
Read = Callable[[str], Tensor]


def preset_configs(preset: str) -> tuple[LMConfig, CodecConfig]:
    """Dimensions of "tiny" or "7b"."""
    lm, codec = (preset_config(preset, part, None) for part in ("lm", "codec"))
    return LMConfig.from_dict(lm), CodecConfig.from_dict(codec)


def preset_setup(preset: str, quantization: str | None, dtype: torch.dtype) -> Setup:
    """Memory set-up of a preset for one row of two groups."""
    lm, codec = preset_configs(preset)
    chosen = QuantizationConfig.parse(quantization)
    formats = chosen.formats(lm_shapes(lm)) if chosen else {}
    return Setup(lm, codec, dtype, dtype, formats, max_batch=1, max_seq_len=2)


def preset_tokenizer(preset: str) -> Tokenizer:
    """A token a byte, and the special tokens with the preset's ids."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), preset_config(preset, "lm", None), TOKEN_IDS[preset])
        return Tokenizer.from_directory(folder)


def random_lm(
    config: LMConfig,
    quantization: str | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    empty_id: int = 1,
    seed: int = 0,
) -> LM:
    """A language model whose activations stay of order 1.

    Quantized matrices are made in their packed form.
    """
    chosen = QuantizationConfig.parse(quantization)
    formats = chosen.formats(lm_shapes(config)) if chosen else {}
    tensors = stored_tensors(lm_shapes(config), formats, dtype)
    with _progress("making the language model", tensors) as bar:
        read = random_reader(tensors, device, seed, bar.update)
        return LM(config, empty_id, WeightSource(read, dtype, formats))


def weightless_lm(config: LMConfig, quantization: str | None, dtype: torch.dtype) -> LM:
    """The same on torch's meta device, which has shapes and no data."""
    chosen = QuantizationConfig.parse(quantization)
    formats = chosen.formats(lm_shapes(config)) if chosen else {}
    tensors = stored_tensors(lm_shapes(config), formats, dtype)

    def read(name: str) -> Tensor:
        shape, kind = tensors[name]
        return torch.empty(shape, dtype=kind, device="meta")

    return LM(config, 1, WeightSource(read, dtype, formats))


def random_codec(
    config: CodecConfig,
    quantization: str | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Codec:
    """A random codec; quantization, such as "int8", is that of its transformer layers."""
    chosen = QuantizationConfig.parse({"codec": quantization})
    formats = chosen.formats(codec_shapes(config)) if chosen else {}
    tensors = stored_tensors(codec_shapes(config), formats, dtype)
    with _progress("making the codec", tensors) as bar:
        read = random_reader(tensors, device, seed, bar.update)
        return Codec(config, WeightSource(read, dtype, formats), WeightSource(read, torch.float32))


def _progress(title: str, tensors: Stored) -> tqdm:
    return tqdm(total=len(tensors), desc=title, unit="tensor", delay=1, leave=False, disable=None)


def random_reader(
    tensors: Stored,
    device: torch.device | str,
    seed: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Read:
    """name -> tensor, the same at every call; `advance` is told of each."""

    def read(name: str) -> Tensor:
        advance(1)
        shape, dtype = tensors[name]
        generator = torch.Generator(device).manual_seed(seed + hash_of(name))
        if dtype == torch.int32:
            return torch.randint(
                -(2**31), 2**31 - 1, shape, dtype=dtype, device=device, generator=generator
            )
        if name.endswith(".zeros"):
            return torch.full(shape, -0.5, dtype=dtype, device=device)
        if name.endswith(".scales"):
            words, _ = tensors[name.removesuffix("scales") + "words"]
            return torch.full(shape, _scale(words, tensors, name), dtype=dtype, device=device)
        if name.endswith("istft.window"):
            return torch.hann_window(*shape, dtype=dtype, device=device)
        if len(shape) == 1:
            return torch.full(
                shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device
            )
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(
            0, 1.0 if "embed" in name else math.prod(shape[1:]) ** -0.5, generator=generator
        )

    return read


def _scale(words: tuple[int, ...], tensors: Stored, name: str) -> float:
    """Makes uniform random q of this matrix's bits give values of variance 1 / K."""
    # int4 has zeros or nf4's float32 scales; whatever else is packed is int8.
    four = name.removesuffix("scales") + "zeros" in tensors or tensors[name][1] == torch.float32
    bits = 4 if four else 8
    columns = words[1] * 32 // bits
    spread = math.sqrt((2 ** (2 * bits) - 1) / 12) if tensors[name][1] != torch.float32 else 0.5
    return columns**-0.5 / spread


def hash_of(name: str) -> int:
    """A hash of a name that is the same in every process."""
    return int.from_bytes(name.encode(), "little") % (2**31 - 1)
