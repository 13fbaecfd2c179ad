"""Segments of a prompt, and their packing into ids [C + 1, T G].

Each segment is tokenized on its own, as upstream's are (`InputSegment`, `StreamingInputSegment`).

Control tokens come from templates alone. A segment's type says who wrote it: `str` is a template,
in which special tokens are recognised, and `UserText` is what somebody typed, in which they are
text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.config import LMConfig
from mimo_fast.errors import PromptError
from mimo_fast.text.tokenizer import Tokenizer

TEXT_FILLER = -100
"""Channel 0 of all frames of a group but its first."""

REPLY_TEXT_TOKENS = 5
REPLY_PATCHES = 5
"""Text tokens and patches that alternate in a reply (upstream `StreamingInputSegment`)."""


@dataclass(frozen=True)
class UserText:
    """Text from outside: special tokens written in it are text."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            kind = type(self.text).__name__
            raise PromptError(f"a prompt is made of text and speech, not of a {kind}")


Written = str | UserText


@dataclass(frozen=True)
class Joined:
    """Templates and users' texts that are tokenized as one text."""

    parts: Sequence[Written]


@dataclass(frozen=True)
class Speech:
    """Codes [C, n G] between `<|sosp|>` and `<|eosp|>`; the latter is missing in open speech."""

    codes: Tensor
    closed: bool = True


@dataclass(frozen=True)
class SpokenReply:
    """A spoken reply, its text and codes [C, n G] interleaved between `<|sostm|>` and `<|eostm|>`.

    places: for each text token, ascending, the patch that it stands before. None: text and patches
    alternate as upstream's do.
    """

    text: Written
    codes: Tensor
    places: Sequence[int] | None = None


Segment = Written | Joined | Speech | SpokenReply
Segments = list[Segment]


def pack(segments: Iterable[Segment], tokenizer: Tokenizer, config: LMConfig) -> Tensor:
    """Segments -> ids [C + 1, T G] int64: a text token a group, or a patch under `<|empty|>`.

    Raises:
        PromptError: a segment is neither text nor speech, or has codes of another shape.
    """
    special = tokenizer.special
    parts = [torch.empty(config.channels + 1, 0, dtype=torch.int64, device="cpu")]

    def text(ids: Sequence[int]) -> None:
        codes = torch.tensor(config.empty_codes, dtype=torch.int64, device="cpu")[:, None].expand(
            -1, len(ids) * config.group_size
        )
        parts.append(
            _with_text(torch.tensor(ids, dtype=torch.int64, device="cpu"), codes, config.group_size)
        )

    def speech(codes: Tensor) -> None:
        patches = codes.shape[1] // config.group_size
        parts.append(
            _with_text(
                torch.full((patches,), special.empty, dtype=torch.int64, device="cpu"),
                codes,
                config.group_size,
            )
        )

    for segment in segments:
        written = segment.text if isinstance(segment, SpokenReply) else segment
        if not isinstance(written, str | UserText | Joined | Speech):
            kind = type(written).__name__
            raise PromptError(f"a prompt is made of text and speech, not of a {kind}")
        if isinstance(segment, str | UserText | Joined):
            text(text_ids(segment, tokenizer))
        elif isinstance(segment, Speech):
            _check_codes(segment.codes, config)
            text([special.sosp])
            speech(segment.codes)
            if segment.closed:
                text([special.eosp])
        else:
            _check_codes(segment.codes, config)
            text([special.sostm])
            words = text_ids(segment.text, tokenizer)
            for ids, codes in _interleaved(segment, words, special.eot, config.group_size):
                text(ids)
                speech(codes)
            text([special.eostm])
    return torch.cat(parts, dim=1)


def text_ids(written: Written | Joined, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text: added tokens are recognised where they lie in one template alone.

    What is between two of them is tokenized as text, so that a user's text makes no token, neither
    by itself nor with the template around it. Ids are those of the whole text in `encode` unless a
    user's text holds, or completes, an added token.
    """
    parts = written.parts if isinstance(written, Joined) else [written]
    if all(isinstance(part, str) for part in parts):
        return tokenizer.encode("".join(map(str, parts)))
    ids, stretch = list[int](), ""
    for part in parts:
        for piece in [part.text] if isinstance(part, UserText) else tokenizer.split(part):
            if isinstance(piece, str):
                stretch += piece
            else:
                ids += [*tokenizer.encode_as_text(stretch), piece]
                stretch = ""
    return ids + tokenizer.encode_as_text(stretch)


def _interleaved(
    reply: SpokenReply, ids: list[int], end: int, group_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The reply's text tokens and patches in turn; the end of the text follows its last token."""
    if reply.places is None:
        starts = range(0, max(len(ids), 1), REPLY_TEXT_TOKENS)
        texts = [ids[i : i + REPLY_TEXT_TOKENS] for i in starts]
        texts[-1] = [*texts[-1], end]
        size = REPLY_PATCHES * group_size
    else:
        count, size = reply.codes.shape[1] // group_size, group_size
        last = reply.places[-1] if reply.places else 0
        placed = [*zip([*reply.places, last], [*ids, end], strict=True)]
        texts = [[token for place, token in placed if place == i] for i in range(count)]
    for i in range(max(len(texts), -(-reply.codes.shape[1] // size))):
        yield texts[i] if i < len(texts) else [], reply.codes[:, i * size : (i + 1) * size]


def _with_text(ids: Tensor, codes: Tensor, group_size: int) -> Tensor:
    channel = torch.full((len(ids), group_size), TEXT_FILLER, dtype=torch.int64, device="cpu")
    channel[:, 0] = ids
    return torch.cat((channel.view(1, -1), codes.to("cpu", torch.int64)))


def whole_patches(codes: Tensor, group_size: int, closed: bool = True) -> Tensor:
    """Codes [C, T] -> [C, n G]: the last frame is repeated or, in open speech, the rest cut off."""
    extra = codes.shape[1] % group_size
    if extra and closed:
        return torch.cat((codes, codes[:, -1:].expand(-1, group_size - extra)), dim=1)
    return codes[:, :-extra] if extra else codes


def _check_codes(codes: Tensor, config: LMConfig) -> None:
    if codes.ndim != 2 or codes.shape[0] != config.channels or codes.shape[1] % config.group_size:
        raise PromptError(
            f"codes must be [{config.channels}, a multiple of {config.group_size}], not "
            f"{list(codes.shape)}; use MimoAudio.speech() or preprocess_input() to make them"
        )
