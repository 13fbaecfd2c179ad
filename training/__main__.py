"""`python -m training COMMAND`: trains the small checkpoint pair; see `training/__init__.py`."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

# Only the plain torch path has gradients; set before the package is imported.
os.environ["MIMO_FAST_KERNELS"] = "torch"
# Threads that spin while they wait are expensive where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import mimo_fast
from mimo_fast.errors import MimoFastError
from mimo_fast.sampling import task_samplers

from . import (
    codec,
    codes,
    comparisons,
    confidence,
    data,
    decoder,
    evaluate,
    export,
    lm,
    parallel,
    vocoder,
)
from .card import card
from .codec import CodecTraining
from .codes import Codes
from .data import Part, Sizes
from .decoder import DecoderTraining
from .evaluate import Results
from .lm import LMTraining, Stages
from .loop import Schedule, trained_tensors
from .parameters import build_codec
from .sets import write_sets
from .start import start_from
from .synthesis import INSTALL, has_espeak, has_festival, has_flite, has_pico
from .tokenizer import build_tokenizer
from .vocoder import VocoderTraining

COMMANDS = ("data", "codec", "decoder", "lm", "export", "confidence", "evaluate", "all")
FURTHER = ("vocoder", "hearing")
"""Commands that start from a pair and are no part of `all`."""

SETS = "sets"
"""Writes evaluation sets, and trains nothing."""

SMOKE_SIZES = Sizes(12, 12, 8, 8, 6, 6, 6, 4, 4, 4, 4, 3, 3)
SMOKE_STEPS = {"codec": 3, "decoder": 2, "lm": 10}
"""Steps of `lm`, both stages."""

MOST_WORKERS = 4
"""Default number of workers; their share of a batch of 16 should not get smaller."""

MEASURES = (
    evaluate.codec_quality,
    evaluate.text_to_speech,
    evaluate.transcription,
    evaluate.dialogue,
    evaluate.examples,
    comparisons.formats,
    comparisons.streaming,
    comparisons.sampling,
    comparisons.pace,
)


class Recipe:
    """Every command over one directory; each resumes where an earlier call of it stopped."""

    def __init__(
        self, directory: Path, seed: int, device: str, sizes: Sizes, steps: dict[str, int]
    ) -> None:
        self.directory, self.seed, self.device = directory, seed, device
        self.sizes, self.steps = sizes, steps

    def _how(self, name: str, schedule: Schedule) -> tuple[Schedule, int, str]:
        """Schedule, seed and device of one of the trainings."""
        schedule = replace(schedule, steps=self.steps.get(name, schedule.steps))
        return schedule, self.seed, self.device

    def data(self) -> dict[str, Part]:
        found = {"flite": has_flite(), "festival": has_festival()}
        found |= {"espeak-ng": has_espeak(), "pico": has_pico()}
        for name, here in found.items():
            if not here and not parallel.is_worker():
                problem = f"{name} is not installed ({INSTALL[name]})"
                print(f"{problem}: tones stand in for its speech", file=sys.stderr)
        with parallel.first():
            return data.make(self.directory / "data", self.sizes, self.seed)

    def codec(self) -> None:
        how = self._how("codec", codec.SCHEDULE)
        CodecTraining(self.directory, self.data(), *how).train()

    def decoder(self) -> None:
        """Trains the decoder, which needs the codec's codes and nothing of the language model."""
        trained = trained_tensors(self.directory, codec.NAME)
        how = self._how("decoder", decoder.SCHEDULE)
        DecoderTraining(self.directory, self.data(), trained, *how).train()

    def vocoder(self) -> None:
        """Trains a vocoder of the published depth over the newest codec there is."""
        decoded = (self.directory / f"{decoder.NAME}.safetensors").exists()
        trained = trained_tensors(self.directory, decoder.NAME if decoded else codec.NAME)
        how = self._how("vocoder", vocoder.SCHEDULE)
        VocoderTraining(self.directory, self.data(), trained, *how).train()
        if not parallel.is_worker():
            target = self.directory / "vocoder-float16.safetensors"
            vocoder.export_vocoder(self.directory, target)
            print(f"wrote {target} ({target.stat().st_size / 1e6:.2f} MB)", file=sys.stderr)

    def lm(self) -> None:
        self._lm(self._how("lm", lm.SCHEDULE), lm.STAGES, helped=True)

    def hearing(self, pair: Path) -> None:
        """Trains the language model of a pair further, to hear more; the codec is kept."""
        how = self._how("hearing", lm.HEARING_SCHEDULE)
        self._lm(how, lm.HEARING_STAGES, helped=False)
        if not parallel.is_worker():
            target = self.directory / "nano"
            export.export_lm(self.directory, pair, target, lm.HEARING_SHARE)
            print(f"wrote {target}", file=sys.stderr)

    def _lm(self, how: tuple[Schedule, int, str], stages: Stages, helped: bool) -> None:
        with parallel.first():
            tokenizer = build_tokenizer(self.directory / "tokenizer")
        known, trained = self.codes(), trained_tensors(self.directory, codec.NAME)
        LMTraining(self.directory, known, tokenizer, *how, trained, stages, helped).train()

    def codes(self) -> dict[str, Codes]:
        """Codes of all speech by the trained codec."""
        config = lm.lm_config()
        trained = build_codec(codec.codec_config(), trained_tensors(self.directory, codec.NAME))
        parts, shape = self.data(), (config.channels, config.group_size)
        with parallel.first():
            return codes.make(self.directory / "codes", parts, trained, *shape)

    def export(self) -> tuple[Path, Path]:
        pair = export.export(self.directory, self.directory / "nano", self.data()["replies"])
        for path in pair:
            size = sum(file.stat().st_size for file in path.iterdir())
            print(f"wrote {path} ({size / 1e6:.2f} MB)", file=sys.stderr)
        return pair

    def confidence(self, pair: Path, folders: list[Path]) -> None:
        """Calibrates a pair, see `confidence.py`; `evaluate` writes it into the card."""
        os.environ.pop("MIMO_FAST_KERNELS", None)
        target, counts = self.directory / "confidence.json", confidence.Counts()
        self.directory.mkdir(parents=True, exist_ok=True)
        load = partial(confidence.load_pair, pair)
        confidence.calibrate(load, pair, folders, counts, target)
        print(f"wrote {target} and {pair / 'lm' / 'config.json'}", file=sys.stderr)

    def evaluate(self, count: int) -> None:
        pair, target = self.directory / "nano", self.directory / "evaluation.json"
        # Measure what users run.
        os.environ.pop("MIMO_FAST_KERNELS", None)
        load = _loader(pair / "lm", pair / "codec")
        results = evaluate.evaluate(load, self.data(), count, MEASURES, target)
        calibrated = json.loads((self.directory / "confidence.json").read_text(encoding="utf-8"))
        more = {"confidence": calibrated, "recordings": self._recordings()}
        if (path := self.directory / "by-example.json").exists():
            # Of `python -m benchmarks.studies.by_example`.
            more["by_example"] = json.loads(path.read_text(encoding="utf-8"))
        about = card(pair, results | more, self.sizes)
        (pair / "README.md").write_text(about, encoding="utf-8")
        print(f"wrote {target} and {pair / 'README.md'}", file=sys.stderr)

    def _recordings(self) -> dict[str, Results]:
        """Results of `python -m benchmarks robustness` that lie in the directory, for the card."""
        found = {"before": "recordings-before.json", "after": "recordings.json"}
        paths = {when: self.directory / name for when, name in found.items()}
        return {
            when: json.loads(path.read_text(encoding="utf-8"))
            for when, path in paths.items()
            if path.exists()
        }

    def train(self) -> None:
        self.codec()
        self.decoder()
        self.lm()


def _loader(lm_directory: Path, codec_directory: Path) -> evaluate.Load:
    """Loads the pair in a format, once, with upstream's samplers for every task."""

    @cache
    def load(quantization: str | None) -> mimo_fast.MimoAudio:
        model = mimo_fast.load(lm_directory, codec_directory, "cpu", quantization=quantization)
        model.task_sampler_configs = task_samplers()
        return model

    return load


def _missing() -> Iterator[str]:
    """What the evaluation needs and this machine lacks."""
    if not has_flite():
        yield "flite"
    yield from (name for name in ("pocketsphinx", "pystoi") if find_spec(name) is None)


def smoke(seed: int, workers: int) -> None:
    """A few steps of everything, in a temporary directory."""
    # At this size a second thread only costs time.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        with parallel.workers(workers, sys.argv[1:]):
            recipe = Recipe(Path(parallel.agreed(directory)), seed, "cpu", SMOKE_SIZES, SMOKE_STEPS)
            recipe.train()
        if parallel.is_worker():
            return
        load = _loader(*recipe.export())
        chunks = list(load(None).stream("tts", "seven", seed=seed, max_new_tokens=20))
        print(f"said {chunks[-1].timing.groups} groups", file=sys.stderr)
        if missing := [*_missing()]:
            print(f"skipped: evaluation, which needs {', '.join(missing)}", file=sys.stderr)
        else:
            evaluate.evaluate(load, recipe.data(), 1, MEASURES)
    print("the smoke test has passed", file=sys.stderr)


def run(
    recipe: Recipe,
    command: str,
    count: int,
    workers: int,
    folders: list[Path],
    start: Path | None = None,
) -> None:
    """Runs one command.

    Args:
        count: utterances of a measurement.
        folders: those of foreign speech.
        start: the pair that the run began with.
    """
    if command in ("codec", "decoder", "vocoder", "lm", "all"):
        with parallel.workers(workers, sys.argv[1:]):
            recipe.train() if command == "all" else getattr(recipe, command)()
    elif command == "hearing":
        assert start is not None
        with parallel.workers(workers, sys.argv[1:]):
            recipe.hearing(start)
    elif command == "data":
        recipe.data()
    if not parallel.is_worker():
        if command in ("export", "all"):
            recipe.export()
        if command in ("confidence", "all"):
            recipe.confidence(recipe.directory / "nano", folders)
        if command in ("evaluate", "all"):
            recipe.evaluate(count)


def _sizes(directory: Path, command: str) -> Sizes:
    """How much data a run has: what its first command took."""
    path = directory / "sizes.json"
    if path.exists():
        return Sizes(**json.loads(path.read_text(encoding="utf-8")))
    sizes = {"vocoder": vocoder.SIZES, "hearing": lm.HEARING_SIZES}.get(command, Sizes())
    if not parallel.is_worker():
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(sizes), indent=2) + "\n", encoding="utf-8")
    return sizes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    known = (*COMMANDS, *FURTHER, SETS)
    parser.add_argument("command", nargs="?", choices=known)
    run_help = "directory of data, states, results"
    parser.add_argument("--run", type=Path, default=Path("training_output"), help=run_help)
    start = "exported pair (lm/ and codec/) to go on from, in a new directory"
    parser.add_argument("--start", type=Path, help=start)
    foreign = "folder of recordings of people who say nothing of the domain; may be repeated"
    parser.add_argument("--foreign", type=Path, action="append", default=[], help=foreign)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="to train on, such as cuda")
    numbers = {
        "--threads": "of torch, over all processes; by default all cores",
        "--workers": "processes that train one model together; on a CPU one a core",
        "--steps": "of the command's training, in place of the recipe's",
    }
    for option, meaning in numbers.items():
        parser.add_argument(option, type=int, help=meaning)
    output = "folder that sets are written into"
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help=output)
    count = "utterances a measurement of evaluate, items a set of sets"
    parser.add_argument("--count", type=int, default=200, help=count)
    works = "a few steps of everything, to see that it works"
    parser.add_argument("--smoke", action="store_true", help=works)
    args = parser.parse_args()
    if bool(args.command) == args.smoke:
        parser.error(f"give a command ({', '.join(known)}) or --smoke")
    if (args.command == SETS) != (args.output is not None):
        parser.error("sets and -o DIR go together")
    if args.command in FURTHER and not args.start:
        parser.error(f"{args.command} needs --start PAIR, such as mimo_fast/assets/nano")
    if args.workers is None:
        args.workers = min(MOST_WORKERS, torch.get_num_threads()) if args.device == "cpu" else 1
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.smoke:
            smoke(args.seed, args.workers)
            return 0
        steps = {args.command: args.steps} if args.steps else {}
        if args.command == "confidence" and args.start:
            recipe = Recipe(args.run, args.seed, args.device, Sizes(), steps)
            recipe.confidence(args.start, args.foreign)
            return 0
        if args.command == SETS:
            write_sets(args.output, args.count, args.seed)
            print(f"wrote {args.output}", file=sys.stderr)
            return 0
        if args.start and not parallel.is_worker():
            start_from(args.start, args.run)
        sizes = _sizes(args.run, args.command)
        recipe = Recipe(args.run, args.seed, args.device, sizes, steps)
        run(recipe, args.command, args.count, args.workers, args.foreign, args.start)
    except KeyboardInterrupt:
        if not parallel.is_worker():
            print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (MimoFastError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
