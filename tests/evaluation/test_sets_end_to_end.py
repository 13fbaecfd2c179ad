"""Sets of choices, dialogue and conversion, answered by nano and measured: nonsense, but scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from published_files import (
    big_bench_audio,
    big_bench_audio_as_parquet,
    esd,
    happy_to_sad,
    mmar,
    mmau,
    mmsu,
    speech_mmlu,
)

import mimo_fast
from mimo_fast import MimoAudio
from mimo_fast.evaluation.items import Options, Tools
from mimo_fast.evaluation.run import Asked, evaluate, read_items
from mimo_fast.evaluation.sets import SETS

GROUPS = 8


@pytest.fixture(scope="module")
def small() -> MimoAudio:
    return mimo_fast.load(max_batch=2, device="cpu")


TOOLS = Tools(
    recogniser=lambda audio, language: "Option A. 狐狸" if audio.stat().st_size else "",
    speaker=lambda audio: [1.0, float(audio.stat().st_size % 7)],
    judge=lambda messages, audio=(): json.dumps({"steps": [], "result": 0.6}),
    names={"recogniser": "a", "speaker": "b", "judge": "c"},
)

Case = tuple[str, Callable[[Path], Path], Options, set[str]]

WORDS = {"SIM", "WER, mean of utterances", "WER, corpus"}

CASES: dict[str, Case] = {
    "mmau": ("mmau", mmau, Options(), {"accuracy"}),
    "mmau, thinking": ("mmau", mmau, Options(thinking=True), {"accuracy"}),
    "mmau, by example": ("mmau", mmau, Options(shots=2), {"accuracy"}),
    "mmar": ("mmar", mmar, Options(), {"accuracy"}),
    "mmsu": ("mmsu", mmsu, Options(), {"accuracy"}),
    "speechmmlu, s2t": ("speechmmlu", speech_mmlu, Options(shots=2, mode="s2t"), {"accuracy"}),
    "speechmmlu, t2s": (
        "speechmmlu",
        speech_mmlu,
        Options(shots=2, mode="t2s"),
        {"accuracy", "accuracy of its text"},
    ),
    "bigbench_audio, s2t": (
        "bigbench_audio",
        big_bench_audio_as_parquet,
        Options(mode="s2t"),
        {"accuracy"},
    ),
    "bigbench_audio, s2s": (
        "bigbench_audio",
        big_bench_audio,
        Options(mode="s2s"),
        {"accuracy"},
    ),
    "esd": ("esd", esd, Options(), WORDS | {"CER, mean of utterances", "CER, corpus"}),
    "general_s2s": ("general_s2s", happy_to_sad, Options(shots=2), WORDS),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_measured(small, tmp_path, case):
    name, make, options, figures = CASES[case]
    chosen = SETS[name]
    asked = Asked(chosen, chosen.splits[0], options, max_new_tokens=GROUPS)
    data = make(tmp_path / "data")
    items = read_items(asked, data, limit=2)
    done = evaluate(small, asked, items, TOOLS, tmp_path / "out", progress=False)
    assert [(answer.item.id, answer.error) for answer in done.answers] == [
        (item.id, None) for item in items
    ]
    found = {
        key: figure
        for each in done.measured
        for key, figure in each.measure.figures(each.found).items()
    }
    assert found.keys() == figures
    for figure in found.values():
        assert 1 <= figure.count <= 2
        assert figure.value is not None or figure.note
    if name == "bigbench_audio":
        # The judge's score is just enough.
        assert found["accuracy"].value == 100.0
