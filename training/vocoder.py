"""Training of a vocoder of the published depth over a trained codec, of which nothing changes.

    python -m training vocoder --start mimo_fast/assets/nano

nano's vocoder looks one patch ahead, the published one ten: 16 layers of 10 frames each. What a
shorter look-ahead or other norm statistics cost a trained vocoder of that reach is measured on this
one (`benchmarks/studies/lookahead.py`). It has the published layers and windows and is narrow;
everything before it is nano's. The package does not ship it: `VOCODER` is for tests and studies.

    vocoder and head, 0.71 M parameters, 1.4 MB in float16            positions a second: 100

It starts from random weights and has the loss of `decoder`, so that it uses as much of what follows
as helps. A tenth of the recipe's sentences are enough: it learns sounds, not words.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mimo_fast.checkpoint.embedded import NANO
from mimo_fast.checkpoint.files import open_weights
from mimo_fast.config import CodecConfig
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.model import Codec

from .data import Part, Sizes, save_whole
from .decoder import DecoderTraining
from .export import LEVEL, scaled
from .loop import Schedule, trained_tensors
from .parameters import Tensors, config_json, initial_codec

NAME = "vocoder"
VOCODER = Path(__file__).parents[1] / "tests" / "deep_codec" / "vocoder.safetensors"
"""A vocoder that this trained, where there is a checkout."""

PREFIX = "decoder.vocoder."
SCHEDULE = Schedule(steps=2200, rate=2e-3)
SIZES = Sizes(1000, 1000, 0, 0, 0, 500, 0, 0, 0, 0, 0, 200, 200)


def deep_config() -> CodecConfig:
    return CodecConfig.from_dict(config_json("codec-deep"))


class VocoderTraining(DecoderTraining):
    """The vocoder, its data and its loss. trained: the tensors of a codec with another vocoder."""

    def __init__(
        self,
        directory: Path,
        parts: dict[str, Part],
        trained: Mapping[str, Tensor],
        schedule: Schedule = SCHEDULE,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        config = deep_config()
        kept = {name: tensor for name, tensor in trained.items() if not name.startswith(PREFIX)}
        tensors = kept | vocoder_of(initial_codec(config, seed))
        how = schedule, seed, device
        super().__init__(directory, parts, tensors, *how, config, NAME, PREFIX)


def vocoder_of(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def export_vocoder(run: Path, target: Path) -> None:
    """Writes the vocoder of a run's directory alone, in float16.

    Raises:
        CheckpointError: it was not trained.
    """
    quieter = vocoder_of(scaled(trained_tensors(run, NAME), LEVEL))
    stored = {name: tensor.half() for name, tensor in quieter.items()}
    save_whole(target, stored, {"format": "pt"})


def deep_codec(vocoder: Path, rest: Path = NANO / "codec") -> Codec:
    """The vocoder of such a file after the encoder, codebooks and decoder of a checkpoint.

    In float32 on the CPU. It states no norm statistics, as published ones do not.
    """
    stored = open_weights(rest)
    tensors = {name: stored.get(name, dtype=torch.float32) for name in stored.names()}
    tensors |= {name: tensor.float() for name, tensor in load_file(vocoder).items()}
    return Codec(deep_config(), WeightSource(tensors.__getitem__), tensors.__getitem__)
