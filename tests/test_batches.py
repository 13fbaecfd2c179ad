"""`batch`: many requests as rows of one batch; what ended is kept, what failed is tried again."""

import json
from pathlib import Path

import pytest
import torch

import mimo_fast
from mimo_fast import AudioError, MimoAudio, batch
from mimo_fast.batches import RECORD
from mimo_fast.cli.main import main

WORDS = Path(__file__).parent / "words"
TEXTS = ["seven", "the dog is big and black", "thank you", "six five zero"]


@pytest.fixture(scope="module")
def nano() -> MimoAudio:
    return mimo_fast.load(max_batch=3)


def test_each_is_what_it_is_alone(nano):
    found = sorted(batch(nano, "tts", TEXTS, seed=7), key=lambda result: result.index)
    assert [result.index for result in found] == [*range(4)]
    for i, (result, text) in enumerate(zip(found, TEXTS, strict=True)):
        chunks = list(nano.stream("tts", text, seed=7 + i))
        assert result.text == text
        assert torch.equal(result.audio, torch.cat([chunk.audio for chunk in chunks]))
        assert result.seconds == pytest.approx(len(result.audio) / 24_000)
        assert result.finish_reason == "stop"


def test_recordings(nano):
    files = [WORDS / "thank_you.flac", WORDS / "none.flac", WORDS / "six_five_zero.flac"]
    found = {result.index: result for result in batch(nano, "asr", files)}
    assert (found[0].text, found[2].text) == ("thank you", "six five zero")
    assert found[0].audio is None
    assert isinstance(found[1].error, AudioError)


def test_a_folder_resumes(nano, tmp_path):
    requests = [*TEXTS, {"input": "seven", "instruct": "speak slowly"}, {"wrong": 1}]
    first = list(batch(nano, "tts", requests, tmp_path))
    assert {result.index for result in first} == {*range(6)}
    assert {file.name for file in tmp_path.glob("*.wav")} == {f"000{i}.wav" for i in range(5)}
    # The failed one again, the one whose text is another, the one whose file is lost.
    (tmp_path / "0003.wav").unlink()
    with (tmp_path / RECORD).open("a") as file:
        file.write('{"index": 1, "reque')
    again = list(batch(nano, "tts", ["eight", *requests[1:]], tmp_path))
    assert {result.index for result in again} == {0, 3, 5}
    lines = (tmp_path / RECORD).read_text().splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(whole) == len(lines) - 1
    assert {line["index"] for line in whole if "error" in line} == {5}
    assert not list(batch(nano, "tts", ["eight", *requests[1:5]], tmp_path))


def test_closing_it_frees_the_slots(nano, tmp_path):
    found = batch(nano, "tts", TEXTS * 5, tmp_path)
    next(found)
    found.close()
    recorded = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    assert 1 <= len(recorded) < 20
    assert all(line["finish_reason"] == "stop" for line in recorded)
    assert nano.asr_sft(WORDS / "thank_you.flac") == "thank you"


def test_wrong_calls(nano, tmp_path):
    with pytest.raises(ValueError, match="no task 'sing'"):
        batch(nano, "sing", TEXTS)
    with pytest.raises(TypeError, match="did you mean 'instruct'"):
        batch(nano, "tts", TEXTS, instuct="speak slowly")
    with pytest.raises(ValueError, match="seed"):
        batch(nano, "tts", TEXTS, seed=-1)
    with pytest.raises(AudioError):
        batch(nano, "tts", TEXTS, tmp_path, suffix=".xyz")
    assert not list(batch(nano, "tts", []))


@pytest.mark.parametrize("one", ["hello", b"RIFF", Path("a.wav"), {"text": "a"}, torch.zeros(9)])
def test_one_request_is_no_list_of_them(nano, one):
    with pytest.raises(TypeError, match=r"must be (a list of them|an Iterable), not"):
        batch(nano, "tts", one)


def test_lines_of_a_file(capsys, tmp_path):
    (tmp_path / "lines.txt").write_text("seven\n\n  thank you \n", encoding="utf-8")
    command = ["tts", "--lines", str(tmp_path / "lines.txt"), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert "wrote 2 recordings" in capsys.readouterr().err
    assert main(command) == 0
    assert "wrote 0 recordings and results.jsonl" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "0000.wav",
        "0001.wav",
        RECORD,
    }
    for wrong in (["tts", "-o", "a.wav"], [*command, "seven"], [*command[:-1], "-"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert main(["tts", "--lines", str(tmp_path / "none.txt"), "-o", str(tmp_path / "out")]) == 1
    assert "cannot read" in capsys.readouterr().err
