"""What was trained -> a pair of checkpoints in the published form, ready for `mimo_fast.load`."""

from pathlib import Path

import torch

from mimo_fast.checkpoint.files import write_checkpoint
from mimo_fast.checkpoint.layout import codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig

from . import codec, decoder, lm
from .data import Part
from .loop import trained_tensors
from .parameters import Tensors, build_codec, config_json
from .tokenizer import build_tokenizer

WINDOW = "decoder.vocoder.head.istft.window"
LEVEL = 0.33
"""Of the codec's output, as it is exported. Trained on spectra, it puts the harmonics of a voice in
phase: pulses whose peaks are up to three times those of the recording, which files and sound cards
would cut off."""

GREEDY_TASKS = ("tts",)
"""Whose replies are greedy by default: so small a model draws a wrong code as soon as it is asked
to choose."""

MEASURED = 64
"""Utterances that the typical moments of the codec's norms are averaged over."""


def export(
    run: Path, target: Path, replies: Part, dtype: torch.dtype = torch.float16
) -> tuple[Path, Path]:
    """Writes TARGET/lm and TARGET/codec from a run's directory and returns their paths.

    replies: what the codec's norms over time are measured on, for streaming.

    Raises:
        CheckpointError: one of the two was not trained, or the target holds weights already.
    """
    quieter = scaled(trained_tensors(run, decoder.NAME), LEVEL)
    return write_pair(target, trained_tensors(run, lm.NAME), quieter, replies, dtype)


def scaled(codec_tensors: Tensors, factor: float) -> Tensors:
    """The codec whose output is `factor` times as large: overlapping frames are divided by their
    squared window, so it is by the window that they grow, and the bound on magnitudes before it
    stays where it was in training."""
    return codec_tensors | {WINDOW: codec_tensors[WINDOW] / factor}


def write_pair(
    target: Path, lm_tensors: Tensors, codec_tensors: Tensors, replies: Part, dtype: torch.dtype
) -> tuple[Path, Path]:
    """Both checkpoints from their tensors; what only training needs is left out."""
    tokenizer = build_tokenizer(target / "lm")
    stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
    added = {
        "lm": stored
        | {
            "bos_token_id": tokenizer.special.eos,
            "eos_token_id": tokenizer.special.eos,
            "greedy_tasks": list(GREEDY_TASKS),
        },
        "codec": stored | {"streaming_moments": typical_moments(codec_tensors, replies)},
    }
    for part, tensors in (("lm", lm_tensors), ("codec", codec_tensors)):
        raw = config_json(part) | added[part]
        shapes = (
            lm_shapes(LMConfig.from_dict(raw))
            if part == "lm"
            else codec_shapes(CodecConfig.from_dict(raw))
        )
        write_checkpoint(target / part, shapes, tensors.__getitem__, dtype=dtype, config=raw)
    return target / "lm", target / "codec"


def typical_moments(tensors: Tensors, replies: Part) -> list[list[float]]:
    """Mean and variance of each of the codec's two norms over time, averaged over utterances."""
    trained = build_codec(
        codec.codec_config(), {name: tensor.detach() for name, tensor in tensors.items()}
    )
    found = []
    for i in range(min(MEASURED, len(replies))):
        unpool, to_mel = trained.moments(trained.encode(replies[i].wav))
        found.append(torch.stack([*(unpool or to_mel), *to_mel]))
    return torch.stack(found).mean(0).view(2, 2).tolist()
