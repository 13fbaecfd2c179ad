"""`mimo-fast continue WAV -o WAV`: carries a recording on."""

import argparse

from mimo_fast.audio.files import load_audio
from mimo_fast.cli.common import load_model, write_speech


def run(args: argparse.Namespace) -> int:
    model = load_model(args)
    wav = load_audio(args.audio, model.codec.sample_rate)
    chunks = model.stream(
        "speech_continuation", wav, seed=args.seed, max_new_tokens=args.max_tokens
    )
    write_speech(chunks, args.output, before=wav if args.join else None)
    return 0
