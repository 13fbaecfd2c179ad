"""The `mimo-fast` command: arguments, exit codes and one-line errors.

Exit codes are 0 done, 1 failed, 2 bad usage, 130 interrupted. Results go to stdout, everything else
to stderr. What a command does is in the module of its name, imported once it is asked for: `--help`
does not wait for torch.
"""

import argparse
import os
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from mimo_fast import __version__
from mimo_fast.audio.paths import FORMATS
from mimo_fast.checkpoint.embedded import PUBLISHED_BASE, PUBLISHED_CODEC, PUBLISHED_MODEL, SENTENCE
from mimo_fast.cli.arguments import (
    check_arguments,
    path,
    points,
    positive,
    seed,
    whole_checkpoints,
)
from mimo_fast.cli.early import INTERRUPTED
from mimo_fast.cli.process import (
    Interrupts,
    OutputError,
    StandardStream,
    is_closed_pipe,
    standard_streams,
    written,
)
from mimo_fast.cli.reports import TRACEBACK, report, say
from mimo_fast.cli.server_options import add_server_options, take_variables
from mimo_fast.config import OFFLOADABLE, ROPE_FREQUENCIES
from mimo_fast.text.transcript import SUFFIXES

EMBEDDED = "nano, inside the package"
SEVERAL_ADAPTERS = ("serve", "info")
"""Commands in which requests may choose one of several adapters."""

AUDIO_FILE = f"file ({', '.join(FORMATS)}), or - for standard output, a WAV as it is spoken"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    written.clear()
    args = argparse.Namespace(writes=False, folders=())
    with standard_streams() as output, Interrupts() as interrupts:
        try:
            code = _run(arguments, args, output, interrupts)
            output.finish()
            return code
        except OutputError as error:
            if not is_closed_pipe(error):
                report(error)
            return 1
        except KeyboardInterrupt:
            return _end_interrupted(args)
        except Exception as error:
            if interrupts.seen:
                return _end_interrupted(args)
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            report(error)
            return 1
        finally:
            with suppress(OutputError):
                output.finish()


def _run(
    arguments: Sequence[str] | None,
    args: argparse.Namespace,
    output: StandardStream,
    interrupts: Interrupts,
) -> int:
    try:
        build_parser().parse_args(arguments, args)
        check_arguments(args)
    except SystemExit:
        # --help and --version have printed.
        output.finish()
        raise
    output.patient = args.writes
    command = import_module(f"mimo_fast.cli.{args.module}")
    interrupts.working = True
    return int(command.run(args))


def _end_interrupted(args: argparse.Namespace) -> int:
    done = [f"wrote {', '.join(written)}"] if written else []
    for folder in args.folders:
        done += [f"wrote {each}" for each in whole_checkpoints(folder) if each not in args.before]
        files = folder.iterdir() if folder.is_dir() else ()
        if not done and any(file not in args.before for file in files):
            done.append(f"{folder} is incomplete")
    if not done and args.writes:
        done.append("nothing was written")
    say("; ".join(["mimo-fast: interrupted", *done]))
    return INTERRUPTED


class Anew(argparse._AppendAction):
    """Appends what is given to nothing, whatever the default is."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) is self.default:
            setattr(namespace, self.dest, None)
        super().__call__(parser, namespace, values, option)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (usage: {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mimo-fast", description="MiMo-Audio: speech in, speech and text out.")
    parser.add_argument("--version", action="version", version=f"mimo-fast {__version__}")
    commands_ = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        help: str,
        published: str | None = PUBLISHED_MODEL,
        default: str = EMBEDDED,
        module: str | None = None,
    ) -> argparse.ArgumentParser:
        sub = commands_.add_parser(name, help=help, description=help)
        sub.set_defaults(module=module or name, published=published, parser=sub, folder=None)
        if published is not None:
            _add_model_options(sub, published, default, several=name in SEVERAL_ADAPTERS)
        return sub

    tts = command("tts", "Say a text.")
    tts.add_argument("text", nargs="?", help="what to say; '-' reads it from standard input")
    _add_output(tts, required=False, note="; with --lines a folder")
    _add_playing(tts)
    each = "say each line of a file: -o is a folder, what is there already is kept"
    tts.add_argument("--lines", type=path, metavar="FILE", help=each)
    at_once = "lines said at once [4, or as many as fit]"
    tts.add_argument("--streams", type=positive, metavar="N", help=at_once)
    _add_lookahead(tts)
    style = "how to say it, such as 'in a happy voice'"
    tts.add_argument("--instruct", metavar="STYLE", help=style)
    natural = 'TEXT holds style and words: "say softly: good night"'
    tts.add_argument("--natural", action="store_true", help=natural)
    whole = "say a long text in one go [in pieces, where the model states how much it says at once]"
    tts.add_argument("--whole", action="store_true", help=whole)
    _add_voice(tts, "whose voice to use; needs --instruct or --natural")
    _add_prepare(tts, note=" of --voice")
    _add_marks(tts)
    _add_generation_options(tts)

    asr = command("asr", "Transcribe recordings.")
    asr.add_argument("audio", type=path, nargs="*", help="recordings; - for standard input")
    asr.add_argument("--live", action="store_true", help="the microphone, until Ctrl-C")
    form = "what is written [text]"
    asr.add_argument("--format", choices=tuple(SUFFIXES), default="text", help=form)
    place = "file, or folder for several; what is there already is kept [standard output]"
    asr.add_argument("-o", "--output", type=path, metavar="PATH", help=place)
    again = "transcribe again what is in the folder already"
    asr.add_argument("--overwrite", action="store_true", help=again)
    one = "upstream's one pass over a whole recording [cut at pauses, levels set]"
    asr.add_argument("--whole", action="store_true", help=one)
    spoken = "what is spoken, en or zh, for a model with language tags [the model hears it]"
    asr.add_argument("--language", metavar="CODE", help=spoken)
    at_once = "pieces transcribed at once [4, or as many as fit]"
    asr.add_argument("--streams", type=positive, metavar="N", help=at_once)
    _add_prepare(asr, note=" for --whole; pieces always are")
    _add_generation_options(asr)

    understand = command("understand", "Answer a question about a recording.")
    understand.add_argument("audio", type=path)
    understand.add_argument("question")
    _add_prepare(understand, default=False, note=", for speech")
    _add_thinking(understand, "let the model think before it answers")
    _add_generation_options(understand)

    chat = command("chat", "Answer speech with speech, turn by turn.")
    turns = "one recording a turn (or texts, with --text)"
    chat.add_argument("turns", nargs="+", metavar="AUDIO", help=turns)
    note = "; with several turns reply.wav becomes reply-1.wav, reply-2.wav, ..."
    _add_output(chat, required=False, note=note)
    _add_lookahead(chat)
    chat.add_argument("--system", metavar="TEXT", help="an instruction in front of the first turn")
    _add_voice(chat, "whose voice the replies should have")
    _add_prepare(chat, note=" of recordings")
    chat.add_argument("--text", action="store_true", help="turns are texts and so are the replies")
    _add_marks(chat)
    _add_thinking(chat, "with --text: let the model think before it answers")
    _add_generation_options(chat)

    example = "Convert speech as examples show it: voice, emotion, style, speed, language, noise."
    _add_convert_options(command("convert", example, PUBLISHED_BASE))

    talk = command("talk", "Talk with the model: microphone, speaker, interruption.")
    _add_talk_options(talk)

    carry = "Carry a recording on (a base model does this)."
    more = command("continue", carry, PUBLISHED_BASE, module="carry_on")
    more.add_argument("audio", type=path)
    _add_output(more)
    _add_lookahead(more)
    join = "write the recording and its continuation as one file"
    more.add_argument("--join", action="store_true", help=join)
    _add_prepare(more, default=False, note=", also of what --join writes")
    _add_marks(more, ", what --join writes before it is not")
    _add_generation_options(more)

    show = command("demo", "Say a text, transcribe a recording and answer it; time every stage.")
    heard = "what to transcribe and to answer [a question in English]"
    show.add_argument("audio", type=path, nargs="?", help=heard)
    _add_prepare(show, note=" of AUDIO")
    show.add_argument("--text", default=SENTENCE, help=f"what to say [{SENTENCE}]")
    show.add_argument("-o", "--output", type=path, default=Path("demo_output"), metavar="DIR")
    _add_marks(show)
    _add_json(show)
    _add_generation_options(show)

    speed = command(
        "bench",
        "Measure this machine: speed, first audio, streams it can carry, memory.",
        default="random weights",
    )
    _add_json(speed, "write it there as well, without what is yours: a file to share")
    speed.add_argument("--quality", action="store_true", help=argparse.SUPPRESS)

    worth = "Compare weight formats on your recordings: words, voice, sound, speed; name one."
    _add_quality_options(command("quality", worth))

    public = "Answer a public evaluation set, and measure the answers as MiMo-Audio's report does."
    _add_evaluation_options(command("eval", public, module="evaluate"))

    check = command("verify", "Check every stage against ground truth on this machine.", None)
    check.add_argument(
        "--checkpoint", type=path, required=True, metavar="DIR", help="folder with lm/ and codec/"
    )
    check.add_argument("--golden", type=path, required=True, metavar="DIR", help="the parity kit")
    beside = "audio tokenizer [codec/ in the checkpoint's folder]"
    check.add_argument("--codec", type=path, metavar="DIR", help=beside)
    _add_codec_rope(check, "what the golden folder states")
    _add_device_options(check)

    write = "Write a checkpoint pair of random weights."
    init = command("init-checkpoint", write, None, module="init_checkpoint")
    init.set_defaults(folder="directory")
    init.add_argument("directory", type=path, metavar="DIR")
    init.add_argument(
        "--preset", choices=("tiny", "7b"), default="tiny", help="7b: published dimensions, 19 GB"
    )
    init.add_argument("--seed", type=seed, default=0)

    smaller = "Write a language model's checkpoint in a smaller format"
    theirs = "what GPTQ, AutoRound, bitsandbytes, compressed-tensors, FP8 or GGUF hold is imported"
    pack = command("quantize", f"{smaller}; {theirs}.", None)
    pack.set_defaults(folder="target")
    pack.add_argument(
        "source", metavar="IN", help="directory or hub id of the language model, or a GGUF file"
    )
    pack.add_argument("target", type=path, metavar="OUT", help="directory to write into")
    pack.add_argument(
        "--format",
        choices=("int8", "int4", "nf4"),
        help="of what is not packed yet [int4; what is imported keeps its values]",
    )
    pack.add_argument(
        "--speech-from",
        type=path,
        metavar="DIR",
        help="the dense checkpoint that a GGUF file was converted from, for its speech parts",
    )
    _add_hub_options(pack)

    join = "Merge a fine-tune's PEFT adapter into a language model's checkpoint."
    _add_merge_options(command("merge", join, None))

    heard = "Tell whether recordings are marked as a model's, and what their provenance states."
    seek = command("detect", heard, None)
    seek.add_argument("audio", type=path, nargs="+", metavar="FILE", help="recordings")
    lines = "a JSON object a line instead"
    seek.add_argument("--json", action="store_true", dest="as_json", help=lines)

    measure = "Measure on speech what streams with an elastic look-ahead begin with."
    known = command("calibrate", measure, None)
    known.add_argument("codec", metavar="CODEC", help="directory or hub id of the audio tokenizer")
    spoken = "speech like that of the replies; half a minute is plenty"
    known.add_argument("audio", type=path, nargs="+", metavar="AUDIO", help=spoken)
    books = "codebooks that the language model speaks [8]"
    known.add_argument("--codebooks", type=positive, default=8, metavar="N", help=books)
    known.add_argument("--device", help="cuda, cpu, cuda:1, ... [cuda where there is one]")
    _add_codec_rope(known)
    _add_hub_options(known)

    serve = command("serve", "Serve the OpenAI API's speech endpoints and realtime sessions.")
    named = "what clients call the model [the last part of its name]"
    serve.add_argument("--served-name", metavar="NAME", help=named)
    at_once = "replies, texts and pieces computed at once [8]"
    serve.add_argument("--streams", type=positive, default=8, metavar="N", help=at_once)
    add_server_options(serve)
    take_variables(serve)

    command("info", "Describe this machine, the kernels and a checkpoint pair.")
    return parser


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
    what = "recordings to convert, 30 s each; - for standard input"
    parser.add_argument("audio", type=path, nargs="*", metavar="WAV", help=what)
    shows = (
        "a recording, what became of it, and the words of the latter [the model hears them]; "
        "repeatable, up to 16. Recordings that follow it are those to convert"
    )
    parser.add_argument(
        "--example", nargs="+", action="append", metavar=("IN OUT", "TEXT"), help=shows
    )
    kept = "examples that --save-examples or the server keeps, in place of --example"
    parser.add_argument("--examples", type=path, metavar="DIR/NAME", help=kept)
    words = (
        "what the examples show, in words or one of voice, emotion, style, speed, denoise, "
        "translation [the set's, or voice]"
    )
    parser.add_argument("--instruction", metavar="TEXT", help=words)
    _add_output(parser, required=False, note="; folder for several, what is there already is kept")
    parser.add_argument("--overwrite", action="store_true", help="convert again what is there")
    at_once = "recordings converted at once [4, or as many as fit]"
    parser.add_argument("--streams", type=positive, metavar="N", help=at_once)
    _add_playing(parser)
    _add_lookahead(parser)
    save = "keep the examples as a set, of which --consent says who allowed it"
    parser.add_argument("--save-examples", type=path, metavar="DIR/NAME", help=save)
    note = "with --save-examples: who allowed the use of these recordings, and for what"
    parser.add_argument("--consent", metavar="TEXT", help=note)
    _add_marks(parser)
    _add_generation_options(parser)


def _add_quality_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(folder="target")
    speech = "recordings to transcribe; WAV's words are in a .txt of its name, where there is one"
    parser.add_argument("--audio", type=path, nargs="+", metavar="WAV", help=speech)
    words = "words of the recordings: a line each of name, tab, words"
    parser.add_argument("--text-of", type=path, metavar="FILE", help=words)
    said = "texts to say [the words of the recordings]"
    parser.add_argument("--text", nargs="+", metavar="TEXT", help=said)
    place = "new or empty folder of the report"
    parser.add_argument(
        "-o", "--output", dest="target", type=path, required=True, metavar="DIR", help=place
    )
    chosen = "to compare with the checkpoint as it is; repeatable [int8 and int4]"
    parser.add_argument("--format", action="append", choices=("int8", "int4", "nf4"), help=chosen)
    ears = "package.module:name or https://host/v1#model, who hears the speech [the model itself]"
    parser.add_argument("--recogniser", metavar="PLUGIN", help=ears)
    spoken = "what is spoken [en]"
    parser.add_argument(
        "--language", dest="spoken", choices=("en", "zh"), default="en", help=spoken
    )
    allowed = "points of words that a format may lose [3]"
    parser.add_argument("--margin", type=points, default=3.0, metavar="POINTS", help=allowed)
    _add_generation_options(parser)


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(folder="target")
    parser.add_argument("set", nargs="?", metavar="SET", help="which one, see --list")
    known = "list the sets, their files, and where they come from"
    parser.add_argument("--list", action="store_true", help=known)
    where = "MiMo-Audio-Eval's data/, or the folder of the set as it is published"
    parser.add_argument("--data", type=path, metavar="DIR", help=where)
    place = "folder of answers and report; what is there already is kept [evaluations/SET-SPLIT]"
    parser.add_argument("-o", "--output", dest="target", type=path, metavar="DIR", help=place)
    parser.add_argument("--split", help="of the set [its first]")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N items [all]")
    parser.add_argument("--mode", help="way of asking, where a set has several [its first]")
    shots = "examples in front of each question, for base models [0]"
    parser.add_argument("--shots", type=positive, metavar="N", help=shots)
    _add_thinking(parser, "let the model think before it answers")
    anew = "begin anew where the folder has answers, of whatever evaluation"
    parser.add_argument("--overwrite", action="store_true", help=anew)
    at_once = "items answered at once [4, or as many as fit]"
    parser.add_argument("--streams", type=positive, metavar="N", help=at_once)
    drawn = "upstream's samplers, also where the checkpoint states greedy ones, as nano's does"
    parser.add_argument("--sampled", action="store_true", help=drawn)
    theirs = "answer in MiMo-Audio-Eval's own runtime, which differs from the released one"
    parser.add_argument("--as-evaluated", action="store_true", help=theirs)
    tools = parser.add_argument_group(
        "tools",
        "package.module:name of a function or class, or https://host/v1#model of a server like "
        "OpenAI's, whose key is in MIMO_FAST_EVAL_KEY or OPENAI_API_KEY",
    )
    hears = "hears the words of speech; self is the model that is evaluated"
    tools.add_argument("--recogniser", metavar="TOOL", help=hears)
    voices = "tells voices apart, such as resemblyzer"
    tools.add_argument("--speaker", metavar="TOOL", help=voices)
    tools.add_argument("--judge", metavar="TOOL", help="says whether answers are right")
    both = "rates of words in Whisper's normalisation as well"
    tools.add_argument("--normaliser", choices=("whisper",), help=both)
    _add_generation_options(parser)


def _add_talk_options(parser: argparse.ArgumentParser) -> None:
    where = "talk to a running server, such as http://127.0.0.1:8000 [the model in this process]"
    parser.add_argument("--server", metavar="URL", help=where)
    key = os.environ.get("MIMO_FAST_API_KEY") or None
    known = "the server's key [from MIMO_FAST_API_KEY]" if key else "the server's key [none]"
    parser.add_argument("--api-key", default=key, metavar="KEY", help=known)
    spoken = "whose voice the replies have: a recording, or with --server a voice's name"
    parser.add_argument("--voice", metavar="WAV|NAME", help=spoken)
    parser.add_argument("--instructions", metavar="TEXT", help="how to reply")
    by_hand = "space begins and ends what you say [pauses do]"
    parser.add_argument("--push", action="store_true", help=by_hand)
    _add_mark(parser, "; with --server it is the server's to do")
    sound = parser.add_argument_group("sound")
    chosen = "number, or part of the name [the default]"
    sound.add_argument("--device-in", metavar="DEVICE", help=f"microphone: {chosen}")
    sound.add_argument("--device-out", metavar="DEVICE", help=f"speaker: {chosen}")
    sound.add_argument("--list-devices", action="store_true", help="list both, and end")
    fake = "a recording in the microphone's place; once it is answered the talk ends"
    sound.add_argument("--input", type=path, metavar="AUDIO", help=fake)
    place = "a file in the speaker's place"
    sound.add_argument("--output", type=path, metavar="WAV", help=place)
    both = "keep the talk: you on the left, the model on the right"
    sound.add_argument("--save", type=path, metavar="WAV", help=both)
    echo = "take what the speaker plays out of what the microphone hears"
    sound.add_argument("--echo-cancel", action="store_true", help=echo)


def _add_merge_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(folder="target")
    chosen = os.environ.get("MIMO_FAST_MODEL") or None
    named = f"directory or hub id of the language model [{chosen or EMBEDDED}]"
    parser.add_argument("--model", default=chosen, metavar="DIR|ID", help=named)
    _add_adapter(parser, required=True)
    place = "directory to write into"
    parser.add_argument(
        "-o", "--output", dest="target", type=path, required=True, metavar="OUT", help=place
    )
    _add_hub_options(parser)


def _add_model_options(
    parser: argparse.ArgumentParser, published: str, default: str, several: bool
) -> None:
    group = parser.add_argument_group(
        "model", f"one without the other goes with {published} or {PUBLISHED_CODEC}"
    )
    for option, variable, what in (
        ("--model", "MIMO_FAST_MODEL", "language model"),
        ("--codec", "MIMO_FAST_CODEC", "audio tokenizer"),
    ):
        chosen = os.environ.get(variable) or None
        named = f"{what} [{chosen or default}]"
        group.add_argument(option, default=chosen, metavar="DIR|ID", help=named)
    if several:
        _add_adapters(group)
    else:
        _add_adapter(group)
    _add_hub_options(group)
    group.add_argument("--codec-revision", help="of the codec, on the hub")
    _add_codec_rope(group)
    memory = parser.add_argument_group("memory")
    context = "groups of context, 160 ms each [the model's]"
    memory.add_argument("--max-seq-len", type=positive, metavar="N", help=context)
    cache = "keys and values in half the memory [the dtype's own]"
    memory.add_argument("--kv-cache", choices=("int8",), help=cache)
    kept = f"keep in host memory: {' or '.join(OFFLOADABLE)}; may be given twice"
    memory.add_argument(
        "--offload", action="append", choices=OFFLOADABLE, metavar="PART", help=kept
    )
    group.add_argument(
        "--quantization", choices=("int8", "int4", "nf4"), help="quantize while loading [none]"
    )
    _add_device_options(parser)


def _add_hub_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--revision", help="of the language model, on the hub")
    group.add_argument("--cache-dir", type=path, help="where downloads are kept")
    group.add_argument("--offline", action="store_true", help="use only what is already downloaded")


def _add_adapter(group: argparse._ActionsContainer, required: bool = False) -> None:
    what = "folder of a PEFT adapter to merge into the language model"
    note = "" if required else ", while loading [none]"
    group.add_argument(
        "--adapter", type=path, required=required, metavar="DIR", help=f"{what}{note}"
    )


def _add_adapters(group: argparse._ActionsContainer) -> None:
    what = (
        "folder of a PEFT adapter: DIR is merged into the language model, while loading; NAME=DIR, "
        "which may be given again, is for requests that choose it, as the model MODEL:NAME [none]"
    )
    group.add_argument("--adapter", action=Anew, metavar="[NAME=]DIR", help=what)


def _add_codec_rope(
    group: argparse._ActionsContainer, default: str = "the checkpoint's; rounded if published"
) -> None:
    what = f"rotary frequencies of the codec, exact or rounded as upstream runs it [{default}]"
    group.add_argument("--codec-rope", choices=ROPE_FREQUENCIES, help=what)


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, cpu, cuda:1, ... [cuda where there is one]")
    dtypes, what = ("float32", "bfloat16", "float16"), "to compute in [the checkpoint's]"
    parser.add_argument("--dtype", choices=dtypes, help=what)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--seed", type=seed, help="makes the draws repeatable")
    group.add_argument(
        "--max-tokens", type=positive, metavar="N", help="stop after N groups (audio: 160 ms each)"
    )


def _add_playing(parser: argparse.ArgumentParser) -> None:
    aloud = "hear it on this machine's speaker while it is made"
    parser.add_argument("--play", action="store_true", help=aloud)
    chosen = "with --play: number, or part of the name [the default]"
    parser.add_argument("--device-out", metavar="DEVICE", help=f"speaker {chosen}")


def _add_lookahead(parser: argparse.ArgumentParser) -> None:
    heard = "elastic: heard after two patches instead of up to eleven, where it is heard [exact]"
    parser.add_argument("--lookahead", choices=("exact", "elastic"), default="exact", help=heard)


def _add_voice(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--voice", type=path, metavar="WAV", help=help)


def _add_prepare(parser: argparse.ArgumentParser, default: bool = True, note: str = "") -> None:
    """Whether recordings are prepared; off where they may be more than speech, or go on."""
    what = f"cut silence and long pauses, set the level{note} [{'on' if default else 'off'}]"
    action = argparse.BooleanOptionalAction
    parser.add_argument("--prepare", action=action, default=default, help=what)


def _add_thinking(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--thinking", action="store_true", help=help)


def _add_mark(parser: argparse.ArgumentParser, note: str = "") -> None:
    heard = "put a watermark into what is said, which detect finds and some people hear"
    parser.add_argument("--mark", action="store_true", help=f"{heard}{note}")


def _add_marks(parser: argparse.ArgumentParser, note: str = "") -> None:
    _add_mark(parser, note)
    pem = "sign files with your certificate (C2PA): made by a model, by which, with whose consent"
    parser.add_argument("--sign", nargs=2, type=path, metavar=("CERT", "KEY"), help=pem)


def _add_json(parser: argparse.ArgumentParser, help: str = "write the table there as well") -> None:
    parser.add_argument("--json", type=path, metavar="FILE", help=help)


def _add_output(parser: argparse.ArgumentParser, required: bool = True, note: str = "") -> None:
    parser.add_argument(
        "-o", "--output", type=path, required=required, metavar="AUDIO", help=f"{AUDIO_FILE}{note}"
    )
