"""`mimo-fast asr`: formats, files, folders that resume, pipes, the microphone."""

import io
import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pysubs2
import pytest
import torch

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.writing import save_wav
from mimo_fast.batches import RECORD
from mimo_fast.cli.main import main

WORDS = Path(__file__).parents[1] / "words"
RATE = 24_000
SAID = "thank you six five zero"


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    parts = [torch.zeros(RATE)]
    for name in ("thank_you", "six_five_zero"):
        parts += [load_audio(WORDS / f"{name}.flac", RATE), torch.zeros(2 * RATE)]
    save_wav(tmp_path / "talk.wav", torch.cat(parts), RATE)
    return tmp_path / "talk.wav"


def out(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["asr", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["asr", *map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_text_is_one_line(capsys, talk):
    assert out(capsys, talk) == f"{SAID}\n"


def test_json(capsys, talk):
    found = json.loads(out(capsys, talk, "--format", "json"))
    assert found["text"] == SAID
    assert [each["text"] for each in found["segments"]] == ["thank you", "six five zero"]
    assert found["duration"] == pytest.approx(load_audio(talk, RATE).shape[0] / RATE, abs=1e-3)


def test_json_of_several_is_a_line_each(capsys, talk):
    lines = out(capsys, talk, WORDS / "thank_you.flac", "--format", "json").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [SAID, "thank you"]


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_are_where_the_words_are(capsys, talk, form, tmp_path):
    target = tmp_path / f"a.{form}"
    assert out(capsys, talk, "--format", form, "-o", target) == ""
    read = pysubs2.load(str(target))
    assert [line.plaintext for line in read] == ["thank you", "six five zero"]
    assert read[0].start == pytest.approx(1000, abs=350)
    assert read.to_string(form)


def test_a_folder_keeps_what_is_there(capsys, talk, tmp_path):
    folder = tmp_path / "out"
    files = [talk, WORDS / "thank_you.flac"]
    out(capsys, *files, "-o", folder)
    assert (folder / "talk.txt").read_text() == f"{SAID}\n"
    (folder / "talk.txt").write_text("kept")
    (folder / "thank_you.txt").unlink()
    assert main(["asr", *map(str, files), "-o", str(folder)]) == 0
    assert "1 of 2 are there already" in capsys.readouterr().err
    assert (folder / "talk.txt").read_text() == "kept"
    assert (folder / "thank_you.txt").read_text() == "thank you\n"
    out(capsys, *files, "-o", folder, "--overwrite")
    assert (folder / "talk.txt").read_text() == f"{SAID}\n"


def test_a_bad_one_of_several_writes_no_file(capsys, talk, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    folder = tmp_path / "out"
    assert main(["asr", str(tmp_path / "bad.wav"), str(talk), "-o", str(folder)]) == 1
    assert "cannot decode" in capsys.readouterr().err
    assert {file.name for file in folder.iterdir()} == {"talk.txt", RECORD}


def test_several_at_once_are_printed_in_the_order_given(capsys, talk, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    files = [WORDS / "thank_you.flac", tmp_path / "bad.wav", talk, WORDS / "thank_you.flac"]
    assert main(["asr", *map(str, files)]) == 1
    told = capsys.readouterr()
    said = {files[0]: "thank you", talk: SAID}
    assert told.out.splitlines() == [f"{x}: {said[x]}" for x in files if x in said]
    assert "transcribed 3 recordings, 1 failed" in told.err


def test_standard_input_is_one_of_several(capsys, talk, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(talk.read_bytes())))
    out(capsys, "-", WORDS / "thank_you.flac", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "standard input.txt").read_text() == f"{SAID}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"RIFF")))
    assert main(["asr", "-", str(WORDS / "thank_you.flac")]) == 1
    told = capsys.readouterr()
    assert "standard input" in told.err
    assert told.out == f"{WORDS / 'thank_you.flac'}: thank you\n"


def test_the_same_recording_twice_is_written_once(capsys, tmp_path):
    twice = [WORDS / "thank_you.flac"] * 2
    out(capsys, *twice, "-o", tmp_path)
    lines = (tmp_path / RECORD).read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["thank you"]


def test_a_folder_that_cannot_be_written_is_wrong_usage(capsys, talk, tmp_path):
    (tmp_path / "file").write_text("")
    files = [talk, WORDS / "thank_you.flac"]
    assert "cannot write into" in error(capsys, *files, "-o", tmp_path / "file")


def test_an_interrupt_prints_what_is_known(capsys, talk, monkeypatch):
    import mimo_fast.cli.asr as command

    def interrupted(*arguments, **options):
        for result in real(*arguments, **options):
            yield result
            raise KeyboardInterrupt

    real = command.batch
    monkeypatch.setattr(command, "batch", interrupted)
    assert main(["asr", str(WORDS / "thank_you.flac"), str(talk), "--streams", "1"]) == 130
    # The longest is first, though it is printed last.
    assert capsys.readouterr().out == f"{talk}: {SAID}\n"


def test_a_pipe(capsys, talk, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(talk.read_bytes())))
    assert out(capsys, "-") == f"{SAID}\n"


def test_a_recording_without_speech_is_warned_of(capsys, tmp_path):
    save_wav(tmp_path / "a.wav", torch.zeros(RATE), RATE)
    assert main(["asr", str(tmp_path / "a.wav")]) == 0
    printed = capsys.readouterr()
    assert printed.out == "\n"
    assert "no speech was found in the 1.0 s of" in printed.err


def test_wrong_usage_is_said_before_anything_is_loaded(capsys, talk, tmp_path):
    assert "give recordings, or --live" in error(capsys)
    assert "--live takes none" in error(capsys, talk, "--live")
    assert "name a folder with -o" in error(capsys, talk, talk, "--format", "srt")
    assert "--whole prints text" in error(capsys, talk, "--whole", "--format", "srt")
    other = tmp_path / "other" / talk.name
    other.parent.mkdir()
    other.write_bytes(talk.read_bytes())
    assert "would be written twice" in error(capsys, talk, other, "-o", tmp_path / "out")
    assert "is an input" in error(capsys, talk, "-o", talk)


def test_the_microphone_until_ctrl_c(capsys, talk, monkeypatch):
    samples, handler = load_audio(talk, RATE).numpy(), signal.getsignal(signal.SIGINT)

    def speak(callback, blocksize):
        for start in range(0, len(samples) - blocksize, blocksize):
            callback(samples[start : start + blocksize, None], blocksize, None, None)
        while signal.getsignal(signal.SIGINT) is handler:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    class Stream:
        def __init__(self, samplerate, channels, dtype, blocksize, callback, **options):
            assert (samplerate, channels, dtype) == (RATE, 1, "float32")
            self.thread = threading.Thread(target=speak, args=(callback, blocksize))

        def __enter__(self):
            self.thread.start()

        def __exit__(self, *_):
            self.thread.join()

    devices = [{"index": 0, "name": "microphone", "max_input_channels": 1}]
    fake = SimpleNamespace(InputStream=Stream, PortAudioError=OSError)
    fake.query_devices = lambda: devices
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    assert out(capsys, "--live") == "thank you\nsix five zero\n"
    assert np.isfinite(samples).all()


def test_without_a_microphone(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["asr", "--live"]) == 1
    assert "needs the package sounddevice: pip install" in capsys.readouterr().err
