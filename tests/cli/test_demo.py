"""`mimo-fast demo`: its table, texts and files, with any weights."""

import json
import re

import pytest
import soundfile
from helpers import AUDIO, KIT_PAIR

from mimo_fast.checkpoint.embedded import QUESTION, SENTENCE
from mimo_fast.cli.main import main
from training import domain

STAGES = [
    "load",
    "say: prefill",
    "say: N groups, streaming",
    "encode to 8 x N codes",
    "decode them again",
    "transcribe: encode and prefill",
    "transcribe: N groups, streaming",
    "answer: encode and prefill",
    "answer: N groups, streaming",
]


def demo(*arguments: object) -> int:
    return main(["demo", *map(str, arguments)])


def without_counts(stage: str) -> str:
    return re.sub(r"\d+ (?=groups|codes)", "N ", stage)


def test_without_a_model_the_embedded_one_speaks_listens_and_answers(capsys, tmp_path):
    assert demo("-o", tmp_path / "out", "--json", tmp_path / "t.json", "--max-tokens", 60) == 0
    out, err = capsys.readouterr()
    assert err.startswith("using nano, ")
    assert "warning" not in err
    table, texts = (part.splitlines() for part in out.split("\n\n"))
    record = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    stages = [row["stage"] for row in record["stages"]]
    assert [stage for stage in map(without_counts, stages) if "first audio" not in stage] == STAGES
    assert table[0].split() == ["stage", "audio", "time", "real-time", "factor"]
    assert all(map(str.startswith, table[1:], stages))
    assert len(table[1:]) == len(stages)
    assert texts[0] == f"the recording: {QUESTION}"
    said = [f"{name + ':':<10}{text!r}" for name, text in record["texts"].items()]
    assert texts[1:4] == said
    assert [*record["texts"]] == ["said", "heard", "answered"]
    written = sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert sorted(line.removeprefix("wrote ") for line in texts[4:]) == written
    assert str(tmp_path / "out" / "recording_decoded.wav") in written


def test_with_a_model_and_a_recording(capsys, tmp_path):
    said = ["--text", "Hello there.", "-o", tmp_path, "--max-tokens", 40]
    pair = ["--model", KIT_PAIR[0], "--codec", KIT_PAIR[1]]
    assert demo(AUDIO, *said, *pair, "--no-prepare") == 0
    out, err = capsys.readouterr()
    assert err.startswith("loading ")
    assert f"the recording: {AUDIO}" in out
    first_audio = "time to first audio"
    for stage in (f"say: {first_audio}", "encode to 8 x 63 codes", f"answer: {first_audio}"):
        assert stage in out
    names = ["recording_decoded.wav", "reply.wav", "said.wav"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(soundfile.info(tmp_path / name).samplerate == 24000 for name in names)
    assert soundfile.info(tmp_path / "recording_decoded.wav").duration == pytest.approx(63 / 25)


def test_it_names_words_that_the_model_was_not_trained_on(capsys, tmp_path):
    said = ["--text", "Hello, 42 penguins!", "-o", tmp_path / "out"]
    assert demo(*said, "--max-tokens", 5) == 0
    warning = "warning: this model was not trained on, and may garble: penguins\n"
    assert warning in capsys.readouterr().err


def test_its_sentence_is_of_the_domain_and_new_to_the_model():
    assert set(SENTENCE.split()) <= set(domain.vocabulary())
    assert domain.is_held_out(SENTENCE)
