"""Speech to speech by example: voices of ESD, styles of Expresso, speeds.

Of base models, by examples in the prompt and without an instruction.

Source: MiMo-Audio-Eval, `datasets/esd.py`, `general_s2s.py`,
`evaluator/voice_conversion_s2s_evaluator.py`, `general_s2s_evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.few_shot import drawn_examples
from mimo_fast.evaluation.items import (
    Answer,
    EvaluationSet,
    Figure,
    Found,
    Item,
    Measure,
    Options,
    Tools,
)
from mimo_fast.evaluation.rates import RATES, Words
from mimo_fast.evaluation.sets.tables import Files, refuse
from mimo_fast.evaluation.sets.words import VoiceLikeness

TASK = "in_context_learning_s2s"

ESD = Files("ESD voice conversion", "huggingface.co/datasets/XiaomiMiMo/MiMo-Audio-Evalset")

ESD_TABLES = ("ESD/VoiceConversion.tsv", "VoiceConversion.tsv")

ESD_COLUMNS = ("source_id", "source_path", "target_id", "target_path", "prompt")

PAIRS = Files("pairs of recordings", "huggingface.co/datasets/XiaomiMiMo/MiMo-Audio-Evalset")

PAIR_LISTS = {
    "ex01_happy2sad": ("expresso", "en"),
    "ex02_default2laughing": ("expresso", "en"),
    "ex03_default2whisper": ("expresso", "en"),
    "ZH001SpeedConversion_speed0.5to1.0": ("speed_conversion", "zh"),
    "ZH001SpeedConversion_speed1.0to0.5": ("speed_conversion", "zh"),
    "ZH001SpeedConversion_speed1.0to1.5": ("speed_conversion", "zh"),
}
"""Split -> the folder of its list in `data/`, and the language of what is said."""


def read_voices(folder: Path, split: str, options: Options) -> list[Item]:
    """A recording to convert a row, and pairs of others, "source#target|source#target|...".

    Paths of the table start in the folder that holds ESD's. What a target says is in its speaker's
    table of transcripts, SPEAKER/SPEAKER.txt.
    """
    refuse(options, "ESD, whose rows have their own examples,", shots=False, thinking=False)
    path = ESD.find(folder, *ESD_TABLES)
    root, transcripts = path.parent.parent, Transcripts()
    rows = ESD.rows(path, ESD_COLUMNS)
    ids = [f"{row['source_id']}_{row['target_id']}" for row in rows]
    numbered = len(set(ids)) < len(ids)
    items = list[Item]()
    for i, (name, row) in enumerate(zip(ids, rows, strict=True)):
        pairs = [each.split("#") for each in row["prompt"].strip().split("|") if each]
        if not pairs or any(len(each) != 2 for each in pairs):
            raise ESD.error(f"{path}: row {i + 1} has no pairs of recordings in prompt")
        known = [(ESD.file(root, source), ESD.file(root, target)) for source, target in pairs]
        examples = [example(*pair, transcripts.of(pair[1])) for pair in known]
        target = ESD.file(root, row["target_path"])
        text = transcripts.of(target, str(row["target_id"]))
        source = ESD.file(root, row["source_path"])
        items.append(
            Item(
                f"{i:05}" if numbered else name,
                converting(source, examples),
                {"text": text, "language": language_of(text), "voice": known[-1][1]},
                {"language": language_of(text)},
            )
        )
    return items


class Transcripts:
    """What recordings of ESD say, by their speakers' tables: id, tab, text, tab, emotion."""

    def __init__(self) -> None:
        self._read = dict[Path, dict[str, str]]()

    def of(self, recording: Path, name: str | None = None) -> str:
        """The text of a recording SPEAKER/EMOTION/ID.wav, or of another of its speaker by id.

        Raises:
            EvaluationError: the table lacks it.
        """
        speaker, name = recording.parent.parent, name or recording.stem
        path = speaker / f"{speaker.name}.txt"
        if path not in self._read:
            lines = (line.split("\t") for line in ESD.text(path).splitlines())
            self._read[path] = {line[0].strip(): line[1] for line in lines if len(line) > 1}
        if name not in self._read[path]:
            raise ESD.error(f"{path} has no text of {name}")
        return self._read[path][name]


def language_of(text: str) -> str:
    """zh where more than half of the letters are Chinese, else en."""
    letters = [each for each in text if each.isalpha()]
    chinese = sum("\u4e00" <= each <= "\u9fff" for each in letters)
    return "zh" if 2 * chinese > len(letters) else "en"


def read_pairs(folder: Path, split: str, options: Options) -> list[Item]:
    """A recording to convert a line, "source|target", by pairs of other lines drawn for it.

    What a target says is in a file TARGET.txt beside TARGET.wav, as `mimo-fast asr` writes it:
    MiMo-Audio-Eval has Whisper large-v3 and Paraformer listen while it asks.
    """
    refuse(options, "speech to speech", thinking=False)
    if not options.shots:
        raise EvaluationError("speech to speech is asked by example: give shots, 16 as the report")
    place, language = PAIR_LISTS[split]
    path = PAIRS.find(folder, f"{place}/{split}.scp", f"{split}.scp")
    pairs = _pairs(path)
    texts = [_said(target) for _, target in pairs]
    examples = [example(*pair, text) for pair, text in zip(pairs, texts, strict=True)]
    drawn = drawn_examples(examples, options.shots, options.seed, fewer=True)
    names = [f"{source.stem}_{target.stem}" for source, target in pairs]
    numbered = len(set(names)) < len(names)
    items = list[Item]()
    for i, ((source, _), text, shown) in enumerate(zip(pairs, texts, drawn, strict=True)):
        if not shown:
            raise PAIRS.error(f"{path} has one pair alone, and no example of it")
        truth = {"text": text, "language": language, "voice": shown[-1]["output_audio"]}
        name = f"{i:05}" if numbered else names[i]
        items.append(Item(name, converting(source, shown), truth))
    return items


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    """Recordings of a list; its paths start where MiMo-Audio-Eval's `data/` lies, or in it."""
    roots = (path.parents[1].parent, path.parents[1], path.parent)
    pairs = list[tuple[Path, Path]]()
    for number, line in enumerate(PAIRS.text(path).splitlines(), 1):
        written = line.strip().split("|") if line.strip() else []
        if written and len(written) != 2:
            raise PAIRS.error(f"{path}, line {number} is no pair source|target")
        found = [next((r / one for r in roots if (r / one).is_file()), None) for one in written]
        if None in found:
            lost = written[found.index(None)]
            raise PAIRS.error(f"{path}, line {number}: the recording {lost} is missing")
        pairs += [(found[0], found[1])] if found and found[0] and found[1] else []
    if not pairs:
        raise PAIRS.error(f"{path} has no pairs")
    return pairs


def _said(recording: Path) -> str:
    path = recording.with_suffix(".txt")
    if not path.is_file():
        raise EvaluationError(
            f"{path} is missing, with what {recording.name} says: mimo-fast asr writes such files"
        )
    return PAIRS.text(path).strip()


def example(source: Path, target: Path, text: str) -> dict[str, Any]:
    """An example as the task takes it."""
    return {"input_audio": source, "output_audio": target, "output_transcription": text}


def converting(source: Path, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of the task: MiMo-Audio-Eval asks without an instruction."""
    return {"instruction": None, "prompt_examples": [*examples], "audio": source}


@dataclass(frozen=True)
class WordsByLanguage:
    """`Words` that are heard, of the items of each language."""

    normaliser: str | None = None
    name: str = "words heard"
    needs: frozenset[str] = frozenset({"recogniser"})

    def find(self, answer: Answer, tools: Tools) -> Found:
        return self._words(answer.item.truth["language"]).find(answer, tools)

    def figures(self, found: Sequence[tuple[Answer, Found]]) -> Mapping[str, Figure]:
        """The figures of English, WER, and of Chinese, CER."""
        figures = dict[str, Figure]()
        for language in RATES:
            own = [each for each in found if each[0].item.truth["language"] == language]
            figures |= self._words(language).figures(own) if own else {}
        return figures

    def _words(self, language: str) -> Words:
        return Words(language, heard=True, normaliser=self.normaliser)


def measures(split: str, options: Options) -> list[Measure]:
    """Likeness to the voice of the last example's target, and words."""
    return [VoiceLikeness(), WordsByLanguage(options.normaliser)]


CONVERSION_SETS = (
    EvaluationSet(
        name="esd",
        title=ESD.title,
        splits=("test",),
        task=lambda _: TASK,
        read=read_voices,
        measures=measures,
        forms=(f"{ESD_TABLES[0]} with **/SPEAKER/SPEAKER.txt and **/SPEAKER/EMOTION/ID.wav",),
        source=ESD.source,
    ),
    EvaluationSet(
        name="general_s2s",
        title="speech to speech by example",
        splits=tuple(PAIR_LISTS),
        task=lambda _: TASK,
        read=read_pairs,
        measures=measures,
        forms=(
            "expresso/SPLIT.scp with a TARGET.txt beside each TARGET.wav",
            "speed_conversion/SPLIT.scp with a TARGET.txt beside each TARGET.wav",
        ),
        source=PAIRS.source,
    ),
)
