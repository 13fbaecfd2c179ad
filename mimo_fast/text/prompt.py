"""Segments of a prompt, and their packing into ids [C + 1, T G].

Each segment is tokenized on its own, as upstream's are (`InputSegment`, `StreamingInputSegment`).

Control tokens come from templates alone. A segment's type says who wrote it: `str` is a template,
in which special tokens are recognised, and `UserText` is what somebody typed, in which they are
text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mimo_fast.config import Calibration, LMConfig
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
    loss: Tensor | None = field(default=None, repr=False, compare=False)
    """The share of the encoder's energy that the codes lose, a scalar, where it was measured."""


class PendingCodes(Protocol):
    """Codes that a device is still computing: `frames` of them, whose number is known."""

    frames: int

    def wait(self) -> Tensor:
        """The codes [C, frames] on the host."""
        ...

    def copy_to(self, out: Tensor, first: int) -> None:
        """Copies frames first ... to out [C, m] on the device; nobody waits."""
        ...

    def drop(self) -> None:
        """Lets go of the device's memory, once nothing on the device needs them any more."""
        ...


class PendingSpeech(Speech):
    """Speech whose codes are still being computed; whoever reads `codes` waits for them."""

    def __init__(self, pending: PendingCodes, closed: bool, loss: Tensor | None = None) -> None:
        object.__setattr__(self, "pending", pending)
        object.__setattr__(self, "closed", closed)
        object.__setattr__(self, "loss", loss)

    pending: PendingCodes

    @property
    def codes(self) -> Tensor:
        return self.pending.wait()


@dataclass(frozen=True)
class Hearing:
    """What the confidence of a reply is made of before it begins: see `runtime/confidence.py`.

    loss: of the prompt's last recording, which the reply is about, see `Speech.loss`.
    """

    calibration: Calibration
    loss: Tensor


@dataclass(frozen=True)
class PackedPrompt:
    """Ids [C + 1, T G] of a prompt, of which some may still be computed.

    pending: (frame, codes) of what belongs at this frame; `ids` has zeros there.
    hearing: None where the checkpoint calibrates nothing for the task, or there is no recording.
    """

    ids: Tensor
    pending: tuple[tuple[int, PendingCodes], ...] = ()
    hearing: Hearing | None = None

    def part(self, first: int, end: int) -> "PackedPrompt":
        """Frames first ... end - 1; codes that begin before them have a negative frame."""
        found = ((place - first, codes) for place, codes in self.pending)
        kept = (each for each in found if each[0] < end - first and each[0] + each[1].frames > 0)
        return PackedPrompt(self.ids[:, first:end], tuple(kept))

    def settled(self) -> Tensor:
        """The ids, with codes that are waited for."""
        return fill_in(self.ids, self.pending)


def fill_in(ids: Tensor, pending: Iterable[tuple[int, PendingCodes]]) -> Tensor:
    """Ids [C + 1, T G] with pending codes at their frames; a copy, if there are any."""
    for i, (place, codes) in enumerate(pending):
        ids = ids if i else ids.clone()
        first, end = max(place, 0), min(place + codes.frames, ids.shape[1])
        ids[1:, first:end] = codes.wait()[:, first - place : end - place]
    return ids


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
    return pack_pending(segments, tokenizer, config).settled()


def pack_pending(
    segments: Iterable[Segment], tokenizer: Tokenizer, config: LMConfig, task: str | None = None
) -> PackedPrompt:
    """`pack` that does not wait for the codes of `PendingSpeech`.

    task: key of `sampling.TASK_SAMPLERS`, for the confidence of the reply.
    """
    special, pending = tokenizer.special, list[tuple[int, PendingCodes]]()
    calibration, loss = config.calibration(task), None
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
            text([special.sosp])
            loss = segment.loss
            if isinstance(segment, PendingSpeech):
                place, frames = sum(part.shape[1] for part in parts), segment.pending.frames
                pending.append((place, segment.pending))
                codes = torch.zeros(config.channels, frames, dtype=torch.int64, device="cpu")
            else:
                codes = segment.codes
            _check_codes(codes, config)
            speech(codes)
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
    hearing = None if calibration is None or loss is None else Hearing(calibration, loss)
    return PackedPrompt(torch.cat(parts, dim=1), tuple(pending), hearing)


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


def in_vocabulary(ids: Tensor, config: LMConfig) -> bool:
    """Whether ids [C + 1, T G] of integers are all of this model; text may have its filler."""
    text = ids[0].view(-1, config.group_size)
    outside = (text < 0) | (text >= config.vocab_size)
    outside[:, 1:] &= text[:, 1:] != TEXT_FILLER
    sizes = ids.new_tensor(config.code_sizes)[:, None]
    return not bool(outside.any() | ((ids[1:] < 0) | (ids[1:] >= sizes)).any())


def whole_patches(codes: Tensor, group_size: int, closed: bool = True) -> Tensor:
    """Codes [C, T] -> [C, n G]: the last frame is repeated or, in open speech, the rest cut off."""
    extra = whole_frames(codes.shape[1], group_size, closed) - codes.shape[1]
    if extra > 0:
        return torch.cat((codes, codes[:, -1:].expand(-1, extra)), dim=1)
    return codes[:, :extra] if extra else codes


def whole_frames(frames: int, group_size: int, closed: bool = True) -> int:
    """Frames of `whole_patches`."""
    return -(-frames // group_size) * group_size if closed else frames - frames % group_size


def _check_codes(codes: Tensor, config: LMConfig) -> None:
    if codes.ndim != 2 or codes.shape[0] != config.channels or codes.shape[1] % config.group_size:
        raise PromptError(
            f"codes must be [{config.channels}, a multiple of {config.group_size}], not "
            f"{list(codes.shape)}; use MimoAudio.speech() or preprocess_input() to make them"
        )
