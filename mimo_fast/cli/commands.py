"""What each command of the CLI does; each takes the parsed arguments and returns the exit code."""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from mimo_fast.audio.files import load_audio, save_wav
from mimo_fast.bench.machine import describe_checkpoint, describe_machine, useful_threads
from mimo_fast.checkpoint.embedded import CARD, NANO, PUBLISHED_CODEC, resolve_pair
from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.initialize import init_checkpoint
from mimo_fast.config import PathLike, read_json
from mimo_fast.errors import MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.quantization import FOREIGN_KEY, import_checkpoint, quantize_checkpoint
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.runtime.loading import HubOptions, LoadOptions
from mimo_fast.testing.parity import Golden, verify
from mimo_fast.text.spelling import spell

WORDS_NAMED = 8
"""Of those that a warning is about."""


def load_options(args: argparse.Namespace) -> LoadOptions:
    """Where a model is looked up and how much memory it may take."""
    return {
        "revision": args.revision,
        "codec_revision": args.codec_revision,
        "cache_dir": args.cache_dir,
        "local_files_only": args.offline,
        "max_batch": 1,
        "max_seq_len": args.max_seq_len,
        "kv_cache": args.kv_cache,
        "offload": args.offload or (),
    }


def find_pair(args: argparse.Namespace) -> tuple[PathLike, PathLike]:
    """The language model and the codec that the command's options mean; says so where nothing named
    them."""
    lm, codec = resolve_pair(args.model, args.codec, args.published)
    if args.model is None and args.codec is None:
        say(
            f"using nano, which speaks, transcribes and answers in a small closed domain of English (see {CARD}); "
            f"for the published model give --model {args.published} --codec {PUBLISHED_CODEC}"
        )
    return lm, codec


def load_model(args: argparse.Namespace) -> MimoAudio:
    """The model that the command's options mean."""
    lm, codec = find_pair(args)
    if Path(lm).parent != NANO:
        say(f"loading {lm} and {codec}")
    options, quantization = load_options(args), args.quantization
    model = MimoAudio(
        lm, codec, args.device, dtype=args.dtype, quantization=quantization, **options
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(useful_threads(model.lm.config))
    return model


def say(text: str) -> None:
    """Progress and remarks go to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def warn_of_words(model: MimoAudio, text: str) -> None:
    """Names the words of a text to be said that the model was not trained on, where it is known on
    which it was."""
    known = model.tokenizer.trained_words
    unknown = [word for word in dict.fromkeys(spell(text)) if known and word not in known]
    if unknown:
        more = ", ..." if len(unknown) > WORDS_NAMED else ""
        named = ", ".join(unknown[:WORDS_NAMED])
        say(f"warning: this model was not trained on, and may garble: {named}{more}")


def tts(args: argparse.Namespace) -> int:
    text = sys.stdin.read().strip() if args.text == "-" else args.text
    if not text:
        raise MimoFastError("there is no text to say")
    if args.voice and not (args.instruct or args.natural):
        raise MimoFastError(
            "--voice needs --instruct or --natural: the model clones voices in those forms alone"
        )
    model = load_model(args)
    if not args.natural:
        warn_of_words(model, text)
    chunks = model.stream(
        "tts",
        text,
        args.instruct,
        not args.natural,
        args.voice,
        seed=args.seed,
        max_new_tokens=args.max_tokens,
    )
    _write_speech(chunks, args.output)
    return 0


def asr(args: argparse.Namespace) -> int:
    model = load_model(args)
    for path in args.audio:
        if len(args.audio) > 1:
            print(f"{path}: ", end="", flush=True)
        _print_text(model.stream("asr", path, seed=args.seed, max_new_tokens=args.max_tokens))
    return 0


def understand(args: argparse.Namespace) -> int:
    model = load_model(args)
    _print_text(
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


def chat(args: argparse.Namespace) -> int:
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
        output = (
            args.output if len(turns) == 1 else args.output.with_stem(f"{args.output.stem}-{i}")
        )
        _write_speech(session.stream(turn, max_new_tokens=args.max_tokens), output)
    return 0


def _chat_in_text(args: argparse.Namespace) -> int:
    if args.output or args.voice or args.system:
        raise MimoFastError("--text gives text replies: leave out --output, --voice and --system")
    model = load_model(args)
    messages = []
    for turn in args.turns:
        messages.append({"role": "user", "content": turn})
        chunks = model.stream(
            "text_dialogue_multiturn",
            messages,
            args.thinking,
            seed=args.seed,
            max_new_tokens=args.max_tokens,
        )
        messages.append({"role": "assistant", "content": _print_text(chunks)})
    return 0


def carry_on(args: argparse.Namespace) -> int:
    model = load_model(args)
    wav = load_audio(args.audio, model.codec.sample_rate)
    chunks = model.stream(
        "speech_continuation", wav, seed=args.seed, max_new_tokens=args.max_tokens
    )
    _write_speech(chunks, args.output, before=wav if args.join else None)
    return 0


def verify_(args: argparse.Namespace) -> int:
    golden = Golden(args.golden)
    model = MimoAudio(
        args.checkpoint / "lm",
        args.checkpoint / "codec",
        args.device,
        dtype=args.dtype or "float32",
    )
    print(f"{'stage':<15}{'largest error':>14}{'bound':>10}  {'unit':<9} {'compared':>8}  worst")
    failed = []
    for result in verify(model, golden):
        verdict = "" if result.ok else "  FAILED"
        print(
            f"{result.stage:<15}{result.error:>14.3g}{result.bound:>10.3g}  {result.unit:<9} {result.compared:>8}  "
            f"{result.worst}{verdict}",
            flush=True,
        )
        if not result.ok:
            failed.append(result.stage)
    if failed:
        say(f"mimo-fast: verify failed at: {', '.join(failed)}")
        return 1
    say(
        f"all {len(golden.compared)} golden tensors within bounds, on {model.device}, {args.dtype or 'float32'}"
    )
    return 0


def init(args: argparse.Namespace) -> int:
    lm, codec = init_checkpoint(args.directory, args.preset, seed=args.seed)
    say(
        "random weights make noise, not words: this pair is for trying the pipeline and for timing it"
    )
    print(f"{lm}\n{codec}")
    return 0


def quantize(args: argparse.Namespace) -> int:
    foreign = read_json(args.source / "config.json").get(FOREIGN_KEY)
    errors = (import_checkpoint if foreign else quantize_checkpoint)(
        args.source, args.target, args.format
    )
    print(f"{'relative error':>14}  matrix")
    for name, error in errors.items():
        print(f"{error:>14.4f}  {name}")
    before, after = (open_weights(directory).nbytes for directory in (args.source, args.target))
    say(
        f"wrote {args.target}: {after / 1e9:.3f} GB, was {before / 1e9:.3f} GB; it loads without --quantization"
    )
    return 0


def info(args: argparse.Namespace) -> int:
    for line in describe_machine():
        print(line)
    lm, codec = find_pair(args)
    alone = (args.model is None) != (args.codec is None)
    for source, kind, named in ((lm, "lm", args.model), (codec, "codec", args.codec)):
        # Of what the published other of one alone is, nobody asked.
        if named or not alone:
            hub: HubOptions = {"cache_dir": args.cache_dir, "local_files_only": args.offline}
            hub["revision"] = args.revision if kind == "lm" else args.codec_revision
            for line in describe_checkpoint(source, kind, hub):
                print(line)
    return 0


def _print_text(chunks: Iterator[Chunk]) -> str:
    """Prints text as it comes; returns all of it."""
    text = ""
    for chunk in chunks:
        # Leading blanks are not part of the answer.
        new = chunk.text if text else chunk.text.lstrip()
        text += new
        print(new, end="", flush=True)
    print(flush=True)
    return text.strip()


def _write_speech(
    chunks: Iterator[Chunk], output: Path, before: torch.Tensor | None = None
) -> None:
    """Collects a reply under a progress bar of seconds spoken, writes it whole, and says how fast
    it was."""
    audio, text, last = [] if before is None else [before], [], None
    with tqdm(desc="speaking", unit="s", unit_scale=True, disable=None, leave=False) as bar:
        for chunk in chunks:
            audio.append(chunk.audio)
            text.append(chunk.text)
            bar.update(len(chunk.audio) / chunk.sample_rate)
            last = chunk
    assert last is not None
    words, timing = "".join(text).strip(), last.timing
    if words:
        print(words, flush=True)
    wav = torch.cat(audio)
    if not len(wav):
        raise MimoFastError(
            f"the model said nothing in {timing.groups} groups; nothing was written"
        )
    save_wav(output, wav, last.sample_rate)
    factor = timing.elapsed / timing.audio_seconds if timing.audio_seconds else math.inf
    first = "" if timing.first_audio is None else f", first audio after {timing.first_audio:.2f} s"
    say(
        f"wrote {output}: {timing.audio_seconds:.2f} s of audio in {timing.elapsed:.2f} s "
        f"(real-time factor {factor:.2f}{first})"
    )
