"""Writes a pair of checkpoints with random weights: to try everything out, to test and to measure without a download.

Names, dimensions and files are those of the published checkpoints, or tiny ones ("presets"). Every tensor has a random
generator of its own, seeded from the seed and the tensor's name, so its values depend on nothing else.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from .checkpoint import SHARD_BYTES, write_checkpoint, write_json
from .config import CodecConfig, LMConfig
from .errors import CheckpointError
from .layout import Shapes, codec_shapes, lm_shapes
from .tokenizer import CHAT_TOKENS, MODEL_TOKENS

PIECE = 2**24
"""Values drawn at once: bounds the memory."""

TOKEN_IDS = {
    "tiny": dict(zip(
        ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>", "</think>", *MODEL_TOKENS.values()), range(400, 413),
        strict=True,
    )),
    "7b": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    | dict(zip(MODEL_TOKENS.values(), range(151665, 151673), strict=True)),
}
"""Special tokens of each preset; those of 7b have the published ids. Ids below 256 are bytes, the others are unused."""

README = """# Random weights
`mimo-fast init-checkpoint --preset {preset} --seed {seed}` made these two checkpoints, `lm` and `codec`. Nothing was
trained: what the model says is noise, and the tokenizer knows bytes and special tokens only. Names, shapes and files
are those that the real checkpoints have, so whatever loads these loads those.
{note}"""

SPEAKING = """
This preset leans towards speaking: the weights are arranged so that `<|empty|>`, the token of an audio position, is
usually the likeliest and `<|im_end|>` comes up now and then. A trained model decides by the prompt; this one just talks.
"""

CODEBOOK_STD, CODEBOOK_DECAY = 0.5, 0.8
"""Of the first codebook, and from each to the next: encoder outputs have unit variance, residuals shrink."""

HEAD_GAIN = 2.0
"""Of the output heads over unit variance, so that logits differ enough to be worth sampling from."""

PUSH, EMPTY_LEAN, END_LEAN = 8.0, 3.0, 2.0
"""See `_lean_to_speech`."""


def init_checkpoint(
    directory: str | os.PathLike[str], preset: str = "tiny", *, seed: int = 0, dtype: torch.dtype | None = None,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Writes DIR/lm and DIR/codec with random weights and returns their paths.

    Args:
        preset: "tiny" (2.4 MB, float32) or "7b" (the published dimensions, 18 GB in bfloat16).
        dtype: of all tensors; by default the preset's.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: the preset is unknown, the directory is not empty, or the disk lacks space.
    """
    directory = Path(directory)
    if preset not in TOKEN_IDS:
        raise CheckpointError(f"no preset {preset!r}: use one of {', '.join(TOKEN_IDS)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not an empty directory: choose another")
    raw_lm, raw_codec = (_preset(preset, part, dtype) for part in ("lm", "codec"))
    lm_config, codec_config = LMConfig.from_dict(raw_lm), CodecConfig.from_dict(raw_codec)
    parts = (("lm", raw_lm, lm_shapes(lm_config)), ("codec", raw_codec, codec_shapes(codec_config)))
    total = sum(_nbytes(shapes, raw) for _, raw, shapes in parts)
    _require_space(directory, total)
    ...
