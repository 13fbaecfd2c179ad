"""What was trained -> a pair of checkpoints in the published form, ready for `mimo_fast.load`."""

from pathlib import Path

import torch

from mimo_fast.checkpoint import write_checkpoint
from mimo_fast.config import CodecConfig, LMConfig
from mimo_fast.layout import codec_shapes, lm_shapes

from . import codec, lm
from .loop import trained_tensors
from .parameters import Tensors, config_json
from .tokenizer import build_tokenizer


def export(run: Path, target: Path, dtype: torch.dtype = torch.float16) -> tuple[Path, Path]:
    """Writes TARGET/lm and TARGET/codec from a run's directory and returns their paths.

    Raises:
        CheckpointError: one of the two was not trained, or the target holds weights already.
    """
    return write_pair(target, trained_tensors(run, lm.NAME), trained_tensors(run, codec.NAME), dtype)


def write_pair(target: Path, lm_tensors: Tensors, codec_tensors: Tensors, dtype: torch.dtype) -> tuple[Path, Path]:
    """Both checkpoints from their tensors; what only training needs is left out."""
    tokenizer = build_tokenizer(target / "lm")
    special = {"bos_token_id": tokenizer.special.eos, "eos_token_id": tokenizer.special.eos}
    for part, tensors in (("lm", lm_tensors), ("codec", codec_tensors)):
        name = {"torch_dtype": str(dtype).removeprefix("torch.")}
        raw = config_json(part) | name | (special if part == "lm" else {})
        shapes = lm_shapes(LMConfig.from_dict(raw)) if part == "lm" else codec_shapes(CodecConfig.from_dict(raw))
        write_checkpoint(target / part, shapes, tensors.__getitem__, dtype=dtype, config=raw)
    return target / "lm", target / "codec"
