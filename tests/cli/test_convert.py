"""`mimo-fast convert`: by example, into files and pipes; what is wrong is said before a load."""

import io
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conversions import ANSWER, ASKED, WORDS, answered, write_answers

import mimo_fast
from mimo_fast.batches import RECORD
from mimo_fast.cli import common
from mimo_fast.cli.arguments import check_arguments
from mimo_fast.cli.main import main
from mimo_fast.cli.parser import build_parser
from mimo_fast.runtime.examples import read_set

RATE = 24_000
OTHER = WORDS / "where_do_you_live.flac"


@pytest.fixture(scope="module")
def nano():
    return mimo_fast.load()


@pytest.fixture(scope="module")
def examples(nano, tmp_path_factory):
    return answered(nano, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def folder(nano, tmp_path_factory):
    return write_answers(nano, tmp_path_factory.mktemp("sets") / "answers")


@pytest.fixture
def shown(examples):
    """Options that show how questions are answered."""
    given = [str(part) for each in examples for part in ("--example", *each)]
    return [*given, "--instruction", "answer"]


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_what_examples_show_is_done(capsys, shown, tmp_path, nano, examples):
    assert convert(*shown, ASKED, "-o", tmp_path / "a.wav", "--seed", 1) == 0
    told = capsys.readouterr()
    assert told.out == f"{ANSWER}\n"
    assert f"wrote {tmp_path / 'a.wav'}" in told.err
    assert "warning" not in told.err
    found, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    alone = mimo_fast.convert(nano, ASKED, examples, instruction="answer", seed=1)
    assert rate == RATE
    assert np.abs(found / 2**15 - alone.audio.numpy()).max() <= 2**-15


def test_words_that_are_left_out_are_heard(capsys, examples, tmp_path):
    given = [part for before, after, _ in examples for part in ("--example", before, after)]
    answer = "--instruction", "answer", "-o", tmp_path / "a.ogg", "--seed", 1
    assert convert(*given, *answer, "--", ASKED) == 0
    told = capsys.readouterr()
    assert told.out == f"{ANSWER}\n"
    assert f"example 1: heard 'seven' in {examples[0][1]}" in told.err


def test_standard_input_and_output(capfdbinary, shown, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ASKED.read_bytes())))
    assert convert(*shown, "-", "-o", "-", "--seed", 1) == 0
    told = capfdbinary.readouterr()
    assert told.out[:4] == b"RIFF"
    assert len(told.out) > RATE
    assert ANSWER in told.err.decode()


def test_several_go_into_a_folder_that_keeps_what_it_has(capsys, shown, tmp_path):
    output, bad = tmp_path / "out", tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    several = [*shown, ASKED, OTHER, bad, tmp_path / "none.wav", "-o", output, "--seed", 1]
    assert convert(*several) == 1
    told = capsys.readouterr()
    assert "cannot decode" in told.err
    assert "none.wav" in told.err
    assert "wrote 2 recordings" in told.err
    assert "2 failed" in told.err
    names = {f"{each.stem}.wav" for each in (ASKED, OTHER)}
    assert {each.name for each in output.iterdir()} == {*names, RECORD}
    # What is missing is made again as it was; what is there stays.
    (output / f"{ASKED.stem}.wav").write_bytes(b"kept")
    again = (output / f"{OTHER.stem}.wav").read_bytes()
    (output / f"{OTHER.stem}.wav").unlink()
    assert convert(*shown, ASKED, OTHER, "-o", output, "--seed", 1) == 0
    assert (output / f"{OTHER.stem}.wav").read_bytes() == again
    assert "wrote 1 recordings" in capsys.readouterr().err
    assert (output / f"{ASKED.stem}.wav").read_bytes() == b"kept"
    assert convert(*shown, ASKED, "-o", output, "--seed", 1, "--overwrite") == 0
    assert soundfile.info(output / f"{ASKED.stem}.wav").duration > 0.5


def test_an_interrupt_leaves_no_half_file(capsys, shown, tmp_path, monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(common, "save_wav", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert convert(*shown, ASKED, "-o", tmp_path / "a.wav", "--seed", 1) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_examples_are_kept_as_a_set(capsys, examples, shown, tmp_path, monkeypatch):
    kept = tmp_path / "sets" / "answers"
    # The words are all there, so that no model is needed.
    monkeypatch.setattr(common, "find_pair", None)
    consent = "--consent", "Synthesized."
    assert convert(*shown, "--save-examples", kept, *consent) == 0
    found = read_set(kept)
    assert [each.words for each in found.examples] == [words for _, _, words in examples]
    assert (found.instruction, found.consent) == ("answer", "Synthesized.")
    assert convert(*shown, "--save-examples", kept, *consent) == 1
    assert "answers exists" in capsys.readouterr().err


def test_a_set_is_used(capsys, folder, tmp_path):
    output = tmp_path / "a.wav"
    assert convert("--examples", folder, ASKED, "-o", output, "--seed", 1) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    # Another instruction than the set's.
    command = "--examples", folder, "--instruction", "Sing it", ASKED, "-o", output
    assert convert(*command, "--max-tokens", 20) == 0
    told = capsys.readouterr().err
    assert 'was trained to convert by example with "Say it again in your own voice"' in told


@pytest.mark.parametrize(
    ("given", "pairs", "recordings"),
    [
        (["--example", "a.wav", "b.wav", "some words", "c.wav"], [("some words",)], ["c.wav"]),
        (["--example", "a.wav", "b.wav", "c.wav", "d.mp3"], [(None,)], ["c.wav", "d.mp3"]),
        (["c.wav", "--example", "a.wav", "b.wav", "1.5"], [("1.5",)], ["c.wav"]),
        (["--example", "a.wav", "b.wav", "w", "-"], [("w",)], ["-"]),
        (["--example", "a.wav", "b.wav", "-"], [(None,)], ["-"]),
        (
            ["--example", "a", "b", "x", "--example", "c", "d", "--seed", "1", "e.wav"],
            [("x",), (None,)],
            ["e.wav"],
        ),
    ],
)
def test_text_and_recordings_are_told_apart(given, pairs, recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for name in ("a", "b", "c", "d"):
        for path in (Path(name), Path(f"{name}.wav"), Path(f"{name}.mp3"), Path("e.wav")):
            path.write_bytes(b"x")
    output = ["-o", "out" if len(recordings) > 1 else "out.wav"]
    args = build_parser().parse_args(["convert", *given, *output])
    check_arguments(args)
    assert [each[2:] for each in args.pairs] == pairs
    assert [*map(str, args.audio)] == recordings


def tone(path, seconds=1.0, rate=RATE, level=0.3):
    soundfile.write(path, level * np.sin(np.arange(round(seconds * rate)) / 20), rate)
    return path


@pytest.fixture
def in_(tmp_path):
    return tone(tmp_path / "in.wav")


WRONG = {
    "IN alone": (lambda at: ["--example", at / "in.wav"], "in.wav is IN alone: give OUT"),
    "IN is missing": (lambda at: pair(at / "none.wav", at / "in.wav"), "example 1: cannot read"),
    "OUT is missing": (lambda at: pair(at / "in.wav", at / "none.wav"), "example 1: cannot read"),
    "OUT is empty": (
        lambda at: pair(at / "in.wav", touched(at / "b.wav", b"")),
        "example 1: .*b.wav is empty",
    ),
    "OUT is no audio": (
        lambda at: pair(at / "in.wav", touched(at / "b.wav", b"no audio")),
        "example 1: cannot decode .*b.wav",
    ),
    "OUT is a folder": (lambda at: pair(at / "in.wav", at), "example 1: .* is a folder"),
    "OUT has another rate": (
        lambda at: pair(at / "in.wav", tone(at / "b.wav", rate=16_000)),
        "example 1: .*in.wav has a sample rate of 24000 Hz, and .*b.wav one of 16000 Hz",
    ),
    "IN is too long": (
        lambda at: pair(tone(at / "b.wav", 30.1), at / "in.wav"),
        "example 1: .*b.wav is 30.1 s long, and 30 s is the most",
    ),
    "IN is silent": (
        lambda at: pair(tone(at / "b.wav", level=0.0), at / "in.wav"),
        "example 1: .*b.wav is silent",
    ),
    "the second is wrong": (
        lambda at: [*pair(at / "in.wav", at / "in.wav"), *pair(at / "in.wav", at / "none.wav")],
        "example 2: cannot read",
    ),
    "17 examples": (lambda at: pair(at / "in.wav", at / "in.wav") * 17, "at most 16 examples"),
    "TEXT is empty": (
        lambda at: ["--example", at / "in.wav", at / "in.wav", " "],
        "TEXT is empty",
    ),
    "no examples": (lambda at: [], "give --example IN OUT"),
    "no such set": (lambda at: ["--examples", at], "holds no examples"),
    "both": (
        lambda at: [*pair(at / "in.wav", at / "in.wav"), "--examples", at],
        "give --example IN OUT",
    ),
    "consent without a set": (
        lambda at: [*pair(at / "in.wav", at / "in.wav"), "--consent", "Anna"],
        "go together",
    ),
    "a set without consent": (
        lambda at: [*pair(at / "in.wav", at / "in.wav"), "--save-examples", at / "set"],
        "go together",
    ),
    "consent that says nothing": (
        lambda at: [*saved(at / "set"), *pair(at / "in.wav", at / "in.wav"), "--consent", " "],
        "say in 3 to 2000 characters who",
    ),
    "a set of no name": (
        lambda at: [*saved(at / "a b"), *pair(at / "in.wav", at / "in.wav"), "--consent", "Anna"],
        "1 to 40 letters",
    ),
    "no instruction": (
        lambda at: [*pair(at / "in.wav", at / "in.wav"), "--instruction", ""],
        "--instruction: it is empty",
    ),
    "an output that is an example": (
        lambda at: [*pair(at / "in.wav", tone(at / "out.wav"))],
        "out.wav is an input and would be overwritten",
    ),
}


def pair(source, target):
    return ["--example", source, target, "some words"]


def saved(path):
    return ["--save-examples", path]


def touched(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(
    capsys, tmp_path, in_, monkeypatch, name
):
    given, problem = WRONG[name]
    monkeypatch.setattr(common, "find_pair", forbidden)
    recording = tone(tmp_path / "recording.wav")
    assert code(*given(tmp_path), "-o", tmp_path / "out.wav", "--", recording) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(problem, line), line
    assert line.startswith("mimo-fast")


def code(*arguments):
    try:
        return convert(*arguments)
    except SystemExit as ended:
        return ended.code


def forbidden(*arguments, **named):
    raise AssertionError("a model was looked for")


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda at: tone(at / "b.wav", 31), "31.0 s long"),
        (lambda at: tone(at / "b.wav", level=0.0), "silent"),
        (lambda at: touched(at / "b.wav", b"RIFF"), "cannot decode"),
        (lambda at: at / "b.wav", "No such file"),
    ],
)
def test_a_recording_that_cannot_be_converted_is_one_line_too(
    capsys, shown, tmp_path, monkeypatch, wrong, problem
):
    monkeypatch.setattr(common, "find_pair", forbidden)
    assert code(*shown, "-o", tmp_path / "out.wav", "--", wrong(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_what_the_context_cannot_hold_is_said_before_the_weights_are_read(
    capsys, shown, tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "MimoAudio", forbidden)
    # 12.6 s of questions and 1.3 s of answers.
    assert convert(*shown, ASKED, "-o", tmp_path / "a.wav", "--max-seq-len", 40) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model's context is 40 groups (6.4 s): give fewer or shorter examples" in line


def test_a_model_that_only_transcribes_says_so(capsys, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MimoAudio", forbidden)
    kit = Path(__file__).parents[1] / "golden"
    (found,) = kit.glob("*asr*/lm")
    pair = "--model", found, "--codec", found.parent / "codec"
    assert convert(*shown, ASKED, "-o", tmp_path / "a.wav", *pair) == 1
    assert "MiMo-V2.5-ASR does asr_sft alone" in capsys.readouterr().err


def test_help_is_quick_and_names_the_kinds(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--example IN OUT [TEXT ...]" in told
    for kind in ("voice", "emotion", "style", "speed", "denoise", "translation"):
        assert kind in told
