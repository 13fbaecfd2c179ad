"""Starts a run from an exported pair: its weights, everything else as at the first step."""

from pathlib import Path

import torch

from mimo_fast.checkpoint.files import open_weights

from . import codec, lm
from .export import HEAD, LEVEL, scaled
from .loop import save_state
from .parameters import Tensors
from .rvq import known_usage


def start_from(pair: Path, run: Path) -> None:
    """Writes states of the codec and the language model at step 0 into a run's directory.

    Existing ones are kept. The heads that only training has start at zero; codebooks as if all
    their rows were used alike.

    Raises:
        CheckpointError: PAIR/lm or PAIR/codec is no checkpoint, or one of other dimensions.
    """
    run.mkdir(parents=True, exist_ok=True)
    config = codec.codec_config()
    heard = codec.initial_tensors(config, seed=0) | scaled(_weights(pair / "codec"), 1 / LEVEL)
    states = {
        codec.NAME: heard | known_usage(config, heard),
        lm.NAME: lm.initial_tensors(lm.lm_config(), seed=0) | _tied(_weights(pair / "lm")),
    }
    for name, tensors in states.items():
        path = run / f"{name}.safetensors"
        if not path.exists():
            save_state(path, tensors, step=0)


def _tied(tensors: Tensors) -> Tensors:
    """Without the head that the export writes beside the embeddings."""
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _weights(directory: Path) -> Tensors:
    stored = open_weights(directory)
    return {name: stored.get(name, dtype=torch.float32) for name in stored.names()}
