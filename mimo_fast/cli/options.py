"""Options that several commands share."""

import argparse
import os
from typing import Any

from mimo_fast.audio.paths import FORMATS
from mimo_fast.checkpoint.embedded import PUBLISHED_CODEC
from mimo_fast.cli.arguments import path, positive, seed
from mimo_fast.config import OFFLOADABLE, ROPE_FREQUENCIES

EMBEDDED = "nano, inside the package"
AUDIO_FILE = f"file ({', '.join(FORMATS)}), or - for standard output, a WAV as it is spoken"


class Anew(argparse._AppendAction):
    """Appends what is given to nothing, whatever the default is."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) is self.default:
            setattr(namespace, self.dest, None)
        super().__call__(parser, namespace, values, option)


def add_model_options(
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
        add_adapters(group)
    else:
        add_adapter(group)
    add_hub_options(group)
    group.add_argument("--codec-revision", help="of the codec, on the hub")
    add_codec_rope(group)
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
    add_device_options(parser)


def add_hub_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--revision", help="of the language model, on the hub")
    group.add_argument("--cache-dir", type=path, help="where downloads are kept")
    group.add_argument("--offline", action="store_true", help="use only what is already downloaded")


def add_adapter(group: argparse._ActionsContainer, required: bool = False) -> None:
    what = "folder of a PEFT adapter to merge into the language model"
    note = "" if required else ", while loading [none]"
    group.add_argument(
        "--adapter", type=path, required=required, metavar="DIR", help=f"{what}{note}"
    )


def add_adapters(group: argparse._ActionsContainer) -> None:
    what = (
        "folder of a PEFT adapter: DIR is merged into the language model, while loading; NAME=DIR, "
        "which may be given again, is for requests that choose it, as the model MODEL:NAME [none]"
    )
    group.add_argument("--adapter", action=Anew, metavar="[NAME=]DIR", help=what)


def add_codec_rope(
    group: argparse._ActionsContainer, default: str = "the checkpoint's; rounded if published"
) -> None:
    what = f"rotary frequencies of the codec, exact or rounded as upstream runs it [{default}]"
    group.add_argument("--codec-rope", choices=ROPE_FREQUENCIES, help=what)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, cpu, cuda:1, ... [cuda where there is one]")
    dtypes, what = ("float32", "bfloat16", "float16"), "to compute in [the checkpoint's]"
    parser.add_argument("--dtype", choices=dtypes, help=what)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--seed", type=seed, help="makes the draws repeatable")
    group.add_argument(
        "--max-tokens", type=positive, metavar="N", help="stop after N groups (audio: 160 ms each)"
    )


def add_playing(parser: argparse.ArgumentParser) -> None:
    aloud = "hear it on this machine's speaker while it is made"
    parser.add_argument("--play", action="store_true", help=aloud)
    chosen = "with --play: number, or part of the name [the default]"
    parser.add_argument("--device-out", metavar="DEVICE", help=f"speaker {chosen}")


def add_lookahead(parser: argparse.ArgumentParser) -> None:
    heard = "elastic: heard after two patches instead of up to eleven, where it is heard [exact]"
    parser.add_argument("--lookahead", choices=("exact", "elastic"), default="exact", help=heard)


def add_voice(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--voice", type=path, metavar="WAV", help=help)


def add_prepare(parser: argparse.ArgumentParser, default: bool = True, note: str = "") -> None:
    """Whether recordings are prepared; off where they may be more than speech, or go on."""
    what = f"cut silence and long pauses, set the level{note} [{'on' if default else 'off'}]"
    action = argparse.BooleanOptionalAction
    parser.add_argument("--prepare", action=action, default=default, help=what)


def add_thinking(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--thinking", action="store_true", help=help)


def add_mark(parser: argparse.ArgumentParser, note: str = "") -> None:
    heard = "put a watermark into what is said, which detect finds and some people hear"
    parser.add_argument("--mark", action="store_true", help=f"{heard}{note}")


def add_marks(parser: argparse.ArgumentParser, note: str = "") -> None:
    add_mark(parser, note)
    pem = "sign files with your certificate (C2PA): made by a model, by which, with whose consent"
    parser.add_argument("--sign", nargs=2, type=path, metavar=("CERT", "KEY"), help=pem)


def add_json(parser: argparse.ArgumentParser, help: str = "write the table there as well") -> None:
    parser.add_argument("--json", type=path, metavar="FILE", help=help)


def add_output(parser: argparse.ArgumentParser, required: bool = True, note: str = "") -> None:
    parser.add_argument(
        "-o", "--output", type=path, required=required, metavar="AUDIO", help=f"{AUDIO_FILE}{note}"
    )
