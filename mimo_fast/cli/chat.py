"""`mimo-fast chat WAV ... -o WAV`: answers speech with speech, or texts with texts."""

import argparse
from pathlib import Path

from mimo_fast.cli.arguments import numbered
from mimo_fast.cli.common import (
    LiveAudio,
    adapter_of,
    drawn,
    load_model,
    load_recording,
    lookahead_of,
    print_text,
    speech_output,
    write_speech,
)
from mimo_fast.errors import MimoFastError


def run(args: argparse.Namespace) -> int:
    if args.text:
        return _chat_in_text(args)
    if args.thinking:
        raise MimoFastError("--thinking goes with --text: spoken replies do not think")
    if args.output is None:
        raise MimoFastError("spoken replies need -o FILE.wav (or --text for a dialogue in text)")
    lookahead = lookahead_of(args)
    turns = [load_recording(turn, args.prepare) for turn in args.turns]
    voice = load_recording(args.voice, args.prepare) if args.voice else None
    model = load_model(args)
    session = model.session(args.system, voice, args.seed, adapter=adapter_of(model, args))
    # On standard output the replies follow one another in one WAV.
    whole = speech_output(args.output)
    outputs: list[Path | LiveAudio] = [whole] * len(turns)
    if isinstance(whole, Path):
        outputs = [*numbered(whole, len(turns))]
    for turn, output in zip(turns, outputs, strict=True):
        chunks = session.stream(turn, max_new_tokens=args.max_tokens, lookahead=lookahead)
        write_speech(model, args, chunks, output)
    return 0


def _chat_in_text(args: argparse.Namespace) -> int:
    lookahead_of(args)
    if args.output or args.voice or args.system:
        raise MimoFastError("--text gives text replies: leave out --output, --voice and --system")
    model = load_model(args)
    messages = []
    for turn in args.turns:
        messages.append({"role": "user", "content": turn})
        options = drawn(model, args)
        chunks = model.stream("text_dialogue_multiturn", messages, args.thinking, **options)
        said = print_text(model, args, chunks)
        if args.thinking:
            # As text of a later turn, what it thought would not end.
            said = said.rpartition("</think>")[2].strip()
        messages.append({"role": "assistant", "content": said})
    return 0
