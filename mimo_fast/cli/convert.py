"""`mimo-fast convert --example IN OUT [TEXT] WAV -o OUT`: speech to speech by example."""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from mimo_fast.audio.files import AudioSource
from mimo_fast.audio.paths import name_of
from mimo_fast.batches import CONVERT, MOST_SEED, batch
from mimo_fast.cli.arguments import STANDARD
from mimo_fast.cli.common import (
    adapter_of,
    load_model,
    lookahead_of,
    speech_output,
    write_speech,
)
from mimo_fast.cli.playing import aloud
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import report, say
from mimo_fast.config import LMConfig
from mimo_fast.errors import AudioError, MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.conversion import (
    KIND,
    Converter,
    check_room,
    check_words,
    untrained_instruction,
)
from mimo_fast.runtime.examples import (
    ExampleSet,
    Source,
    check_new_set,
    read_recording,
    read_set,
    read_sources,
    set_of,
    write_set,
)
from mimo_fast.talk import card


def run(args: argparse.Namespace) -> int:
    for error in args.problems.values():
        report(error)
    failed = len(args.problems)
    if args.save_examples:
        check_new_set(args.save_examples, args.consent)
    examples = _examples(args)
    if not args.audio and all(each.words is not None for each in examples.examples):
        _save(args, [str(each.words) for each in examples.examples])
        return 0
    if args.resumes:
        return _convert_all(args, examples, failed)
    lookahead = lookahead_of(args)
    source: AudioSource | None = None
    if args.audio:
        (path,) = args.audio
        source = sys.stdin.buffer.read() if path == STANDARD else path
    device = card.find_device(args.device_out, "output") if args.play else None
    longest = 0 if source is None else len(read_recording(source))
    model, converter = _loaded(args, examples, longest)
    if source is None:
        return 0
    limits = {"seed": args.seed, "max_new_tokens": args.max_tokens}
    chunks = converter.stream(source, lookahead=lookahead, **limits)
    output = None if args.output is None else speech_output(args.output)
    with aloud(model.codec.sample_rate, device) if args.play else nullcontext() as heard:
        write_speech(model, args, chunks, output, aloud=heard)
    return 0


def _examples(args: argparse.Namespace) -> ExampleSet:
    """The examples of the options, decoded, with the instruction."""
    if args.examples:
        found = read_set(args.examples)
        return replace(found, instruction=args.instruction or found.instruction)
    return ExampleSet(read_sources(_sources(args)), args.instruction)


def _sources(args: argparse.Namespace) -> list[Source]:
    return [Source(*pair) for pair in args.pairs] if args.pairs else set_of(args.examples)[0]


def _loaded(
    args: argparse.Namespace, examples: ExampleSet, longest: int, at_once: int | None = 1
) -> tuple[MimoAudio, Converter]:
    """The model and what converts by the examples, whose words are known by then."""

    def check(config: LMConfig) -> None:
        check_words(config, examples)
        check_room(config, examples, longest, args.max_seq_len)

    model = load_model(args, max_batch=at_once, check=check)
    if problem := untrained_instruction(model.lm.config, examples.instruction):
        say(f"warning: {problem}: do not rely on its reply")
    converter = model.converter(examples, adapter=adapter_of(model, args))
    words, sources = converter.words, _sources(args)
    for number, (each, heard) in enumerate(zip(sources, words, strict=True), 1):
        if each.words is None:
            say(f"example {number}: heard {heard!r} in {name_of(each.after)}; TEXT would say so")
    if args.save_examples:
        _save(args, words)
    return model, converter


def _save(args: argparse.Namespace, words: list[str]) -> None:
    pairs = zip(_sources(args), words, strict=True)
    sources = [replace(source, words=said) for source, said in pairs]
    write_set(args.save_examples, sources, args.instruction or KIND, args.consent)
    written.append(name_of(args.save_examples))
    say(f"wrote {len(sources)} examples into {name_of(args.save_examples)}")


def _convert_all(args: argparse.Namespace, examples: ExampleSet, failed: int) -> int:
    """Several recordings at once, each into a file of its name; what is there already is kept."""
    recordings = [*dict.fromkeys(args.audio)]
    done = [path for path in recordings if not args.overwrite and args.targets[path].exists()]
    waiting = list[Path]()
    longest = 0
    for path in recordings:
        if path in args.problems or path in done:
            continue
        # A bad one ends only itself.
        try:
            longest = max(longest, len(read_recording(path)))
            waiting.append(path)
        except AudioError as error:
            report(error)
            failed += 1
    said = 0
    if waiting or args.save_examples:
        model, converter = _loaded(args, examples, longest, args.streams)
        requests = [{"audio": path} | _seed(args, recordings.index(path)) for path in waiting]
        options = {"examples": converter, "max_new_tokens": args.max_tokens, "overwrite": True}
        for result in batch(model, CONVERT, requests, args.output, **options):
            if result.error is not None or result.file is None:
                failed += 1
                problem = result.error or "the model said nothing"
                report(MimoFastError(f"{name_of(waiting[result.index])}: {problem}"))
            else:
                said += 1
                written.append(name_of(result.file))
    before = f", {len(done)} were there already" if done else ""
    lost = f", {failed} failed" if failed else ""
    say(f"wrote {said} recordings into {name_of(args.output)}{before}{lost}")
    return int(failed > 0)


def _seed(args: argparse.Namespace, index: int) -> dict[str, int]:
    """A recording's seed by its place among all, so that one that is made again is the same."""
    return {} if args.seed is None else {"seed": (args.seed + index) % MOST_SEED}
