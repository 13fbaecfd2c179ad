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
from mimo_fast.checkpoint.layout import Shapes, codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig
from mimo_fast.quantization import Format, QuantizationConfig, WeightSource
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
    formats, _ = _stored(lm_shapes(lm), quantization, dtype)
    return Setup(lm, codec, dtype, dtype, formats, max_batch=1, max_seq_len=2)


def _stored(
    shapes: Shapes, quantization: str | dict[str, str | None] | None, dtype: torch.dtype
) -> tuple[dict[str, Format], Stored]:
    """The formats of quantized tensors, and all tensors as they are stored."""
    chosen = QuantizationConfig.parse(quantization)
    formats = chosen.formats(shapes) if chosen else {}
    return formats, stored_tensors(shapes, formats, dtype)


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
    formats, tensors = _stored(lm_shapes(config), quantization, dtype)
    with _progress("making the language model", tensors) as bar:
        read = random_reader(tensors, device, seed, bar.update)
        return LM(config, empty_id, WeightSource(read, dtype, formats))


def weightless_lm(
    config: LMConfig, quantization: str | dict[str, str | None] | None, dtype: torch.dtype
) -> LM:
    """The same on torch's meta device, which has shapes and no data."""
    formats, tensors = _stored(lm_shapes(config), quantization, dtype)

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
    formats, tensors = _stored(codec_shapes(config), {"codec": quantization}, dtype)
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
        values = torch.empty(shape, dtype=dtype, device=device)
        if dtype == torch.int32:
            return values.random_(-(2**31), 2**31 - 1, generator=generator)
        if name.endswith(".zeros"):
            return values.fill_(-0.5)
        if name.endswith(".scales"):
            return values.fill_(_scale(tensors, name))
        if name.endswith("istft.window"):
            return torch.hann_window(*shape, dtype=dtype, device=device)
        if len(shape) == 1:
            return values.fill_(0.0 if name.endswith("bias") else 1.0)
        spread = 1.0 if "embed" in name else math.prod(shape[1:]) ** -0.5
        return values.normal_(0, spread, generator=generator)

    return read


def _scale(tensors: Stored, name: str) -> float:
    """Makes uniform random q of this matrix's bits give values of variance 1 / K."""
    (_, packed), _ = tensors[name.removesuffix("scales") + "words"]
    # int4 has zeros or nf4's float32 scales; whatever else is packed is int8.
    four = name.removesuffix("scales") + "zeros" in tensors or tensors[name][1] == torch.float32
    bits = 4 if four else 8
    columns = packed * 32 // bits
    spread = math.sqrt((2 ** (2 * bits) - 1) / 12) if tensors[name][1] != torch.float32 else 0.5
    return columns**-0.5 / spread


def hash_of(name: str) -> int:
    """A hash of a name that is the same in every process."""
    return int.from_bytes(name.encode(), "little") % (2**31 - 1)
