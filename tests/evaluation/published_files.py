"""Small files of evaluation sets, in the forms in which they are published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile

RATE = 24000


def tone(path: Path, number: int = 0) -> Path:
    """A quarter of a second of sound, of its own pitch, in the form of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = np.arange(RATE // 4) / RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + 40 * number) * seconds), RATE)
    return path


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def as_json(path: Path, content: Any) -> Path:
    return written(path, json.dumps(content, ensure_ascii=False))


def as_lines(path: Path, rows: Sequence[Any]) -> Path:
    return written(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def as_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows]), path)
    return path


def mmau_row(i: int) -> dict[str, Any]:
    return {
        "id": f"a{i}",
        "audio_id": f"./test-mini-audios/a{i}.wav",
        "question": f"What barks {i}?",
        "choices": ["A fox", "A dog", "Two dogs"][: 2 + i % 2],
        "answer": "A dog",
        "dataset": "clotho",
        "task": ("sound", "music", "speech")[i % 3],
        "difficulty": "easy",
    }


def mmau(folder: Path, rows: int = 3) -> Path:
    """test-mini as MiMo-Audio-Evalset holds it."""
    for i in range(rows):
        tone(folder / "MMAU" / "test-mini-audios" / f"a{i}.wav", i)
    as_json(folder / "MMAU" / "mmau-test-mini.json", [mmau_row(i) for i in range(rows)])
    return folder


def mmar_row(i: int) -> dict[str, Any]:
    return {
        "id": f"clip_{i}",
        "audio_path": f"./audio/clip_{i}.wav",
        "question": "Who speaks?",
        "choices": ["A man", "A woman"],
        "answer": "A woman",
        "modality": ("speech", "mix-sound-speech")[i % 2],
        "category": "Signal Layer",
        "sub-category": "Acoustic Quality Analysis",
    }


def mmar(folder: Path, rows: int = 2) -> Path:
    """The hub's metadata, and mmar-audio.tar.gz unpacked beside it."""
    for i in range(rows):
        tone(folder / "MMAR" / "audio" / f"clip_{i}.wav", i)
    as_json(folder / "MMAR" / "MMAR-meta.json", [mmar_row(i) for i in range(rows)])
    return folder


def mmsu_row(i: int) -> dict[str, Any]:
    return {
        "id": f"code_{i}",
        "audio_path": f"audio/code_{i}.wav",
        "question": "How often?",
        "choice_a": i,
        "choice_b": "twice",
        "choice_c": "never",
        "choice_d": "always",
        "answer_gt": "twice",
        "task_name": "counting",
        "category": ("Perception", "Reasoning")[i % 2],
        "sub-category": "Linguistics",
        "sub-sub-category": "Semantics",
        "linguistics_sub_discipline": "Semantics",
    }


def mmsu(folder: Path, rows: int = 2) -> Path:
    root = folder / "MMSU_Bench" / "MMSU"
    for i in range(rows):
        tone(root / "audio" / f"code_{i}.wav", i)
    as_lines(root / "question" / "mmsu.jsonl", [mmsu_row(i) for i in range(rows)])
    return folder


VOICE = "english_prompt_007"


def speech_mmlu_row(subject: str, i: int) -> dict[str, Any]:
    return {
        "id": f"{subject}_{i}",
        "subject": subject,
        "question_text": f"{subject}, question {i}? Option A: yes. Option B: no.\n",
        "question_audio": f"audio/{subject}/{subject}_{i}.mp3",
        "voice_id": VOICE,
        "answer": i % 4,
    }


def speech_mmlu(folder: Path, subjects: Sequence[str] = ("virology", "anatomy")) -> Path:
    """A parquet file a subject, examples of all in one file, audio.tar.gz unpacked in audio/."""
    root = folder / "SpeechMMLU"
    examples = dict[str, Any]()
    for subject in subjects:
        as_parquet(
            root / subject / "train-00000-of-00001.parquet",
            [speech_mmlu_row(subject, i) for i in range(2)],
        )
        examples[subject] = {
            "beginning": f"Questions about {subject}.\n",
            "examples": [
                {"question": f"{subject} example {i}?\n", "answer": f"Option {letter}.\n"}
                for i, letter in enumerate("BA")
            ],
        }
        prompts = root / "audio" / subject / "prompts" / f"{subject}_{VOICE}"
        names = ["beginning", *(f"{i}_{part}" for i in range(2) for part in PARTS)]
        for number, name in enumerate(names):
            tone(prompts / f"{subject}_{name}.mp3", number)
        for i in range(2):
            tone(root / "audio" / subject / f"{subject}_{i}.mp3", 9 + i)
    as_json(root / "few_shot_prompts.json", examples)
    return folder


PARTS = ("question_and_choices", "answer")

PUZZLES = ("formal_fallacies", "navigate")


def big_bench_audio(folder: Path) -> Path:
    """The files of the hub's repository."""
    root = folder / "big_bench_audio"
    rows = [
        {
            "file_name": f"data/question_{i}.mp3",
            "category": category,
            "official_answer": "valid",
            "id": i,
        }
        for i, category in enumerate(PUZZLES)
    ]
    for i in range(len(rows)):
        tone(root / "data" / f"question_{i}.mp3", i)
    as_lines(root / "metadata.jsonl", rows)
    return folder


def big_bench_audio_as_parquet(folder: Path) -> Path:
    """The same as the hub converts it, audio in a column."""
    recordings = [tone(folder / "made" / f"question_{i}.mp3", i) for i in range(2)]
    rows = [
        {
            "audio": {"bytes": recording.read_bytes(), "path": recording.name},
            "category": category,
            "official_answer": "valid",
            "id": i,
        }
        for i, (recording, category) in enumerate(zip(recordings, PUZZLES, strict=True))
    ]
    as_parquet(folder / "big_bench_audio" / "data" / "train-00000-of-00001.parquet", rows)
    return folder


ESD_TEXTS = {"0015": ("The fox runs.", "A dog sleeps."), "0003": ("狐狸在跑。", "狗在睡觉。")}


def esd(folder: Path) -> Path:
    """ESD's folder of speakers, and MiMo-Audio-Evalset's table of conversions."""
    speakers = folder / "ESD" / "proc" / "EmotionSpeechDataset"
    for speaker, texts in ESD_TEXTS.items():
        names = [f"{speaker}_{i:06}" for i in range(len(texts))]
        for i, name in enumerate(names):
            tone(speakers / speaker / "Happy" / f"{name}.wav", i + int(speaker))
        lines = [f"{name}\t{text}\tHappy\n" for name, text in zip(names, texts, strict=True)]
        written(speakers / speaker / f"{speaker}.txt", "".join(lines))

    def place(name: str) -> str:
        return f"ESD/proc/EmotionSpeechDataset/{name[:4]}/Happy/{name}.wav"

    lines = ["source_id\tsource_path\ttarget_id\ttarget_path\tprompt"]
    for source, target in (("0003", "0015"), ("0015", "0003")):
        one, other = f"{source}_000000", f"{target}_000000"
        pair = f"{place(f'{source}_000001')}#{place(f'{target}_000001')}"
        prompt = f"{place(one)}#{place(other)}|{pair}"
        lines.append(f"{one}\t{place(one)}\t{other}\t{place(other)}\t{prompt}")
    written(folder / "ESD" / "VoiceConversion.tsv", "".join(f"{line}\n" for line in lines))
    return folder


def happy_to_sad(folder: Path, pairs: int = 3) -> Path:
    """A list of pairs from the folder that `data/` lies in, and what the targets say."""
    lines = []
    for i in range(pairs):
        tone(folder / "expresso" / "wav" / f"happy_{i}.wav", i)
        target = tone(folder / "expresso" / "wav" / f"sad_{i}.wav", 10 + i)
        written(target.with_suffix(".txt"), f"Sentence {i}.\n")
        names = (f"{folder.name}/expresso/wav/{which}_{i}.wav" for which in ("happy", "sad"))
        lines.append("|".join(names))
    written(folder / "expresso" / "ex01_happy2sad.scp", "".join(f"{line}\n" for line in lines))
    return folder
