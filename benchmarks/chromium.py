"""Chromium without a screen, with a microphone that plays what it is given.

Playwright drives it, from a folder of its own (`make browser`). A context is a visitor of their
own, with permissions, a size and preferences, and is made in milliseconds; nothing is downloaded,
as the browser is the machine's.
"""

from __future__ import annotations

import os
import shutil
import sys
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mimo_fast.bench.environment import ROOT
from mimo_fast.errors import MimoFastError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, CDPSession, Page

PACKAGES = ROOT / ".venv" / "browser"
"""What `make browser` installs, of PyPI and npm."""

NAMES = ("chromium", "chromium-browser", "google-chrome")

ELSEWHERE = "voice.test"
"""A name of this machine to which the browser gives no microphone, as it is not localhost."""

RATE = 24_000

QUIET = 0.5
"""Seconds of silence at the end of a recording: Chromium repeats its last 10 ms for ever."""

FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--enable-precise-memory-info",
    "--no-first-run",
    # Nothing may leave the machine, whatever a page asks for.
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1, MAP * ~NOTFOUND, "
    "EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


def executable() -> str | None:
    """The browser of this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def missing() -> str | None:
    """What a machine lacks; None where a browser can be driven."""
    if executable() is None:
        return "needs a browser: apt-get install chromium"
    if not (PACKAGES / "playwright").is_dir():
        return "needs what drives a browser: make browser"
    return None


class Microphone:
    """The file that every microphone of a browser plays from its start when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.plays(np.zeros(0, np.int16))

    def plays(self, samples: np.ndarray, rate: int = RATE) -> None:
        """int16 [n], then silence for ever."""
        assert samples.dtype == np.int16
        samples = np.concatenate([samples, np.zeros(round(QUIET * rate), np.int16)])
        # A stream that is open has read its own.
        new = self.file.with_suffix(".new")
        with wave.open(str(new), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(samples.astype("<i2").tobytes())
        os.replace(new, self.file)


@contextmanager
def driver() -> Iterator[Any]:
    """Playwright.

    Raises:
        MimoFastError: there is no browser, or nothing that drives one.
    """
    if reason := missing():
        raise MimoFastError(f"the page {reason}")
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


@contextmanager
def chromium(playwright: Any, microphone: Microphone | None, *flags: str) -> Iterator[Browser]:
    """The browser; with None it has the machine's own devices."""
    given = [*FLAGS, *flags]
    if microphone is not None:
        given.append("--use-fake-device-for-media-stream")
        given.append(f"--use-file-for-fake-audio-capture={microphone.file}%noloop")
    browser = playwright.chromium.launch(executable_path=executable(), args=given)
    try:
        yield browser
    finally:
        browser.close()


def counted(page: Page, devtools: CDPSession) -> dict[str, int]:
    """What a page holds once its garbage is collected."""
    for _ in range(2):
        # What finalizers let go of is collected by the second.
        devtools.send("HeapProfiler.collectGarbage")
        page.wait_for_timeout(50)
    listed = devtools.send("Performance.getMetrics")["metrics"]
    found = {each["name"]: each["value"] for each in listed}
    names = {
        "heap_bytes": "JSHeapUsedSize",
        "nodes": "Nodes",
        "listeners": "JSEventListeners",
        "documents": "Documents",
    }
    return {ours: int(found[theirs]) for ours, theirs in names.items()}
