"""The page at `/`: its headers, its files and what they may refer to."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import Answer, Running

from mimo_fast.server.page import SITE
from mimo_fast.server.page.config import FEW_WORDS
from mimo_fast.server.page.files import TYPES, page_files
from mimo_fast.text.spelling import spell

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in SITE.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
HTML = (SITE / "index.html").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(SITE).as_posix()


class Elements(HTMLParser):
    """Every element's tag and attributes, and texts inside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style") and data.strip():
            self.inline.append(data)


PAGE = Elements(HTML)
IDS = [attributes["id"] for _, attributes in PAGE.found if attributes.get("id")]


def check_headers(answer: Answer) -> None:
    policy = dict(
        rule.strip().split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in str(policy)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "microphone=(self)" in answer.headers["Permissions-Policy"]
    assert answer.headers["Cache-Control"] == "no-cache"


def test_the_page_and_each_of_its_files_are_served(server: Running):
    answer = server.get("/")
    assert answer.status == 200
    assert answer.body.decode() == HTML
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    check_headers(answer)
    assert set(page_files()) == {name_of(path) for path in FILES}
    for path in FILES:
        answer = server.get(f"/static/{name_of(path)}")
        assert answer.status == 200
        assert answer.body == path.read_bytes()
        assert answer.headers["Content-Type"] == TYPES[path.suffix]
        check_headers(answer)


def test_a_file_that_is_still_the_same_is_not_sent_again(server: Running):
    for path in ("/", "/static/scripts/main.js"):
        tag = server.get(path).headers["ETag"]
        again = server.get(path, if_none_match=f'"other", W/{tag}')
        assert (again.status, again.body) == (304, b"")
        check_headers(again)
        assert server.get(path, if_none_match='"other"').status == 200
    tags = {file.tag for file in page_files().values()}
    assert len(tags) == len(page_files())


@pytest.mark.parametrize(
    "path",
    [
        "",
        "index.htm",
        "../files.py",
        "scripts/../../files.py",
        "%2e%2e/files.py",
        "..%2ffiles.py",
        "scripts/%2e%2e/%2e%2e/files.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "scripts",
        "scripts/",
        "scripts//main.js",
        "SCRIPTS/MAIN.JS",
        "scripts/main.js%00",
        "..\\files.py",
    ],
)
def test_nothing_else_is_served(server: Running, path: str):
    answer = server.get(f"/static/{path}")
    assert answer.status == 404
    assert answer.error["code"] == "not_found"


def test_files_are_read_only(server: Running):
    for path in ("/", "/static/scripts/main.js"):
        assert server.ask("HEAD", path).status == 200
        answer = server.ask("POST", path, {})
        assert answer.status == 405
        assert answer.error["code"] == "method_not_allowed"


def test_the_page_is_open_and_its_configuration_is_not(serve):
    server = serve(api_key="a-key")
    assert server.get("/").status == 200
    assert server.get("/static/scripts/main.js").status == 200
    refused = server.get("/page/config")
    assert refused.status == 401
    assert refused.error["code"] == "invalid_api_key"
    assert server.get("/page/config", authorization="Bearer another").status == 401
    assert server.get("/page/config", authorization="Bearer a-key").status == 200


def test_the_configuration_is_what_this_model_can_do(server: Running):
    answer = server.get("/page/config")
    config = answer.json
    assert answer.headers["Cache-Control"] == "no-store"
    assert config["model"] == "nano"
    assert config["few_words"]
    assert config["knows"] == {
        "talk": True,
        "instructions": False,
        "memory": False,
        "say": True,
        "styles": True,
        "transcribe": True,
        "ask": False,
        "convert": True,
    }
    assert config["voices"] == ["default"]
    assert config["limits"]["text_chars"] == 16384


def test_ice_servers_are_given_as_browsers_take_them(serve):
    server = serve()
    settings = server.app.state.settings
    object.__setattr__(settings, "ice_servers", ("stun:a.example", {"urls": ["turn:b.example"]}))
    found = server.get("/page/config").json["ice_servers"]
    assert found == [{"urls": "stun:a.example"}, {"urls": ["turn:b.example"]}]


def texts_of(samples: object) -> list[str]:
    if isinstance(samples, str):
        return [samples]
    found = samples.values() if isinstance(samples, dict) else samples or ()
    return [text for each in found for text in texts_of(each)]


def test_the_samples_are_in_the_small_model_s_vocabulary(service):
    words = service.model.tokenizer.trained_words
    said = {name: FEW_WORDS[name] for name in ("talk", "say", "recordings")}
    examples = [(each["examples"], each["recording"]) for each in FEW_WORDS["conversions"]]
    texts = texts_of([said, examples])
    assert len(texts) > 10
    for text in texts:
        spelled = spell(text)
        assert spelled
        assert set(spelled) <= set(words), text


# What the files refer to


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_names_another_host(path: Path):
    text = path.read_text(encoding="utf-8")
    for address in re.findall(
        r"(?:https?|wss?):?//[^\s\"'`)<>]+|(?<=[\"'`(])//\w[^\s\"'`)]*", text
    ):
        # The name of a language, which nothing opens.
        assert address == "http://www.w3.org/2000/svg", address
    assert "@import" not in text


def test_nothing_is_inline():
    assert PAGE.inline == []
    for tag, attributes in PAGE.found:
        assert tag != "style"
        assert "style" not in attributes, (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        if tag == "script":
            assert attributes["src"]


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_make_no_code_and_no_markup_of_text(path: Path):
    text = path.read_text(encoding="utf-8")
    refused = r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function)\b\s*[(=.]"
    assert re.search(refused, text) is None
    assert 'setAttribute("style"' not in text
    # A key is never in an address.
    assert re.search(r"searchParams\.set\([\"'](api_)?key", text) is None


def test_every_file_that_is_referred_to_is_there():
    referred = set[Path]()
    for _, attributes in PAGE.found:
        for name in ("src", "href"):
            address = attributes.get(name) or ""
            if address and not address.startswith("#"):
                parts = urlsplit(address)
                assert not parts.scheme
                assert not parts.netloc
                assert parts.path.startswith("static/"), address
                referred.add(SITE / parts.path.removeprefix("static/"))
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        for address in re.findall(r"(?:^import|^\} from|from) \"(\.[^\"]+)\"", text, re.M):
            referred.add((script.parent / address).resolve())
    referred |= {SITE / "index.html", *(SITE / "worklets").iterdir()}
    assert {path for path in referred if not path.is_file()} == set()
    # And no file is there that nothing refers to.
    assert set(FILES) - referred == set()


def test_every_id_that_scripts_ask_for_is_there():
    assert len(IDS) == len(set(IDS))
    tabs = [a["aria-controls"] for _, a in PAGE.found if a.get("role") == "tab"]
    assert len(tabs) == 6
    asked = set[str]()
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        asked |= set(re.findall(r"(?<![.\w])(?:get|sourceOf|SpeechOutput)\(\s*\"([\w-]+)\"", text))
        asked |= set(re.findall(r"^  \"([\w]+-[\w-]+)\": \"", text, re.M))
    assert asked - set(IDS) == set()
    assert len(asked) > 80
    assert {f"tab-{tab}" for tab in tabs} <= set(IDS)
    for _, attributes in PAGE.found:
        for name in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
            for each in (attributes.get(name) or "").split():
                assert each in IDS, (name, each)


def test_every_icon_is_in_the_sprite():
    drawn = {attributes["id"] for tag, attributes in PAGE.found if tag == "symbol"}
    used = {a["href"].removeprefix("#") for tag, a in PAGE.found if tag == "use" and a["href"]}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        used |= set(re.findall(r"#(i-[\w-]+)", text))
        used |= {f"i-{name}" for name in re.findall(r"(?:icon|iconButton)\(\"([\w-]+)\"", text)}
    assert used - {"i-"} <= drawn


def test_controls_have_names():
    labelled = {attributes.get("for") for tag, attributes in PAGE.found if tag == "label"}
    for tag, attributes in PAGE.found:
        if tag in ("input", "textarea", "select") and attributes.get("type") not in (
            *("radio", "checkbox"),
        ):
            assert attributes["id"] in labelled, attributes


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_scripts_are_valid():
    for script in SCRIPTS:
        kind = [] if script.name == "theme.js" else ["--input-type=module"]
        command = ["node", *kind, "--check"]
        source = script.read_bytes()
        done = subprocess.run(command, input=source, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, f"{script}\n{done.stderr.decode()}"


RESAMPLES = """
import { Resampler } from "%s";
const [source, target, hertz] = [%d, %d, %d];
const resampler = new Resampler(source, target);
const tone = (i, rate) => Math.sin((2 * Math.PI * hertz * i) / rate);
const wave = Float32Array.from({ length: source }, (_, i) => tone(i, source));
const made = [];
for (let at = 0; at < source; at += 128) made.push(...resampler.push(wave.subarray(at, at + 128)));
let [squares, errors, count] = [0, 0, 0];
for (let i = 2000; i < made.length - 2000; i++) {
  squares += made[i] ** 2;
  errors += (made[i] - tone(i, target)) ** 2;
  count++;
}
console.log(made.length, Math.sqrt(squares / count), Math.sqrt(errors / count));
"""


def resampled(source: int, target: int, hertz: int) -> list[float]:
    """Samples made of a second of a tone, its level afterwards, and its error against the tone."""
    file = (SITE / "scripts" / "resampler.js").as_uri()
    script = RESAMPLES % (file, source, target, hertz)
    command = ["node", "--input-type=module", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=True)
    return [float(each) for each in done.stdout.split()]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize(
    ("source", "target"), [(48000, 24000), (44100, 24000), (24000, 48000), (24000, 44100)]
)
def test_tones_are_resampled_in_place_and_what_would_fold_back_is_gone(source: int, target: int):
    count, level, error = resampled(source, target, 3000)
    assert abs(count - target) < 64
    assert level == pytest.approx(0.7071, abs=1e-3)
    # 50 dB below the tone: neither its phase nor its level has moved.
    assert error < 2.5e-3
    if target < source:
        _, level, _ = resampled(source, target, target * 3 // 4)
        assert level < 1e-3


def test_the_wheel_and_the_source_have_the_files():
    data = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"server/page/site/**/*"' in data
    for path in FILES:
        # What git ignores, a checkout does not have.
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
        assert done.returncode in (1, 128), path
