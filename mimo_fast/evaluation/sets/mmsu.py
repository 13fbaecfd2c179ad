"""MMSU: a question about speech, answered by the letter of one of four choices.

Source: MiMo-Audio-Eval, `datasets/mmsu.py`, `evaluator/mmsu_evaluator.py`.
"""

from __future__ import annotations

from pathlib import Path

from mimo_fast.evaluation.choices import LETTERS, Accuracy, lettered_choice
from mimo_fast.evaluation.items import EvaluationSet, Item, Measure, Options
from mimo_fast.evaluation.published import MODEL, accuracy
from mimo_fast.evaluation.sets.tables import Files, groups_of, ids_of, refuse
from mimo_fast.text.tasks import THINK_FIRST

FILES = Files("MMSU", "huggingface.co/datasets/XiaomiMiMo/MiMo-Audio-Evalset or ddwang2000/MMSU")

TABLES = ("MMSU_Bench/MMSU/question/mmsu.jsonl", "MMSU/question/mmsu.jsonl", "question/mmsu.jsonl")

CHOICES = tuple(f"choice_{letter.lower()}" for letter in LETTERS)

GROUPS = ("category", "sub-category", "sub-sub-category", "task_name")

REQUEST = (
    "Choose the most suitable answer from options A, B, C, and D to respond the question in next"
    " line, **you should only choose A or B or C or D.** Do not provide any additional"
    " explanations or content."
)


def read(folder: Path, split: str, options: Options) -> list[Item]:
    """Items; a choice that a question lacks is the word None, as in MiMo-Audio-Eval."""
    refuse(options, FILES.title, shots=False)
    path = FILES.find(folder, *TABLES)
    rows = FILES.rows(path, ("audio_path", "question", "answer_gt", *CHOICES[:2]))
    items = list[Item]()
    for name, row in zip(ids_of(rows), rows, strict=True):
        choices = [str(row.get(choice)) for choice in CHOICES]
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
        asked = f"{REQUEST}\n\nQuestion: {row['question']}\n\n" + "\n".join(lines)
        arguments = {
            "input_speech": FILES.file(path.parent.parent, row["audio_path"]),
            # Here, unlike in MMAU, it is in the segment of the question.
            "input_text": asked + (THINK_FIRST if options.thinking else ""),
            "thinking": options.thinking,
        }
        truth = {"answer": str(row["answer_gt"]), "choices": choices}
        items.append(Item(name, arguments, truth, groups_of(row, GROUPS)))
    return items


def measures(split: str, options: Options) -> list[Measure]:
    return [Accuracy(lettered_choice)]


MMSU = EvaluationSet(
    name="mmsu",
    title=FILES.title,
    splits=("test",),
    task=lambda _: "audio_understanding_sft",
    read=read,
    measures=measures,
    published=(
        accuracy(MODEL, 61.70, 8, Options()),
        accuracy(MODEL, 62.88, 8, Options(thinking=True)),
    ),
    forms=TABLES,
    source=FILES.source,
)
