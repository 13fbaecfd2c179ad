"""`mimo-fast chat WAV ... -o WAV`: answers speech with speech, or texts with texts."""

import argparse

from mimo_fast.audio.files import load_audio
from mimo_fast.cli.common import load_model, print_text, write_speech
from mimo_fast.errors import MimoFastError


def run(args: argparse.Namespace) -> int:
    if args.text:
        return _chat_in_text(args)
    if args.thinking:
        raise MimoFastError("--thinking goes with --text: spoken replies do not think")
    if args.output is None:
        raise MimoFastError("spoken replies need -o FILE.wav (or --text for a dialogue in text)")
    turns = [load_audio(turn, 24000) for turn in args.turns]
    model = load_model(args)
    session = model.session(args.system, args.voice, args.seed)
    for i, turn in enumerate(turns, start=1):
        numbered = args.output.with_stem(f"{args.output.stem}-{i}")
        output = args.output if len(turns) == 1 else numbered
        write_speech(session.stream(turn, max_new_tokens=args.max_tokens), output)
    return 0


def _chat_in_text(args: argparse.Namespace) -> int:
    if args.output or args.voice or args.system:
        raise MimoFastError("--text gives text replies: leave out --output, --voice and --system")
    model = load_model(args)
    messages = []
    for turn in args.turns:
        messages.append({"role": "user", "content": turn})
        limits = {"seed": args.seed, "max_new_tokens": args.max_tokens}
        chunks = model.stream("text_dialogue_multiturn", messages, args.thinking, **limits)
        messages.append({"role": "assistant", "content": print_text(chunks)})
    return 0
