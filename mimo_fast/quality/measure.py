"""Everything that a quality report holds, measured: one model after the other.

The full format is loaded first: its replies are what the others are compared on. It is loaded once
more at the end where it is also who listens to what all have said.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.writing import save_wav
from mimo_fast.bench.environment import environment
from mimo_fast.bench.meters import PeakMemory
from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.items import Recogniser
from mimo_fast.evaluation.voices import Resemblyzer
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.quality import judged
from mimo_fast.quality.advice import WORDED, Bounds, Candidate, advice
from mimo_fast.quality.codecs import compare_codec, compare_streams, round_trip
from mimo_fast.quality.formats import (
    can,
    pace,
    speak_all,
    transcripts,
    voices_of,
    weight_bytes,
)
from mimo_fast.quality.heads import Head, compare, own_sequences, teacher_forced
from mimo_fast.quality.losses import Loss, mean_loss, word_loss
from mimo_fast.quality.material import Recording

FORMATS = ("int8", "int4")
"""Compared by default; nf4 is another."""

COMPARED = 16
"""Recordings and texts whose heads and streams are compared: the scores of one reply are 30 MB in
the published vocabulary."""

AUDIO = "audio"

Load = Callable[[Any], MimoAudio]
"""Quantization, None for none -> the pair in it."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        recordings, texts: To hear and to say.
        formats: Beside the full one.
        recogniser: Who hears the speech; None for the full format itself. `listener` is its name.
        language: Of recordings and texts, "en" or "zh".
        folder: Where what is said is written.
        seed, most: Of what is said, and its groups at most; None for a minute.
    """

    recordings: Sequence[Recording]
    texts: Sequence[str]
    formats: Sequence[str]
    folder: Path
    language: str = "en"
    recogniser: Recogniser | None = None
    listener: str | None = None
    seed: int = 0
    most: int | None = None
    bounds: Bounds = field(default_factory=Bounds)


def measure(study: Study, load: Load, device: torch.device) -> Record:
    """The report of a study, as JSON values; advice and reasons are among them."""
    study.folder.mkdir(parents=True, exist_ok=True)
    at_start = environment(device)
    found: dict[str, Record] = {}
    files: dict[str, list[Path | None]] = {}
    peak = PeakMemory(device)
    model = load(None)
    name = str(model.lm.dtype).removeprefix("torch.")
    speaks, transcribes = bool(study.texts) and can(model, "tts_sft"), can(model, "asr_sft")
    lessons = [*own_sequences(model, _waves(study), study.texts[:COMPARED])]
    reference = [teacher_forced(model.lm, each) for each in lessons]
    voices = voices_of(model, study.recordings, study.texts)
    found[name], files[name] = _one_format(model, study, name, voices, speaks, peak)
    codec, channels = model.codec, model.lm.config.channels
    codes = [codec.encode(wav, channels) for wav in _waves(study)]
    streams = compare_streams(codec, codes) if codes else None
    trips = {name: _round_trips(codec, study, name, channels)}
    del model
    _free()
    small = None
    if study.recordings:
        quantized = load({"codec": "int8"}).codec
        small = asdict(compare_codec(codec, quantized, _waves(study), channels))
        trips["int8"] = _round_trips(quantized, study, "int8", channels)
        del quantized
    del codec
    for other in study.formats:
        _free()
        peak = PeakMemory(device)
        model = load(other)
        heads = compare(reference, [teacher_forced(model.lm, each) for each in lessons])
        found[other], files[other] = _one_format(model, study, other, voices, speaks, peak)
        found[other]["heads"] = [_head(each) for each in heads]
        del model
    _free()
    unmeasured = _reasons(study, speaks, transcribes)
    references = _references(study, found[name])
    for each in found.values():
        heard = each.pop("transcripts")
        if heard:
            texts = [text for text, _ in references]
            each["hearing"] = judged.words_of(heard, texts, study.language)
    if "speech" not in unmeasured:
        _hear(study, load, found, files)
    _judge(study, found, files, trips, voices, unmeasured)
    report: Record = {
        "kind": "quality",
        "environment": at_start,
        "full": name,
        "seed": study.seed,
        "language": study.language,
        "recogniser": study.listener or f"the model itself, in {name}",
        "recordings": [
            {"file": each.path.name, "seconds": each.seconds, "reference": text, "from": source}
            for each, (text, source) in zip(study.recordings, references, strict=True)
        ],
        "texts": [*study.texts] if speaks else [],
        "voices": [voice and voice.path.name for voice in voices] if speaks else [],
        "bounds": asdict(study.bounds),
        "formats": found,
        "codecs": {"int8": small, "round_trips": trips},
        "streaming": streams,
        "not_measured": unmeasured,
    }
    for other in study.formats:
        losses = losses_of(found[other], found[name], study.bounds)
        found[other]["losses"] = {
            measure: asdict(loss) | {"verdict": loss.verdict, "needed": loss.needed}
            for measure, loss in losses.items()
        }
    report["advice"] = asdict(advice(candidates(report), study.bounds))
    return report


def losses_of(found: Mapping[str, Any], full: Mapping[str, Any], bounds: Bounds) -> dict[str, Loss]:
    """Losses of a format's record beside the full one's, of what was measured in both."""
    losses = dict[str, Loss | None]()
    for name in WORDED:
        if name in found and name in full:
            ours, theirs = found[name], full[name]
            counts = ours["errors"], theirs["errors"], theirs["words"]
            losses[name] = word_loss(*counts, bounds.words)
    for name in ("voice", "sound"):
        if name in found and name in full:
            values = found[name]["values"], full[name]["values"]
            losses[name] = mean_loss(*values, bounds.of(name))
    return {name: loss for name, loss in losses.items() if loss is not None}


def candidates(report: Mapping[str, Any]) -> list[Candidate]:
    """What the rule of advice needs of a report."""
    bounds, formats = Bounds(**report["bounds"]), report["formats"]
    full = formats[report["full"]]
    return [
        Candidate(
            name,
            {} if each is full else losses_of(each, full, bounds),
            _factor(each),
            each["memory"]["weights"],
        )
        for name, each in formats.items()
    ]


def _factor(found: Mapping[str, Any]) -> float | None:
    """Of speech or, where it does not speak, of transcription."""
    spoken: float | None = found["speed"].get("real_time_factor")
    return spoken if spoken is not None else found["speed"].get("hearing_factor")


def _one_format(
    model: MimoAudio,
    study: Study,
    name: str,
    voices: Sequence[Recording | None],
    speaks: bool,
    peak: PeakMemory,
) -> tuple[Record, list[Path | None]]:
    """What one format hears and says; its speed and memory."""
    heard, speed, files = list[str](), Record(), list[Path | None]()
    if study.recordings and can(model, "asr_sft"):
        sounds = [each.wav for each in study.recordings]
        heard, seconds = transcripts(model, sounds, name, study.language, study.seed)
        factors = zip(seconds, study.recordings, strict=True)
        speed["hearing_factor"] = sorted(s / each.seconds for s, each in factors)[len(seconds) // 2]
    if speaks:
        how = name, study.seed, study.most
        files = speak_all(model, study.texts, voices, study.folder / AUDIO / name, *how)
        speed |= pace(model, study.texts, voices, *how)
    memory = {"weights": weight_bytes(model), "peak": peak.bytes}
    return {"transcripts": heard, "speed": speed, "memory": memory}, files


def _waves(study: Study) -> list[Tensor]:
    return [each.wav for each in study.recordings[:COMPARED]]


def _round_trips(codec: Any, study: Study, name: str, channels: int) -> Record:
    """Recordings through the codec, as files."""
    folder = study.folder / AUDIO / f"codec-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, wav in enumerate(tqdm(_waves(study), desc=f"codec {name}", leave=False, disable=None)):
        files.append(folder / f"recording-{i + 1:03}.wav")
        save_wav(files[-1], round_trip(codec, wav, channels), codec.sample_rate)
    return {"files": files}


def _references(study: Study, full: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was said in each recording, and whether that was given or heard by the full format."""
    heard = full["transcripts"] or [""] * len(study.recordings)
    return [
        (each.words, "given") if each.words is not None else (text, "heard by the full format")
        for each, text in zip(study.recordings, heard, strict=True)
    ]


def _hear(
    study: Study, load: Load, found: dict[str, Record], files: Mapping[str, list[Path | None]]
) -> None:
    """What is heard in the speech of each format, by the same ears."""
    model = None if study.recogniser is not None else load(None)
    for name, said in files.items():
        there = [file for file in said if file is not None]
        if model is not None:
            heard, _ = transcripts(model, there, f"speech of {name}:", study.language, study.seed)
        else:
            assert study.recogniser is not None
            bar = tqdm(there, desc=f"speech of {name} is heard", leave=False, disable=None)
            heard = [study.recogniser(file, study.language) for file in bar]
        known = dict(zip(there, heard, strict=True))
        texts = ["" if file is None else known[file] for file in said]
        found[name]["speech"] = judged.words_of(texts, study.texts, study.language)


def _judge(
    study: Study,
    found: dict[str, Record],
    files: Mapping[str, list[Path | None]],
    trips: dict[str, Record],
    voices: Sequence[Recording | None],
    unmeasured: dict[str, str],
) -> None:
    """Adds voice and sound to the records; what is missing gets its reason."""
    try:
        _judge_voices(study, found, files, trips, voices)
    except EvaluationError as error:
        unmeasured["voice"] = str(error)
    try:
        for name, said in files.items():
            if said:
                found[name]["sound"] = judged.sound_of(said, name)
        for name, trip in trips.items():
            trip["sound"] = judged.sound_of(trip["files"], f"the codec in {name}")
    except EvaluationError as error:
        unmeasured["sound"] = str(error)
    for trip in trips.values():
        trip["files"] = [str(file.relative_to(study.folder)) for file in trip["files"]]


def _judge_voices(
    study: Study,
    found: dict[str, Record],
    files: Mapping[str, list[Path | None]],
    trips: dict[str, Record],
    voices: Sequence[Recording | None],
) -> None:
    encoder = Resemblyzer()
    heard = [each.path for each in study.recordings]
    recorded = judged.embeddings(heard, encoder, "the recordings")
    spoken = {name: judged.embeddings(said, encoder, name) for name, said in files.items() if said}
    full = next(iter(found))
    if full in spoken:
        own = dict(zip(heard, recorded, strict=True))
        references = judged.others(spoken[full])
        if any(voices):
            references = [voice and own[voice.path] for voice in voices]
        for name, each in spoken.items():
            found[name]["voice"] = judged.likeness(each, references)
        pairs = {"recordings": recorded, "speech": spoken[full]}
        found[full]["voices"] = {
            f"{a} and {b}": judged.closeness(pairs[a], pairs[b], a == b)
            for a, b in product(pairs, repeat=2)
            if a <= b
        }
    for name, trip in trips.items():
        made = judged.embeddings(trip["files"], encoder, f"the codec in {name}")
        trip["voice"] = judged.likeness(made, recorded[: len(made)])


def _reasons(study: Study, speaks: bool, transcribes: bool) -> dict[str, str]:
    """Why parts are not there."""
    reasons, untrained = dict[str, str](), "the model was not trained to transcribe"
    if not study.recordings:
        reasons["hearing"] = reasons["streaming"] = "no recordings were given (--audio)"
    elif not transcribes:
        reasons["hearing"] = untrained
    if not speaks:
        missing = "the model was not trained to say texts"
        if not study.texts:
            missing = "no texts were given (--text, or the words of recordings)"
        reasons |= dict.fromkeys(("speech", "voice", "sound"), missing)
    elif not transcribes and study.recogniser is None:
        reasons["speech"] = f"{untrained}, so nobody listens: give --recogniser"
    return reasons


def _head(head: Head) -> Record:
    """NaN, of a head without predictions, is no JSON."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(head).items()
    }


def _free() -> None:
    """A model is freed with the circles that it is part of."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
