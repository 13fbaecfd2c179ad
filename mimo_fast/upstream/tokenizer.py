"""`CallableTokenizer`: our tokenizer with the methods of transformers' that users call."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mimo_fast.text.tokenizer import Tokenizer


class CallableTokenizer(Tokenizer):
    """A `Tokenizer` that transformers' users can use as theirs; ids are the same."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "CallableTokenizer":
        """The same tokenizer: both share their state."""
        if isinstance(tokenizer, cls):
            return tokenizer
        view = object.__new__(cls)
        view.__dict__ = tokenizer.__dict__
        return view

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **_unused: Any,
    ) -> dict[str, Any]:
        """Ids of one text, or of several; special tokens written in them are tokens.

        Args:
            add_special_tokens: has no effect: this tokenizer adds none.
            padding: pads several texts on the right with pad_token to the longest of them.
            truncation, max_length: keep the first max_length ids.
            return_tensors: "pt" for tensors [texts, n], also of one text.

        Returns:
            input_ids and attention_mask, lists as deep as `text`, or tensors.

        Raises:
            ValueError: return_tensors is not "pt", or texts of different lengths would need
                padding.
        """
        texts, longest = [text] if isinstance(text, str) else [*text], None
        if truncation not in (None, False, "do_not_truncate"):
            longest = max_length
        rows = [self.encode(each)[:longest] for each in texts]
        masks = [[1] * len(row) for row in rows]
        if padding not in (False, "do_not_pad"):
            width = max(map(len, rows), default=0)
            if padding == "max_length" and max_length is not None:
                width = max(width, max_length)
            masks = [mask + [0] * (width - len(mask)) for mask in masks]
            rows = [row + [self.pad_id] * (width - len(row)) for row in rows]
        found: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
        if return_tensors is None:
            return Encoding(found if not isinstance(text, str) else _first(found))
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt' or None, not {return_tensors!r}")
        if len({len(row) for row in rows}) > 1:
            raise ValueError("texts of different lengths make one tensor only with padding=True")
        made = {
            name: torch.tensor(each, dtype=torch.int64, device="cpu").reshape(len(rows), -1)
            for name, each in found.items()
        }
        return Encoding(made)

    def encode(self, text: str, add_special_tokens: bool = True, **_unused: Any) -> list[int]:
        """See `Tokenizer.encode`; add_special_tokens has no effect: this tokenizer adds none."""
        return super().encode(text)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_unused: Any) -> str:
        """Text of one id or several, in a list, an array or a tensor of any integer type."""
        return super().decode(_as_ids(ids), skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Any], **options: Any) -> list[str]:
        return [self.decode(ids, **options) for ids in sequences]

    def tokenize(self, text: str, **_unused: Any) -> list[str]:
        """The tokens of a text."""
        return self.convert_ids_to_tokens(self.encode(text))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or a list of them; None for what is no token."""
        if isinstance(tokens, str):
            return self._backend.token_to_id(tokens)
        return [self._backend.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or a list of them; None for what is no id."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        hidden = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(i) for i in _as_ids(ids) if i not in hidden]

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones included, and its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: i for i, token in self._added.items()}

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones, as transformers counts; `len` counts all."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int:
        return self.eos_id

    @property
    def pad_token_id(self) -> int:
        return self.pad_id

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id_of("unk_token")

    def _id_of(self, name: str) -> int | None:
        """The id of a named token, None where the checkpoint names none."""
        return self._named_id(name) if self._config.get(name) else None

    @property
    def eos_token(self) -> str:
        return str(self._backend.id_to_token(self.eos_id))

    @property
    def pad_token(self) -> str:
        return str(self._backend.id_to_token(self.pad_id))

    @property
    def all_special_ids(self) -> list[int]:
        return [i for i, token in self._added.items() if token.special]

    @property
    def all_special_tokens(self) -> list[str]:
        return [token.content for token in self._added.values() if token.special]


class Encoding(dict[str, Any]):
    """What a tokenizer returns: a mapping whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> "Encoding":
        """With its tensors on a device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.items()}
        return Encoding(moved)


def _first(found: dict[str, Any]) -> dict[str, Any]:
    return {name: rows[0] for name, rows in found.items()}


def _as_ids(ids: Any) -> list[int]:
    """Ids as Python's integers."""
    given = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(given, int):
        return [given]
    return [int(each) for each in given]
