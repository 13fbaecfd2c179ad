"""`mimo-fast understand WAV QUESTION`: answers a question about a recording."""

import argparse

from mimo_fast.cli.common import drawn, load_model, load_recording, print_text


def run(args: argparse.Namespace) -> int:
    wav = load_recording(args.audio, args.prepare)
    model = load_model(args)
    asked = wav, args.question, args.thinking
    print_text(model, args, model.stream("audio_understanding", *asked, **drawn(model, args)))
    return 0
