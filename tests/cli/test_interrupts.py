"""Ctrl-C at any time: one line, which says what was written."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import AUDIO, PAIR

from mimo_fast.checkpoint.embedded import QUESTION
from mimo_fast.cli.main import main

ROOT = Path(__file__).parents[2]
COMMAND = f"{sys.executable} -m mimo_fast"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def _ctrl_c():
    # Tests that run in the background may ignore Ctrl-C, which processes inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_names_what_was_written(capsys, tmp_path, monkeypatch):
    from mimo_fast.cli import common

    def save(path, *arguments):
        if path.name == "a-3.wav":
            signal.raise_signal(signal.SIGINT)
        write(path, *arguments)

    write = common.save_wav
    monkeypatch.setattr(common, "save_wav", save)
    turns = [str(AUDIO)] * 4
    assert (
        main(
            [
                "chat",
                *turns,
                "-o",
                str(tmp_path / "a.wav"),
                "--max-tokens",
                "20",
                "--seed",
                "1",
                *PAIR,
            ]
        )
        == 130
    )
    written = [str(tmp_path / name) for name in ("a-1.wav", "a-2.wav")]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"mimo-fast: interrupted; wrote {', '.join(written)}"
    assert sorted(map(str, tmp_path.iterdir())) == written


@pytest.mark.slow
def test_an_interrupt_from_outside_names_what_was_written(tmp_path):
    turns = " ".join([str(AUDIO)] * 9)
    line = f"exec {COMMAND} chat {turns} -o {tmp_path}/a.wav --seed 1 --max-tokens 20"
    environment = {**ENVIRONMENT, "MIMO_FAST_KERNELS": "torch"}
    command = ["bash", "-c", f"{line} {' '.join(PAIR)}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        while not (said := process.stderr.readline()).startswith("wrote"):
            assert said
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, rest
    last = rest.splitlines()[-1]
    written = sorted(str(path) for path in tmp_path.iterdir())
    assert 1 <= len(written) < 9
    assert last == f"mimo-fast: interrupted; wrote {', '.join(written)}"


def test_an_interrupt_while_modules_are_imported(tmp_path):
    code = f"""if True:
        import os, signal, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    os.kill(os.getpid(), signal.SIGINT)
                    raise ImportError("as a native initialiser makes of it")
        sys.meta_path.insert(0, Finder())
        sys.argv = ["mimo-fast", "tts", "seven", "-o", {str(tmp_path / "a.wav")!r}]
        from mimo_fast.__main__ import main
        raise SystemExit(main())
    """
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert said.returncode == 130
    assert said.stderr == "mimo-fast: interrupted; nothing was written\n"


@pytest.mark.slow
def test_an_interrupt_at_any_time_is_one_line():
    for wait in (0.0, 0.1, 0.4):
        command = [*COMMAND.split(), "asr", *[str(QUESTION)] * 9]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        ) as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("using nano")
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        # 0 or -2: it came once the recordings were transcribed.
        assert (process.returncode, err) in (
            (130, "mimo-fast: interrupted\n"),
            (0, ""),
            (-2, ""),
        )


def test_an_interrupt_that_native_code_has_swallowed(capsys, monkeypatch, tmp_path):
    def native(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise SystemError("returned a result with an exception set") from None

    monkeypatch.setattr("mimo_fast.cli.common.MimoAudio", native)
    assert main(["tts", "seven", "-o", str(tmp_path / "a.wav")]) == 130
    assert capsys.readouterr().err.endswith("mimo-fast: interrupted; nothing was written\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(["asr", "none.wav"]) == 1


def test_a_command_in_another_thread_leaves_signals_alone(tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["asr", "none.wav"])))
    thread.start()
    thread.join()
    assert codes == [1]


def test_interrupted_checkpoints_are_named(capsys, monkeypatch, tmp_path):
    from mimo_fast.checkpoint import initialize

    def stop(*arguments: object, **options: object) -> None:
        if "codec" in str(arguments[0]):
            raise KeyboardInterrupt
        write(*arguments, **options)

    write = initialize.write_checkpoint
    monkeypatch.setattr(initialize, "write_checkpoint", stop)
    assert main(["init-checkpoint", str(tmp_path / "pair")]) == 130
    assert capsys.readouterr().err.endswith("interrupted; nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_interrupted_folders_are_called_incomplete_if_something_was_written(
    capsys, monkeypatch, tmp_path
):
    def stop(source, target, form):
        for name in names:
            (target / name).touch()
        raise KeyboardInterrupt

    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr("mimo_fast.cli.quantize.quantize_checkpoint", stop)
    names = ["model.safetensors"]
    assert main(["quantize", "nano", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith(f"interrupted; {tmp_path} is incomplete\n")
    names = []
    assert main(["quantize", "nano", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("interrupted; nothing was written\n")
