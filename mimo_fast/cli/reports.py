"""Errors and remarks on standard error; results alone go to standard output."""

import os
import re
import sys

from mimo_fast.config import OFFLOADABLE
from mimo_fast.errors import MimoFastError

TRACEBACK = "MIMO_FAST_TRACEBACK"


def say(text: str) -> None:
    """Progress and remarks go to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def report(error: Exception) -> None:
    """Prints an error as one line."""
    say(f"mimo-fast: error: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    text = _as_options(" ".join(str(error).split()) or type(error).__name__)
    if isinstance(error, OSError) and error.strerror:
        named = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return named + error.strerror
    if isinstance(error, MimoFastError | ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text:.300} (set {TRACEBACK}=1 to see where)"


def _as_options(text: str) -> str:
    """Arguments of `mimo_fast.load` in an error's advice as the options that set them here."""
    offload = " ".join(f"--offload {part}" for part in OFFLOADABLE)
    text = text.replace(f"offload={list(OFFLOADABLE)}", offload)
    text = re.sub(r"\b(kv_cache|quantization|max_seq_len)=['\"]?(\w+)['\"]?", r"--\1 \2", text)
    # One request at a time is all that a command has.
    text = text.replace("lower max_batch or max_seq_len", "lower max_seq_len")
    text = re.sub(r"(?<![\w-])(kv_cache|max_seq_len)\b", r"--\1", text)
    text = re.sub(r"(?<![\w-])max_new_tokens\b", "--max-tokens", text)
    return text.replace("--kv_cache", "--kv-cache").replace("--max_seq_len", "--max-seq-len")
