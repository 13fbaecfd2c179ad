"""A script for upstream's class, with its import and its paths changed.

    python examples/upstream_script.py [--model DIR --codec DIR] [--out DIR] RECORDING

Before:

    from src.mimo_audio.mimo_audio import MimoAudio
    model = MimoAudio("models/MiMo-Audio-7B-Instruct", "models/MiMo-Audio-Tokenizer")

After: the two lines marked below. Every other line stays as it was; docs/differences.md lists the
few places where a result is not upstream's, and why.
"""

import argparse
from pathlib import Path

from mimo_fast import MimoAudio  # the first line that changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording", help="somebody who asks something")
    parser.add_argument("--model", default="nano", help="directory or hub id")
    parser.add_argument("--codec", default="nano", help="directory or hub id")
    parser.add_argument("--out", type=Path, default=Path(), help="directory of the recordings")
    args = parser.parse_args()

    model = MimoAudio(args.model, args.codec)  # the second

    model.tts_sft("the cat is in the garden", args.out / "tts.wav")
    model.tts_sft("i have a yellow box", args.out / "slow.wav", instruct="speak slowly")
    print("heard:", model.asr_sft(args.recording))
    answer = model.spoken_dialogue_sft(
        args.recording, output_audio_path=args.out / "answer.wav", add_history=True
    )
    print("answered:", answer)
    model.clear_history()


if __name__ == "__main__":
    main()
