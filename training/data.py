"""The training data: which sentences are spoken how, and the speech itself in shards on disk.

    speech      sentences, and words in random order, in the six training voices; rate, pitch and
                speaker size are drawn for each utterance
    replies     sentences in the reply's voice, each in one of the styles that can be asked for
    readings    sentences, and words in random order, in the reply's voice, in the plain style
    spellings   letters in the reply's voice
    letters     letters spoken as in `speech`
    words       every word of the domain alone, spoken as in `speech`
    questions   the dialogue's questions, spoken as in `speech`
    answers     the dialogue's answers, in the reply's voice
    echoes      answers spoken as in `speech`: inputs to be repeated in the reply's voice
    strangers, strange_words, strange_questions
                like `speech`, `words` and `questions`, by the many speakers of another synthesizer;
                less natural, and used only as input
    unheard     held-out sentences in a voice that training never uses
    unsaid      held-out sentences in the reply's voice: the reference for text to speech

Utterance i of a part is a function of (seed, part, i) alone, so an interrupted run can continue.
"""

import random
import string
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from . import domain
from .synthesis import ESPEAK, Manner, Utterance, synthesize

VOICES = ("slt", "awb", "kal16", "ked", "pico us", "pico gb")
SPEAKERS = """
    m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5
    Alex Andy Annie Denis Diogo Gene Hugo Jacky Lee Marco Michael adam antonio belinda benjamin
    boris david ed edward iven john klatt klatt2 klatt3 linda max miguel pablo paul pedro quincy
    rob robert sandro shelby steph travis victor zac
""".split()  # noqa: SIM905
STRANGERS = tuple(
    f"{ESPEAK}{accent}+{speaker}"
    for accent in ("en-us", "en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland")
    for speaker in SPEAKERS
)
UNHEARD_VOICE = "rms"
REPLY_VOICE = "slt"

FRAME, PATCH = 0.04, 0.16
"""Seconds of one frame of codes, and of a group of frames, one step of the language model."""

STYLES = {
    "normal": Manner(REPLY_VOICE, grid=PATCH),
    "slow": Manner(REPLY_VOICE, stretch=1.35, grid=PATCH),
    "fast": Manner(REPLY_VOICE, stretch=0.75, grid=PATCH),
    "high": Manner(REPLY_VOICE, pitch=1.35, grid=PATCH),
    "low": Manner(REPLY_VOICE, pitch=0.72, grid=PATCH),
}
"""Words of replies begin where patches do: a word has nearly the same patches everywhere."""

LISTED_SHARE, LISTED = 0.3, 6
"""Share and largest length of word lists in random order, where only its sound tells a word."""

SPELT = 6
"""Most letters in a row, of letters and spellings."""

ANNOTATIONS = ("phones", "words", "starts", "ends")
"""Fields of an utterance, see `Utterance`."""

SHARD = 100
"""Utterances in a file."""

SYNTHESIZERS = 2
"""Concurrent runs of flite."""


@dataclass(frozen=True)
class Item:
    """One utterance to be made: words, how they are spoken, and the style's name if it has one."""

    text: str
    manner: Manner
    style: str = "normal"


@dataclass(frozen=True)
class Sizes:
    """Utterances in each part of the data."""

    speech: int = 10000
    replies: int = 5000
    words: int = 2000
    questions: int = 1200
    echoes: int = 600
    readings: int = 12000
    strangers: int = 5000
    strange_words: int = 1000
    strange_questions: int = 600
    spellings: int = 2500
    letters: int = 2500
    unheard: int = 200
    unsaid: int = 200

    @property
    def parts(self) -> dict[str, int]:
        return vars(self) | {"answers": len(answers())}


def item(part: str, index: int, seed: int = 0) -> Item:
    """Utterance `index` of a part."""
    rng = random.Random(f"{seed}/{part}/{index}")
    if part.startswith("strange"):
        like = {"strangers": "speech", "strange_words": "words"}.get(part, "questions")
        voice, stretch, pitch = (
            rng.choice(STRANGERS),
            rng.uniform(0.75, 1.25),
            rng.uniform(0.3, 1.7),
        )
        return Item(item(like, index, seed + 1).text, Manner(voice, stretch, pitch))
    if part == "answers":
        return Item(answers()[index], STYLES["normal"])
    if part == "questions":
        return Item(_questions()[index % len(_questions())], _any_manner(rng))
    if part == "echoes":
        return Item(answers()[index % len(answers())], _any_manner(rng))
    if part == "words":
        return Item(domain.vocabulary()[index % len(domain.vocabulary())], _any_manner(rng))
    if part in ("spellings", "letters"):
        return Item(_spelt(rng), STYLES["normal"] if part == "spellings" else _any_manner(rng))
    if part in ("readings", "speech"):
        text = _listed(rng) if rng.random() < LISTED_SHARE else domain.draw_sentence(rng)
        return Item(text, STYLES["normal"] if part == "readings" else _any_manner(rng))
    if part == "unheard":
        return Item(domain.draw_sentence(rng, held_out=True), Manner(UNHEARD_VOICE))
    if part == "unsaid":
        return Item(domain.draw_sentence(rng, held_out=True), STYLES["normal"])
    if part != "replies":
        raise ValueError(f"no part {part!r} of the data")
    style = rng.choice(["normal", *STYLES])
    return Item(domain.draw_sentence(rng), STYLES[style], style)


def _listed(rng: random.Random) -> str:
    """Words in random order."""
    return _jumbled(domain.vocabulary(), 1, LISTED, rng)


def _spelt(rng: random.Random) -> str:
    """Letters in random order."""
    return _jumbled(string.ascii_lowercase, 2, SPELT, rng)


def _jumbled(words: Sequence[str], fewest: int, most: int, rng: random.Random) -> str:
    while domain.is_held_out(text := " ".join(rng.choices(words, k=rng.randint(fewest, most)))):
        continue
    return text


def _any_manner(rng: random.Random) -> Manner:
    voice, stretch, pitch = rng.choice(VOICES), rng.uniform(0.8, 1.25), rng.uniform(0.8, 1.25)
    return Manner(voice, stretch, pitch, warp=rng.choice((0.9, 0.95, 1, 1.05, 1.1)))


@lru_cache
def _questions() -> tuple[str, ...]:
    return tuple(domain.dialogue())


@lru_cache
def answers() -> tuple[str, ...]:
    """The dialogue's answers, each once: utterance i of `answers`."""
    return tuple(dict.fromkeys(domain.dialogue().values()))


class Part:
    """The speech of one part, read shard by shard."""

    def __init__(self, directory: Path, name: str, count: int, seed: int = 0) -> None:
        self.directory, self.name, self.count, self.seed = directory, name, count, seed

    def __len__(self) -> int:
        return self.count

    def item(self, index: int) -> Item:
        return item(self.name, index, self.seed)

    def path(self, shard: int) -> Path:
        return self.directory / f"{self.name}-{shard:04d}.safetensors"

    def __getitem__(self, index: int) -> Utterance:
        """One utterance, with what is known about it."""
        shard, place = divmod(index, SHARD)
        tensors = _open(self.path(shard))
        wav, *rest = (piece(tensors, name, place) for name in ("samples", *ANNOTATIONS))
        return Utterance(wav.float() / 2**15, *(each.tolist() for each in rest))

    def make(self, bar: tqdm) -> None:
        """Writes the missing shards."""
        for shard in range(-(-self.count // SHARD)):
            indices = range(shard * SHARD, min(self.count, (shard + 1) * SHARD))
            if not self.path(shard).exists():
                self._make_shard(shard, indices, bar)
            else:
                bar.update(len(indices))

    def _make_shard(self, shard: int, indices: Sequence[int], bar: tqdm) -> None:
        def speak(index: int) -> Utterance:
            wanted = self.item(index)
            made = synthesize(domain.spoken(wanted.text), wanted.manner)
            bar.update(1)
            return made

        with ThreadPoolExecutor(SYNTHESIZERS) as pool:
            made = list(pool.map(speak, indices))
        tensors = joined("samples", [as_samples(each.wav) for each in made])
        for name in ANNOTATIONS:
            marks = [torch.tensor(getattr(each, name), dtype=torch.int32) for each in made]
            tensors |= joined(name, marks)
        save_whole(self.path(shard), tensors)


def as_samples(wav: Tensor) -> Tensor:
    """Speech [n] as it is kept, int16."""
    return (wav.clamp(-1, 1 - 2**-15) * 2**15).round().to(torch.int16)


def make(directory: Path, sizes: Sizes, seed: int = 0) -> dict[str, Part]:
    """All speech; only missing shards are synthesized."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {name: Part(directory, name, count, seed) for name, count in sizes.parts.items()}
    total = sum(map(len, found.values()))
    with tqdm(total=total, desc="speech", unit="utterance", miniters=1) as bar:
        for part in found.values():
            part.make(bar)
    return found


def save_whole(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)


def joined(name: str, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors [n_i] as two of a file: `name` concatenates them, the other has their ends."""
    ends = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    return {name: torch.cat(list(pieces)), f"{name}.ends": ends}


def piece(tensors: dict[str, Tensor], name: str, place: int) -> Tensor:
    """One of the tensors that `joined` joined."""
    start, end = tensors[f"{name}.ends"][place : place + 2].tolist()
    return tensors[name][start:end]


@lru_cache(maxsize=256)
def _open(path: Path) -> dict[str, Tensor]:
    return load_file(path)
