"""A visitor of the server's page: what it shows, sends, says, and must never do."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import soundfile
import torch

from benchmarks.chromium import PACKAGES, RATE
from benchmarks.page import VOICE
from mimo_fast.audio.resample import resample

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page, WebSocket

LIMIT = 90.0
"""Seconds after which a wait is given up; no check is about time."""

ROOT = Path(__file__).resolve().parents[3]
AXE = PACKAGES / "node_modules" / "axe-core" / "axe.min.js"
TAP = Path(__file__).with_name("tap.js")

PHONE = {"width": 360, "height": 740}


def recording(words: str) -> np.ndarray:
    """int16 samples of a sentence of tests/words, at 24 kHz."""
    path = ROOT / "tests" / "words" / f"{words.replace(' ', '_')}.flac"
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    return samples


def pause(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.int16)


def said(words: str, before: float = 0.3, after: float = 0.9) -> np.ndarray:
    """A sentence with silence around it, as a microphone hears it; the turn ends in it."""
    return np.concatenate([pause(before), recording(words), pause(after)])


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def plain(text: str) -> str:
    """Its words alone, in small letters."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def share(part: np.ndarray, rate: int, whole: np.ndarray, whole_rate: int) -> float:
    """How much of `part` is in `whole`: of its pieces of 100 ms that are not silent, one
    every 25 ms, those found.

    A piece is found where some place of `whole` has its form; levels and gaps do not matter, as a
    busy machine pauses between pieces.
    """
    part, whole = (
        resample(torch.from_numpy(np.ascontiguousarray(x, np.float32)), r, 12_000).numpy()
        for x, r in ((part, rate), (whole, whole_rate))
    )
    size = 1200
    power = np.sqrt(np.convolve(whole**2, np.ones(size), "valid")) + 1e-6
    found, pieces = 0, 0
    for at in range(0, len(part) - size + 1, size // 4):
        piece = part[at : at + size]
        if np.abs(piece).max() < 0.02:
            continue
        pieces += 1
        length = 1 << (len(whole) + size).bit_length()
        product = np.fft.rfft(whole, length) * np.conj(np.fft.rfft(piece, length))
        match = np.fft.irfft(product, length)[: len(power)] / (power * np.linalg.norm(piece))
        found += match.max() > 0.9
    assert pieces, "it is silent"
    return found / pieces


def pieces(part: np.ndarray, whole: np.ndarray, size: int = 240) -> tuple[list[int], int]:
    """Where each step of `part` that is not silent lies in `whole`, sample for sample, less its
    place in `part`; and how many steps are nowhere, such as those with a pause in them."""
    data, found, missing, at = whole.tobytes(), list[int](), 0, 0
    for start in range(0, len(part) - size + 1, size):
        step = part[start : start + size]
        if np.abs(step).max() < 0.02:
            continue
        place = data.find(step.tobytes(), at)
        if place < 0:
            missing += 1
            continue
        at = place
        found.append(at // part.itemsize - start)
    return found, missing


@dataclass
class Guard:
    """What no visit may do, unless a test allows it by a pattern."""

    home: str
    problems: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)

    def allow(self, *patterns: str) -> None:
        self.allowed += patterns

    def note(self, problem: str) -> None:
        self.problems.append(problem[:500])

    def goes_to(self, address: str) -> None:
        """Other hosts and other ports are other servers."""
        parts = urlsplit(address)
        if parts.scheme in ("data", "blob"):
            return
        if parts.netloc != urlsplit(self.home).netloc:
            self.note(f"a request to {address}")

    def found(self) -> list[str]:
        return [
            each for each in self.problems if not any(re.search(one, each) for one in self.allowed)
        ]


class Visit:
    """A page that is open, watched from its first request on."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context, self.url = context, url
        self.guard = Guard(url)
        self.wire = list[tuple[str, dict[str, Any]]]()
        self.sockets = list[str]()
        context.on("request", lambda request: self.guard.goes_to(request.url))
        context.on("console", self._said)
        context.on("weberror", lambda error: self.guard.note(f"an exception: {error.error}"))
        context.expose_binding("__violated", lambda _, what: self.guard.note(f"CSP: {what}"))
        context.add_init_script(path=TAP)
        context.add_init_script(path=VOICE)
        self.page: Page = context.new_page()
        self.page.on("websocket", self._socket)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            where = message.location.get("url", "")
            self.guard.note(f"console: {message.text} {where}")

    def _socket(self, socket: WebSocket) -> None:
        self.sockets.append(socket.url)
        self.guard.goes_to(re.sub("^ws", "http", socket.url))

        def kept(way: str) -> Callable[[str | bytes], None]:
            def keep(frame: str | bytes) -> None:
                if isinstance(frame, str):
                    self.wire.append((way, json.loads(frame)))

            return keep

        socket.on("framesent", kept("sent"))
        socket.on("framereceived", kept("got"))

    def open(self, path: str = "") -> Visit:
        self.page.goto(f"{self.url}/{path}")
        return self

    # What went over the wire.

    def sent(self, kind: str) -> list[dict[str, Any]]:
        return [event for way, event in self.wire if way == "sent" and event.get("type") == kind]

    def got(self, kind: str) -> list[dict[str, Any]]:
        return [event for way, event in self.wire if way == "got" and event.get("type") == kind]

    def reply(self, item: str | None = None) -> np.ndarray:
        """float32 [n] at 24 kHz that came of an item, or of the last reply."""
        deltas = self.got("response.output_audio.delta")
        item = item or deltas[-1]["item_id"]
        parts = [base64.b64decode(each["delta"]) for each in deltas if each["item_id"] == item]
        return np.frombuffer(b"".join(parts), "<i2").astype(np.float32) / 32768

    # What a visitor does.

    def speaks(self, words: str) -> None:
        """Says a sentence once the page listens, faster than a microphone could."""
        self.until(lambda: self.got("session.updated"), "session")
        samples = base64.b64encode(said(words).tobytes()).decode()
        self.page.evaluate("text => window.__voice.say(text)", samples)

    def types(self, words: str) -> None:
        self.page.locator("#talk-input").fill(words)
        self.page.locator("#talk-input").press("Enter")

    # What the page shows.

    def text(self, selector: str) -> str:
        return " ".join(self.page.locator(selector).inner_text().split())

    def state(self) -> str:
        return self.page.locator("#talk").get_attribute("data-state") or ""

    def states(self) -> list[str]:
        """All that there were, in order."""
        return self.page.evaluate("() => window.__states")

    def microphones(self) -> list[dict[str, Any]]:
        """Those that were asked for and given: {live, audio}, audio as it was asked for."""
        return self.page.evaluate("() => window.__microphones()")

    def holds_microphone(self) -> bool:
        return any(each["live"] for each in self.microphones())

    def reason(self) -> str:
        """Code of the problem that the talk shows; "" for none."""
        shown = self.page.locator("#talk-reason")
        return (shown.get_attribute("data-code") or "") if shown.is_visible() else ""

    def turns(self, who: str) -> list[str]:
        """Words of the transcript that one side said."""
        turns = self.page.locator(f'#transcript .turn[data-who="{who}"] .words')
        return [plain(text) for text in turns.all_inner_texts()]

    def tab(self, name: str) -> None:
        self.page.locator(f"#tab-{name}").click()
        self.until(lambda: self.page.locator("body").get_attribute("data-tab") == name, name)

    # Waits.

    def until(self, found: Callable[[], Any], what: str) -> Any:
        """Waits for a true value and returns it."""
        end = time.monotonic() + LIMIT
        while not (value := found()):
            assert time.monotonic() < end, f"no {what}; {self._explained()}"
            self.page.wait_for_timeout(30)
        return value

    def until_state(self, *states: str) -> str:
        def there() -> str | None:
            state = self.state()
            return state if state in states else None

        return self.until(there, f"state {' or '.join(states)}")

    def _explained(self) -> str:
        events = [f"{way} {event.get('type')}" for way, event in self.wire]
        events = [each for each in events if "append" not in each and "audio.delta" not in each]
        shown = self.text("body")[:600]
        return f"state {self.state()}; wire {events[-12:]}; guard {self.guard.found()}; {shown}"

    # What it says.

    def heard(self) -> tuple[np.ndarray, int]:
        """float32 [n] that arrived at the output, silence at its ends left out, and its rate."""
        rate, coded = self.page.evaluate("() => window.__heard.taken()")
        samples = np.frombuffer(base64.b64decode(coded), "<i2").astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(samples) > 1e-3)
        if not len(loud):
            return samples[:0], int(rate)
        return samples[loud[0] : loud[-1] + 1], int(rate)

    def loudness(self) -> float:
        """The most of all that has arrived at the output."""
        return self.page.evaluate("() => window.__heard.most()")

    def axe(self, *rules: str) -> list[str]:
        """Violations of accessibility rules in what is shown; of all, or of those named."""
        if not self.page.evaluate("() => Boolean(window.axe)"):
            self.page.evaluate(AXE.read_text(encoding="utf-8"))
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        if rules:
            options["runOnly"] = {"type": "rule", "values": [*rules]}
        result = self.page.evaluate("options => axe.run(document, options)", options)
        return [
            f"{each['id']}: {node['target']} {node['failureSummary']}"
            for each in result["violations"]
            for node in each["nodes"]
        ]
