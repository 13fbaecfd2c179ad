"""What each command takes."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from mimo_fast import __version__
from mimo_fast.checkpoint.embedded import PUBLISHED_BASE, PUBLISHED_MODEL, SENTENCE
from mimo_fast.cli.arguments import (
    path,
    points,
    positive,
    seed,
)
from mimo_fast.cli.options import (
    EMBEDDED,
    add_adapter,
    add_codec_rope,
    add_device_options,
    add_generation_options,
    add_hub_options,
    add_json,
    add_lookahead,
    add_mark,
    add_marks,
    add_model_options,
    add_output,
    add_playing,
    add_prepare,
    add_thinking,
    add_voice,
)
from mimo_fast.cli.server_options import add_server_options, take_variables
from mimo_fast.text.transcript import SUFFIXES

SEVERAL_ADAPTERS = ("serve", "info")
"""Commands in which requests may choose one of several adapters."""


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
            add_model_options(sub, published, default, several=name in SEVERAL_ADAPTERS)
        return sub

    _add_tts_options(command("tts", "Say a text."))
    _add_asr_options(command("asr", "Transcribe recordings."))
    _add_understand_options(command("understand", "Answer a question about a recording."))
    _add_chat_options(command("chat", "Answer speech with speech, turn by turn."))
    example = "Convert speech as examples show it: voice, emotion, style, speed, language, noise."
    _add_convert_options(command("convert", example, PUBLISHED_BASE))
    talk = command("talk", "Talk with the model: microphone, speaker, interruption.")
    _add_talk_options(talk)
    carry = "Carry a recording on (a base model does this)."
    _add_continue_options(command("continue", carry, PUBLISHED_BASE, module="carry_on"))
    _add_demo_options(
        command("demo", "Say a text, transcribe a recording and answer it; time every stage.")
    )
    _add_bench_options(
        command(
            "bench",
            "Measure this machine: speed, first audio, streams it can carry, memory.",
            default="random weights",
        )
    )
    worth = "Compare weight formats on your recordings: words, voice, sound, speed; name one."
    _add_quality_options(command("quality", worth))
    public = "Answer a public evaluation set, and measure the answers as MiMo-Audio's report does."
    _add_evaluation_options(command("eval", public, module="evaluate"))
    _add_verify_options(
        command("verify", "Check every stage against ground truth on this machine.", None)
    )
    write = "Write a checkpoint pair of random weights."
    _add_init_options(command("init-checkpoint", write, None, module="init_checkpoint"))
    smaller = "Write a language model's checkpoint in a smaller format"
    theirs = "what GPTQ, AutoRound, bitsandbytes, compressed-tensors, FP8 or GGUF hold is imported"
    _add_quantize_options(command("quantize", f"{smaller}; {theirs}.", None))
    join = "Merge a fine-tune's PEFT adapter into a language model's checkpoint."
    _add_merge_options(command("merge", join, None))
    heard = "Tell whether recordings are marked as a model's, and what their provenance states."
    _add_detect_options(command("detect", heard, None))
    measure = "Measure on speech what streams with an elastic look-ahead begin with."
    _add_calibrate_options(command("calibrate", measure, None))
    _add_serve_options(
        command("serve", "Serve the OpenAI API's speech endpoints and realtime sessions.")
    )
    command("info", "Describe this machine, the kernels and a checkpoint pair.")
    return parser


def _add_tts_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="what to say; '-' reads it from standard input")
    add_output(parser, required=False, note="; with --lines a folder")
    add_playing(parser)
    each = "say each line of a file: -o is a folder, what is there already is kept"
    parser.add_argument("--lines", type=path, metavar="FILE", help=each)
    at_once = "lines said at once [4, or as many as fit]"
    parser.add_argument("--streams", type=positive, metavar="N", help=at_once)
    add_lookahead(parser)
    style = "how to say it, such as 'in a happy voice'"
    parser.add_argument("--instruct", metavar="STYLE", help=style)
    natural = 'TEXT holds style and words: "say softly: good night"'
    parser.add_argument("--natural", action="store_true", help=natural)
    whole = "say a long text in one go [in pieces, where the model states how much it says at once]"
    parser.add_argument("--whole", action="store_true", help=whole)
    add_voice(parser, "whose voice to use; needs --instruct or --natural")
    add_prepare(parser, note=" of --voice")
    add_marks(parser)
    add_generation_options(parser)


def _add_asr_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", type=path, nargs="*", help="recordings; - for standard input")
    parser.add_argument("--live", action="store_true", help="the microphone, until Ctrl-C")
    form = "what is written [text]"
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="text", help=form)
    place = "file, or folder for several; what is there already is kept [standard output]"
    parser.add_argument("-o", "--output", type=path, metavar="PATH", help=place)
    again = "transcribe again what is in the folder already"
    parser.add_argument("--overwrite", action="store_true", help=again)
    one = "upstream's one pass over a whole recording [cut at pauses, levels set]"
    parser.add_argument("--whole", action="store_true", help=one)
    spoken = "what is spoken, en or zh, for a model with language tags [the model hears it]"
    parser.add_argument("--language", metavar="CODE", help=spoken)
    at_once = "pieces transcribed at once [4, or as many as fit]"
    parser.add_argument("--streams", type=positive, metavar="N", help=at_once)
    add_prepare(parser, note=" for --whole; pieces always are")
    add_generation_options(parser)


def _add_understand_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", type=path)
    parser.add_argument("question")
    add_prepare(parser, default=False, note=", for speech")
    add_thinking(parser, "let the model think before it answers")
    add_generation_options(parser)


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    turns = "one recording a turn (or texts, with --text)"
    parser.add_argument("turns", nargs="+", metavar="AUDIO", help=turns)
    note = "; with several turns reply.wav becomes reply-1.wav, reply-2.wav, ..."
    add_output(parser, required=False, note=note)
    add_lookahead(parser)
    parser.add_argument(
        "--system", metavar="TEXT", help="an instruction in front of the first turn"
    )
    add_voice(parser, "whose voice the replies should have")
    add_prepare(parser, note=" of recordings")
    parser.add_argument(
        "--text", action="store_true", help="turns are texts and so are the replies"
    )
    add_marks(parser)
    add_thinking(parser, "with --text: let the model think before it answers")
    add_generation_options(parser)


def _add_continue_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", type=path)
    add_output(parser)
    add_lookahead(parser)
    join = "write the recording and its continuation as one file"
    parser.add_argument("--join", action="store_true", help=join)
    add_prepare(parser, default=False, note=", also of what --join writes")
    add_marks(parser, ", what --join writes before it is not")
    add_generation_options(parser)


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    heard = "what to transcribe and to answer [a question in English]"
    parser.add_argument("audio", type=path, nargs="?", help=heard)
    add_prepare(parser, note=" of AUDIO")
    parser.add_argument("--text", default=SENTENCE, help=f"what to say [{SENTENCE}]")
    parser.add_argument("-o", "--output", type=path, default=Path("demo_output"), metavar="DIR")
    add_marks(parser)
    add_json(parser)
    add_generation_options(parser)


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    add_json(parser, "write it there as well, without what is yours: a file to share")
    parser.add_argument("--quality", action="store_true", help=argparse.SUPPRESS)


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=path, required=True, metavar="DIR", help="folder with lm/ and codec/"
    )
    parser.add_argument("--golden", type=path, required=True, metavar="DIR", help="the parity kit")
    beside = "audio tokenizer [codec/ in the checkpoint's folder]"
    parser.add_argument("--codec", type=path, metavar="DIR", help=beside)
    add_codec_rope(parser, "what the golden folder states")
    add_device_options(parser)


def _add_init_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(folder="directory")
    parser.add_argument("directory", type=path, metavar="DIR")
    parser.add_argument(
        "--preset", choices=("tiny", "7b"), default="tiny", help="7b: published dimensions, 19 GB"
    )
    parser.add_argument("--seed", type=seed, default=0)


def _add_quantize_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(folder="target")
    parser.add_argument(
        "source", metavar="IN", help="directory or hub id of the language model, or a GGUF file"
    )
    parser.add_argument("target", type=path, metavar="OUT", help="directory to write into")
    parser.add_argument(
        "--format",
        choices=("int8", "int4", "nf4"),
        help="of what is not packed yet [int4; what is imported keeps its values]",
    )
    parser.add_argument(
        "--speech-from",
        type=path,
        metavar="DIR",
        help="the dense checkpoint that a GGUF file was converted from, for its speech parts",
    )
    add_hub_options(parser)


def _add_detect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", type=path, nargs="+", metavar="FILE", help="recordings")
    lines = "a JSON object a line instead"
    parser.add_argument("--json", action="store_true", dest="as_json", help=lines)


def _add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codec", metavar="CODEC", help="directory or hub id of the audio tokenizer")
    spoken = "speech like that of the replies; half a minute is plenty"
    parser.add_argument("audio", type=path, nargs="+", metavar="AUDIO", help=spoken)
    books = "codebooks that the language model speaks [8]"
    parser.add_argument("--codebooks", type=positive, default=8, metavar="N", help=books)
    parser.add_argument("--device", help="cuda, cpu, cuda:1, ... [cuda where there is one]")
    add_codec_rope(parser)
    add_hub_options(parser)


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    named = "what clients call the model [the last part of its name]"
    parser.add_argument("--served-name", metavar="NAME", help=named)
    at_once = "replies, texts and pieces computed at once [8]"
    parser.add_argument("--streams", type=positive, default=8, metavar="N", help=at_once)
    add_server_options(parser)
    take_variables(parser)


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
    add_output(parser, required=False, note="; folder for several, what is there already is kept")
    parser.add_argument("--overwrite", action="store_true", help="convert again what is there")
    at_once = "recordings converted at once [4, or as many as fit]"
    parser.add_argument("--streams", type=positive, metavar="N", help=at_once)
    add_playing(parser)
    add_lookahead(parser)
    save = "keep the examples as a set, of which --consent says who allowed it"
    parser.add_argument("--save-examples", type=path, metavar="DIR/NAME", help=save)
    note = "with --save-examples: who allowed the use of these recordings, and for what"
    parser.add_argument("--consent", metavar="TEXT", help=note)
    add_marks(parser)
    add_generation_options(parser)


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
    add_generation_options(parser)


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
    add_thinking(parser, "let the model think before it answers")
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
    add_generation_options(parser)


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
    add_mark(parser, "; with --server it is the server's to do")
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
    add_adapter(parser, required=True)
    place = "directory to write into"
    parser.add_argument(
        "-o", "--output", dest="target", type=path, required=True, metavar="OUT", help=place
    )
    add_hub_options(parser)
