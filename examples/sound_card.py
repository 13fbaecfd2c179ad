"""Says a text through the sound card while it is made.

    python examples/sound_card.py "seven forty two"

`lookahead="elastic"` is for listeners: the first samples come with the second patch of 160 ms.
Writing waits while the card has enough, and the model waits with it.
"""

import argparse

import sounddevice

import mimo_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text")
    parser.add_argument("--model", help="directory or hub id; by default nano")
    parser.add_argument("--codec", help="directory or hub id")
    args = parser.parse_args()

    with mimo_fast.load(args.model, args.codec) as model:
        card = sounddevice.OutputStream(
            samplerate=model.codec.sample_rate, channels=1, dtype="float32"
        )
        with card:
            for chunk in model.stream("tts", args.text, lookahead="elastic"):
                card.write(chunk.audio.numpy()[:, None])
        timing = chunk.timing
    if timing.first_audio is None:
        raise SystemExit("nothing was said")
    print(f"{timing.audio_seconds:.1f} s, heard after {1000 * timing.first_audio:.0f} ms")


if __name__ == "__main__":
    main()
