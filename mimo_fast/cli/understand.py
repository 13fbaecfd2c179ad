"""`mimo-fast understand WAV QUESTION`: answers a question about a recording."""

import argparse

from mimo_fast.cli.common import load_model, print_text


def run(args: argparse.Namespace) -> int:
    model = load_model(args)
    print_text(
        model.stream(
            "audio_understanding",
            args.audio,
            args.question,
            args.thinking,
            seed=args.seed,
            max_new_tokens=args.max_tokens,
        )
    )
    return 0
