"""docs/server.md: its examples run as they stand but for the port, and its tables are true.

Those of Pipecat and LiveKit run in tests/server/clients.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from servers import Running

import mimo_fast
from mimo_fast.cli.main import build_parser
from mimo_fast.cli.server_options import GROUPS
from mimo_fast.server.app import create_app
from mimo_fast.server.realtime.config import EAGERNESS, SERVER_VAD
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings, variable_of
from mimo_fast.server.voices import ALIASES
from training.listen import recognise

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "server.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?m)^```(\w*)\n((?:.*\n)*?)^```$", TEXT)
APART = ("from pipecat", "from livekit")
"""What needs an environment of its own."""


def block(language: str, holding: str) -> str:
    (found,) = [code for name, code in BLOCKS if name == language and holding in code]
    return found


def ran(server: Running, folder: Path, language: str, holding: str) -> str:
    """What an example of the page prints, run in this folder against this server."""
    code = block(language, holding)
    assert "127.0.0.1:8000" in code
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    command = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    options = {"cwd": folder, "env": environment, "timeout": 120}
    done = subprocess.run([*command[language], code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heard(file: Path) -> str:
    return recognise(mimo_fast.load_audio(file, 24000), 24000)


def test_every_example_is_run():
    code = [text for name, text in BLOCKS if name and not any(each in text for each in APART)]
    here = Path(__file__).read_text(encoding="utf-8")
    holding = re.findall(r'ran\(server, tmp_path, "(?:python|bash)", "([^"]+)"\)', here)
    assert len(holding) == len(code) == 5
    assert all(sum(each in text for text in code) == 1 for each in holding)
    apart = [text for name, text in BLOCKS if any(each in text for each in APART)]
    assert len(apart) == len(APART)


@pytest.mark.slow
def test_a_text_is_said_and_transcribed(server, tmp_path):
    printed = ran(server, tmp_path, "python", "client.audio.speech")
    assert printed == "what color is the sea\n"
    assert heard(tmp_path / "speech.mp3") == "what color is the sea"


@pytest.mark.slow
def test_a_realtime_session(server, tmp_path):
    printed = ran(server, tmp_path, "python", "client.realtime")
    assert printed.strip() == "the sea is blue"
    assert heard(tmp_path / "answer.wav") == "the sea is blue"


@pytest.mark.slow
def test_a_text_that_is_still_being_written(server, tmp_path):
    printed = ran(server, tmp_path, "python", "websockets.connect")
    assert printed.count('"audio.start"') == printed.count('"audio.done"') == 2
    assert printed.splitlines()[-1] == '{"type":"session.done","total_sentences":2}'
    wav = mimo_fast.load_audio(tmp_path / "said.wav", 24000)
    with mimo_fast.load() as model:
        assert model.transcribe(wav).text == "the sea is blue thank you"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server, tmp_path):
    printed = ran(server, tmp_path, "bash", "-o said.wav")
    assert '"text":"the dog is big and black"' in printed
    assert "good morning to you" in printed
    assert heard(tmp_path / "said.wav") == "the dog is big and black"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_voice_is_added(serve, tmp_path):
    folder = tmp_path / "voices"
    folder.mkdir()
    question = Path(mimo_fast.__file__).parent / "assets" / "question.wav"
    shutil.copyfile(question, tmp_path / "anna.wav")
    server = serve(voices=folder, allow_voice_upload=True)
    ran(server, tmp_path, "bash", "audio_sample")
    assert "Anna Example agreed" in (folder / "anna.txt").read_text(encoding="utf-8")


def serve_parser() -> argparse.ArgumentParser:
    (commands,) = [
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return commands.choices["serve"]


def rows(option: argparse.Action) -> str:
    """The page's row of an option, from its help, whose end is its default in brackets."""
    help, default = re.fullmatch(r"(.*?)(?: \[(.*)\])?", option.help, re.S).groups()
    name = option.option_strings[0]
    variable = variable_of(option.dest)
    return f"| `{name}` | `{variable}` | {default or ''} | {help} |"


def test_every_option_has_its_row(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MIMO_FAST_")]:
        monkeypatch.delenv(name)
    known = {each.name for each in fields(Settings)}
    options = {each.dest: each for each in serve_parser()._actions if each.dest != "help"}
    ordered = [options.pop(name) for names in GROUPS.values() for name in names]
    assert {each.dest for each in ordered} == known
    tables = [rows(each) for each in ordered], [rows(each) for each in options.values()]
    for table in tables:
        assert "\n".join(table) + "\n\n" in TEXT, "\n".join(table)


def test_every_path_is_named(service: Service):
    routes = {route.path for route in create_app(service).routes}
    for path in routes - {"/v1/models/{name:path}"}:
        assert re.search(rf"`(?:(?:POST|WS|GET) )?{re.escape(path)}`", TEXT), path
    for path in re.findall(r"`(?:POST |WS |GET )?(/(?:v1|api)/[\w/]+)`", TEXT):
        assert path in routes, path


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / link).exists(), link


def row(start: str) -> str:
    (found,) = [line for line in TEXT.splitlines() if line.startswith(f"| {start}")]
    return found


@pytest.mark.parametrize(
    ("start", "name", "value"),
    [
        ("tools", "tools", [{"type": "function", "function": {"name": "clock"}}]),
        ("tools", "tool_choice", "required"),
        ("`logprobs`", "logprobs", True),
        ("`logprobs`", "stop", ["."]),
        ("`logprobs`", "logit_bias", {"1": 1}),
        ("`logprobs`", "response_format", {"type": "json_object"}),
    ],
)
def test_what_chats_refuse_is_refused_by_name(server, start, name, value):
    assert f"`{name}`" in row(start) or name in row(start)
    body = {"model": "nano", "messages": [{"role": "user", "content": "hello"}], name: value}
    answer = server.ask("POST", "/v1/chat/completions", body)
    assert answer.status == 400
    assert answer.error["param"] == name


def test_figures_of_turns_are_those_of_the_code():
    assert len(ALIASES) == 13
    waits = {name: f"{ms // 1000} s" for name, ms in EAGERNESS.items()}
    assert waits["medium"] == waits["auto"]
    text = f"low {waits['low']}, medium and auto {waits['auto']}, high {waits['high']}"
    assert text in TEXT
    names = "threshold", "prefix_padding_ms", "silence_duration_ms"
    threshold, before, silence = (SERVER_VAD[name] for name in names)
    assert f"threshold {threshold}, {before} ms before, {silence} ms of silence" in TEXT
