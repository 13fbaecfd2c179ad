"""Weights in a smaller format: what it saves, what it changes, and what is said with it.

    python examples/quantize.py MODEL TARGET [--format int4] [--codec DIR]

MODEL is a directory, such as one that `hf download XiaomiMiMo/MiMo-Audio-7B-Instruct` fills, or
"nano". TARGET is a checkpoint like any other: `mimo_fast.load(TARGET)`. To quantize while loading,
and write nothing: `mimo_fast.load(..., quantization="int4")`.
"""

import argparse
from pathlib import Path

import mimo_fast
from mimo_fast.checkpoint.embedded import resolve_pair
from mimo_fast.quantization import quantize_checkpoint


def size(folder: Path) -> float:
    """MB of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help='directory, or "nano"')
    parser.add_argument("target", type=Path)
    parser.add_argument("--format", default="int4", help="int8, int4, nf4, ...")
    parser.add_argument("--codec", default="nano", help="directory or hub id")
    parser.add_argument("--text", default="seven forty two")
    args = parser.parse_args()
    source, codec = resolve_pair(args.model, args.codec)

    errors = quantize_checkpoint(Path(source), args.target, args.format)
    worst = max(errors, key=errors.__getitem__)
    print(f"{size(Path(source)):.1f} MB -> {size(args.target):.1f} MB of weights")
    print(f"largest relative error: {errors[worst]:.4f} in {worst}")
    for folder in (source, args.target):
        with mimo_fast.load(folder, codec) as model:
            for _ in range(2):  # the first reply also warms up
                chunks = list(model.stream("tts", args.text, seed=1))
            timing = chunks[-1].timing
            speed = timing.elapsed / timing.audio_seconds if timing.audio_seconds else float("nan")
            print(f"{folder}: {timing.audio_seconds:.1f} s, real-time factor {speed:.3f}")


if __name__ == "__main__":
    main()
