"""MMAU and MMAR: a question about a recording, answered by one of its choices.

Source: MiMo-Audio-Eval, `datasets/mmau.py`, `mmar.py`, `evaluator/mmau_evaluator.py`,
`mmar_evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_fast.evaluation.choices import Accuracy, matched_choice
from mimo_fast.evaluation.few_shot import drawn_examples
from mimo_fast.evaluation.items import EvaluationSet, Item, Measure, Options, Published
from mimo_fast.evaluation.published import BASE, MODEL, accuracy
from mimo_fast.evaluation.sets.tables import Files, Row, groups_of, ids_of, refuse

ONLY_ONE = (
    " Do not provide any additional explanations or content."
    " Output must match exactly one of the listed choices."
)


def listed(question: str, choices: Sequence[str]) -> str:
    """A question and its choices, a line each."""
    return "\n".join([f"{question}\n\nChoice: ", *choices, "\n"])


@dataclass(frozen=True)
class Questions:
    """A set of questions whose rows have question, choices and answer.

    Args:
        tables: names of its table; the first of them that a folder has.
        audio: the column of a recording's path, from the folder of the table on.
        groups: columns of its breakdowns.
        asked_by_example: what a base model reads behind the choices.
    """

    files: Files
    tables: tuple[str, ...]
    audio: str
    groups: tuple[str, ...]
    asked_by_example: str

    def task(self, options: Options) -> str:
        return "few_shots_qa" if options.shots else "instruction_following"

    def read(self, folder: Path, split: str, options: Options) -> list[Item]:
        """Items: asked by instruction or, with shots, by the examples of other rows."""
        refuse(options, self.files.title)
        path = self.files.find(folder, *self.tables)
        columns = (self.audio, "question", "choices", "answer")
        rows = self.files.rows(path, columns)
        for row in rows:
            if not isinstance(row["choices"], list):
                raise self.files.error(f"{path}: choices are no list in {row['question']!r}")
        recordings = [self.files.file(path.parent, row[self.audio]) for row in rows]
        asked = self._by_example if options.shots else self._by_instruction
        arguments = asked(rows, recordings, options)
        return [
            Item(
                name,
                given,
                {"answer": str(row["answer"]), "choices": [*map(str, row["choices"])]},
                groups_of(row, self.groups),
            )
            for name, given, row in zip(ids_of(rows), arguments, rows, strict=True)
        ]

    def measures(self, split: str, options: Options) -> list[Measure]:
        return [Accuracy(matched_choice)]

    def _by_instruction(
        self, rows: Sequence[Row], recordings: Sequence[Path], options: Options
    ) -> list[dict[str, object]]:
        return [
            {
                "input_text": f"<sound>{listed(row['question'], row['choices'])}Choose a choices"
                f" from the given {len(row['choices'])} choices.{ONLY_ONE}",
                "input_speech": recording,
                "thinking": options.thinking,
            }
            for row, recording in zip(rows, recordings, strict=True)
        ]

    def _by_example(
        self, rows: Sequence[Row], recordings: Sequence[Path], options: Options
    ) -> list[dict[str, object]]:
        shown = [
            {
                "audio": recording,
                "question": f"{listed(row['question'], row['choices'])}Make a choice from the given"
                f" {len(row['choices'])} choices.{self.asked_by_example}",
                "answer": str(row["answer"]),
            }
            for row, recording in zip(rows, recordings, strict=True)
        ]
        drawn = drawn_examples(shown, options.shots, options.seed)
        return [
            {"examples": [*examples, {key: one[key] for key in ("audio", "question")}]}
            for one, examples in zip(shown, drawn, strict=True)
        ]


MMAU = Questions(
    Files(
        "MMAU test-mini",
        "github.com/Sakshi113/MMAU or huggingface.co/datasets/XiaomiMiMo/MiMo-Audio-Evalset",
    ),
    ("MMAU/mmau-test-mini.json", "mmau-test-mini.json"),
    "audio_id",
    ("task", "difficulty"),
    "",
)

MMAR = Questions(
    Files("MMAR", "huggingface.co/datasets/BoJack/MMAR, with mmar-audio.tar.gz unpacked in it"),
    ("MMAR/MMAR-meta.json", "MMAR-meta.json", "MMAR/MMAR-meta.jsonl", "MMAR-meta.jsonl"),
    "audio_path",
    ("modality", "category", "sub-category"),
    # MiMo-Audio-Eval writes the place of a recording into it, which is text there.
    f"{ONLY_ONE}<sound>",
)


def _set(name: str, of: Questions, split: str, *published: Published) -> EvaluationSet:
    return EvaluationSet(
        name=name,
        title=of.files.title,
        splits=(split,),
        task=of.task,
        read=of.read,
        measures=of.measures,
        published=published,
        forms=of.tables,
        source=of.files.source,
    )


QUESTION_SETS = (
    _set(
        "mmau",
        MMAU,
        "test-mini",
        accuracy(MODEL, 74.90, 8, Options()),
        accuracy(BASE, 66.0, 6, Options(shots=5)),
    ),
    _set(
        "mmar",
        MMAR,
        "test",
        accuracy(MODEL, 63.60, 8, Options()),
    ),
)
