"""Standard streams: files before text, audio through pipes, warnings of what was cut."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import AUDIO, PAIR

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.writing import save_wav
from mimo_fast.checkpoint.embedded import QUESTION
from mimo_fast.cli.main import main
from mimo_fast.cli.process import OutputError, StandardStream

SHORT = ["--seed", "1", "--max-tokens", "30"]
ROOT = Path(__file__).parents[2]
COMMAND = f"{sys.executable} -m mimo_fast"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Gone(io.BytesIO):
    """What remains of a pipe whose reader has left."""

    def write(self, data: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class Full(io.TextIOWrapper):
    """A standard output on a full disk, or whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def shell(line: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


# Standard output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "cannot write to standard output: No space left"),
        (BrokenPipeError(32, "Broken pipe"), None),
    ],
)
@pytest.mark.parametrize(
    ("command", "files"),
    [
        (["tts", "seven", "-o", "a.wav"], {"a.wav"}),
        (["chat", QUESTION, QUESTION, "-o", "a.wav"], {"a-1.wav", "a-2.wav"}),
        (["continue", QUESTION, "-o", "a.wav"], {"a.wav"}),
        (
            ["demo", "-o", ".", "--json", "a.json"],
            {"a.json", "recording_decoded.wav", "reply.wav", "said.wav"},
        ),
    ],
)
def test_files_are_written_though_their_words_cannot_be_printed(
    capsys, tmp_path, monkeypatch, command, files, error, line
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Full(error))
    assert main([*map(str, command), "--seed", "1", "--max-tokens", "30"]) == 1
    err = capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == files
    assert err.count("mimo-fast: error: ") == (line is not None)
    assert line is None or line in err


class Listened(io.TextIOWrapper):
    """A standard output that somebody listens to."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def samples(self) -> torch.Tensor:
        self.flush()
        return load_audio(self.buffer.getvalue(), 24000)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command",
    [["tts", "seven forty two"], ["chat", QUESTION, QUESTION], ["continue", QUESTION]],
)
def test_an_elastic_look_ahead_is_for_listeners(capsys, tmp_path, monkeypatch, command):
    heard = []
    for lookahead in ("exact", "elastic"):
        monkeypatch.setattr(sys, "stdout", Listened())
        given = [*map(str, command), "-o", "-", "--lookahead", lookahead, "--seed", "1"]
        assert main([*given, "--max-tokens", "30"]) == 0
        heard.append(sys.stdout.samples())
    assert len(heard[0]) == len(heard[1]) > 0
    # A reply of one patch is decoded as it ends, with all that is known by then.
    assert torch.equal(*heard) == (len(heard[0]) <= 3840)
    capsys.readouterr()
    file = tmp_path / "a.wav"
    assert main([*map(str, command), "-o", str(file), "--lookahead", "elastic"]) == 1
    assert "it goes with -o -" in capsys.readouterr().err
    assert not file.exists()


def test_without_files_a_broken_output_ends_the_work(capsys, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "stdout", Full(BrokenPipeError(32, "Broken pipe")))
    monkeypatch.setattr(
        "mimo_fast.cli.asr.load_recording", lambda path, _: heard.append(path) or AUDIO
    )
    assert main(["asr", "--whole", str(AUDIO), str(AUDIO), *PAIR, *SHORT]) == 1
    assert len(heard) == 1


def test_nothing_said_on_standard_error_stops_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full(BrokenPipeError(32, "Broken pipe")))
    assert main(["tts", "seven", "-o", str(tmp_path / "a.wav")]) == 0
    assert (tmp_path / "a.wav").is_file()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_a_terminal_lacks_are_replaced(capsys, tmp_path, monkeypatch, encoding):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    # These weights say letters of many scripts.
    assert main(["tts", "Hi.", "-o", str(tmp_path / "a.wav"), *PAIR, *SHORT]) == 0
    sys.stdout.flush()
    assert b"?" in printed.getvalue()
    assert (tmp_path / "a.wav").is_file()


@pytest.mark.parametrize(
    "output",
    [
        "| true",
        "> /dev/full",
        *(pytest.param(each, marks=pytest.mark.slow) for each in (">&-", "2>&1 | true", "2>&-")),
    ],
)
def test_a_process_with_a_broken_output(tmp_path, output):
    path, code = tmp_path / "a.wav", tmp_path / "code"
    said = shell(f"{{ {COMMAND} tts seven -o {path}; echo $? > {code}; }} {output}")
    assert path.is_file()
    assert "Traceback" not in said.stderr
    assert "Exception ignored" not in said.stderr
    if output in ("> /dev/full", ">&-"):
        assert code.read_text() == "1\n"
        assert "mimo-fast: error: cannot write to standard output: " in said.stderr


@pytest.mark.parametrize("arguments", ["--help", "tts --help", "--version"])
def test_help_that_cannot_be_printed(arguments):
    said = shell(f"{COMMAND} {arguments} > /dev/full")
    assert said.returncode == 1
    assert said.stderr == (
        "mimo-fast: error: cannot write to standard output: No space left on device\n"
    )


def test_a_stream_keeps_its_failure_or_raises_it():
    stream = StandardStream(Full(OSError(5, "Input/output error")))
    with pytest.raises(OutputError, match="Input/output error"):
        print("word", file=stream)
    stream = StandardStream(Full(OSError(5, "Input/output error")), patient=True)
    print("word", file=stream)
    stream.flush()
    with pytest.raises(OutputError, match="Input/output error"):
        stream.finish()


# Audio through pipes


def live(capfdbinary, *arguments: object) -> tuple[int, bytes, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capfdbinary.readouterr()
    return code, out, err.decode()


def test_speech_goes_to_standard_output_while_it_is_spoken(capfdbinary, tmp_path):
    file = tmp_path / "a.wav"
    assert main(["tts", "seven forty two", "-o", str(file), "--seed", "1"]) == 0
    words = capfdbinary.readouterr().out.decode().strip()
    code, out, err = live(capfdbinary, "tts", "seven forty two", "-o", "-", "--seed", "1")
    assert code == 0
    assert out[:4] + out[8:16] == b"RIFFWAVEfmt "
    assert out[4:8] == out[40:44] == b"\xff\xff\xff\xff"
    assert out[44:] == file.read_bytes()[44:]
    assert words in err.splitlines()
    assert "wrote standard output: " in err


def test_chunks_come_before_the_reply_has_ended(monkeypatch):
    order = []

    def warn(model, args, last):
        order.append(last.timing.audio_seconds)

    monkeypatch.setattr(StandardStream, "write_bytes", lambda self, data: order.append(len(data)))
    monkeypatch.setattr("mimo_fast.cli.common.warn_if_cut", warn)
    assert main(["tts", "seven forty two", "-o", "-", "--seed", "1"]) == 0
    *pieces, seconds = order
    assert sum(pieces) == 44 + 2 * 24000 * seconds
    assert len(pieces) > 3


def test_a_dialogue_on_standard_output_is_one_wav(capfdbinary, tmp_path):
    chat = ["chat", AUDIO, AUDIO, *PAIR, *SHORT]
    assert live(capfdbinary, *chat, "-o", tmp_path / "a.wav")[0] == 0
    code, out, _ = live(capfdbinary, *chat, "-o", "-")
    files = [(tmp_path / f"a-{turn}.wav").read_bytes()[44:] for turn in (1, 2)]
    assert (code, out[44:]) == (0, b"".join(files))


def test_continue_joins_on_standard_output(capfdbinary):
    code, out, _ = live(capfdbinary, "continue", AUDIO, "-o", "-", "--join", *PAIR, *SHORT)
    assert code == 0
    before = load_audio(AUDIO, 24000)
    assert torch.equal(load_audio(out, 24000)[: len(before)], before)


def test_a_player_that_has_gone_ends_the_reply(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Gone(), encoding="utf-8"))
    assert main(["tts", "seven", "-o", "-"]) == 1
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "same"),
    [
        (["asr", "-"], ["asr", QUESTION]),
        (["understand", "-", "What?", *PAIR], ["understand", QUESTION, "What?", *PAIR]),
    ],
)
def test_recordings_come_from_standard_input(capsys, monkeypatch, command, same):
    assert main([*map(str, same), *SHORT]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(QUESTION.read_bytes())))
    assert main([*command, *SHORT]) == 0
    assert capsys.readouterr().out == expected != ""


@pytest.mark.slow
def test_a_pipe_of_two_commands():
    said = shell(f"{COMMAND} tts seven -o - --seed 1 | {COMMAND} asr -")
    assert (said.returncode, said.stdout) == (0, "seven\n")


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "standard input is empty"), (b"text", "cannot decode standard input")],
)
def test_standard_input_that_is_no_recording(capsys, monkeypatch, data, problem):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(named(data)))
    assert main(["asr", "-"]) == 1
    assert problem in capsys.readouterr().err


def named(data: bytes) -> io.BytesIO:
    stream = io.BytesIO(data)
    stream.name = "<stdin>"
    return stream


def test_standard_input_that_is_no_text(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert main(["tts", "-", "-o", str(tmp_path / "a.wav")]) == 1
    assert "standard input is not text in utf-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["asr", "-", "-"],
        ["chat", "-", "-o", "a.wav", "--voice", "-"],
        ["tts", "-", "--natural", "--voice", "-", "-o", "a.wav"],
    ],
)
def test_standard_input_is_given_once(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "standard input can be given once" in capsys.readouterr().err


def test_terminals_are_no_recordings(capsys, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    assert main(["asr", "-"]) == 1
    assert "standard input is a terminal" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO()))
    with pytest.raises(SystemExit):
        main(["tts", "seven", "-o", "-"])
    assert "standard output is a terminal: redirect it" in capsys.readouterr().err


# Several recordings, and replies that were cut


def test_a_bad_recording_ends_only_itself(capsys, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    files = [tmp_path / "bad.wav", QUESTION, tmp_path / "none.wav", QUESTION]
    assert main(["asr", *map(str, files)]) == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"({re.escape(str(QUESTION))}: [a-z ]+\n){{2}}", out)
    errors = [line for line in err.splitlines() if line.startswith("mimo-fast: error: ")]
    assert "none.wav" in errors[0]
    assert "bad.wav" in errors[1]


def test_a_recording_beyond_the_context_says_so_in_seconds(capsys, tmp_path):
    save_wav(tmp_path / "long.wav", torch.zeros(24000 * 60), 24000)
    files = [str(tmp_path / "long.wav"), str(QUESTION)]
    assert main(["asr", "--whole", *files, "--max-seq-len", "100"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{QUESTION}: ")
    assert "context is 100 groups (16.0 s)" in err


@pytest.mark.slow
def test_too_long_audio_names_no_argument_that_the_command_lacks(capsys, tmp_path, monkeypatch):
    save_wav(tmp_path / "long.flac", torch.zeros(24000 * 1801), 24000)
    assert main(["asr", "--whole", str(tmp_path / "long.flac")]) == 1
    assert capsys.readouterr().err.endswith("long.flac is longer than 1800 s; cut it\n")


def test_advice_is_in_options(capsys, monkeypatch):
    from mimo_fast.errors import DeviceMemoryError

    def fails(*_: object, **__: object) -> None:
        raise DeviceMemoryError(
            "9 GB needed: kv_cache='int8', quantization='int4', offload=['text_embeddings', "
            "'codec_encoder'], max_seq_len=4096 would fit; lower max_batch or max_seq_len"
        )

    monkeypatch.setattr("mimo_fast.cli.common.MimoAudio", fails)
    assert main(["asr", str(QUESTION)]) == 1
    assert capsys.readouterr().err.endswith(
        "9 GB needed: --kv-cache int8, --quantization int4, --offload text_embeddings --offload "
        "codec_encoder, --max-seq-len 4096 would fit; lower --max-seq-len\n"
    )
    monkeypatch.undo()
    assert main(["asr", str(QUESTION), "--max-seq-len", "1"]) == 1
    assert "error: --max-seq-len must be between 2 and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "cut"),
    [
        (["tts", "seven forty two", "-o", "a.wav", "--max-tokens", "4"], "after 4 groups: raise"),
        (["tts", "seven forty two", "-o", "a.wav"], None),
        (["asr", QUESTION, "--max-tokens", "1"], "after 1 groups: raise --max-tokens"),
        (["asr", QUESTION], None),
        (["chat", QUESTION, "-o", "a.wav", "--max-tokens", "5"], "raise --max-tokens"),
        (["understand", AUDIO, "What?", *PAIR, "--max-tokens", "2"], "raise --max-tokens"),
        (["demo", "-o", ".", "--max-tokens", "3"], "raise --max-tokens"),
        (
            ["tts", "Hi.", "-o", "a.wav", *PAIR, "--max-seq-len", "60", "--seed", "3"],
            "the context of 60 groups (9.6 s) is full: raise --max-seq-len (up to",
        ),
    ],
)
def test_a_reply_that_was_cut_is_warned_of(capsys, tmp_path, monkeypatch, command, cut):
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, command)]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cut" in line]
    assert bool(warnings) == (cut is not None)
    assert all(re.match(r"warning: .+ (was|were) cut after ", line) for line in warnings)
    assert cut is None or cut in warnings[0]
