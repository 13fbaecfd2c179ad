"""`batch`: many requests as rows of one batch; what ended is kept, what failed is tried again."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import mimo_fast
from mimo_fast import AudioError, MimoAudio, MimoFastError, batch
from mimo_fast.audio.files import load_audio
from mimo_fast.audio.writing import save_wav
from mimo_fast.batches import RECORD, TRANSCRIBE, BatchResult, _Batch, _size
from mimo_fast.cli.main import main

ROOT = Path(__file__).parents[1]
WORDS = ROOT / "tests" / "words"
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


@pytest.mark.parametrize("task", ["asr", TRANSCRIBE])
def test_recordings_are_encoded_together(monkeypatch, task):
    """Requests begin alike: what comes while one recording is encoded is one call after it."""
    model, counts = mimo_fast.load(max_batch=4), list[int]()
    encode, begun = model.codec.encode_measured_together, threading.Event()

    def counted(waves, n_q):
        counts.append(len(waves))
        if len(counts) == 1:
            # The others are read meanwhile.
            while len(model.pipeline._gathering._waiting) < 3:
                assert not begun.wait(0.001)
        return encode(waves, n_q)

    monkeypatch.setattr(model.codec, "encode_measured_together", counted)
    names = ("thank_you", "six_five_zero", "what_is_your_name", "where_is_my_room")
    files = [WORDS / f"{name}.flac" for name in names]
    texts = {result.index: result.text for result in batch(model, task, files, seed=1)}
    assert counts[:2] == [1, 3]
    for i, file in enumerate(files):
        (alone,) = batch(mimo_fast.load(max_batch=1), task, [file], seed=1 + i)
        assert texts[i] == alone.text


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


def test_transcripts_of_recordings_of_any_length(nano, tmp_path):
    parts = [load_audio(WORDS / f"{name}.flac", 24_000) for name in ("thank_you", "six_five_zero")]
    save_wav(tmp_path / "long.wav", torch.cat([parts[0], torch.zeros(48_000), parts[1]]), 24_000)
    files = [WORDS / "thank_you.flac", tmp_path / "long.wav", parts[1]]
    found = {result.index: result for result in batch(nano, TRANSCRIBE, files, seed=5)}
    said = ["thank you", "thank you six five zero", "six five zero"]
    assert [found[i].text for i in range(3)] == said
    assert [len(found[i].transcript.segments) for i in range(3)] == [1, 2, 1]
    assert found[1].transcript == nano.transcribe(files[1], seed=6)
    assert {result.finish_reason for result in found.values()} == {"stop"}


def test_transcripts_in_a_folder_resume(nano, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    files = [WORDS / "thank_you.flac", tmp_path / "bad.wav", WORDS / "none.flac"]
    folder = tmp_path / "out"
    first = {x.index: x for x in batch(nano, TRANSCRIBE, files, folder, suffix=".srt")}
    assert first[0].file == folder / "thank_you.srt"
    assert first[0].file.read_text().endswith("thank you\n")
    assert isinstance(first[1].error, AudioError)
    assert isinstance(first[2].error, AudioError)
    lines = [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]
    assert {line["index"] for line in lines if "error" in line} == {1, 2}
    (told,) = [line for line in lines if line["index"] == 0]
    assert (told["text"], told["file"]) == ("thank you", "thank_you.srt")
    # What failed again; with overwrite all.
    assert {x.index for x in batch(nano, TRANSCRIBE, files, folder, suffix=".srt")} == {1, 2}
    again = batch(nano, TRANSCRIBE, files[:1], folder, suffix=".srt", overwrite=True)
    assert [x.index for x in again] == [0]


def test_two_recordings_of_one_name_are_refused(nano, tmp_path):
    (tmp_path / "a").mkdir()
    files = [tmp_path / "x.wav", tmp_path / "a" / "x.wav"]
    with pytest.raises(ValueError, match=r"x\.txt would be written twice"):
        batch(nano, TRANSCRIBE, files, tmp_path / "out")
    with pytest.raises(ValueError, match="transcripts end in"):
        batch(nano, TRANSCRIBE, files[:1], tmp_path / "out", suffix=".wav")
    with pytest.raises(TypeError, match="instruct"):
        batch(nano, TRANSCRIBE, files, instruct="slowly")
    (tmp_path / "file").write_text("")
    with pytest.raises(AudioError, match="cannot write into"):
        batch(nano, TRANSCRIBE, files[:1], tmp_path / "file")


def test_the_longest_is_first_and_the_same_text_twice_is_two_requests(nano, tmp_path):
    texts = ["seven", "the dog is big and black", "seven"]
    found = list(batch(nano, "tts", texts, tmp_path, seed=3))
    assert {x.file.name for x in found} == {"0000.wav", "0001.wav", "0002.wav"}
    assert not list(batch(nano, "tts", texts, tmp_path, seed=3))
    assert _size(WORDS / "none.flac") > _size(WORDS / "thank_you.flac") > _size("seven") == 5


def test_recordings_share_the_slots(nano):
    share = _Batch(nano, TRANSCRIBE, None, None, {})
    assert share._pieces_at_once() == 3
    running = [Future() for _ in range(3)]
    share._running = dict.fromkeys(running)
    assert share._pieces_at_once() == 1
    for each in running[1:]:
        each.set_result(BatchResult(0))
    assert share._pieces_at_once() == 3


def test_what_nobody_foresaw_ends_only_its_own_request(nano, monkeypatch):
    real = nano.stream

    def stream(task, text, **options):
        if text == "thank you":
            raise RuntimeError("broken")
        return real(task, text, **options)

    monkeypatch.setattr(nano, "stream", stream)
    found = {x.index: x for x in batch(nano, "tts", TEXTS)}
    assert isinstance(found[2].error, RuntimeError)
    assert [found[i].finish_reason for i in (0, 1, 3)] == ["stop"] * 3


def test_a_record_that_cannot_be_written_is_one_error(nano, tmp_path):
    found = batch(nano, "tts", TEXTS, tmp_path)
    next(found)
    (tmp_path / RECORD).unlink()
    (tmp_path / RECORD).mkdir()
    with pytest.raises(AudioError, match="cannot write"):
        list(found)


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(nano, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS * 3), encoding="utf-8")
    options = ["--lines", "lines.txt", "-o", "out", "--seed", "5", "--streams", "2"]
    command = [sys.executable, "-m", "mimo_fast", "tts", *options]
    about = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    record = tmp_path / "out" / RECORD
    with subprocess.Popen(command, cwd=tmp_path, env=about, stderr=subprocess.DEVNULL) as process:
        while not record.exists() or len(record.read_bytes().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.wav")}
    kept = {json.loads(x)["file"] for x in record.read_text().splitlines() if x.endswith("}")}
    assert 3 <= len(kept) < 12
    ended = subprocess.run(command, cwd=tmp_path, env=about, capture_output=True, text=True)
    assert ended.returncode == 0
    assert f"wrote {12 - len(kept)} recordings" in ended.stderr
    files = sorted((tmp_path / "out").glob("*.wav"))
    assert len(files) == 12
    # What was recorded was left alone, and each is what it is alone.
    assert all(path.stat().st_mtime_ns == before[path.name] for path in files if path.name in kept)
    for i in (0, 11):
        alone = torch.cat([x.audio for x in nano.stream("tts", TEXTS[i % 4], seed=5 + i)])
        assert len(load_audio(files[i], 24_000)) == len(alone)


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


def test_a_line_that_fails_is_named_by_its_number_and_ends_no_other(capsys, tmp_path, monkeypatch):
    real = MimoAudio.stream

    def stream(model, task, text, **options):
        if text == "thank you":
            raise MimoFastError("broken")
        return real(model, task, text, **options)

    monkeypatch.setattr(MimoAudio, "stream", stream)
    (tmp_path / "lines.txt").write_text("seven\n\n \nthank you\nseven\n", encoding="utf-8")
    command = ["tts", "--lines", str(tmp_path / "lines.txt"), "-o", str(tmp_path / "out")]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "error: line 4: broken" in told
    assert "wrote 2 recordings and results.jsonl" in told
    assert told.rstrip().endswith(", 1 failed")
    monkeypatch.undo()
    assert main(command) == 0
    assert "wrote 1 recordings" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n \n")
    assert main(["tts", "--lines", str(tmp_path / "empty.txt"), "-o", str(tmp_path / "b")]) == 1
    assert "holds no lines to say" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tts", "--lines", str(tmp_path / "lines.txt"), "-o", str(tmp_path / "lines.txt")])


def test_files_have_the_names_that_were_given(nano, tmp_path):
    found = list(batch(nano, "tts", TEXTS[:2], tmp_path, seed=1, names=["61-1", "a.b"]))
    files = {result.index: result.file for result in found}
    assert files == {0: tmp_path / "61-1.wav", 1: tmp_path / "a.b.wav"}
    assert not list(batch(nano, "tts", TEXTS[:2], tmp_path, seed=1, names=["61-1", "a.b"]))
    with pytest.raises(ValueError, match="1 names for 2 requests"):
        batch(nano, "tts", TEXTS[:2], tmp_path, names=["a"])
    with pytest.raises(ValueError, match="'transcribe'"):
        batch(nano, TRANSCRIBE, [WORDS / "thank_you.flac"], tmp_path, names=["a"])
