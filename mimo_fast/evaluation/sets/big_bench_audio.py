"""Big Bench Audio: spoken puzzles, answered in text or speech; a judge compares with the answer.

Source: MiMo-Audio-Eval, `datasets/bigbench_audio.py`, `evaluator/bigbench_audio_evaluator.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.choices import said_in, share_correct
from mimo_fast.evaluation.items import (
    Answer,
    EvaluationSet,
    Figure,
    Found,
    Item,
    Judge,
    Measure,
    Options,
    Tools,
)
from mimo_fast.evaluation.published import MODEL, accuracy
from mimo_fast.evaluation.sets.tables import Audio, Files, Row, groups_of, ids_of, refuse

FILES = Files("Big Bench Audio", "huggingface.co/datasets/ArtificialAnalysis/big_bench_audio")

FOLDERS = ("big_bench_audio", "bigbench_audio", ".")

LIST = "metadata.jsonl"

TABLES = ("*.parquet", "data/*.parquet", "default/train/*.parquet")
"""Where parquet files lie: the last is what the hub itself converts."""

MODES = ("s2t", "s2s")

VOICES = ("prompt.wav", "assets/prompt.wav", "../assets/prompt.wav")
"""Where the voice of replies is looked for; MiMo-Audio-Eval's is `assets/prompt.wav` of it."""

RULE = (
    "You are a helpful assistant that evaluates whether the model's response matches the provided"
    " reference answer. Respond ONLY with a single JSON object matching:"
    ' {"steps":[{"description":"string","conclusion":"string"}],"result":number}. Do not include'
    " any extra text. result must be a float in [0.0, 1.0]."
)

TRIES = 5
"""Of a judge whose answer cannot be read; then the score is 0."""

RIGHT = 0.6
"""The least score of a right answer."""


def mode_of(options: Options) -> str:
    return options.mode or MODES[0]


def task(options: Options) -> str:
    return "speech2text_dialogue_sft" if mode_of(options) == "s2t" else "spoken_dialogue_sft"


def read(folder: Path, split: str, options: Options) -> list[Item]:
    """Items in the order of the rows.

    Replies in speech have the voice of `VOICES` where there is one of these files in or beside the
    folder; without one they have the model's own, and published scores are of another.
    """
    refuse(options, FILES.title, shots=False, thinking=False)
    mode = mode_of(options)
    if mode not in MODES:
        raise EvaluationError(f"Big Bench Audio is asked as {' or '.join(MODES)}, not {mode!r:.20}")
    voices = [folder / each for each in VOICES if (folder / each).is_file()]
    voice = {"prompt_speech": voices[0]} if voices and mode == "s2s" else {}
    rows, recordings = _rows(folder)
    return [
        Item(
            name,
            {"input_speech": recording, **voice},
            {"answer": str(row["official_answer"])},
            groups_of(row, ("category",)),
        )
        for name, row, recording in zip(ids_of(rows), rows, recordings, strict=True)
    ]


def _rows(folder: Path) -> tuple[list[Row], list[Audio]]:
    """Rows and recordings: of the list and its files as published, or of parquet files."""
    columns = ("category", "official_answer")
    for each in FOLDERS:
        root = folder / each
        if (root / LIST).is_file():
            rows = FILES.rows(root / LIST, (*columns, "file_name"))
            return rows, [FILES.file(root, row["file_name"]) for row in rows]
        if tables := [table for place in TABLES for table in sorted(root.glob(place))]:
            rows = [row for table in tables for row in FILES.parquet(table, (*columns, "audio"))]
            return rows, [_encoded(row, root) for row in rows]
    raise FILES.error(f"{folder} has neither {LIST} nor parquet files")


def _encoded(row: Row, root: Path) -> Audio:
    """The recording in a row of parquet, as `datasets` stores it: its bytes, or its path."""
    audio = row["audio"]
    if isinstance(audio, Mapping) and isinstance(audio.get("bytes"), bytes):
        return bytes(audio["bytes"])
    if isinstance(audio, Mapping) and audio.get("path"):
        return FILES.file(root, audio["path"])
    raise FILES.error(f"{root}: the column audio holds neither bytes nor a path")


@dataclass(frozen=True)
class JudgedRight:
    """The share of answers that a judge scores with 0.6 at least.

    Args:
        heard: the language in which a recogniser hears the answer; None for its text.
    """

    heard: str | None = None
    name: str = "accuracy"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"judge", "recogniser"} if self.heard else {"judge"})

    def find(self, answer: Answer, tools: Tools) -> Found:
        """{"said", "score", "correct"}; score is None where five answers could not be read.

        An answer that failed has the score 0, and no judge is asked.
        """
        said = said_in(answer, tools, self.heard)
        if answer.error is not None:
            return {"said": said, "score": 0.0, "correct": False}
        assert tools.judge is not None
        score = judged(tools.judge, said, str(answer.item.truth["answer"]))
        return {"said": said, "score": score, "correct": (score or 0.0) >= RIGHT}

    def figures(self, found: Sequence[tuple[Answer, Found]]) -> Mapping[str, Figure]:
        lost = sum(each["score"] is None for _, each in found)
        note = f"{lost} count as wrong because no answer of the judge could be read" if lost else ""
        return {self.name: share_correct(found, note)}


def judged(judge: Judge, said: str, answer: str) -> float | None:
    """A judge's score of a response, 0 to 1; None where it says none in `TRIES` tries."""
    asked = [
        {"role": "system", "content": RULE},
        {"role": "user", "content": f"Model Response: {said}\nReference Answer: {answer}"},
    ]
    for _ in range(TRIES):
        score = _score(judge(asked))
        if score is not None:
            return score
    return None


def _score(reply: str) -> float | None:
    try:
        found: Any = json.loads(reply.strip())["result"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return float(found) if isinstance(found, int | float) else None


def measures(split: str, options: Options) -> list[Measure]:
    return [JudgedRight(None if mode_of(options) == "s2t" else "en")]


BIG_BENCH_AUDIO = EvaluationSet(
    name="bigbench_audio",
    title=FILES.title,
    splits=("train",),
    task=task,
    read=read,
    measures=measures,
    published=(
        accuracy(MODEL, 72.90, 8, Options(mode="s2t")),
        accuracy(MODEL, 60.20, 8, Options(mode="s2s")),
    ),
    modes=MODES,
    forms=(f"big_bench_audio/{LIST} with data/*.mp3", "big_bench_audio/data/*.parquet"),
    source=FILES.source,
)
