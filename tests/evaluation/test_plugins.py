"""Plug-ins by import path and by URL; what is wrong with one is a line."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evaluations import WORDS

from mimo_fast import MimoFastError
from mimo_fast.evaluation.plugins import load_plugin, load_tools, with_model


def test_a_function_and_a_class():
    assert load_plugin("recogniser", "evaluations:deaf").__name__ == "deaf"
    first = load_plugin("recogniser", "evaluations:Counting")
    assert type(first).__name__ == "Counting"
    assert load_plugin("judge", "math:hypot")(3, 4) == 5


def test_the_working_directory_is_importable(tmp_path, monkeypatch):
    (tmp_path / "ears_of_here.py").write_text("def hear(audio, language): return 'words'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert load_plugin("recogniser", "ears_of_here:hear")(None, "en") == "words"


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("recogniser", "whisper", r"is package\.module:name or https://.* or self, not 'whisper'"),
        ("speaker", "ecapa", "or resemblyzer, not 'ecapa'"),
        ("judge", "no_such_package:x", "cannot be used: ModuleNotFoundError: No module named"),
        ("judge", "math:no_such_name", "AttributeError"),
        ("judge", "evaluations:number", "is a int, no function"),
        ("judge", "evaluations:Unmade", "cannot be used: TypeError: .*needed"),
        ("judge", "https://host/v1", "names no model: add #MODEL"),
        ("speaker", "https://host/v1#m", "has no URL"),
    ],
)
def test_what_is_wrong_is_one_line(kind, given, message):
    with pytest.raises(MimoFastError, match=message) as raised:
        load_plugin(kind, given)
    assert "\n" not in str(raised.value)


def test_the_model_itself(nano):
    tools = load_tools({"recogniser": "self", "speaker": None, "judge": None})
    assert (tools.recogniser, tools.names) == (None, {"recogniser": "self"})
    ready = with_model(tools, nano)
    assert ready.recogniser(WORDS / "thank_you.flac", "en") == "thank you"


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-like server that fails first, and what it was asked."""
    asked, key = [], "a-key"

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append((self.path, self.headers["authorization"], body))
            if self.path.endswith("completions"):
                model = json.loads(body)["model"]
            else:
                model = "bad" if b"bad" in body else "good"
            code = 401 if model == "bad" else 503 if len(asked) == 1 else 200
            said = {"text": "thank you", "choices": [{"message": {"content": "Score: 1"}}]}
            data = json.dumps(said if code == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("MIMO_FAST_EVAL_KEY", key)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1", asked
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_server_hears(server):
    url, asked = server
    recogniser = load_plugin("recogniser", f"{url}#good")
    assert recogniser(WORDS / "thank_you.flac", "en") == "thank you"
    # It was busy once.
    assert [path for path, _, _ in asked] == ["/v1/audio/transcriptions"] * 2
    assert asked[1][1] == "Bearer a-key"
    assert (WORDS / "thank_you.flac").read_bytes() in asked[1][2]
    assert b"good" in asked[1][2]


def test_a_server_judges(server):
    url, asked = server
    judge = load_plugin("judge", f"{url}#good")
    assert judge([{"role": "user", "content": "right?"}]) == "Score: 1"
    assert json.loads(asked[1][2])["messages"] == [{"role": "user", "content": "right?"}]
    assert json.loads(asked[1][2])["temperature"] == 0
    judge([{"role": "user", "content": "heard?"}], [WORDS / "thank_you.flac"])
    first, second = json.loads(asked[2][2])["messages"][0]["content"]
    assert first == {"type": "text", "text": "heard?"}
    assert second["input_audio"]["format"] == "flac"
    assert base64.b64decode(second["input_audio"]["data"]).startswith(b"fLaC")


def test_a_server_that_refuses_is_one_line(server):
    with pytest.raises(
        MimoFastError, match=r"\(bad\) did not answer: AuthenticationError"
    ) as raised:
        load_plugin("judge", f"{server[0]}#bad")([{"role": "user", "content": "?"}])
    assert "\n" not in str(raised.value)
