"""Cost, delay and closeness to one-shot decoding of the codec's stream.

    python -m benchmarks.studies.codec_stream [--dtype bfloat16] [--quantization int8]
        [--chunks 1000] [--kit-only] [FILE.json]

Milliseconds per 160 ms chunk, for the kit's codec and for random weights of the published
dimensions: medians of 18 chunks around the 20th (audio begins with the 11th, which also decodes the
ten that waited) and of the last 18, pushed alternately so that other load affects both; their ratio
is the median of the pairs'. SNR against one-shot decoding on the kit, by chunk size and
look-ahead, beside upstream's stream.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import mimo_fast
from benchmarks.studies.common import parser_of, write
from mimo_fast.bench.machine import describe_machine
from mimo_fast.bench.synthetic import preset_configs, random_codec
from mimo_fast.config import CodecConfig, read_json
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.testing.parity import Golden

KIT = Path("tests/golden")
AROUND = 9
"""Half the chunks whose median is one figure."""

EARLY = 20
CHUNK_SIZES = (1, 2, 4, 8, 12, 16, 20, 25, 36, 40, 44, 52, 60, 80, 92, 100, 120, 140, 150, 160)


def time_chunks(codec: Codec, chunks: int) -> dict[str, float]:
    """Milliseconds of a push early in one stream and late in another, alternately.

    And of the push with the first audio.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = codec.config.codebook_sizes[:8]
    codes = torch.stack(
        [torch.randint(0, size, (chunks * PATCH_FRAMES,), generator=generator) for size in sizes]
    )
    pushes = list(codes.split(PATCH_FRAMES, dim=1))
    young, old = codec.stream(again=0), codec.stream(again=0)
    # Larger pushes take a stream as far as so many chunks would.
    for part in torch.cat(pushes[: -2 * AROUND], dim=1).split(100, dim=1):
        old.push(part)

    def timed(stream: CodecStream, chunk: Tensor) -> float:
        began = time.perf_counter()
        stream.push(chunk).cpu()
        return (time.perf_counter() - began) * 1e3

    before = [timed(young, chunk) for chunk in pushes[: EARLY - AROUND]]
    pairs = [
        (timed(young, early), timed(old, late))
        for early, late in zip(
            pushes[EARLY - AROUND : EARLY + AROUND], pushes[-2 * AROUND :], strict=True
        )
    ]
    early, late = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(late / early for early, late in pairs)
    return {
        "ms_chunk_20": round(early, 3),
        f"ms_chunk_{chunks}": round(late, 3),
        "ratio": round(ratio, 3),
        "ms_first_audio": round(before[LOOKAHEAD], 3),
        "real_time_factor": round(late / 160, 4),
        "stream_mb": round(old.nbytes / 1e6, 2),
    }


def time_first_audio(codec: Codec, codes: Tensor) -> dict[int, dict[str, float]]:
    """Audio generated before the first sample, and the codec's time until it, by look-ahead."""
    delays = {}
    for lookahead in range(LOOKAHEAD + 1):
        stream, spent, pushed = codec.stream(lookahead), 0.0, 0
        for chunk in codes.split(PATCH_FRAMES, dim=1):
            began = time.perf_counter()
            wav = stream.push(chunk).cpu()
            spent, pushed = spent + time.perf_counter() - began, pushed + 1
            if len(wav):
                break
        delays[lookahead] = {
            "patches": pushed,
            "audio_ms": pushed * 160,
            "codec_ms": round(spent * 1e3, 2),
        }
    return delays


def snr_db(got: Tensor, want: Tensor) -> float:
    return round(float(10 * torch.log10(want.square().sum() / (got - want).square().sum())), 2)


def upstream_stream(codec: Codec, codes: Tensor, size: int) -> Tensor:
    """Audio of upstream's `MiMoAudioTokenizer.streaming_decode` for chunks of so many frames.

    Each call decodes a window of at most 250 frames and the new ones; the newest 40 wait for what
    follows.
    """
    samples, window, done, parts = (
        codec.config.samples_per_frame,
        codec.dequantize(codes[:, :0]),
        0,
        [],
    )
    for chunk in codes.split(size, dim=1):
        window = torch.cat((window, codec.dequantize(chunk)))
        if (final := len(window) - 40) > done:
            parts.append(codec.decode_hidden(window)[done * samples : final * samples])
            dropped = max(0, len(window) - 250)
            window, done = window[dropped:], final - dropped
    return torch.cat([*parts, codec.decode_hidden(window)[done * samples :]])


def closeness(codec: Codec, golden: Golden) -> dict[str, object]:
    codes, oneshot = golden.get("codec:stream_codes"), golden.get("codec:stream_oneshot")

    def stream(size: int, **options: object) -> float:
        running = codec.stream(**options)  # type: ignore[arg-type]
        wav = torch.cat(
            [*(running.push(chunk) for chunk in codes.split(size, dim=1)), running.finish()]
        )
        return snr_db(wav, oneshot)

    moments, looks = codec.moments(codes), range(LOOKAHEAD + 1)
    return {
        "by_chunk_frames": {size: stream(size) for size in CHUNK_SIZES},
        "upstream_by_chunk_frames": {
            size: snr_db(upstream_stream(codec, codes, size), oneshot) for size in CHUNK_SIZES
        },
        "by_lookahead": {patches: stream(PATCH_FRAMES, lookahead=patches) for patches in looks},
        "by_lookahead_given_moments": {
            patches: stream(PATCH_FRAMES, lookahead=patches, moments=moments) for patches in looks
        },
    }


def depth(dtype: torch.dtype) -> dict[int, float]:
    """SNR by look-ahead, for a vocoder of the published depth and small width.

    Random weights, norm statistics given.
    """
    raw = read_json(KIT / "checkpoint" / "codec" / "config.json") | {"vocoder_num_layers": 16}
    codec = random_codec(CodecConfig.from_dict(raw), None, dtype)
    sizes, generator = codec.config.codebook_sizes[:8], torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, size, (180,), generator=generator) for size in sizes])
    want, moments, found = codec.decode(codes), codec.moments(codes), {}
    for lookahead in range(LOOKAHEAD + 1):
        stream = codec.stream(lookahead, moments)
        wav = torch.cat(
            [*(stream.push(chunk) for chunk in codes.split(PATCH_FRAMES, dim=1)), stream.finish()]
        )
        found[lookahead] = snr_db(wav, want)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", default="bfloat16", help="of the published dimensions")
    parser.add_argument(
        "--quantization", help="of the published dimensions' matrices, such as int8"
    )
    parser.add_argument("--chunks", type=int, default=1000, help="of 160 ms, each stream")
    parser.add_argument(
        "--kit-only", action="store_true", help="leave the published dimensions out"
    )
    parser.add_argument("file", nargs="?", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = mimo_fast.load(KIT / "checkpoint" / "lm", KIT / "checkpoint" / "codec", device="cpu")
    golden = Golden(KIT)
    record: dict[str, object] = {
        "machine": [*describe_machine()],
        "snr_db_kit": closeness(model.codec, golden),
        "snr_db_16_vocoder_layers_given_moments": depth(torch.float32),
        "kit_float32": time_chunks(model.codec, args.chunks),
        "kit_first_audio": time_first_audio(model.codec, golden.get("codec:stream_codes")),
    }
    if not args.kit_only:
        _, config = preset_configs("7b")
        codec = random_codec(config, args.quantization, getattr(torch, args.dtype))
        name = f"published_{args.dtype}{'_' + args.quantization if args.quantization else ''}"
        record[name] = time_chunks(codec, args.chunks)
    print(json.dumps(record, indent=1))
    write(args.file, record)


if __name__ == "__main__":
    main()
