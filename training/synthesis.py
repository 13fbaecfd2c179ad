"""Sentences -> speech, by flite, festival, espeak-ng and Pico: the source of the training data.

Rate and pitch are settings of their own. `warp` plays the result faster or slower through the
package's resampler, which moves the formants as another speaker's vocal tract does.
"""

import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import accumulate, chain, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.resample import resample
from mimo_fast.errors import MimoFastError

RATE = 24_000
SYNTHESIZED_RATE = 16_000

PHONES = """
    aa ae ah ao aw ax axr ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th
    uh uw v w y z zh
""".split()  # noqa: SIM905

INSTALL = {
    "flite": "apt-get install flite",
    "festival": "apt-get install festival festvox-kdlpc16k",
    "espeak-ng": "apt-get install espeak-ng",
    "pico": "pip install ttspico",
}
"""How to install each synthesizer."""

ESPEAK = "espeak "
"""Prefix of the voices of espeak-ng: "espeak en-us+m3"."""

ESPEAK_WORDS, ESPEAK_PITCH = 165, 50
"""Words a minute and pitch (0 to 99) of espeak-ng, where they are not varied."""

FESTIVAL = {"ked": "voice_ked_diphone"}
"""Festival's own names of its voices."""

PICO = {"pico us": "en-US", "pico gb": "en-GB"}
"""Pico's own names of its voices."""

SCALE = 0.5
"""Gain of festival and Pico, which would clip at other sampling rates."""

PITCH = {"slt": 178, "awb": 130, "kal16": 105, "rms": 95, "ked": 105}
"""Mean pitch of each voice in Hz, as flite and festival speak by default."""

_PICO_IN_USE = Lock()

HURRY = 0.3
"""Fraction of a grid step: a word longer by less is sped up instead of taking another step."""


class SynthesisError(MimoFastError):
    """Speech could not be made."""


@dataclass(frozen=True)
class Manner:
    """How a sentence is spoken.

    Args:
        voice: of flite or festival, a key of `PITCH`, of Pico, a key of `PICO`, or of espeak-ng,
            see `ESPEAK`.
        stretch: of durations, relative to the voice's own.
        pitch: mean, relative to the voice's own.
        warp: playback speed of the result.
        grid: seconds, for flite: each word starts a multiple of them after the first one, and its
            rate is adapted to that.
    """

    voice: str
    stretch: float = 1.0
    pitch: float = 1.0
    warp: float = 1.0
    grid: float = 0.0


@dataclass(frozen=True)
class Utterance:
    """float32 samples [n] at 24 kHz, and the spoken phones as indices into `PHONES`.

    Args:
        words: which of the phones each word starts with.
        starts, ends: the samples at which each phone starts and ends, where they are known.
    """

    wav: Tensor
    phones: list[int]
    words: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def has_flite() -> bool:
    return shutil.which("flite") is not None


def has_espeak() -> bool:
    return shutil.which("espeak-ng") is not None


def has_festival() -> bool:
    return shutil.which("text2wave") is not None


def has_pico() -> bool:
    return find_spec("ttspico") is not None


def synthesize(text: str, manner: Manner) -> Utterance:
    """Speech; without its synthesizer, tones, which serve only to try the training out."""
    speak, here = _flite, has_flite
    if manner.voice.startswith(ESPEAK):
        speak, here = _espeak, has_espeak
    elif manner.voice in FESTIVAL:
        speak, here = _festival, has_festival
    elif manner.voice in PICO:
        speak, here = _pico, has_pico
    return (speak if here() else tones)(text, manner)


def _espeak(text: str, manner: Manner) -> Utterance:
    words, pitch = round(ESPEAK_WORDS / manner.stretch), round(ESPEAK_PITCH * manner.pitch)
    voice = manner.voice.removeprefix(ESPEAK)
    command = ["espeak-ng", "-v", voice, "-s", str(words), "-p", str(pitch), "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        problem = done.stderr.decode(errors="replace").strip()[:80]
        raise SynthesisError(f"espeak-ng failed at {text!r} ({problem}): {INSTALL['espeak-ng']}")
    return Utterance(load_audio(done.stdout, RATE), _usual_phones(text))


def _festival(text: str, manner: Manner) -> Utterance:
    pitch = PITCH[manner.voice] * manner.pitch / manner.warp
    settings = (
        f"({FESTIVAL[manner.voice]})",
        f"(Parameter.set 'Duration_Stretch {manner.stretch * manner.warp:.4f})",
        f"(set! int_lr_params '((target_f0_mean {pitch:.1f}) (target_f0_std 14)"
        " (model_f0_mean 170) (model_f0_std 34)))",
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "speech.wav")
        options = [part for setting in settings for part in ("-eval", setting)]
        command = ["text2wave", *options, "-scale", str(SCALE), "-o", str(path)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            problem = f"festival failed at {text!r} ({done.stderr.strip()[:80]})"
            raise SynthesisError(f"{problem}: {INSTALL['festival']}")
        return Utterance(_warped(load_audio(path, SYNTHESIZED_RATE), manner), _usual_phones(text))


def _pico(text: str, manner: Manner) -> Utterance:
    engine = _pico_engine(PICO[manner.voice])
    with _PICO_IN_USE:
        engine.rate = round(100 / (manner.stretch * manner.warp))
        engine.pitch = round(100 * manner.pitch / manner.warp)
        spoken = engine.speak(text)
    wav = torch.frombuffer(bytearray(spoken), dtype=torch.int16).float() * (SCALE / 2**15)
    return Utterance(_warped(wav, manner), _usual_phones(text))


@cache
def _pico_engine(language: str) -> Any:
    from ttspico import TtsEngine

    return TtsEngine(language)


def _warped(wav: Tensor, manner: Manner) -> Tensor:
    """Samples at 16 kHz -> at 24 kHz, played at the manner's speed."""
    return resample(wav, round(SYNTHESIZED_RATE * manner.warp / 800) * 800, RATE)


def _usual_phones(text: str) -> list[int]:
    """Phones of the words alone: near enough to any synthesizer's, and one set for all."""
    if has_flite():
        return _indices([phone for word in text.split() for phone in pronunciation(word)])
    return []


def _flite(text: str, manner: Manner) -> Utterance:
    settings = {
        "duration_stretch": manner.stretch * manner.warp,
        "int_f0_target_mean": PITCH[manner.voice] * manner.pitch / manner.warp,
    }
    options, spoken = ["-voice", manner.voice], text
    for name, value in settings.items():
        options += ["--setf", f"{name}={value:.4f}"]
    options.append("-psdur")
    if manner.grid:
        usual = _segments([*options, "-t", text, "-o", "none"], text)
        paces = zip(text.split(), _paces(usual, manner.grid * manner.warp), strict=True)
        paced = (f'<prosody rate="{pace:.4f}">{word}</prosody>' for word, pace in paces)
        options, spoken = [*options, "-ssml"], f"<speak>{' '.join(paced)}</speak>"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "speech.wav")
        found = _segments([*options, "-t", spoken, "-o", str(path)], text)
        wav = _warped(load_audio(path, SYNTHESIZED_RATE), manner)
    times = found.starts, found.ends
    starts, ends = ([round(second * RATE / manner.warp) for second in each] for each in times)
    return Utterance(wav, _indices(found.phones), found.words, starts, ends)


@dataclass(frozen=True)
class _Segments:
    """Phones, which of them each word starts with, and the start and end of each in seconds."""

    phones: list[str]
    words: list[int]
    starts: list[float]
    ends: list[float]


def _segments(options: Sequence[str], text: str) -> _Segments:
    """Segments that flite reports of its own speech, with `-psdur`."""
    names, seconds = zip(*(part.rsplit(":", 1) for part in _run_flite(options)), strict=True)
    ends, spoken = [*map(float, seconds)], [i for i, name in enumerate(names) if name in PHONES]
    phones = [names[i] for i in spoken]
    words = word_places(phones, [pronunciation(word) for word in text.split()])
    starts = [ends[i - 1] if i else 0.0 for i in spoken]
    return _Segments(phones, words, starts, [ends[i] for i in spoken])


def _paces(found: _Segments, grid: float) -> list[float]:
    """Rates of the words that make the next one start on the grid; pauses do not change."""
    paces = []
    for first, following in pairwise((*found.words, len(found.phones))):
        end = found.ends[following - 1]
        length = end - found.starts[first]
        pause = found.starts[following] - end if following < len(found.phones) else 0.0
        steps = max(1, math.ceil((length + pause) / grid - HURRY))
        paces.append(length / max(steps * grid - pause, length / 2))
    return paces


def _run_flite(options: Sequence[str]) -> list[str]:
    """flite's output, split at whitespace."""
    done = subprocess.run(["flite", *options], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        problem = f"flite failed at {options} ({done.stderr.strip()[:80]})"
        raise SynthesisError(f"{problem}: {INSTALL['flite']}")
    return done.stdout.split()


@lru_cache(maxsize=4096)
def pronunciation(word: str) -> tuple[str, ...]:
    """The phones of a word said alone."""
    said = _run_flite(["-voice", "kal16", "-ps", "-t", word, "-o", "none"])
    return tuple(phone for phone in said if phone in PHONES)


def word_places(phones: Sequence[str], words: Sequence[Sequence[str]]) -> list[int]:
    """Positions in the phones where words start, though in a sentence some phones differ."""
    starts, alone = [0, *accumulate(map(len, words))][:-1], [*chain.from_iterable(words)]
    matcher = SequenceMatcher(None, alone, phones, autojunk=False)
    changes = [(i, last, j, end) for _, i, last, j, end in matcher.get_opcodes() if last > i]
    spans = [next(each for each in changes if each[0] <= start < each[1]) for start in starts]
    return [
        min(j + start - i, max(end - 1, j), len(phones) - 1)
        for start, (i, _, j, end) in zip(starts, spans, strict=True)
    ]


def _indices(phones: Sequence[str]) -> list[int]:
    known = {phone: i for i, phone in enumerate(PHONES)}
    return [known[phone] for phone in phones if phone in known]


def tones(text: str, manner: Manner) -> Utterance:
    """A chord of 60 ms for each letter, which decides its upper note: no speech at all."""
    letters = [ord(letter) - ord("a") for letter in text if letter.isalpha()]
    samples = round(0.06 * RATE * manner.stretch)
    time = torch.arange(samples) / RATE
    base = 2 * math.pi * PITCH.get(manner.voice, 140) * manner.pitch
    fade = torch.sin(math.pi * torch.arange(samples) / samples)
    low = torch.sin(base * time)
    parts = [fade * (low + torch.sin(base * (3 + letter) * time)) / 4 for letter in letters]
    words = [*accumulate((sum(map(str.isalpha, word)) for word in text.split()), initial=0)][:-1]
    starts = [i * samples for i in range(len(letters))]
    ends = [start + samples for start in starts]
    phones = [letter % len(PHONES) for letter in letters]
    return Utterance(torch.cat(parts), phones, words, starts, ends)
