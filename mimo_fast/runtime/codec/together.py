"""Chunks of several streams, decoded in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mimo_fast.runtime.codec.stream import CodecStream


@dataclass(frozen=True)
class Push:
    """The next codes of a stream.

    Attributes:
        codes: [n, T], inside their codebooks; None for none, where the stream ends.
        ended: Whether no codes follow: the result is then all that is held back, and the stream is
            reset.
    """

    stream: CodecStream
    codes: Tensor | None
    ended: bool = False


def advance(pushes: Sequence[Push]) -> list[Tensor | Exception]:
    """The result of each push, see `Codec.advance`."""
    return [_result(push) for push in pushes]


def _result(push: Push) -> Tensor | Exception:
    stream, codes = push.stream, push.codes
    try:
        if push.ended:
            return stream.finish(codes, trusted=True)
        assert codes is not None
        return stream.push(codes, trusted=True)
    except Exception as error:
        return error
