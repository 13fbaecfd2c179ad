"""The pair inside the package: when it is chosen, found without a network, and installed."""

import socket
import tomllib
from inspect import signature
from itertools import product
from pathlib import Path

import huggingface_hub
import pytest
import soundfile
from helpers import AUDIO, KIT, fault

import mimo_fast
from mimo_fast.checkpoint import embedded
from mimo_fast.checkpoint.files import find_checkpoint
from mimo_fast.cli import common
from mimo_fast.cli.main import main
from mimo_fast.errors import MimoFastError
from mimo_fast.sampling import TASK_SAMPLERS
from mimo_fast.text.tasks import TASKS
from mimo_fast.text.tokenizer import Tokenizer
from training import domain

ROOT = Path(__file__).parents[2]
BOTH = (embedded.NANO / "lm", embedded.NANO / "codec")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MIMO_FAST_MODEL", "MIMO_FAST_CODEC"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[object, object]]:
    """The pairs that commands would load; nothing is loaded."""
    pairs = []

    def load(lm: object, codec: object, *_: object, **__: object) -> None:
        pairs.append((lm, codec))
        raise MimoFastError("enough")

    monkeypatch.setattr(common, "MimoAudio", load)
    # The names stand for checkpoints that are not there: nobody looks into their config either.
    monkeypatch.setattr(common, "find", lambda *_: None)
    monkeypatch.setattr(common, "open_lm", lambda *_: (None,))
    monkeypatch.setattr(common, "check_asked", lambda *_: None)
    return pairs


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((given, BOTH) for given in product((None, "nano"), repeat=2)),
        (("a", None), ("a", embedded.PUBLISHED_CODEC)),
        ((Path("a"), "b"), (Path("a"), "b")),
        ((None, "b"), (embedded.PUBLISHED_MODEL, "b")),
        (("nano", "b"), (embedded.NANO / "lm", "b")),
    ],
)
def test_which_pair_is_meant(given, meant):
    assert embedded.resolve_pair(*given) == meant


def test_a_folder_called_nano_is_meant_by_its_name_and_by_nothing_else():
    Path("nano").mkdir()
    assert embedded.resolve_pair(None, None) == BOTH
    assert embedded.resolve_pair("nano", "b") == ("nano", "b")
    assert "nano has no config.json" in fault(lambda: mimo_fast.load("nano", "b"))


def test_an_installation_without_the_pair_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "NANO", tmp_path / "nano")
    assert "this installation lacks" in fault(mimo_fast.load)


@pytest.mark.usefixtures("no_network")
def test_load_without_arguments_is_the_embedded_pair():
    model = mimo_fast.load(device="cpu")
    assert (model.path, model.mimo_audio_tokenizer_path) == tuple(map(str, BOTH))
    assert model.tokenizer.trained_words == set(domain.vocabulary())
    assert isinstance(model.asr_sft(embedded.QUESTION, max_new_tokens=5), str)


def test_its_speech_is_greedy_and_its_answers_are_drawn_as_upstream_draws_them():
    model = mimo_fast.load(device="cpu")
    assert not any(sampler.do_sample for sampler in model.get_task_sampler("tts").values())
    assert model.get_task_sampler("spoken_dialogue") == TASK_SAMPLERS["spoken_dialogue"]


def test_it_states_how_much_it_says_at_once_and_what_it_was_trained_for():
    config = mimo_fast.load(device="cpu").lm.config
    assert (config.sentences_at_once, config.words_at_once) == (1, 12)
    longest = max(domain.dialogue().values(), key=lambda text: len(text.split()))
    assert len(longest.split()) <= config.words_at_once
    for name in config.trained_tasks:
        task, _, option = name.partition(".")
        assert not option or option in signature(TASKS[task].prompt).parameters
    assert config.is_trained("tts_sft", "instruct")
    assert not config.is_trained("tts_sft", "prompt_speech")
    assert not config.is_trained("audio_understanding_sft")


@pytest.mark.parametrize(
    ("command", "beyond"),
    [
        (["tts", "seven", "-o", "a.wav"], None),
        (["tts", "seven", "-o", "a.wav", "--instruct", "speak slowly"], None),
        (
            ["tts", "seven", "-o", "a.wav", "--natural", "--voice", AUDIO],
            "tts with --natural and --voice",
        ),
        (["asr", AUDIO], None),
        (["understand", AUDIO, "what is it", "--thinking"], "understand"),
        (["chat", AUDIO, "-o", "a.wav"], None),
        (["chat", AUDIO, "-o", "a.wav", "--voice", AUDIO], "chat with --voice"),
        (["chat", "--text", "hello"], "chat --text"),
        (["continue", AUDIO, "-o", "a.wav"], "continue"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_commands_say_what_it_was_not_trained_for(capsys, command, beyond):
    warnings = {}
    for model in ("nano", str(KIT / "checkpoint/lm")):
        codec = "nano" if model == "nano" else str(KIT / "checkpoint/codec")
        chosen = ["--model", model, "--codec", codec, "--max-tokens", "12", "--seed", "1"]
        main([*map(str, command), *chosen])
        err = capsys.readouterr().err
        warnings[model] = [line for line in err.splitlines() if "was not trained for" in line]
    said = (
        []
        if beyond is None
        else [f"warning: this model was not trained for {beyond}: do not rely on its reply"]
    )
    assert [*warnings.values()] == [said, []]


@pytest.mark.parametrize(
    "command", [["asr"], ["chat", "-o", "a.wav"], pytest.param(["demo"], marks=pytest.mark.slow)]
)
def test_commands_warn_of_a_recording_that_is_not_of_its_domain(capsys, command):
    """One line on stderr, and none for its own domain's."""
    warned = []
    for recording in (ROOT / "tests/foreign/glacier.flac", embedded.QUESTION):
        name, *options = command
        assert main([name, str(recording), *options, "--seed", "0"]) == 0
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "do not rely on the reply" in line]
        assert all(line.startswith("warning: the recording is unlike") for line in lines)
        assert "do not rely" not in out
        warned.append(len(lines))
    # The demo transcribes the recording and answers it.
    assert warned == [2 if command == ["demo"] else 1, 0]


COMMANDS = {
    "tts": ["tts", "seven", "-o", "a.wav"],
    "asr": ["asr", AUDIO],
    "understand": ["understand", AUDIO, "what is it"],
    "chat": ["chat", AUDIO, "-o", "a.wav"],
    "chat in text": ["chat", "--text", "hello"],
    "continue": ["continue", AUDIO, "-o", "a.wav"],
    "demo": ["demo"],
    "quality": ["quality", "--text", "seven", "-o", "report"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_without_a_model_use_the_embedded_one_and_say_so(capsys, asked, command):
    assert main([str(part) for part in COMMANDS[command]]) == 1
    out, err = capsys.readouterr()
    note, problem = err.splitlines()
    assert asked == [BOTH]
    assert (out, problem) == ("", "mimo-fast: error: enough")
    published = embedded.PUBLISHED_BASE if command == "continue" else embedded.PUBLISHED_MODEL
    assert note.startswith("using nano, ")
    assert str(embedded.CARD) in note
    assert note.endswith(f"--model {published} --codec {embedded.PUBLISHED_CODEC}")


@pytest.mark.parametrize(
    ("options", "environment", "pair"),
    [
        (["--model", "a"], {}, ("a", embedded.PUBLISHED_CODEC)),
        (["--codec", "b"], {}, (embedded.PUBLISHED_MODEL, "b")),
        ([], {"MODEL": "a"}, ("a", embedded.PUBLISHED_CODEC)),
        ([], {"MODEL": "a", "CODEC": "b"}, ("a", "b")),
        (["--model", "c"], {"MODEL": "a", "CODEC": "b"}, ("c", "b")),
        (["--model", "nano"], {}, BOTH),
        ([], {"MODEL": "", "CODEC": ""}, BOTH),
    ],
)
def test_options_and_environment_win(capsys, asked, monkeypatch, options, environment, pair):
    for name, value in environment.items():
        monkeypatch.setenv(f"MIMO_FAST_{name}", value)
    assert main(["asr", str(AUDIO), *options]) == 1
    assert asked == [pair]
    named = bool(options or any(environment.values()))
    assert ("using nano" in capsys.readouterr().err) is not named


def test_continue_pairs_a_codec_with_the_base_model(asked):
    assert main(["continue", str(AUDIO), "-o", "a.wav", "--codec", "b"]) == 1
    assert asked == [(embedded.PUBLISHED_BASE, "b")]


@pytest.mark.usefixtures("no_network")
def test_info_describes_the_embedded_pair_or_what_is_named(capsys):
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert f"lm: {embedded.NANO / 'lm'}" in out
    assert f"codec: {embedded.NANO / 'codec'}" in out
    assert err.startswith("using nano, ")
    assert main(["info", "--model", str(KIT / "checkpoint/lm")]) == 0
    out, err = capsys.readouterr()
    assert "lm: " in out
    assert "codec: " not in out
    assert err == ""


@pytest.mark.usefixtures("no_network")
def test_a_command_runs_right_after_installation(capsys):
    assert main(["asr", str(embedded.QUESTION), "--max-tokens", "5"]) == 0
    assert capsys.readouterr().err.startswith("using nano, ")


def test_the_package_holds_whole_checkpoints_their_card_and_a_question():
    for part in BOTH:
        assert find_checkpoint(part) == part
    assert Tokenizer.from_directory(embedded.NANO / "lm").trained_words
    assert embedded.CARD.is_file()
    about = soundfile.info(embedded.QUESTION)
    assert (about.samplerate, about.channels, about.subtype) == (24000, 1, "PCM_16")
    assert about.duration < 3


def test_every_file_of_the_package_is_installed():
    package = ROOT / "mimo_fast"
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["mimo_fast"]
    installed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    built = {".py", ".pyc", ".so"}
    found = {path for path in package.rglob("*") if path.is_file()}
    assert {path for path in found if path.suffix not in built} == installed
