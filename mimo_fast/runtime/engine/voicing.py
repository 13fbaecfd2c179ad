"""Decoded groups -> text and audio, of all replies of a step together.

    groups of R rows ─► readers ─► one `Codec.advance` ─► one copy to the host ─► deliveries

What was read of a group counts once it has been delivered, and a stream whose chunk was broken off
(Ctrl-C, an error of the whole call) is fed again from its beginning. So nothing is lost or said
twice, whatever happens between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mimo_fast.modes import on_device
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.codec.together import Push
from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.device.host_copy import HostCopy
from mimo_fast.runtime.lm.decode import Group
from mimo_fast.text.tokenizer import Tokenizer

Listening = Literal["exact", "elastic"]
"""How far a reply's audio looks ahead, see `Codec.stream`: "elastic" is heard earlier."""

UNFINISHED_CHARACTER = "\ufffd"


@dataclass
class ReplyReader:
    """Separates the text of a reply from its speech (upstream `forward`).

    Spoken patches are those between `<|sostm|>` and `<|eostm|>`. Without `<|sostm|>` every patch is
    spoken, without `<|eostm|>` all to the end. Control tokens are not text. They are dropped by
    their ids before detokenizing (upstream: three of them, after it), so that a character whose
    bytes are split by a patch stays whole.

    Args:
        speaking: whether the prompt itself ended in `<|sostm|>`.
        shown: control tokens that are text all the same; never `<|empty|>`, `<|eot|>`, `<|eostm|>`.
        tags: what is no text wherever it is written, see `Architecture.tags`.
    """

    tokenizer: Tokenizer
    speaking: bool
    shown: frozenset[int] = frozenset()
    tags: tuple[str, ...] = ()
    _ended: bool = False
    _waiting: list[Tensor] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _held: str = ""

    def read(self, token: int, codes: Tensor) -> tuple[str, list[Tensor]]:
        """A group -> the text and the patches [C, G] that become final with it."""
        special = self.tokenizer.special
        if token == special.empty:
            if self.speaking:
                return "", [codes]
            if not self._ended:
                self._waiting.append(codes)
            return "", []
        if token == special.sostm and not self.speaking and not self._ended:
            self.speaking = True
            self._waiting.clear()
        elif token == special.eostm:
            self._ended = True
            spoken, self.speaking, self._waiting = self._waiting, False, []
            return "", spoken
        if token == special.eot or token in self.tokenizer.control_ids - self.shown:
            return "", []
        self._tokens.append(token)
        return self._flush(final=False), []

    def finish(self) -> tuple[str, list[Tensor]]:
        """What was held back: half a character or tag, and patches without a `<|sostm|>`."""
        return self._flush(final=True), self._waiting

    def copy(self) -> ReplyReader:
        """A reader that goes on from here by itself."""
        return replace(self, _waiting=[*self._waiting], _tokens=[*self._tokens])

    def _flush(self, final: bool) -> str:
        text = self.tokenizer.decode(self._tokens) if self._tokens else ""
        if text.endswith(UNFINISHED_CHARACTER) and not final:
            return ""
        self._tokens.clear()
        return self._untagged(text, final) if self.tags else text

    def _untagged(self, text: str, final: bool) -> str:
        """Text without tags; what may become one is held back."""
        text, self._held = self._held + text, ""
        for tag in self.tags:
            text = text.replace(tag, "")
        if final:
            return text
        starts = (tag[:n] for tag in self.tags for n in range(1, len(tag)))
        held = max((start for start in starts if text.endswith(start)), key=len, default="")
        self._held = held
        return text[: len(text) - len(held)]


@dataclass(frozen=True)
class Delivery:
    """A decoded group, and the text and audio that became final with it.

    Attributes:
        audio: float32 [m] on the CPU; None where the reply is not voiced.
        codes: Those [C, T] that the codec was given for it; None for none.
        finite: Whether the samples are.
    """

    group: Group
    text: str = ""
    audio: Tensor | None = None
    codes: Tensor | None = None
    finite: bool = True


@dataclass(frozen=True)
class _Reading:
    """What a group makes final, and the reader after it."""

    text: str
    codes: Tensor | None
    ended: bool
    reader: ReplyReader


@dataclass(frozen=True)
class Voiced:
    """What a group made final, its audio float32 [m] on the CPU.

    finite: False where a GPU's samples are not; a CPU's are checked as they are made.
    """

    reading: _Reading
    audio: Tensor
    finite: bool = True


class Voicing:
    """Text and audio of one reply, group by group, for `voice`.

    Args:
        reader: at the end of the prompt.
        speaks: False makes text only.
        voice: what an elastic look-ahead begins with.

    Attributes:
        totals: Sums of a reply that came to its end, see `CodecStream.totals`; else None.
    """

    def __init__(
        self,
        reader: ReplyReader,
        codec: Codec,
        speaks: bool = True,
        lookahead: Listening = "exact",
        voice: Voice | None = None,
    ) -> None:
        self.codec, self.speaks = codec, speaks
        self._reader, self._lookahead = reader, lookahead
        # What is known of the voice by now: a stream that is fed again begins with the same.
        self._known = None if voice is None or lookahead == "exact" else voice.known(codec)
        self._stream: CodecStream | None = None
        self._pushed = list[Tensor]()
        self._torn = False
        self.totals: Tensor | None = None

    def read(self, group: Group | None) -> _Reading:
        """What a group makes final; None, and the last group, end the reply."""
        reader, ended = self._reader.copy(), group is None or group.finished
        if group is None or group.finished:
            text, patches = reader.finish()
        else:
            text, patches = reader.read(group.text, group.codes)
        codes = torch.cat(patches, dim=1) if patches and self.speaks else None
        return _Reading(text, codes, ended, reader)

    def push(self, reading: _Reading) -> Push | None:
        """What the codec is to compute for it; None for nothing."""
        if not self.speaks or (reading.codes is None and not reading.ended):
            return None
        if self._torn or self._stream is None:
            self._begin()
        assert self._stream is not None
        self._torn = True
        return Push(self._stream, reading.codes, reading.ended)

    def accept(self, reading: _Reading) -> None:
        """Goes on after what was read: it has been delivered."""
        self._reader, self._torn = reading.reader, False
        if reading.codes is not None:
            self._pushed.append(reading.codes)
        if reading.ended and self._stream is not None:
            self.totals = self._stream.totals
            self.close()

    def cut(self, frames: int, samples: int) -> tuple[str, Tensor]:
        """The end of a reply that was broken off: text and audio [m] on the CPU. No step may run.

        Args:
            frames, samples: of codes and audio, what its consumer has taken. What had been made
                beyond that is left out.
        """
        said = sum(codes.shape[1] for codes in self._pushed)
        if self._torn or (self.speaks and said != frames):
            # It is fed what was taken alone.
            self._pushed, self._torn = _first(self._pushed, frames), True
            reading = replace(self.read(None), text="", codes=None)
        else:
            reading = self.read(None)
        if not self.speaks or (self._stream is None and not frames and reading.codes is None):
            return reading.text, nothing()
        (result,) = _advanced(self.codec, [self], [reading])
        if isinstance(result, Exception):
            raise result
        self.accept(reading)
        return reading.text, nothing() if result is None else result.float().cpu().clone()

    def close(self) -> None:
        """Gives the codec's state back; no step may be at work on it."""
        stream, self._stream = self._stream, None
        self._pushed.clear()
        if stream is not None:
            stream.close()

    def _begin(self) -> None:
        """Opens the stream; one that was broken off is opened anew and fed what it was fed."""
        if self._stream is not None:
            self._stream.close()
        # Opened once the reply has a slot: graphs are captured for as many streams as slots.
        self._stream = (
            self.codec.stream()
            if self._lookahead == "exact"
            else self.codec.stream("elastic", self._known)
        )
        for codes in self._pushed:
            (result,) = self.codec.advance([Push(self._stream, codes)])
            if isinstance(result, Exception):
                raise result


def _first(parts: Sequence[Tensor], frames: int) -> list[Tensor]:
    """Of codes [C, T] in parts those that hold the first `frames` frames."""
    found, left = list[Tensor](), frames
    for part in parts:
        if left <= 0:
            break
        found.append(part)
        left -= part.shape[1]
    return found


def voice(
    voicings: Sequence[Voicing],
    groups: Sequence[Group | None],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Voiced | Exception]:
    """What one group of each reply makes final.

    Replies of one codec are one `Codec.advance`; an error is that reply's own.

    Args:
        meanwhile: called once the copies of all samples have been launched, before they are waited
            for: the device works on while the host does.
    """
    readings = [each.read(group) for each, group in zip(voicings, groups, strict=True)]
    found: list[Voiced | Exception] = [Voiced(reading, nothing()) for reading in readings]
    waiting = list[tuple[Sequence[int], Sequence[int], HostCopy]]()
    for codec in {id(each.codec): each.codec for each in voicings}.values():
        mine = [i for i, each in enumerate(voicings) if each.codec is codec]
        results = _advanced(codec, [voicings[i] for i in mine], [readings[i] for i in mine])
        audible = list[tuple[int, Tensor]]()
        for i, result in zip(mine, results, strict=True):
            if isinstance(result, Exception):
                found[i] = result
            elif result is not None and len(result):
                audible.append((i, result))
        if audible:
            with on_device(codec.device):
                copy = to_host([samples for _, samples in audible])
            waiting.append(([i for i, _ in audible], [len(each) for _, each in audible], copy))
    meanwhile()
    for places, sizes, copy in waiting:
        joined = copy.wait()
        finite = bool(joined.isfinite().all())
        for i, samples in zip(places, joined.split(list(sizes)), strict=True):
            # The clone frees the memory of all, which may be pinned and scarce.
            found[i] = Voiced(
                readings[i], samples.clone(), finite or bool(samples.isfinite().all())
            )
    return found


def to_host(waves: Sequence[Tensor]) -> HostCopy:
    """Starts one copy of all samples [m] to the host, one after the other, as float32."""
    return HostCopy(torch.cat([*waves]).float())


def _advanced(
    codec: Codec, voicings: Sequence[Voicing], readings: Sequence[_Reading]
) -> list[Tensor | Exception | None]:
    """The samples of each push; None where there is nothing to compute."""
    results: list[Tensor | Exception | None] = [None] * len(voicings)
    pushes = list[tuple[int, Push]]()
    for i, (each, reading) in enumerate(zip(voicings, readings, strict=True)):
        try:
            push = each.push(reading)
        except Exception as error:
            results[i] = error
            continue
        if push is not None:
            pushes.append((i, push))
    if not pushes:
        return results
    try:
        found = codec.advance([push for _, push in pushes])
    except Exception as error:
        if len(pushes) == 1:
            found = [error]
        else:
            # Whose error it is shows when each is computed by itself.
            found = [
                result
                if (result := _advanced(codec, [voicings[i]], [readings[i]])[0]) is not None
                else error
                for i, _ in pushes
            ]
    for (i, _), result in zip(pushes, found, strict=True):
        results[i] = result
    return results


def nothing() -> Tensor:
    """No samples."""
    return torch.zeros(0, dtype=torch.float32, device="cpu")
