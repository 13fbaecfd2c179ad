"""Speech to speech by example: pairs of recordings show what to do with one more.

    python examples/convert_voice.py --example IN OUT "WORDS OF OUT" [--example ...] \\
        RECORDING -o converted.wav --model XiaomiMiMo/MiMo-Audio-7B-Base \\
        --codec XiaomiMiMo/MiMo-Audio-Tokenizer

Pairs of one speaker and another ask for voice conversion; of noise and silence behind the same
words, for denoising; of slow and fast speech, for speed. Use voices that may be used. The base
model is made for it; nano says again in its own voice what it hears. `mimo-fast convert` does the
same, for several recordings, and keeps examples as sets.
"""

import argparse

import mimo_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument(
        "--example", nargs=3, action="append", required=True, metavar=("IN", "OUT", "WORDS")
    )
    kinds = "in words, or voice, emotion, style, speed, denoise, translation"
    parser.add_argument("--instruction", default="voice", help=f"what the pairs show: {kinds}")
    parser.add_argument("--model", help="directory or hub id; by default nano")
    parser.add_argument("--codec", help="directory or hub id")
    parser.add_argument("--seed", type=int, help="says the same again")
    args = parser.parse_args()

    with mimo_fast.load(args.model, args.codec) as model:
        converted = mimo_fast.convert(
            model,
            args.recording,
            args.example,
            instruction=args.instruction,
            output=args.output,
            seed=args.seed,
        )
    print(converted.text)


if __name__ == "__main__":
    main()
