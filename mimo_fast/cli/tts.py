"""`mimo-fast tts TEXT -o WAV`: says a text, or each line of a file."""

import argparse
import sys
from contextlib import nullcontext

from mimo_fast.batches import RECORD, batch
from mimo_fast.cli.arguments import STANDARD
from mimo_fast.cli.common import (
    drawn,
    load_model,
    load_recording,
    lookahead_of,
    read_text,
    speech_output,
    warn_of_words,
    write_speech,
)
from mimo_fast.cli.playing import aloud
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import report, say
from mimo_fast.errors import MimoFastError
from mimo_fast.talk import card


def run(args: argparse.Namespace) -> int:
    if args.lines:
        return _say_lines(args)
    text = read_text(args.text)
    if not text:
        raise MimoFastError("there is no text to say")
    if args.voice and not (args.instruct or args.natural):
        raise MimoFastError(
            "--voice needs --instruct or --natural: the model clones voices in those forms alone"
        )
    lookahead = lookahead_of(args)
    voice = load_recording(args.voice, args.prepare) if args.voice else None
    device = card.find_device(args.device_out, "output") if args.play else None
    model = load_model(args)
    if not args.natural:
        warn_of_words(model, text)
    request = text, args.instruct, not args.natural, voice
    options = drawn(model, args) | {"lookahead": lookahead}
    # A style holds for a whole text.
    chunks = model.stream("tts", *request, split=not (args.whole or args.natural), **options)
    output = None if args.output is None else speech_output(args.output)
    with aloud(model.codec.sample_rate, device) if args.play else nullcontext() as heard:
        write_speech(model, args, chunks, output, aloud=heard)
    return 0


def _say_lines(args: argparse.Namespace) -> int:
    """A recording for each line of a file, several at once; what is there already is kept."""
    try:
        text = sys.stdin.read() if args.lines == STANDARD else args.lines.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise MimoFastError(f"cannot read {args.lines}: {why}") from error
    numbered = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    lines = [line for _, line in numbered]
    if not lines:
        raise MimoFastError(f"{args.lines} holds no lines to say")
    model = load_model(args, max_batch=args.streams)
    warn_of_words(model, " ".join(lines))
    options = drawn(model, args) | {"instruct": args.instruct, "read_text_only": not args.natural}
    options |= {"split": not (args.whole or args.natural)}
    said, failed = 0, 0
    for result in batch(model, "tts", lines, args.output, **options):
        if result.error is not None or result.file is None:
            failed += 1
            problem = result.error or "the model said nothing"
            report(MimoFastError(f"line {numbered[result.index][0]}: {problem}"))
        else:
            said += 1
            written.append(result.file.name)
    kept = len(lines) - said - failed
    before = f", {kept} were there already" if kept else ""
    lost = f", {failed} failed" if failed else ""
    say(f"wrote {said} recordings and {RECORD} into {args.output}{before}{lost}")
    return int(failed > 0)
