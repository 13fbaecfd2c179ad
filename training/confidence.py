"""Calibrates how confident a pair is of its replies, on the domain's speech and on foreign speech.

The domain is heard in the voice that training never used, its sentences held out of training; the
dialogue's questions, of which all were trained on, in that voice too. Foreign is any speech that is
not of the domain: sentences of `foreign.txt` by the synthesizers, in the held-out voice too, and
recordings of people in the folders of `--foreign`. The evidence is that of
`mimo_fast/runtime/confidence.py`, its factors are those of a logistic regression in which domain
and foreign speech weigh alike, and the warning comes below what `FALSE_ALARMS` of the domain's
utterances get.

One half of everything calibrates. The other half, drawn with other seeds and of other files, says
how often a warning comes: nothing is chosen by it.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.bench.environment import environment
from mimo_fast.checkpoint.folder import write_json
from mimo_fast.config import Calibration
from mimo_fast.errors import MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.confidence import assess, evidence
from mimo_fast.text.tasks import TASKS

from . import data, domain
from .evaluate import fingerprint
from .synthesis import RATE, Manner, SynthesisError, has_espeak, synthesize

FOREIGN = Path(__file__).with_name("foreign.txt")
VOICES = ("rms", "slt", "awb", "kal16", "espeak en-us+m3", "espeak en-gb+f2")

TASK_NAMES = {"asr": "asr_sft", "spoken_dialogue": "spoken_dialogue_sft"}
"""A task whose replies are judged, by the key of its samplers."""

REPLY_LIMITS = {"asr": [16, 5], "spoken_dialogue": [128, 0]}
"""Groups, and groups more a second heard, at which a reply ends by default. The fastest speech of
the domain, spelled letters, has 5 words a second; its longest answer takes 40 groups."""

FALSE_ALARMS = 0.01
"""Share of the calibration's domain speech that may be warned of: half of the aim of 2%, since
other speech gives another share."""

SHORTEST = 1.0
"""Seconds of a recording of foreign speech; shorter ones are single words."""

OF_THE_DOMAIN = frozenset({"digits", "letters", "phonetic", "silence"})
"""Folders of a telephone's prompts that hold words of the domain, or nothing."""

NOT_SPEECH = ("beep", "tone")
"""Parts of names of files that hold no speech."""

RIDGE = 1e-3
"""Penalty of the regression, on factors of evidence in units of its deviation."""

AUDIO = frozenset({".flac", ".mp3", ".ogg", ".wav"})

Utterance = tuple[str, Tensor]
"""What kind of speech, and its waveform [n] at 24 kHz."""


@dataclass(frozen=True)
class Counts:
    """Utterances of each half: of the domain by task, and recordings of each foreign folder.

    A question that was trained on is nearly certain, a sentence that was not less so.
    """

    asr: int = 600
    spoken_dialogue: int = 200
    recordings: int = 60


def domain_speech(task: str, half: int, count: int) -> Iterator[Utterance]:
    """Held-out speech of a task's domain."""
    if task == "asr":
        for i in range(count):
            wanted = data.item("unheard", i, 1 + half)
            yield "unheard", synthesize(domain.spoken(wanted.text), wanted.manner).wav
        return
    questions = list(domain.dialogue())
    for i in range(count):
        rng = random.Random(f"confidence/{half}/{i}")
        manner = Manner(data.UNHEARD_VOICE, rng.uniform(0.9, 1.15), rng.uniform(0.9, 1.1))
        yield "questions", synthesize(questions[i % len(questions)], manner).wav


def foreign_speech(half: int, folders: Sequence[Path], count: int) -> Iterator[Utterance]:
    """Speech that is of no task's domain."""
    for i, text in enumerate(FOREIGN.read_text(encoding="utf-8").splitlines()):
        voice = VOICES[(i + half) % len(VOICES)]
        if i % 2 == half and (has_espeak() or not voice.startswith("espeak")):
            # flite's segments of some words are not those of the words alone.
            with suppress(SynthesisError, StopIteration):
                yield "synthesized", synthesize(text, Manner(voice)).wav
    for folder in folders:
        found = 0
        for path in recordings(folder, half):
            wav = load_audio(path, RATE)
            if len(wav) >= SHORTEST * RATE:
                yield folder.name, wav
                found += 1
            if found == count:
                break


def recordings(folder: Path, half: int) -> list[Path]:
    """Files of one half, in an order that says nothing of them."""
    found = []
    for path in folder.rglob("*"):
        named = f"{path.parent.name}/{path.stem}"
        if path.suffix.lower() not in AUDIO or path.parent.name in OF_THE_DOMAIN:
            continue
        if any(part in path.stem for part in NOT_SPEECH):
            continue
        digest = hashlib.sha256(named.encode()).hexdigest()
        if int(digest[:2], 16) % 2 == half:
            found.append((digest, path))
    return [path for _, path in sorted(found)]


def evidence_of(model: MimoAudio, task: str, wav: Tensor, seed: int) -> tuple[float, float, float]:
    """Entropy, surprise and share lost of a reply to a recording, as the package measures them."""
    pipeline, spec = model.pipeline, TASKS[TASK_NAMES[task]]
    packed = pipeline.packed(spec.prompt(pipeline.context(seed), wav), task)
    assert packed.hearing is not None
    sequence = pipeline.sequence(seed)
    sequence.add(packed)
    stops = spec.stop_ids(pipeline.tokenizer.special)
    reply = pipeline.decode(sequence, pipeline.samplers(task), stops)
    for _ in reply:
        pass
    entropy, surprise = evidence(pipeline.lm, sequence.ids, reply.taken)
    return entropy, surprise, float(packed.hearing.loss)


def fit(domain_rows: Tensor, foreign_rows: Tensor) -> tuple[list[float], float]:
    """Logistic regression over rows [n, 3] of (entropy, surprise, log of the loss), float64.

    Returns:
        The factors and the bias.
    """
    rows = torch.cat((domain_rows, foreign_rows))
    labels = torch.cat((torch.ones(len(domain_rows)), torch.zeros(len(foreign_rows)))).double()
    weights = torch.where(labels > 0, 0.5 / len(domain_rows), 0.5 / len(foreign_rows))
    mean, deviation = rows.mean(0), rows.std(0)
    units = torch.cat(((rows - mean) / deviation, torch.ones(len(rows), 1).double()), dim=1)
    penalty = torch.tensor([RIDGE] * rows.shape[1] + [0.0]).double()
    found = torch.zeros(units.shape[1]).double()
    for _ in range(100):
        guess = torch.sigmoid(units @ found)
        slope = units.T @ (weights * (guess - labels)) + penalty * found
        bend = units.T * (weights * guess * (1 - guess)) @ units + torch.diag(penalty)
        found = found - torch.linalg.solve(bend, slope)
    factors = found[:-1] / deviation
    return factors.tolist(), float(found[-1] - factors @ mean)


def calibrate(
    load: Callable[[], MimoAudio], pair: Path, folders: Sequence[Path], counts: Counts, target: Path
) -> dict[str, Any]:
    """Calibrates both tasks, writes PAIR/lm/config.json and what was found to `target`.

    Raises:
        MimoFastError: a folder holds no recordings.
    """
    model = load()
    for folder in folders:
        if not recordings(folder, 0) or not recordings(folder, 1):
            raise MimoFastError(f"{folder} holds no recordings in {', '.join(sorted(AUDIO))}")
    results: dict[str, Any] = {"weights": fingerprint(model), "environment": environment("cpu")}
    found = dict[str, Calibration]()
    for task in TASK_NAMES:
        # So that recordings are measured.
        unknown = Calibration(task, 0.0, 0.0, 0.0, 0.0, 0.0)
        limits = tuple((name, *map(float, limit)) for name, limit in REPLY_LIMITS.items())
        model.lm.config = replace(model.lm.config, confidence=(unknown,), reply_limits=limits)
        measured = [_measure(model, task, half, folders, counts) for half in (0, 1)]
        found[task] = _calibration(task, measured[0])
        results[task] = {
            "calibration": asdict(found[task]),
            "calibrated_on": {kind: len(rows) for kind, rows in measured[0].items()},
            "warned": _warned(found[task], measured[1]),
        }
        write_json(target, results)
    model.lm.config = replace(model.lm.config, confidence=tuple(found.values()))
    results["domain_transcripts"] = mistaken(model, counts.asr)
    write_json(target, results)
    state(pair / "lm" / "config.json", found)
    return results


def mistaken(model: MimoAudio, count: int) -> dict[str, int]:
    """Of the evaluation's transcripts of the domain: how many are wrong, and which warnings were.

    A warning of a wrong transcript is no false alarm.
    """
    wrong = warned = both = 0
    for i in range(count):
        wanted = data.item("unheard", i, 2)
        text = model.asr_sft(synthesize(domain.spoken(wanted.text), wanted.manner).wav, seed=i)
        wrong += str(text) != wanted.text
        warned += text.warning is not None
        both += text.warning is not None and str(text) != wanted.text
    return {"utterances": count, "wrong": wrong, "warned": warned, "warned_and_wrong": both}


def state(path: Path, found: dict[str, Calibration]) -> None:
    """Writes calibrations into a config.json."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["confidence"] = {
        task: {
            name: float(f"{value:.6g}") for name, value in asdict(each).items() if name != "task"
        }
        for task, each in found.items()
    }
    raw["reply_limits"] = REPLY_LIMITS
    write_json(path, raw)


Rows = dict[str, list[tuple[float, float, float]]]
"""Evidence by the kind of speech."""


def _measure(
    model: MimoAudio, task: str, half: int, folders: Sequence[Path], counts: Counts
) -> Rows:
    rows: Rows = {}
    speech = (
        ("domain", domain_speech(task, half, getattr(counts, task))),
        ("foreign", foreign_speech(half, folders, counts.recordings)),
    )
    with tqdm(desc=f"{task}, {'evaluation' if half else 'calibration'}", unit="utterance") as bar:
        for side, utterances in speech:
            for i, (kind, wav) in enumerate(utterances):
                rows.setdefault(f"{side}: {kind}", []).append(evidence_of(model, task, wav, i))
                bar.update(1)
    return rows


def _sides(rows: Rows) -> tuple[list[tuple[float, float, float]], ...]:
    return tuple(
        [row for kind, each in rows.items() if kind.startswith(side) for row in each]
        for side in ("domain", "foreign")
    )


def _calibration(task: str, rows: Rows) -> Calibration:
    sides = [torch.tensor(side, dtype=torch.float64) for side in _sides(rows)]
    for side in sides:
        side[:, 2] = side[:, 2].clamp(min=1e-6).log()
    factors, bias = fit(*sides)
    known = Calibration(task, *factors, bias, 0.0)
    values = sorted(assess(known, *row).value for row in _sides(rows)[0])
    return replace(known, warns_below=values[round(FALSE_ALARMS * len(values))])


def _warned(calibration: Calibration, rows: Rows) -> dict[str, Any]:
    """Of each kind of speech, and of both sides, the utterances and the share warned of."""
    sides = dict(zip(("domain", "foreign"), _sides(rows), strict=True))
    return {
        kind: {
            "utterances": len(each),
            "warned": round(
                sum(assess(calibration, *row).warning is not None for row in each) / len(each), 4
            ),
        }
        for kind, each in (sides | rows).items()
    }


def load_pair(pair: Path) -> MimoAudio:
    """The pair on a CPU, as users have it."""
    return mimo_fast.load(pair / "lm", pair / "codec", "cpu")
