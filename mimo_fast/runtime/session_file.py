"""Dialogues on disk: a safetensors file of ids and KV cache, with the rest in its header.

If the model that reads the file has a cache of another type or shape, the ids are prefilled again.
"""

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimo_fast.errors import CheckpointError
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.lm.snapshot import Snapshot

FORMAT = "mimo-fast session 1"

Turns = Sequence[tuple[int, int, Tensor]]
"""Each turn is (its first group, first group of its reply, codes of the user's speech)."""


def write_session(
    path: str | Path, engine: Engine, sequence: TokenSequence, about: dict[str, Any], turns: Turns
) -> None:
    """Writes the file atomically: whole or not at all."""
    path = Path(path)
    kept = engine.export(sequence)
    header = about | {
        "model": engine.lm.fingerprint,
        "seed": sequence.seed,
        "draws": sequence.draws,
        "cached": kept.length if kept else 0,
        "turns": [(begin, reply) for begin, reply, _ in turns],
    }
    tensors = {"ids": sequence.ids.contiguous()}
    tensors |= {f"speech.{i}": codes.contiguous() for i, (_, _, codes) in enumerate(turns)}
    if kept:
        tensors |= {f"cache.{i}": part.contiguous() for i, part in enumerate(kept.parts)}
        tensors["hidden"] = kept.hidden
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, "session": json.dumps(header)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_session(
    path: str | Path, engine: Engine, sequence: TokenSequence
) -> tuple[dict[str, Any], Turns]:
    """Fills an empty sequence from the file and returns (header, turns).

    Raises:
        CheckpointError: the file is not a session, is damaged, or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is not a session of this version: it was not written by Session.save"
                )
            header = json.loads(metadata["session"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["model"] != engine.lm.fingerprint:
            raise CheckpointError(
                f"{path} belongs to another model: load the one it was saved with"
            )
        ids = tensors["ids"]
        engine.check_room(ids.shape[1] // sequence.group_size)
        places = enumerate(header["turns"])
        turns = [(begin, reply, tensors[f"speech.{i}"]) for i, (begin, reply) in places]
        sequence.seed, sequence.draws = header["seed"], header["draws"]
        sequence.ids = ids
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the session in {path} cannot be read: {error}") from error
    parts = tuple(tensors[f"cache.{i}"] for i in range(len(tensors)) if f"cache.{i}" in tensors)
    kept = Snapshot(
        header["cached"],
        parts,
        tensors.get("hidden", torch.empty(0, dtype=torch.float32, device="cpu")),
    )
    if kept.fits(engine.state):
        sequence.snapshot, sequence.cached = kept, kept.length
    return header, turns
