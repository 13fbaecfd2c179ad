"""How close nano's streams of recordings are to one-shot decoding, and what would help.

    python -m benchmarks.studies.codec_recordings [--folder DIR ...] [--each N] [FILE.json]

A codec streams replies, and nano states the norm statistics of its own (`STATED_FRAMES` in
`mimo_fast/runtime/codec/prior.py`). A recording of somebody else is where these are wrong. SNR in
dB against one-shot decoding of the same codes, a patch a push, of N recordings of each folder, of
those in tests/words and of nano's own voice, by what the statistics count for and by how far a
stream looks ahead. Upstream's windows wait for 40 code frames, as `codec.stream(10)` does.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mimo_fast
from benchmarks.studies.codec_stream import snr_db, upstream_stream
from benchmarks.studies.common import parser_of, write
from mimo_fast.audio.files import load_audio
from mimo_fast.bench.environment import environment

WORDS = Path(__file__).parents[2] / "tests" / "words"
SENTENCES = ("seven forty two", "the cat is in the garden", "call my mother on sunday")
RATE, PATCH = 24_000, 4
SHORTEST, LONGEST = 1.0, 8.0
"""Seconds of a recording."""

EXACT = 100.0
"""dB that count as exact."""

SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "stated statistics count for nothing": {"weight": 0.0},
    "for one frame": {"weight": 1.0},
    "for eight": {"weight": 8.0},
    "are the truth": {"weight": math.inf},
    "as it is, never decoded again": {"again": 0},
    "one patch more of look-ahead": {"lookahead": 2},
    "look-ahead of 10 patches": {"lookahead": 10},
}


def streamed(codec: mimo_fast.Codec, codes: Tensor, **how: Any) -> Tensor:
    """A stream's samples, a patch a push."""
    stream = codec.stream(**how)
    return torch.cat([*map(stream.push, codes.split(PATCH, dim=1)), stream.finish()])


def closeness(codec: mimo_fast.Codec, codes: Tensor) -> dict[str, float]:
    """SNR in dB by setting, and of upstream's windows."""
    whole = codec.decode(codes)
    found = {name: streamed(codec, codes, **how) for name, how in SETTINGS.items()}
    found["upstream's windows"] = upstream_stream(codec, codes, PATCH)
    return {name: round(min(snr_db(wav, whole), EXACT), 2) for name, wav in found.items()}


def recordings(folder: Path, count: int) -> Iterator[tuple[str, Tensor]]:
    """`count` recordings of a folder, in an order that says nothing of them."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".wav", ".flac", ".ogg")]
    for path in sorted(paths, key=lambda each: hashlib.sha256(each.name.encode()).hexdigest()):
        wav = load_audio(path, RATE)
        if count and SHORTEST * RATE <= len(wav) <= LONGEST * RATE:
            yield path.name, wav
            count -= 1


def own_voice(model: mimo_fast.MimoAudio) -> Iterator[tuple[str, Tensor]]:
    for text in SENTENCES:
        yield text, torch.cat([chunk.audio for chunk in model.stream("tts", text, seed=0)]) * 3


def study(folders: Sequence[Path], each: int) -> dict[str, Any]:
    model = mimo_fast.load("nano", device="cpu")
    sources = {folder.name: recordings(folder, each) for folder in [*folders, WORDS]}
    results: dict[str, Any] = {"environment": environment("cpu"), "snr_db": {}}
    for source, sounds in (sources | {"its own voice": own_voice(model)}).items():
        rows = {name: closeness(model.codec, model.codec.encode(wav)) for name, wav in sounds}
        for setting in next(iter(rows.values())):
            values = [row[setting] for row in rows.values()]
            mean = sum(values) / len(values)
            print(f"{source:<22}{setting:<38}{mean:6.1f} mean {min(values):6.1f} least", flush=True)
        results["snr_db"][source] = rows
    return results


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("out", type=Path, nargs="?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    write(args.out, study(args.folder, args.each))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
