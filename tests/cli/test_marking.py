"""`--mark`, `--sign` and `detect`: said where it is switched on, found again, grep's exit codes."""

import hashlib
import json
from pathlib import Path

import pytest
import soundfile
import torch
from chains import credentials, self_signed

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.cli import common
from mimo_fast.cli.main import main
from mimo_fast.marking.provenance import read_provenance
from mimo_fast.marking.watermark import find_watermark

WORDS = Path(__file__).parents[1] / "words"
QUESTION = WORDS / "what_is_nine_plus_two.flac"
RATE = 24000


def run(*arguments):
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    found = credentials(tmp_path_factory.mktemp("chain"))
    return found.certificate, found.key


def confidence(path):
    return find_watermark(load_audio(path, RATE), RATE).confidence


def test_off_changes_no_sample(tmp_path, capsys):
    assert run("tts", "seven", "--seed", 0, "-o", tmp_path / "a.wav") == 0
    assert "marking" not in capsys.readouterr().err
    with mimo_fast.load() as model:
        wav = torch.cat([chunk.audio for chunk in model.stream("tts", "seven", seed=0)])
    mimo_fast.save_wav(tmp_path / "b.wav", wav, RATE)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_commands_mark_what_they_write(tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("seven forty two\n", encoding="utf-8")
    given = {
        "said.wav": ("tts", "seven forty two"),
        "replied.wav": ("chat", QUESTION),
        "demo": ("demo", QUESTION),
        "lines": ("tts", "--lines", tmp_path / "lines.txt"),
    }
    for name, arguments in given.items():
        assert run(*arguments, "--seed", 0, "--mark", "-o", tmp_path / name) == 0
        # Once, whatever is written.
        assert capsys.readouterr().err.count("marking: a watermark") == 1
    files = [*tmp_path.glob("*.wav"), *tmp_path.glob("demo/*.wav"), *tmp_path.glob("lines/*.wav")]
    assert len(files) == 6
    for file in files:
        assert confidence(file) > 0.95, file


def test_what_was_before_a_continuation_stays(tmp_path):
    for name, more in (("plain.wav", ()), ("marked.wav", ("--mark",))):
        output = "--join", "-o", tmp_path / name
        assert run("continue", QUESTION, "--seed", 0, "--max-tokens", 16, *output, *more) == 0
    plain, marked = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("plain", "marked"))
    before = len(load_audio(QUESTION, RATE))
    assert len(plain) == len(marked) > before
    assert (plain[:before] == marked[:before]).all()
    assert (plain[before:] != marked[before:]).any()


def test_standard_output_is_marked(tmp_path, capsysbinary):
    assert run("tts", "seven forty two", "--seed", 0, "--mark", "-o", "-") == 0
    live = tmp_path / "live.wav"
    live.write_bytes(capsysbinary.readouterr().out)
    assert run("tts", "seven forty two", "--seed", 0, "--mark", "-o", tmp_path / "whole.wav") == 0
    assert confidence(live) > 0.98
    heard, whole = (load_audio(tmp_path / f"{name}.wav", RATE) for name in ("live", "whole"))
    assert torch.equal(heard, whole)


def test_a_talk_is_marked(tmp_path):
    output = tmp_path / "replies.wav"
    assert run("talk", "--mark", "--input", QUESTION, "--output", output) == 0
    assert confidence(output) > 0.95


def test_detect(tmp_path, capsys, pem):
    said, other = tmp_path / "said.flac", tmp_path / "other.wav"
    assert run("tts", "seven forty two", "--mark", "--sign", *pem, "-o", said) == 0
    assert run("tts", "seven forty two", "-o", other) == 0
    capsys.readouterr()
    assert run("detect", other, said) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{other}: not marked (confidence 0.0")
    assert second.startswith(f"{said}: marked (confidence 1.00 from 0.0 to ")
    assert second.endswith(f"made by mimo-fast {mimo_fast.__version__} with nano, signed by Signer")
    assert run("detect", other) == 1
    assert capsys.readouterr().err == ""
    assert run("detect", said, tmp_path / "none.wav", "--json") == 2
    assert run("detect", tmp_path / "none.wav") == 2
    told = capsys.readouterr()
    assert "cannot read" in told.err
    found = json.loads(told.out)
    assert found["marked"]
    assert found["watermark"]["marked"]
    assert 0.98 < found["watermark"]["confidence"] < found["watermark"]["score"] <= 1
    assert found["provenance"]["intact"]


def test_a_file_that_was_changed_is_told(tmp_path, capsys, pem):
    file = tmp_path / "a.wav"
    for more, code in (("--mark",), 0), ((), 1):
        assert run("tts", "seven forty two", "--sign", *pem, "-o", file, *more) == 0
        assert run("detect", file) == 0
        data = bytearray(file.read_bytes())
        data[20_000] ^= 1
        file.write_bytes(data)
        # A watermark is still there; the signature tells nothing any more.
        assert run("detect", file) == code
        assert "the file was changed after it was signed" in capsys.readouterr().out


def test_consent_notes_are_kept_as_hashes(tmp_path, pem):
    voice = tmp_path / "anna.flac"
    voice.write_bytes(QUESTION.read_bytes())
    voice.with_suffix(".txt").write_text("Anna said yes\n", encoding="utf-8")
    output = tmp_path / "a.wav"
    assert run("chat", QUESTION, "--voice", voice, "--sign", *pem, "-o", output) == 0
    told = read_provenance(output)
    assert told.consents == (hashlib.sha256(b"Anna said yes").hexdigest(),)
    assert b"Anna" not in output.read_bytes()
    assert confidence(output) < 0.1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("tts", "seven", "-o", "a.ogg", "--sign", "c", "k"), "--sign needs a file that holds"),
        (("tts", "seven", "-o", "-", "--sign", "c", "k"), "--sign goes with -o FILE"),
        (("talk", "--mark", "--server", "http://127.0.0.1:1"), "start the server with --mark"),
        (("chat", "hello", "--text", "--mark"), "--mark and --sign are for speech"),
    ],
)
def test_what_cannot_be_marked_is_bad_usage(tmp_path, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_wrong_certificate_is_said_before_there_is_speech(tmp_path, capsys, pem):
    (tmp_path / "c.pem").write_text("nothing", encoding="utf-8")
    output = tmp_path / "a.wav"
    assert run("tts", "seven", "-o", output, "--sign", tmp_path / "c.pem", pem[1]) == 1
    assert "cannot sign with" in capsys.readouterr().err
    assert not output.exists()


def test_a_certificate_that_signs_itself_is_said_before_a_model_loads(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(common, "MimoAudio", lambda *_, **__: pytest.fail("a model was loaded"))
    pair = self_signed(tmp_path, authority=False)
    output = tmp_path / "a.wav"
    assert run("tts", "seven", "-o", output, "--sign", pair.certificate, pair.key) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "signs itself" in line]
    assert len(said) == 1
    assert "C2PA asks for a chain: name one that an authority issued" in said[0]
    assert not output.exists()
