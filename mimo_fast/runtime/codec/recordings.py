"""Several recordings encoded in one pass, each with the codes that it has alone, bit for bit.

    recordings -> log-mel -> segments of 60 s -> passes of at most 60 s -> encoder outputs

Nothing is padded: the encoder's stack takes sequences of any lengths (`CodecStack.run_sequences`).
Of a small codec on a CPU a pass is one native call, whose products take the rows of all segments at
once and give each row the same bits in any company. Elsewhere a library chooses the order of sums
by the number of rows, so every operation is of one segment, and a pass shares what does not change
bits: each layer is read once, or copied once from host memory (`offload.py`).

A pass holds no more than the longest segment of one recording would, so memory does not grow with
the number of recordings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mimo_fast.runtime.codec.layers import split_lengths
from mimo_fast.runtime.codec.network import CodecNetwork, MelRow, passes

Result = TypeVar("Result")
Other = TypeVar("Other")


def attempt(compute: Callable[[], Result]) -> Result | Exception:
    """What `compute` returns or raises."""
    try:
        return compute()
    except Exception as error:
        return error


def encoder_outputs(
    codec: CodecNetwork, waves: Sequence[Tensor | Other | Exception]
) -> list[Tensor | Other | Exception]:
    """Encoder output [T, D] of each waveform [n], or the error that is its own.

    What is no waveform, such as an error from before, is passed on.
    """
    found: list[Tensor | Other | Exception] = [*waves]
    # Rows are taken as they are computed: log-mel of one pass is held, not of all recordings.
    coming = deque[int]()
    parts: list[list[Tensor]] = [[] for _ in waves]

    def rows() -> Iterator[MelRow]:
        for place, wav in enumerate(waves):
            if not isinstance(wav, Tensor):
                continue
            mel = attempt(partial(codec.log_mel, wav))
            if isinstance(mel, Exception):
                found[place] = mel
                continue
            for row in codec.mel_rows(mel, split_lengths(len(mel), codec.encode_segment)):
                coming.append(place)
                yield row

    for part in passes(rows()):
        for output in _encoded(codec, part):
            place = coming.popleft()
            if isinstance(output, Exception):
                found[place] = output
            else:
                parts[place].append(output)
    return [
        torch.cat(own) if own and isinstance(each, Tensor) else each
        for each, own in zip(found, parts, strict=True)
    ]


def _encoded(codec: CodecNetwork, rows: Sequence[MelRow]) -> Sequence[Tensor | Exception]:
    """Encoder output of each row, or the error that is its own."""
    outputs = attempt(lambda: codec.encode_rows(rows))
    if not isinstance(outputs, Exception):
        return outputs
    if len(rows) == 1:
        return [outputs]
    # Whose error it is.
    return [each for row in rows for each in _encoded(codec, [row])]
