"""`mimo-fast quality --audio WAV... [--text TEXT...] -o DIR`: formats of a checkpoint compared."""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mimo_fast.audio.paths import name_of, write_whole
from mimo_fast.checkpoint.embedded import NAME, NANO
from mimo_fast.cli.common import find_pair, load_model, load_options
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import report as report_error
from mimo_fast.cli.reports import say
from mimo_fast.config import PathLike
from mimo_fast.errors import EvaluationError, MimoFastError
from mimo_fast.evaluation.plugins import SELF, load_plugin
from mimo_fast.evaluation.rates import evaluation_package
from mimo_fast.quality.advice import Bounds
from mimo_fast.quality.material import read_recordings
from mimo_fast.quality.measure import FORMATS, Study, measure
from mimo_fast.quality.plots import draw
from mimo_fast.quality.report import markdown
from mimo_fast.runtime.loading import find, find_device, open_lm


def run(args: argparse.Namespace) -> int:
    if not args.audio and not args.text:
        raise MimoFastError("there is nothing to compare formats on: give --audio or --text")
    if args.quantization:
        raise MimoFastError(
            "quality compares formats with the checkpoint as it is: use --format in place of "
            "--quantization"
        )
    if args.target.is_dir() and any(args.target.iterdir()):
        raise MimoFastError(f"{name_of(args.target)} is not empty: name another folder")
    device = find_device(args.device)
    recordings = read_recordings(args.audio or (), args.text_of)
    known = [each.words for each in recordings if each.words is not None]
    # Before a model is loaded: without them nothing can be told of any format.
    for package in ("jiwer", "zhon"):
        evaluation_package(package)
    own = args.recogniser in (None, SELF)
    recogniser = None if own else load_plugin("recogniser", args.recogniser)
    args.model, args.codec = find_pair(args)
    if open_lm(find(args.model, load_options(args))).stored:
        raise MimoFastError(
            f"{name_of(args.model)} is quantized already: give the checkpoint that it was made from"
        )
    study = Study(
        recordings,
        args.text or known,
        tuple(dict.fromkeys(args.format or FORMATS)),
        args.target,
        args.spoken,
        recogniser,
        None if own else args.recogniser,
        args.seed or 0,
        args.max_tokens,
        replace(Bounds(), words=args.margin / 100),
    )
    found = measure(study, partial(load_model, args), device)
    _write({"model": _named(args.model), "codec": _named(args.codec)} | found, args)
    return 0


def _named(part: PathLike) -> str:
    return NAME if Path(part).parent == NANO else str(part)


def _write(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Both forms of the report, last of all, so that where they are it is whole."""
    pictures = []
    try:
        pictures = draw(found, args.target)
    except EvaluationError as error:
        report_error(error)
    write_whole(args.target / "report.md", markdown(found, pictures).encode())
    write_whole(args.target / "report.json", (json.dumps(found, indent=1) + "\n").encode())
    written.append(name_of(args.target / "report.md"))
    print(found["advice"]["sentence"])
    for what, why in found["not_measured"].items():
        say(f"not measured: {what}: {why}")
    say(f"wrote {name_of(args.target / 'report.md')}, report.json and what was heard")
