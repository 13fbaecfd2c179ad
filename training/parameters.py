"""The package's own models over tensors that are trained.

A model joins some of its tensors when it is built (the code tables of all channels, the codebooks).
So it is built anew from the trained leaves at every step, which takes about a millisecond;
gradients reach every leaf by its upstream name.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_fast.checkpoint.layout import Shapes, codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig, read_json
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.lm.model import LM

CONFIGS = Path(__file__).parent / "nano"

CODEBOOK = re.compile(r"\._codebook\.")

EMBEDDING_STD = 0.05
FRAME_STD = 0.5
"""Initial deviation of a frame's embedding, the sum over its codes."""

Tensors = dict[str, Tensor]


def config_json(part: str, directory: Path = CONFIGS) -> dict[str, Any]:
    """The config.json of "codec" or "lm"."""
    return read_json(directory / f"{part}.json")


def codebook_names(count: int) -> list[str]:
    """Names of the first codebooks, as upstream's."""
    return [f"encoder.quantizer.vq.layers.{i}._codebook" for i in range(count)]


def build_codec(config: CodecConfig, tensors: Mapping[str, Tensor]) -> Codec:
    return Codec(config, WeightSource(tensors.__getitem__, join=False), tensors.__getitem__)


def build_lm(config: LMConfig, empty_id: int, tensors: Mapping[str, Tensor]) -> LM:
    return LM(config, empty_id, WeightSource(tensors.__getitem__, join=False))


def initial_codec(config: CodecConfig, seed: int) -> Tensors:
    """Leaves to train and, without gradients, codebooks and the window."""
    return _initial(codec_shapes(config), config.decoder_layers, seed)


def initial_lm(config: LMConfig, seed: int) -> Tensors:
    return _initial(lm_shapes(config), config.backbone.layers, seed)


@torch.no_grad()
def embed_codebooks(tensors: Tensors, codebooks: Sequence[Tensor], usage: Sequence[Tensor]) -> None:
    """Initializes the language model's code embeddings with the codec's rows.

    They are in their principal directions: a frame's input, the sum over its codes, is then a
    rotation of the codec decoder's input, in which similar sounds are near. codebooks [V_q, D],
    usage [V_q]: how often each row is chosen.
    """
    width = tensors["speech_embeddings.0.weight"].shape[1]
    centred = [book - mean(book, used) for book, used in zip(codebooks, usage, strict=True)]
    shares = [(used / used.sum()).sqrt()[:, None] for used in usage]
    weighted = torch.cat([book * share for book, share in zip(centred, shares, strict=True)])
    _, spread, directions = torch.linalg.svd(weighted, full_matrices=False)
    turn = directions[:width].T / spread.square().sum().sqrt() * math.sqrt(width) * FRAME_STD
    for channel, book in enumerate(centred):
        rows = book @ turn
        tensors[f"speech_embeddings.{channel}.weight"][: len(rows), : rows.shape[1]] = rows


def mean(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights[:, None]).sum(0) / weights.sum()


def trainable(tensors: Tensors) -> Tensors:
    """The leaves that gradients train, marked as such."""
    return {name: tensor.requires_grad_() for name, tensor in tensors.items() if not is_fixed(name)}


def is_fixed(name: str) -> bool:
    """Whether it is not trained by gradients: codebooks (moving averages) and the window."""
    return bool(CODEBOOK.search(name)) or name.endswith("istft.window")


def _initial(shapes: Shapes, layers: int, seed: int) -> Tensors:
    """Initial values: matrices keep their input's variance; additions to the residual are small."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("istft.window"):
            tensors[name] = torch.hann_window(*shape)
        elif len(shape) == 1:
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            values = torch.randn(shape, generator=generator)
            tensors[name] = values * _std(name, shape, layers)
    return tensors


def _std(name: str, shape: tuple[int, ...], layers: int) -> float:
    if re.search(r"embed_tokens|speech_embeddings\.", name):
        return EMBEDDING_STD
    std = 1 / math.sqrt(math.prod(shape[1:]))
    if re.search(r"(o_proj|down_proj|out_proj|fc2)\.weight$", name):
        return std / math.sqrt(2 * layers)
    return std
