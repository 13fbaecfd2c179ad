"""Pictures of the page in each of its states, for the documentation.

    python tests/server/browser/pictures.py docs/pictures [NAME ...]

Each is made with nano at 1280 x 800 in light colours, and on a phone of 390 x 844 in dark ones;
with --both in both. A state is set up by what a visitor would do, and looked at once it is there.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from visits import Visit, pause, recording, said, wav
from websockets.sync.client import connect

from benchmarks.chromium import ELSEWHERE, Microphone, chromium, driver
from benchmarks.serving import served

SIZES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
THEMES = {"desktop": "light", "phone": "dark"}
QUALITY = 75
"""Of the WebP files, of 100."""

SESSIONS = 2
"""Places of the server; the picture of its queue takes them all."""

QUESTION = "what is three plus four"
LONG = "where do you live"

State = Callable[[Visit, Microphone, ExitStack], None]
STATES: dict[str, State] = {}
"""How a visitor gets into each, by the picture's name; what it needs is held until it is taken."""


def state(made: State) -> State:
    STATES[made.__name__.replace("_", "-")] = made
    return made


def begin(page: Visit, microphone: Microphone, samples: np.ndarray) -> None:
    microphone.plays(samples)
    page.page.locator("#talk-button").click()


def ready(page: Visit) -> None:
    page.until(lambda: page.page.locator("html").get_attribute("data-ready"), "configuration")


def done(page: Visit, tab: str) -> None:
    page.until(
        lambda: page.page.locator(f"#{tab}").get_attribute("data-state") == "done", f"end of {tab}"
    )


@state
def talk_idle(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.until_state("idle")


@state
def talk_queued(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    for _ in range(SESSIONS):
        held.enter_context(connect(f"ws{page.url.removeprefix('http')}/v1/realtime?model=nano"))
    begin(page, microphone, pause(1.0))
    page.until_state("queued")


@state
def talk_listening(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    begin(page, microphone, pause(1.0))
    page.until_state("listening")


@state
def talk_you_speak(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    sentence = recording("your blue house is at the street")
    begin(page, microphone, np.concatenate([pause(2.0), *[sentence] * 4]))
    page.until_state("hearing")
    page.page.wait_for_timeout(1200)


@state
def talk_speaking(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    begin(page, microphone, np.concatenate([said(QUESTION, after=4.0), said(LONG, 0.0)]))
    page.until(lambda: "seven" in page.turns("model"), "the first answer")
    page.until(lambda: page.states().count("speaking") == 2, "the second")
    page.page.wait_for_timeout(700)


@state
def talk_interrupted(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    talk_speaking(page, microphone, held)
    page.page.keyboard.press("Escape")
    page.until_state("listening")
    page.page.locator("#details-toggle").click()


@state
def talk_denied(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.context.clear_permissions()
    begin(page, microphone, pause(1.0))
    page.until(lambda: page.reason() == "denied", "problem")


@state
def talk_insecure(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.page.goto(page.url.replace("127.0.0.1", ELSEWHERE))
    begin(page, microphone, pause(1.0))
    page.until(lambda: page.reason() == "insecure", "problem")


@state
def say(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.tab("say")
    ready(page)
    page.page.locator("#say-samples .chip").first.click()
    page.until(lambda: page.loudness() > 0.05, "sound")
    page.page.wait_for_timeout(900)


@state
def transcribe(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.tab("transcribe")
    ready(page)
    words = ("what color is the sea", "the dog is big and black", "come here on monday")
    samples = np.concatenate([said(each, 0.4, 0.6) for each in words])
    page.page.locator("#transcribe-source input[type=file]").set_input_files(
        {"name": "market.wav", "mimeType": "audio/wav", "buffer": wav(samples)}
    )
    done(page, "transcribe")


@state
def ask(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.tab("ask")
    ready(page)
    page.page.locator("#ask-source input[type=file]").set_input_files(
        {
            "name": "question.wav",
            "mimeType": "audio/wav",
            "buffer": wav(said("what color is the sea", 0.3)),
        }
    )
    page.page.locator("#ask-button").click()
    done(page, "ask")


@state
def convert(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.tab("convert")
    ready(page)
    page.page.locator("#convert-samples .chip").first.click()
    done(page, "convert")


@state
def settings(page: Visit, microphone: Microphone, held: ExitStack) -> None:
    page.tab("settings")
    ready(page)


def wanted(names: list[str], both: bool) -> list[tuple[str, str, str]]:
    """State, size and theme of each picture."""
    themes = {size: sorted(THEMES.values()) if both else [THEMES[size]] for size in SIZES}
    return [(name, size, theme) for name in names for size in SIZES for theme in themes[size]]


def picture(page: Visit) -> bytes:
    devtools = page.context.new_cdp_session(page.page)
    asked = {"format": "webp", "quality": QUALITY}
    return base64.b64decode(devtools.send("Page.captureScreenshot", asked)["data"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STATES)}")
    parser.add_argument("--both", action="store_true", help="in the other theme, too")
    args = parser.parse_args()
    if unknown := set(args.names) - set(STATES):
        parser.error(f"no such state: {', '.join(sorted(unknown))}")
    args.folder.mkdir(parents=True, exist_ok=True)
    options = ["--allowed-hosts", ELSEWHERE, "--max-sessions", str(SESSIONS)]
    options += ["--log-level", "error"]
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options) as server,
        driver() as playwright,
        chromium(playwright, microphone := Microphone(Path(folder, "speech.wav"))) as browser,
    ):
        for name, size, theme in wanted(args.names or [*STATES], args.both):
            looks = {"color_scheme": theme, **SIZES[size]}
            context = browser.new_context(permissions=["microphone"], **looks)
            with ExitStack() as held:
                held.callback(context.close)
                page = Visit(context, server.url).open()
                page.until_state("idle")
                STATES[name](page, microphone, held)
                last = f"-{theme}" if args.both else ""
                path = args.folder / f"{name}-{size}{last}.webp"
                path.write_bytes(picture(page))
                print(path, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
