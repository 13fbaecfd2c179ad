"""Text <-> ids, with the special tokens of MiMo-Audio.

tokenizer.json is used unchanged, as upstream's pinned transformers (4.49) does. transformers 5
replaces its pre-tokenizer by that of the class named in tokenizer_config.json, which is the same
for the published files.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mimo_fast.errors import CheckpointError, PromptError
from mimo_fast.json_files import cut, read_json, regular_size, shown
from mimo_fast.text.tokenizer_file import MAX_ADDED, load_tokenizer_file

MODEL_TOKENS = {
    "sosp": "<|sosp|>",
    "eosp": "<|eosp|>",
    "empty": "<|empty|>",
    "human": "<|Human|>",
    "speech_lm": "<|SpeechLM|>",
    "sostm": "<|sostm|>",
    "eostm": "<|eostm|>",
    "eot": "<|eot|>",
}
"""Special tokens; upstream appends the absent ones in this order, which decides their ids."""

CHAT_TOKENS = {"im_start": "<|im_start|>", "im_end": "<|im_end|>"}

THINK_TOKENS = ("<think>", "</think>")
"""The bounds of what a model thinks before it answers."""

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

TRAINED_WORDS = "trained_words"
"""Our key of tokenizer_config.json: a list of lower-case words."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids with a meaning to the model: bounds of speech, stream and chat; audio, stop, padding."""

    sosp: int
    eosp: int
    empty: int
    human: int
    speech_lm: int
    sostm: int
    eostm: int
    eot: int
    im_start: int
    im_end: int
    eos: int
    pad: int


class Tokenizer:
    """A byte-level BPE tokenizer of the `tokenizers` package; ids equal those of transformers.

    Args:
        backend: is changed: tokens that `config` or the model needs are added, truncation and
            padding turned off.
        config: content of tokenizer_config.json, and of special_tokens_map.json where that lacks a
            key.
        source: what to call it in errors.

    Attributes:
        trained_words: The only words that the model was trained on; empty where config has none.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], source: str = "the tokenizer"
    ) -> None:
        self._backend, self._config, self._source = backend, config, source
        backend.no_truncation()
        backend.no_padding()
        try:
            _add_configured_tokens(backend, config)
            self.trained_words = frozenset(_texts(config.get(TRAINED_WORDS)))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            problem = f"the special tokens in {source}/tokenizer_config.json are malformed"
            raise CheckpointError(f"{problem} ({cut(error)}): download the file again") from error
        _add_special(backend, MODEL_TOKENS.values())

    @classmethod
    def from_directory(cls, directory: str | PathLike[str]) -> "Tokenizer":
        """The tokenizer of a checkpoint: tokenizer.json, else vocab.json and merges.txt.

        The latter need transformers.

        Raises:
            CheckpointError: neither is there, one cannot be read, or transformers is needed and
                missing.
            ConfigError: tokenizer_config.json or special_tokens_map.json is not a JSON object.
        """
        directory = Path(directory)
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if os.path.lexists(directory / name):
                given = read_json(directory / name).items()
                config |= {key: value for key, value in given if value is not None}
        if os.path.lexists(path := directory / "tokenizer.json"):
            backend = load_tokenizer_file(path)
        else:
            backend = _from_vocabulary(directory)
        return cls(backend, config, str(directory))

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, and none is added.

        Raises:
            PromptError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"the text holds a broken character at position {error.start}"
            raise PromptError(f"{problem}: remove it") from error
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_as_text(self, text: str) -> list[int]:
        """Ids of a text in which nothing is an added token, whatever is written in it.

        Ids equal those of `encode` where the text holds no added token. Whether it does is decided
        on the ids, after the normalization of the tokenizer.

        Raises:
            PromptError: as `encode`.
        """
        ids = self.encode(text)
        if self._added.keys().isdisjoint(ids):
            return ids
        return list(self._without_added.encode(text, add_special_tokens=False).ids)

    def split(self, text: str) -> list[int | str]:
        """A text, cut at its added tokens: their ids, and the texts between them."""
        parts, place = list[int | str](), 0
        encoded = self._backend.encode(text, add_special_tokens=False)
        for token, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
            if token in self._added:
                parts += [text[place:start], token]
                place = stop
        return [part for part in (*parts, text[place:]) if part != ""]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; those outside the vocabulary give nothing, broken characters U+FFFD."""
        known = [i for i in ids if 0 <= i < 2**32]
        return str(self._backend.decode(known, skip_special_tokens=skip_special_tokens))

    def id(self, token: str) -> int:
        """Id of a token. Raises CheckpointError where the vocabulary lacks it."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"{self._source} has no token {token}: use the tokenizer files of the checkpoint"
            )
        return int(found)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the largest id is larger where there are gaps."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def eos_id(self) -> int:
        return self._named_id("eos_token")

    @cached_property
    def pad_id(self) -> int:
        return self._named_id("pad_token")

    @cached_property
    def special(self) -> SpecialIds:
        ids = {name: self.id(token) for name, token in (MODEL_TOKENS | CHAT_TOKENS).items()}
        return SpecialIds(**ids, eos=self.eos_id, pad=self.pad_id)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that are no text: those of `special`, special added tokens, bounds of thinking."""
        special = self.special
        named = frozenset[int](getattr(special, each.name) for each in fields(special))
        return named.union(i for i, token in self._added.items() if _is_control(token))

    @cached_property
    def think_ids(self) -> tuple[int, int] | None:
        """Ids of `<think>` and `</think>`; None where the vocabulary lacks them."""
        begin, end = map(self._backend.token_to_id, THINK_TOKENS)
        return None if begin is None or end is None else (begin, end)

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return dict(self._backend.get_added_tokens_decoder())

    @cached_property
    def _without_added(self) -> tokenizers.Tokenizer:
        """The same tokenizer without added tokens, which is built when a text needs it first."""
        content = json.loads(self._backend.to_str())
        content |= {"added_tokens": [], "post_processor": None}
        model = content["model"]
        if isinstance(model.get("vocab"), dict):
            # A vocabulary that lists a control token would give it back as a whole word.
            control = {token.content for token in self._added.values() if _is_control(token)}
            control.discard(model.get("unk_token"))
            model["vocab"] = {name: i for name, i in model["vocab"].items() if name not in control}
            pairs = (
                (merge, merge.split(" ") if isinstance(merge, str) else merge)
                for merge in model.get("merges") or ()
            )
            model["merges"] = [
                merge for merge, parts in pairs if control.isdisjoint([*parts, "".join(parts)])
            ]
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def check_vocab(self, vocab_size: int) -> None:
        """Raises CheckpointError where a token's id is not below the LM's vocab_size."""
        token, largest = max(self._backend.get_vocab().items(), key=lambda item: item[1])
        if largest >= vocab_size:
            raise CheckpointError(
                f"{self._source}: token {token!r} has id {largest}, but the LM has vocab_size "
                f"{vocab_size}: use the tokenizer that belongs to this checkpoint"
            )

    def _named_id(self, name: str) -> int:
        token = _content(self._config.get(name))
        if not token:
            file = "tokenizer_config.json"
            raise CheckpointError(f"{self._source} names no {name}: set it in its {file}")
        return self.id(token)


def _from_vocabulary(directory: Path) -> tokenizers.Tokenizer:
    if not (directory / "vocab.json").is_file() or not (directory / "merges.txt").is_file():
        raise CheckpointError(
            f"{directory} has no tokenizer.json, nor vocab.json with merges.txt: add tokenizer.json"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        problem = f"{directory} has no tokenizer.json, and vocab.json with merges.txt needs"
        fix = "transformers: pip install mimo-fast[transformers]"
        raise CheckpointError(f"{problem} {fix}") from error
    try:
        for path in directory.iterdir():
            if path.suffix in (".json", ".txt", ".jinja", ".model"):
                regular_size(path)
        # Never the checkpoint's own code, and never a question on stdin whether to run it.
        loaded = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        return loaded.backend_tokenizer
    # transformers raises whatever the parser it picked happens to raise, panics too.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        problem = f"cannot read vocab.json of {directory} ({cut(error)})"
        raise CheckpointError(f"{problem}: add a tokenizer.json") from error


def _add_configured_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Adds what transformers adds: `added_tokens_decoder` in order, then other special tokens."""
    listed = config.get("added_tokens_decoder") or {}
    if len(listed) > MAX_ADDED:
        raise ValueError(f"{len(listed)} added tokens, where at most {MAX_ADDED} are read")
    tokens = []
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        names = ("single_word", "lstrip", "rstrip", "normalized")
        flags = {name: bool(entry[name]) for name in names if name in entry}
        tokens.append(AddedToken(_content(entry), special=bool(entry.get("special")), **flags))
    # In as few calls as the order allows: each call rebuilds the library's tables.
    for special, together in groupby(tokens, key=lambda token: bool(token.special)):
        (backend.add_special_tokens if special else backend.add_tokens)([*together])
    named = [config.get(name) for name in NAMED_TOKENS]
    # transformers 5 writes the additional ones as a list under extra_special_tokens; 4 has a
    # mapping of names there.
    extra = config.get("extra_special_tokens") or []
    extra = [*extra.values()] if isinstance(extra, dict) else extra
    for tokens in (config.get("additional_special_tokens") or [], extra):
        if not isinstance(tokens, list):
            raise TypeError(f"{shown(tokens)} is no list of tokens")
        named += tokens
    _add_special(backend, map(_content, named))


def _add_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Adds the tokens that are absent, in their order."""
    absent = [token for token in tokens if token and backend.token_to_id(token) is None]
    backend.add_special_tokens(absent)


def _is_control(token: AddedToken) -> bool:
    return token.special or token.content in THINK_TOKENS or token.content.startswith("<|")


def _content(token: Any) -> str:
    """A special token's text: config files give it as a string or as an object."""
    text = token["content"] if isinstance(token, dict) else token or ""
    if not isinstance(text, str):
        raise TypeError(f"{shown(text)} is no token")
    return text


def _texts(value: Any) -> list[str]:
    """A list of texts, or none."""
    if value is not None and not (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    ):
        raise TypeError(f"{shown(value)} is no list of words")
    return value or []
