"""How close streams are to one-shot decoding, beside upstream's windows, on many pairs.

    python -m benchmarks.studies.codec_closeness [--kept-back] [--again FRAMES] [--only NAME]
        [FILE.json]

A pair is a codec and an utterance: random codecs of several kinds and dimensions, the kit's, and
nano's with the norm statistics that it states and without; codes that are random, repeated, joined,
or those of speech (flite, espeak-ng and recordings). SNR in dB against one-shot decoding of the
same codes, by code frames a push. `--kept-back` takes the pairs on which nothing was tuned.
"""

import copy
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mimo_fast
from benchmarks.studies.codec_stream import KIT, snr_db, upstream_stream
from benchmarks.studies.common import Record, parser_of, write
from mimo_fast.audio.files import load_audio
from mimo_fast.bench.machine import describe_machine
from mimo_fast.bench.synthetic import hash_of, random_codec
from mimo_fast.checkpoint.embedded import NANO, QUESTION
from mimo_fast.checkpoint.layout import codec_shapes
from mimo_fast.config import CodecConfig, read_json
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.geometry import LOOKAHEAD
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.testing.parity import Golden

RATE = 24_000

EXACT = 100.0
"""dB from which on differences are rounding, and count as none."""

CHANNELS = 8
"""Codebooks whose codes are decoded, as in a reply; fewer where a codec has fewer."""

SHAPES: dict[str, dict[str, Any]] = {
    "kit": {},
    "no pooling": {"avg_pooler": 1, "ln_type": "RMSNorm", "d_model": 48, "decoder_layers": 1}
    | {"decoder_attention_heads": 2, "vocoder_attn_window_size": [12, 3]},
    "wide": {"d_model": 96, "decoder_layers": 4, "decoder_attention_heads": 3}
    | {"decoder_kernel_size": 4, "n_mels": 80},
    "deep": {"decoder_layers": 8, "vocoder_num_layers": 16},
}
"""Changes to the kit's codec."""

SENTENCES = (
    "Tomorrow is Tuesday, December twenty five.",
    "The cat is in the garden, and nobody has seen the dog since seven forty two.",
    "What day comes after Friday?",
    "A quick brown fox jumps over the lazy dog, and then it rests under the old tree.",
    "Three plus four is seven; nine hundred and ninety nine is less than a thousand.",
    "Good morning! How are you today?",
    "She sells sea shells by the sea shore, whatever the weather may bring this week.",
)


def loose_codec(config: CodecConfig, seed: int) -> Codec:
    """Random weights with a gain of 1.5, biases and norms that differ from 0 and 1."""
    shapes = codec_shapes(config)

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("istft.window"):
            return torch.hann_window(*shape)
        generator = torch.Generator().manual_seed(seed + hash_of(name))
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return values * 0.1 + (0 if name.endswith("bias") else 1)
        return values * (1.0 if "embed" in name else 1.5 / prod(shape[1:]) ** 0.5)

    return Codec(config, WeightSource(read, torch.float32), WeightSource(read, torch.float32))


@cache
def codec_of(name: str) -> Codec:
    """A codec by name: "kit", "nano", "nano unstated", "unit SHAPE SEED" or "loose SHAPE SEED"."""
    kind, _, rest = name.partition(" ")
    if kind in ("kit", "nano"):
        folder = KIT / "checkpoint" if kind == "kit" else NANO
        codec = mimo_fast.load(folder / "lm", folder / "codec", device="cpu").codec
        return without_statistics(codec) if rest else codec
    shape, _, seed = rest.rpartition(" ")
    raw = read_json(KIT / "checkpoint" / "codec" / "config.json") | SHAPES[shape]
    config = CodecConfig.from_dict(raw)
    if kind == "unit":
        return random_codec(config, None, torch.float32, seed=int(seed))
    return loose_codec(config, int(seed))


def without_statistics(codec: Codec) -> Codec:
    """The codec as if its checkpoint stated no norm statistics."""
    codec = copy.copy(codec)
    codec.config = replace(codec.config, moments=None)
    codec.stated_statistics = None
    return codec


@cache
def speech(voice: str, seconds: float) -> Tensor:
    """float32 [n] at 24 kHz: sentences by flite or espeak-ng, or "recordings", as long as asked."""
    if voice == "recordings":
        files = [QUESTION, *sorted((KIT / "audio").glob("*.wav"))]
        said = [load_audio(file, RATE) for file in files]
    else:
        said = [spoken(voice, sentence) for sentence in SENTENCES]
    wanted = int(seconds * RATE)
    whole = torch.cat(said)
    return whole.repeat(-(-wanted // len(whole)))[:wanted]


def spoken(voice: str, text: str) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        program, _, name = voice.partition(" ")
        options = (
            ("-voice", name, "-o", path, "-t") if program == "flite" else ("-v", name, "-w", path)
        )
        subprocess.run([program, *map(str, options), text], check=True)
        return load_audio(path, RATE)


def codes_of(codec: Codec, kind: str, frames: int) -> Tensor:
    """Codes [n, frames]: "random SEED", "repeated SEED", "kit" (its stream's) or a voice's."""
    sizes = codec.config.codebook_sizes[:CHANNELS]
    name, _, seed = kind.partition(" ")
    if name in ("random", "repeated"):
        generator = torch.Generator().manual_seed(int(seed))
        length = frames if name == "random" else 30
        drawn = [torch.randint(0, size, (length,), generator=generator) for size in sizes]
        codes = torch.stack(drawn)
    elif name == "kit":
        codes = Golden(KIT).get("codec:stream_codes")
    else:
        wav = speech(kind, frames * codec.config.samples_per_frame / RATE + 1)
        codes = codec.encode(wav, len(sizes))
    return codes.repeat(1, -(-frames // codes.shape[1]))[:, :frames]


@dataclass(frozen=True)
class Pair:
    """A codec and an utterance, and the code frames a push that are tried.

    lookahead: patches; by default the codec's own.
    """

    codec: str
    codes: str
    frames: int
    sizes: tuple[int, ...] = (4, 25)
    lookahead: int | None = None

    @property
    def name(self) -> str:
        waits = "" if self.lookahead is None else f", {self.lookahead} patches"
        return f"{self.codec}, {self.codes}, {self.frames}{waits}"

    @property
    def early(self) -> bool:
        """Whether samples are returned before upstream's windows would return any."""
        return self.codec == "nano" and self.lookahead is None


PAIRS = (
    Pair("kit", "kit", 182),
    Pair("kit", "kit", 320, (4, 25, 60)),
    Pair("kit", "repeated 1", 228),
    Pair("kit", "random 2", 120, (4, 25, 7)),
    Pair("kit", "flite slt", 500),
    Pair("kit", "recordings", 64, (4, 25, 50)),
    Pair("unit kit 1", "random 3", 100),
    Pair("unit kit 2", "random 4", 228, (4, 25, 60)),
    Pair("unit kit 3", "flite rms", 182),
    Pair("unit no pooling 4", "random 5", 150),
    Pair("unit deep 5", "espeak-ng en-us+f2", 90),
    Pair("loose kit 1", "random 6", 60, (4, 25, 13)),
    Pair("loose kit 2", "random 7", 228, (4, 25, 100)),
    Pair("loose kit 3", "flite kal16", 400),
    Pair("loose kit 4", "repeated 8", 700),
    Pair("loose kit 5", "recordings", 47),
    Pair("loose kit 6", "espeak-ng en-gb", 250),
    Pair("loose no pooling 7", "random 9", 228),
    Pair("loose wide 8", "flite awb", 140, (4, 25, 40)),
    Pair("loose deep 9", "random 10", 182),
    Pair("loose kit 10", "random 11", 264, (4, 25, 100, 150)),
    Pair("nano unstated", "recordings", 36),
    Pair("nano unstated", "flite slt", 60, (4, 25, 17)),
    Pair("nano unstated", "flite rms", 120),
    Pair("nano unstated", "espeak-ng en-us+m3", 182),
    Pair("nano unstated", "flite kal16", 250, (4, 25, 90)),
    Pair("nano unstated", "espeak-ng en-us+m7", 300, (4, 25, 100)),
    Pair("nano unstated", "flite awb", 500),
    Pair("nano unstated", "recordings", 1000),
    *(
        Pair("nano", codes, frames, (4, 25), lookahead)
        for codes, frames in (
            ("flite slt", 60),
            ("flite rms", 120),
            ("espeak-ng en-us+f2", 250),
            ("recordings", 500),
        )
        for lookahead in (LOOKAHEAD, None)
    ),
)

KEPT_BACK = (
    Pair("kit", "random 101", 36),
    Pair("kit", "espeak-ng en-us+f4", 228, (4, 25, 44)),
    Pair("kit", "repeated 102", 90),
    Pair("kit", "flite awb", 1000),
    Pair("unit kit 101", "random 103", 182),
    Pair("unit kit 102", "flite kal", 300),
    Pair("unit no pooling 103", "random 104", 80, (4, 25, 9)),
    Pair("unit wide 104", "repeated 105", 228),
    Pair("loose kit 101", "random 106", 228),
    Pair("loose kit 102", "random 107", 90, (4, 25, 30)),
    Pair("loose kit 103", "espeak-ng en-gb-scotland", 500),
    Pair("loose kit 104", "flite slt", 150, (4, 25, 80)),
    Pair("loose kit 105", "repeated 108", 300),
    Pair("loose no pooling 106", "flite kal", 120),
    Pair("loose wide 107", "random 109", 600),
    Pair("loose deep 108", "flite rms", 60),
    Pair("nano unstated", "espeak-ng en-gb-x-rp", 36),
    Pair("nano unstated", "flite kal", 90, (4, 25, 11)),
    Pair("nano unstated", "espeak-ng en-us+f5", 150),
    Pair("nano unstated", "flite slt", 228),
    Pair("nano unstated", "espeak-ng en-gb-scotland", 320, (4, 25, 150)),
    Pair("nano unstated", "flite rms", 1000),
    *(
        Pair("nano", codes, frames, (4, 25), lookahead)
        for codes, frames in (
            ("espeak-ng en-gb-x-rp", 36),
            ("flite awb", 150),
            ("recordings", 228),
            ("flite kal", 1000),
        )
        for lookahead in (LOOKAHEAD, None)
    ),
)
"""Pairs on which nothing was tuned."""


def stream_in(codec: Codec, codes: Tensor, size: int, **options: Any) -> Tensor:
    """The whole waveform from pushes of so many frames."""
    stream = codec.stream(**options)
    return torch.cat([*map(stream.push, codes.split(size, dim=1)), stream.finish()])


def measure(pair: Pair, **options: Any) -> Record:
    """SNR in dB of the stream and of upstream's windows, by frames a push.

    options: of `Codec.stream`.
    """
    codec = codec_of(pair.codec)
    codes = codes_of(codec, pair.codes, pair.frames)
    oneshot = codec.decode(codes)
    options = {"lookahead": pair.lookahead} | options
    record: Record = {"pair": pair.name, "early": pair.early, "stream_db": {}, "upstream_db": {}}
    for size in pair.sizes:
        ours, theirs = stream_in(codec, codes, size, **options), upstream_stream(codec, codes, size)
        record["stream_db"][size] = min(EXACT, snr_db(ours, oneshot))
        record["upstream_db"][size] = min(EXACT, snr_db(theirs, oneshot))
    return record


def gains(records: Iterable[Record]) -> list[float]:
    """Decibels that streams are closer to one-shot decoding than upstream's windows."""
    return [
        record["stream_db"][size] - theirs
        for record in records
        for size, theirs in record["upstream_db"].items()
    ]


def summary(records: Sequence[Record]) -> Record:
    """Least and mean gain over the pairs, those that begin early apart."""
    found: Record = {}
    for name, early in (("waiting", False), ("early", True)):
        values = gains(record for record in records if record["early"] == early)
        if values:
            mean = round(sum(values) / len(values), 2)
            found[name] = {"least_db": round(min(values), 2), "mean_db": mean, "n": len(values)}
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kept-back", action="store_true", help="pairs that nothing was tuned on")
    parser.add_argument(
        "--again", type=int, help="code frames decoded again; by default the codec's"
    )
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("file", nargs="?", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    pairs = [pair for pair in (KEPT_BACK if args.kept_back else PAIRS) if args.only in pair.name]
    head = ("git", "rev-parse", "--short", "HEAD")
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    about: Record = {"machine": [*describe_machine()], "commit": commit, "again": args.again}
    records: list[Record] = []
    for pair in pairs:
        records.append(measure(pair, again=args.again))
        print(records[-1], flush=True)
        write(args.file, about | {"gain_db": summary(records), "records": records})
    print(summary(records))


if __name__ == "__main__":
    main()
