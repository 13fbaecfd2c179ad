"""What a young stream of nano's loses where it is decoded again less often, and what that saves.

    python -m benchmarks.studies.settling [FILE.json]

Recordings of `tests/words`, alone and joined, are streamed a patch at a time; SNR in dB against
one-shot decoding of the same codes, and CPU seconds on one thread. A stream of n code frames is
decoded again once n^2 / settling of them are new (`runtime/codec/state.py`); 0 is never.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from time import process_time
from unittest.mock import patch

import torch
from torch import Tensor

import mimo_fast
from benchmarks.studies.codec_stream import snr_db
from benchmarks.studies.common import Record, parser_of, write
from mimo_fast.audio.files import load_audio
from mimo_fast.bench.environment import ROOT, environment
from mimo_fast.runtime.codec import stream
from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, Lookahead
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.state import RESTART_LIMIT

SETTLINGS = (2000, 1000, 500, 250, 125, 0)
LOOKAHEADS: tuple[Lookahead, ...] = ("elastic", "exact")


def utterances(codec: Codec, channels: int) -> list[Tensor]:
    """Codes of recordings of a second and more, and of two to four of them in a row."""
    draw = random.Random(1)
    files = sorted((ROOT / "tests" / "words").glob("*.flac"))
    codes = [codec.encode(load_audio(file, codec.sample_rate))[:channels] for file in files]
    joined = [torch.cat(draw.sample(codes, count), dim=1) for count in (2, 2, 2, 3, 3, 3, 4, 4)]
    return [each[:, :RESTART_LIMIT] for each in (*codes, *joined) if each.shape[1] >= 25]


def streamed(
    codec: Codec, codes: Sequence[Tensor], lookahead: Lookahead, settling: int
) -> list[Tensor]:
    again = RESTART_LIMIT if settling else 0
    found = []
    with (
        patch.object(stream, "SETTLING", settling),
        patch.object(stream, "ELASTIC_SETTLING", settling),
    ):
        for each in codes:
            one = codec.stream(lookahead, again=again)
            parts = [one.push(part) for part in each.split(PATCH_FRAMES, dim=1)]
            found.append(torch.cat([*parts, one.finish()]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("output", nargs="?", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = mimo_fast.load("nano")
    codec = model.codec
    codes = utterances(codec, model.lm.config.channels)
    want = [codec.decode(each) for each in codes]
    records = list[Record]()
    for lookahead in LOOKAHEADS:
        first = list[float]()
        for settling in SETTLINGS:
            began = process_time()
            waves = streamed(codec, codes, lookahead, settling)
            seconds = process_time() - began
            found = [snr_db(wav, best) for wav, best in zip(waves, want, strict=True)]
            first = first or found
            lost = [a - b for a, b in zip(found, first, strict=True)]
            record = {"lookahead": lookahead, "settling": settling, "cpu_s": round(seconds, 2)}
            record |= {"mean_db": round(mean(found), 2), "least_db": round(min(found), 2)}
            record |= {
                "mean_change_db": round(mean(lost), 2),
                "worst_change_db": round(min(lost), 2),
            }
            records.append(record)
            print(record)
    frames = [each.shape[1] for each in codes]
    about = {"environment": environment(torch.device("cpu")), "code_frames": frames}
    write(options.output, about | {"records": records})


if __name__ == "__main__":
    sys.exit(main())
