"""What the server's page is after an hour of talk with it left open: as it was before.

    python -m benchmarks page -o benchmarks/results/DATE-page.json

A page in Chromium talks to `mimo-fast serve`. What is said comes faster than anybody speaks: the
blocks of the page's capture node are handed to it a question at a time, and go its whole way to the
server. Replies come as fast as the server sends them, at most at twice their pace, and are played
in real time, so most are cut by the next question, as by somebody who interrupts; every tenth is
heard to its end. Talk is what was said and what came back. The capture node itself, WebRTC and the
sound card's time are not made faster, and so what they might leak in an hour is not seen.

At quiet points nobody speaks, garbage is collected, and the page's heap, nodes and listeners, the
browser's memory, and the server's memory, threads and file descriptors are counted: they must be
those of the first half. Then the talk is ended and begun again some times.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from benchmarks.chromium import RATE, Microphone, chromium, counted, driver
from benchmarks.serving import Served, served
from mimo_fast.bench.environment import ROOT, environment
from mimo_fast.checkpoint.folder import write_json
from mimo_fast.errors import MimoFastError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VOICE = Path(__file__).with_name("page_voice.js")
"""Script of a page, before its own: `__voice.say` speaks faster than a microphone."""

COUNTS = Path(__file__).with_name("page_counts.js")
WORDS = ROOT / "tests" / "words"
QUESTIONS = (
    "what_is_three_plus_four",
    "what_day_comes_after_friday",
    "what_color_is_the_sea",
    "what_month_comes_after_may",
    "where_do_you_live",
)

WARM = 8
"""Turns before anything is counted."""

HEARD_WHOLE = 10
"""One turn of so many is heard to its end."""

STEP = 60.0
"""Seconds that a state may take to come; a failure, not a measurement."""

ALLOWED = {
    "heap_mb": 4.0,
    "nodes": 200,
    "listeners": 20,
    "browser_mb": 48.0,
    "rss_mb": 32.0,
    "threads": 0,
    "fds": 0,
}
"""What may be more at the end than in the first half."""

RECORDED = 0.096
"""MB that a second of both sides takes, which the page keeps for a download."""

KEPT = 1800.0
"""Seconds of it that are kept, in real time: this much the browser may grow, and no more."""

ENOUGH = 1800.0
"""Seconds of talk from which a verdict is given: what is bounded has reached its bounds by then."""


def question(name: str) -> str:
    """Base64 of int16 samples at 24 kHz: a question in silence."""
    samples, rate = soundfile.read(WORDS / f"{name}.flac", dtype="int16")
    if rate != RATE:
        raise MimoFastError(f"{name} is at {rate} Hz")
    before, after = np.zeros(RATE // 3, np.int16), np.zeros(RATE * 9 // 10, np.int16)
    return base64.b64encode(np.concatenate([before, samples, after]).tobytes()).decode()


def family(pid: int) -> list[int]:
    """A process and all that it started, by /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The second field is a name in brackets, which may hold spaces.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def browser_pids() -> list[int]:
    """The browser's processes, among those that this one started."""

    def is_browser(pid: int) -> bool:
        try:
            return "chrom" in os.readlink(f"/proc/{pid}/exe")
        except OSError:
            return False

    return list(filter(is_browser, family(os.getpid())))


def resident_mb(pids: Iterable[int]) -> float:
    """Memory of processes, shared pages divided among those that share them."""
    total = 0
    for pid in pids:
        try:
            lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


class Talk:
    """A page that talks, from outside."""

    def __init__(self, browser: Browser, server: Served) -> None:
        self.server, self._begun = server, time.monotonic()
        context = browser.new_context(permissions=["microphone"])
        context.add_init_script(path=VOICE)
        context.add_init_script(path=COUNTS)
        # A recording, a socket: what the page does without a network between.
        context.add_init_script(
            "localStorage.setItem('mimo-fast', JSON.stringify({connection: 'websocket'}))"
        )
        self.page: Page = context.new_page()
        self.failures = list[str]()
        context.on("console", self._said)
        context.on("weberror", lambda error: self.failures.append(str(error.error)[:300]))
        self._devtools = context.new_cdp_session(self.page)
        for domain in ("Performance", "HeapProfiler"):
            self._devtools.send(f"{domain}.enable")
        self._questions = [question(name) for name in QUESTIONS]
        self.turns, self.said = 0, 0.0

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.failures.append(message.text[:300])

    def counts(self) -> dict[str, float]:
        return {"said": self.said, **self.page.evaluate("() => window.__counts()")}

    def seconds(self) -> float:
        """Of talk: what was said, and what came back."""
        found = self.counts()
        return found["said"] + found["received"]

    def state(self) -> str:
        return self.page.locator("#talk").get_attribute("data-state") or ""

    def until(self, true: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + STEP
        while not true():
            if time.monotonic() > end:
                raise MimoFastError(
                    f"the page did not get to {what}: {self.state()} {self.failures[-3:]}"
                )
            self.page.wait_for_timeout(20)

    def quiet(self) -> None:
        """Nobody speaks."""
        self.until(lambda: self.state() == "listening", "silence")

    def begin(self) -> None:
        self.page.locator("#talk-button").click()
        self.quiet()

    def end(self) -> None:
        self.page.locator("#talk-end").click()
        self.until(lambda: self.state() == "idle", "its end")

    def turn(self) -> None:
        """A question, and its reply until it is heard, or to its end."""
        before = self.counts()["created"]
        asked = self._questions[self.turns % len(self._questions)]
        self.said += self.page.evaluate("text => window.__voice.say(text)", asked)
        self.turns += 1
        self.until(lambda: self.counts()["created"] > before, "a reply")

        def ended() -> bool:
            found = self.counts()
            return found["replies"] == found["created"]

        if self.turns % HEARD_WHOLE:
            # Speaking, or over before that was seen.
            self.until(lambda: self.state() == "speaking" or ended(), "sound")
        else:
            self.until(ended, "the end of a reply")
            self.quiet()

    def count(self) -> dict[str, float]:
        """What page, browser and server hold, and when."""
        found = counted(self.page, self._devtools)
        return {
            "at_s": round(time.monotonic() - self._begun),
            "heap_mb": round(found["heap_bytes"] / 1e6, 3),
            "nodes": found["nodes"],
            "listeners": found["listeners"],
            "browser_mb": round(resident_mb(browser_pids()), 1),
            **vars(self.server.state()),
        }


def new_record(args: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    return record | {"parts": args.parts, "calm": [], "again": [], "failures": [], "log": []}


def wear(
    talk: Talk, args: argparse.Namespace, record: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Fills a record, which is kept after each part."""
    begun = time.monotonic()

    def note(part: int) -> None:
        talk.quiet()
        record["calm"].append(found := talk.count())
        counts = {name: round(value, 1) for name, value in talk.counts().items()}
        record.update(counts, turns=talk.turns, failures=talk.failures[:20])
        record["seconds"] = round(time.monotonic() - begun)
        keep()
        shown = ", ".join(f"{name} {found[name]:g}" for name in ALLOWED)
        told = f"{talk.seconds():.0f} s of talk in {record['seconds']} s"
        tqdm.write(f"part {part} of {args.parts}: {told}; {shown}", file=sys.stderr)

    talk.page.goto(talk.server.url)
    talk.begin()
    for _ in range(WARM):
        talk.turn()
    note(0)
    start, most = talk.seconds(), args.talk
    with tqdm(total=round(most), unit="s", disable=None) as bar:
        for part in range(1, args.parts + 1):
            while (found := talk.seconds() - start) < most * part / args.parts:
                talk.turn()
                bar.n = round(found)
                bar.refresh()
            note(part)
    talk.end()
    for _ in range(args.again):
        talk.begin()
        talk.turn()
        talk.end()
        record["again"].append(talk.count())
    record["log"] = talk.server.failures()[:20]
    record["talk_s"] = round(talk.seconds() - start)
    keep()


def problems(record: dict[str, Any]) -> list[str]:
    """What a record shows that must not be."""
    found = [f"the page failed: {each}" for each in record["failures"]]
    found += [f"in the log: {line[:300]}" for line in record["log"]]
    if not record["replies"] or not record["interrupted"]:
        found.append("nobody was answered, or nobody interrupted")
    if record["talk_s"] < ENOUGH:
        return found
    for kind in ("calm", "again"):
        found += grown(record[kind])
    return found


def verdict(record: dict[str, Any]) -> list[str] | str:
    """What is wrong, or that nothing is."""
    enough = record["talk_s"] >= ENOUGH
    return problems(record) or ("flat" if enough else f"too short: {ENOUGH:g} s tell")


def grown(calm: list[dict[str, float]]) -> list[str]:
    """What is more at the end than it ever was in the first half."""
    before = calm[: len(calm) // 2]
    found = []
    for name, allowed in ALLOWED.items() if before else ():
        first, last = max(each[name] for each in before), calm[-1][name]
        if name == "browser_mb":
            kept = [min(KEPT, each["at_s"]) for each in (before[-1], calm[-1])]
            allowed += RECORDED * (kept[1] - kept[0])
        if last > first + allowed:
            found.append(f"{name} grew from {first:g} to {last:g} in the second half")
    return found


def add_options(option: Callable[..., Any]) -> None:
    option("--talk", type=float, default=3600.0, help="seconds that are said and come back")
    option("--parts", type=int, default=10, help="after each of which everything is counted")
    option("--again", type=int, default=8, help="times that the talk is begun again at last")
    option("-o", "--output", type=Path)


def run(args: argparse.Namespace) -> int:
    if not Path("/proc/self/smaps_rollup").exists():
        raise MimoFastError("memory is counted by /proc, which Linux has")
    record = new_record(args)

    def keep() -> None:
        if args.output:
            write_json(args.output, record)

    with (
        tempfile.TemporaryDirectory() as folder,
        served(["--log-level", "warning"]) as server,
        driver() as playwright,
        chromium(playwright, Microphone(Path(folder, "silence.wav"))) as browser,
    ):
        record["browser"] = browser.version
        wear(Talk(browser, server), args, record, keep)
    record["verdict"] = verdict(record)
    keep()
    for state in (*record["calm"], *record["again"]):
        print(json.dumps(state))
    print(f"{record['talk_s']} s of talk in {record['seconds']} s: {record['verdict']}")
    found = problems(record)
    for each in found:
        print(f"problem: {each}", file=sys.stderr)
    return 1 if found else 0
