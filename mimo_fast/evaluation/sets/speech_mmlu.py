"""SpeechMMLU: questions with four options, in text or speech, answered in text or speech.

Of base models: the questions of the subject's examples, with their answers, precede each question.

Source: MiMo-Audio-Eval, `datasets/speech_mmlu.py`, `evaluator/speechmmlu_evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.choices import Accuracy, numbered_option
from mimo_fast.evaluation.items import EvaluationSet, Item, Measure, Options
from mimo_fast.evaluation.published import BASE, accuracy
from mimo_fast.evaluation.sets.tables import Files, Row, ids_of, refuse, table_files

FILES = Files("SpeechMMLU", "huggingface.co/datasets/XiaomiMiMo/SpeechMMLU, audio.tar.gz in audio/")

EXAMPLES = "few_shot_prompts.json"

COLUMNS = ("id", "subject", "question_text", "question_audio", "voice_id", "answer")

MODES = ("s2t", "s2s", "t2t", "t2s")
"""What is asked in speech or text, to be answered in speech or text."""

TEXT_GROUPS, SPEECH_GROUPS = (5, 10), (10, 25)
"""Groups of a reply, at least and at most (`gen_text`, `gen_speech` of MiMo-Audio-Eval)."""


def mode_of(options: Options) -> str:
    return options.mode or MODES[0]


def task(options: Options) -> str:
    return "gen_text" if mode_of(options).endswith("t") else "gen_speech"


def read(folder: Path, split: str, options: Options) -> list[Item]:
    """Items by subject, in the order of the subjects' names; a row's "subject" says which it is.

    `datasets` reads the same rows from the same files, a configuration a subject.
    """
    refuse(options, FILES.title, thinking=False)
    mode = mode_of(options)
    if mode not in MODES:
        raise EvaluationError(f"SpeechMMLU is asked as {', '.join(MODES)}, not {mode!r:.20}")
    root = FILES.find(folder, f"SpeechMMLU/{EXAMPLES}", EXAMPLES).parent
    examples = FILES.json(root / EXAMPLES)
    rows = sorted(_rows(root), key=lambda row: str(row["subject"]))
    beginnings = dict[tuple[str, str], list[dict[str, Any]]]()
    items = list[Item]()
    for name, row in zip(ids_of(rows), rows, strict=True):
        subject, voice = str(row["subject"]), str(row["voice_id"])
        if (subject, voice) not in beginnings:
            beginnings[subject, voice] = _beginning(
                root, _of_subject(root, examples, subject), subject, voice, options.shots, mode
            )
        if row["answer"] not in range(4):
            raise FILES.error(f"{root}: the answer of {name} is {row['answer']!r:.20}, not 0 to 3")
        question = _asked(mode, row["question_text"], root, row["question_audio"])
        least, most = TEXT_GROUPS if mode.endswith("t") else SPEECH_GROUPS
        arguments = {
            "prompts": [*beginnings[subject, voice], question],
            "min_new_tokens": least,
            "max_new_tokens": most,
        }
        items.append(Item(name, arguments, {"answer": int(row["answer"])}, {"subject": subject}))
    return items


def measures(split: str, options: Options) -> list[Measure]:
    """Of speech, what a recogniser hears and, beside it, what the text of the reply says."""
    if mode_of(options).endswith("t"):
        return [Accuracy(numbered_option)]
    return [
        Accuracy(numbered_option, heard="en"),
        Accuracy(numbered_option, name="accuracy of its text"),
    ]


def _rows(root: Path) -> list[Row]:
    found = list[Row]()
    for path in table_files(root):
        if path.name != EXAMPLES:
            read = FILES.parquet if path.suffix == ".parquet" else FILES.rows
            found += read(path, COLUMNS)
    if not found:
        raise FILES.error(f"{root} has no parquet or JSON files of questions")
    return found


def _of_subject(root: Path, examples: Any, subject: str) -> Mapping[str, Any]:
    found = examples.get(subject) if isinstance(examples, Mapping) else None
    if isinstance(found, Mapping) and "beginning" in found:
        shown = found.get("examples")
        if isinstance(shown, list) and all({"question", "answer"} <= set(each) for each in shown):
            return found
    raise FILES.error(f"{root / EXAMPLES} has no beginning and examples of {subject}")


def _beginning(
    root: Path, of: Mapping[str, Any], subject: str, voice: str, shots: int, mode: str
) -> list[dict[str, Any]]:
    """What precedes each question of a subject in a voice."""
    if shots > len(of["examples"]):
        found = f"{len(of['examples'])} examples of {subject}"
        raise EvaluationError(f"SpeechMMLU has {found}, not {shots}: use fewer shots")
    spoken = f"audio/{subject}/prompts/{subject}_{voice}/{subject}_"
    parts = [_asked(mode, of["beginning"], root, f"{spoken}beginning.mp3")]
    for i, example in enumerate(of["examples"][:shots]):
        heard = f"{spoken}{i}_question_and_choices.mp3"
        parts.append(_asked(mode, example["question"], root, heard))
        answer: dict[str, Any] = {"text": example["answer"]}
        if mode.endswith("s"):
            answer["speech"] = FILES.file(root, f"{spoken}{i}_answer.mp3")
        parts.append(answer)
    return parts


def _asked(mode: str, text: str, root: Path, audio: str) -> dict[str, Any]:
    return {"speech": FILES.file(root, audio)} if mode.startswith("s") else {"text": text}


SPEECH_MMLU = EvaluationSet(
    name="speechmmlu",
    title=FILES.title,
    splits=("all",),
    task=task,
    read=read,
    measures=measures,
    published=(
        accuracy(BASE, 69.1, 6, Options(shots=5, mode="s2s")),
        accuracy(BASE, 69.5, 6, Options(shots=5, mode="s2t")),
        accuracy(BASE, 71.5, 6, Options(shots=5, mode="t2s")),
        accuracy(BASE, 72.5, 6, Options(shots=5, mode="t2t")),
    ),
    modes=MODES,
    forms=(f"SpeechMMLU/{EXAMPLES} with **/*.parquet (or .json, .jsonl) and audio/**/*.mp3",),
    source=FILES.source,
)
