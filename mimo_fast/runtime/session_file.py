"""Dialogues on disk: a safetensors file of ids and KV cache, with the rest in its header.

A file is foreign: its header and the shapes and types of its tensors are checked before a tensor is
read, and values before anything is used. If the model that reads it has a cache of another type or
shape, the ids are prefilled again.
"""

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mimo_fast.checkpoint.files import DTYPES, is_finite, open_safetensors
from mimo_fast.errors import CheckpointError, ConfigError, PromptError
from mimo_fast.json_files import JSON_BYTES, cut, parse_json, shown
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.lm.snapshot import Snapshot
from mimo_fast.text.prompt import in_vocabulary

FORMAT = "mimo-fast session 1"

Turns = Sequence[tuple[int, int, Tensor]]
"""Each turn is (its first group, first group of its reply, codes of the user's speech)."""

INTEGERS = {"seed": (-(2**63), 2**63 - 1), "draws": (0, 2**62), "cached": (0, 2**31)}
INTEGERS |= {"opening": (0, 2**31)}
"""Smallest and largest value of the header's numbers."""

FIELDS = {*INTEGERS, "model", "special_tokens", "system_prompt", "turns", "spoken", "heard"}
FIELDS |= {"adapter"}

LATER = {"special_tokens": False, "heard": None, "adapter": ""}
"""Fields that files of earlier versions lack, and what they mean there."""

FIX = "save the dialogue again"


@dataclass(frozen=True)
class SavedSession:
    """What a file holds, checked against the model that reads it.

    Attributes:
        adapter: Place of its adapter in this model.
        seed, draws: Of the sequence.
        ids: [C + 1, T G].
        opening: Number of groups in front of the first turn.
        spoken: Groups of the last reply that are patches, ascending.
        kept: Its cache; None where it holds none that this model can use.
        heard: Sums [2, 3] of its replies (`CodecStream.totals`) and the fingerprint of the codec
            that spoke them; None where no reply came to its end.
    """

    system_prompt: str | None
    special_tokens: bool
    adapter: int
    seed: int
    draws: int
    opening: int
    ids: Tensor
    turns: Turns
    spoken: list[int]
    kept: Snapshot | None
    heard: tuple[Tensor, str] | None

    def heard_by(self, codec: CodecNetwork) -> Tensor | None:
        """The sums of its replies, on the device of the codec that spoke them; None for another."""
        if self.heard is None or self.heard[1] != codec.fingerprint:
            return None
        return self.heard[0].to(codec.device)

    def fill(self, sequence: TokenSequence) -> None:
        """Fills an empty sequence."""
        sequence.seed, sequence.draws, sequence.ids = self.seed, self.draws, self.ids
        sequence.adapter, sequence.prefix_groups = self.adapter, self.opening
        if self.kept is not None:
            sequence.snapshot, sequence.cached = self.kept, self.kept.length


def write_session(
    path: str | Path, engine: Engine, sequence: TokenSequence, about: dict[str, Any], turns: Turns
) -> None:
    """Writes the file atomically: whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = Path(path)
    kept = engine.export(sequence)
    header = about | {
        "model": engine.lm.fingerprint,
        "adapter": engine.lm.adapter_digests[sequence.adapter],
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
    partial = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, "session": json.dumps(header)})
        os.replace(partial, path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or cut(error)
        problem = f"cannot write {path} ({reason})"
        raise CheckpointError(f"{problem}: free space or write elsewhere") from error
    finally:
        with suppress(OSError, ValueError):
            partial.unlink()


def read_session(path: str | Path, engine: Engine) -> SavedSession:
    """Reads a file for this engine's model; nothing is changed.

    Raises:
        CheckpointError: the file is not a session, is damaged, contradicts itself, belongs to
            another model or an adapter that it was not loaded with, or is longer than this model's
            context.
    """
    try:
        with open_safetensors(Path(path), FIX) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or len(metadata.get("session", "")) > JSON_BYTES:
                raise CheckpointError(
                    "it is not a session of this version, as Session.save writes them"
                )
            return _Reader(engine, file, metadata["session"]).read()
    except (CheckpointError, ConfigError, PromptError, KeyError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"the session in {path} cannot be read: {reason}") from error


class _Reader:
    """One file: header fields first, then tensors; errors say which field is wrong."""

    def __init__(self, engine: Engine, file: Any, header: str) -> None:
        self.engine, self.config, self.file = engine, engine.lm.config, file
        self.header = parse_json(header, "its header")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.tensors = {
            name: (str(found.get_dtype()), tuple(found.get_shape()))
            for name, found in slices.items()
        }

    def read(self) -> SavedSession:
        header = {**LATER, **self.header}
        if odd := FIELDS ^ header.keys():
            raise CheckpointError(f"its header lacks or adds {shown(min(odd))}: {FIX}")
        if header["model"] != self.engine.lm.fingerprint:
            raise CheckpointError("it belongs to another model: load the one it was saved with")
        adapter = self.adapter(header["adapter"])
        numbers = {name: self.integer(name, header[name], *INTEGERS[name]) for name in INTEGERS}
        system = header["system_prompt"]
        if system is not None and not (isinstance(system, str) and _is_text(system)):
            raise self.wrong("system_prompt", system, "a text or null")
        special_tokens = header["special_tokens"]
        if not isinstance(special_tokens, bool):
            raise self.wrong("special_tokens", special_tokens, "true or false")
        rows, groups = self.config.channels + 1, self.groups("ids", self.config.channels + 1)
        self.engine.check_room(groups)
        opening = self.integer("opening", numbers["opening"], 0, groups)
        places = self.places(opening, groups)
        spoken = self.spoken(places[-1][1] if places else groups, groups)
        cached = self.integer("cached", numbers["cached"], 0, groups)
        if not places and opening != groups:
            raise self.wrong("turns", header["turns"], f"those of {groups} groups")
        for i, (begin, reply) in enumerate(places):
            if self.groups(f"speech.{i}", rows - 1) > reply - begin:
                raise self.wrong(f"turns[{i}]", [begin, reply], f"as long as speech.{i}")
        parts = sum(name.startswith("cache.") for name in self.tensors)
        names = {"ids", *(f"speech.{i}" for i in range(len(places)))}
        if cached:
            names |= {"hidden", *(f"cache.{i}" for i in range(parts))}
        if odd := names ^ self.tensors.keys():
            raise CheckpointError(
                f"it lacks the tensor {shown(min(odd))}, or has it unasked: {FIX}"
            )
        ids = self.file.get_tensor("ids").clone()
        if not in_vocabulary(ids, self.config):
            raise CheckpointError(f"its ids are outside of the model's vocabulary: {FIX}")
        turns = []
        for i, (begin, reply) in enumerate(places):
            codes = self.file.get_tensor(f"speech.{i}").clone()
            self.check_speech(i, codes, ids, begin, reply)
            turns.append((begin, reply, codes))
        # A cache that ends in the opening is not worth having: the opening is shared with other
        # sequences once it has been prefilled, and so is computed here.
        kept = self.cache(cached, parts) if cached >= opening else None
        seed, draws = numbers["seed"], numbers["draws"]
        given = seed, draws, opening, ids, turns, spoken, kept
        return SavedSession(system, special_tokens, adapter, *given, self.heard())

    def adapter(self, digest: Any) -> int:
        """The place of the adapter that it was computed with."""
        if not isinstance(digest, str):
            raise self.wrong("adapter", digest, "the digest of an adapter or empty")
        known = self.engine.lm.adapter_digests
        if digest not in known:
            raise CheckpointError(
                "it belongs to an adapter that this model was not loaded with: load the model with "
                "adapters={...}, unmerged, and that adapter among them"
            )
        return known.index(digest)

    def wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"'{name}' is {shown(value)}, not {expected}: {FIX}")

    def integer(self, name: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def groups(self, name: str, rows: int) -> int:
        """Number of groups of a tensor [rows, n G] of int64."""
        dtype, shape = self.tensors[name]
        size = self.config.group_size
        if dtype != "I64" or len(shape) != 2 or shape[0] != rows or shape[1] % size:
            raise CheckpointError(
                f"{name} is {dtype} {list(shape)}, not I64 [{rows}, a multiple of {size}]: {FIX}"
            )
        return shape[1] // size

    def places(self, opening: int, groups: int) -> list[tuple[int, int]]:
        """(first group, first group of the reply) of each turn, one after the other."""
        given, end = self.header["turns"], opening
        if not isinstance(given, list):
            raise self.wrong("turns", given, "a list")
        places = []
        for i, turn in enumerate(given):
            if not isinstance(turn, list) or len(turn) != 2:
                raise self.wrong(f"turns[{i}]", turn, "two whole numbers")
            begin = self.integer(f"turns[{i}]", turn[0], end, groups)
            end = self.integer(f"turns[{i}]", turn[1], begin + 1, groups)
            places.append((begin, end))
        return places

    def spoken(self, first: int, groups: int) -> list[int]:
        given = self.header["spoken"]
        if not isinstance(given, list):
            raise self.wrong("spoken", given, "a list")
        for group in given:
            first = self.integer("spoken", group, first, groups - 1) + 1
        return given

    def heard(self) -> tuple[Tensor, str] | None:
        """Sums of rows, means and mean squares: of two norms, in a whole number of rows."""
        given = self.header.get("heard")
        if given is None:
            return None
        expected = "a codec and finite sums of rows, means and squares of two norms, or null"
        with suppress(TypeError, ValueError, KeyError, OverflowError, RuntimeError):
            rows = [[float(value) for value in row] for row in given["sums"]]
            sums = torch.tensor(rows, dtype=torch.float64, device="cpu")
            counts, means, squares = sums.T
            fits = sums.shape == (2, 3) and len(given) == 2 and isinstance(given["codec"], str)
            # A codec that does not pool has no rows of the first norm.
            spread = squares * counts >= means.square() * (1 - 1e-9)
            if fits and is_finite(sums) and counts[1] >= 1 and counts[0] >= 0 and spread.all():
                return sums, given["codec"]
        raise self.wrong("heard", given, expected)

    def check_speech(self, turn: int, codes: Tensor, ids: Tensor, begin: int, reply: int) -> None:
        """The user's codes are kept twice: in the ids, and to say them again as the first turn."""
        size = self.config.group_size
        said = ids[:, begin * size : reply * size]
        patches = (said[0, ::size] == self.engine.lm.empty_id).repeat_interleave(size)
        if not torch.equal(said[1:, patches], codes):
            raise CheckpointError(f"speech.{turn} is not what its turn holds: {FIX}")

    def cache(self, cached: int, parts: int) -> Snapshot | None:
        """The cache, if it has the types and shapes of this model's; only then it is read."""
        state, names = self.engine.state, [f"cache.{i}" for i in range(parts)]
        if not cached or len(names) != len(state.cache.parts):
            return None
        own = [part[:, 0, :, :cached] for part in state.cache.parts]
        expected = [(part.dtype, tuple(part.shape)) for part in (*own, state.hidden[0])]
        found = [self.tensors[name] for name in (*names, "hidden")]
        if expected != [(DTYPES.get(dtype), shape) for dtype, shape in found]:
            return None
        tensors = [self.file.get_tensor(name).clone() for name in (*names, "hidden")]
        for name, tensor in zip((*names, "hidden"), tensors, strict=True):
            if not is_finite(tensor):
                raise CheckpointError(f"{name} holds NaN or infinite values: {FIX}")
        return Snapshot(cached, tuple(tensors[:-1]), tensors[-1])


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
