"""Loads a foreign tokenizer.json without letting it abort or hang this process.

The `tokenizers` library parses whatever its many classes take: nested sequences that take for ever,
patterns, paddings of any size, tables that make it panic. A file of the form that checkpoints of
this model have, a byte-level BPE with the usual pieces, is recognised by its fields and loaded. Any
other is first loaded, and tried on a few texts, in a child process with limits of time and memory.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mimo_fast.errors import CheckpointError, ConfigError
from mimo_fast.json_files import cut, read_json

TRIAL_SECONDS = 10
TRIAL_BYTES = 4 * 2**30

MAX_ID = 2**24
MAX_CONTENT = 1000
INSERTS = ("content", "prepend", "replacement")
"""Keys of what a piece puts into a text."""

MAX_ADDED = 10_000
"""Added tokens at most; the library's tables are built from all of them."""

MAX_PIECES = 8
"""Normalizers, or pre-tokenizers, in a sequence at most; the published files have two."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _WORDS + r"\p{N}" + _REST,
    _WORDS + r"\p{N}{1,3}" + _REST,
)
"""Of GPT-2, Qwen2 and Llama 3; an unknown pattern may backtrack for ever."""

TRIAL = """
import resource, sys
for kind, limit in ((resource.RLIMIT_AS, {bytes}), (resource.RLIMIT_CPU, {seconds})):
    resource.setrlimit(kind, (limit, limit))
import tokenizers
try:
    loaded = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
    loaded.no_truncation()
    loaded.no_padding()
    texts = ["a1 \\u00e9\\u4f60\\U0001f600'!?,", "", "<|im_start|>user\\nhello 123<|im_end|>"]
    texts.append("".join(map(chr, range(32, 127))))
    for text in [*texts, *(each * 5000 for each in ("a", " ", "1", "\\n", "a1 !"))]:
        ids = loaded.encode(text, add_special_tokens=False).ids
        if len(ids) > 8 * len(text.encode()) + 256:
            raise ValueError(f"a text of {{len(text)}} characters has {{len(ids)}} tokens")
        loaded.decode(ids)
except BaseException as error:
    sys.stdout.buffer.write(("!" + str(error)).encode("utf-8", "replace"))
else:
    sys.stdout.buffer.write(b"loads")
"""


def load_tokenizer_file(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file, without its truncation and padding.

    Raises:
        CheckpointError: the file is damaged or no tokenizer, or makes the library hang or abort.
    """
    try:
        tree = read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged ({error}): download it again") from error
    text = json.dumps({**tree, "truncation": None, "padding": None})
    if not is_usual(tree):
        for name in ("normalizer", "pre_tokenizer", "decoder"):
            if (longest := _longest_insert(tree.get(name))) > MAX_CONTENT:
                problem = f"its {name} inserts {longest} characters"
                raise CheckpointError(f"{path} is damaged ({problem}): download it again")
        try_in_child(text, path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    # The library raises no more specific class; its panics are no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CheckpointError(f"{path} is damaged ({cut(error)}): download it again") from error


def try_in_child(text: str, path: Path) -> None:
    """Raises CheckpointError unless a child process can load this tokenizer and use it."""
    code = TRIAL.format(bytes=TRIAL_BYTES, seconds=TRIAL_SECONDS)
    try:
        done = subprocess.run(
            # -P: no module comes from the working directory, which may be the checkpoint's.
            [sys.executable, "-P", "-c", code],
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TRIAL_SECONDS,
        )
        said = done.stdout.decode("utf-8", "replace")
        ended = f"the tokenizers library ended with code {done.returncode}"
    except subprocess.TimeoutExpired:
        said, ended = "", f"the tokenizers library is not done after {TRIAL_SECONDS} s"
    except OSError as error:
        said, ended = "", f"no process to try it in: {error.strerror or error}"
    if said != "loads":
        reason = cut(said[1:]) if said.startswith("!") else ended
        raise CheckpointError(f"{path} is damaged ({reason}): download it again")


def _longest_insert(piece: Any) -> int:
    """Characters that a piece, or one inside it, puts into a text at once; no trial may meet it."""
    if isinstance(piece, list):
        return max(map(_longest_insert, piece), default=0)
    if not isinstance(piece, dict):
        return 0
    own = (len(text) for key in INSERTS if isinstance(text := piece.get(key), str))
    return max([*own, *map(_longest_insert, piece.values())], default=0)


def is_usual(tree: Mapping[str, Any]) -> bool:
    """Whether it is a byte-level BPE of known pieces, whose tables fit together."""
    try:
        return (
            len(tree.get("added_tokens") or []) <= MAX_ADDED
            and all(map(_is_added_token, tree.get("added_tokens") or []))
            and _is_one_of(tree.get("normalizer"), "normalizers", _is_normalizer)
            and _is_one_of(tree.get("pre_tokenizer"), "pretokenizers", _is_pre_tokenizer)
            and _is_one_of(tree.get("post_processor"), "", _is_post_processor)
            and _is_one_of(tree.get("decoder"), "", _is_byte_level)
            and _is_model(tree["model"])
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _is_one_of(piece: Any, members: str, known: Callable[[Any], bool]) -> bool:
    """Whether a piece is absent, known, or a short sequence of known ones, which is not nested.

    A byte-level piece doubles what is not ASCII, and so stands in a sequence once.
    """
    if isinstance(piece, dict) and members and piece.get("type") == "Sequence":
        pieces = piece[members]
        return (
            0 < len(pieces) <= MAX_PIECES
            and all(map(known, pieces))
            and sum(map(_is_byte_level, pieces)) <= 1
        )
    return piece is None or known(piece)


def _is_normalizer(piece: Any) -> bool:
    return piece["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")


def _is_byte_level(piece: Any) -> bool:
    return piece["type"] == "ByteLevel"


def _is_post_processor(piece: Any) -> bool:
    plain = piece["type"] == "TemplateProcessing" and not piece["special_tokens"]
    return plain or _is_byte_level(piece)


def _is_pre_tokenizer(piece: Any) -> bool:
    split = piece["type"] == "Split" and piece["pattern"].get("Regex") in PATTERNS
    return split or _is_byte_level(piece)


def _is_added_token(token: Any) -> bool:
    return _is_id(token["id"]) and 0 < len(token["content"]) <= MAX_CONTENT


def _is_model(model: Any) -> bool:
    vocabulary = model["vocab"]
    plain = not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if model["type"] != "BPE" or not plain or not isinstance(vocabulary, dict):
        return False
    ids = vocabulary.values()
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return (
        all(map(_is_id, ids))
        and len(set(ids)) == len(vocabulary)
        and all(
            first in vocabulary and second in vocabulary and first + second in vocabulary
            for first, second in pairs
        )
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ID
