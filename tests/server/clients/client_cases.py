"""What the scripts of stock clients share: recordings, waits with a limit, a report of each case.

    python SCRIPT URL SLOW_URL FOLDER

URL: a server of nano. SLOW_URL: one that computes no faster than its speech is heard. A script runs
in the environment of .ci/clients.txt, without the package, and prints a line of JSON a case: its
name, what went wrong (null: nothing) and what the client saw. Audio goes to FOLDER/NAME.wav.
"""

import asyncio
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 24000
ROOT = Path(__file__).resolve().parents[3]
LIMIT = 240.0
"""Seconds after which a wait is given up; no check is about time."""


class Server:
    """Where it listens, and what a case leaves behind."""

    def __init__(self, url: str, folder: Path) -> None:
        self.http, self.folder = f"{url}/v1", folder
        self.realtime = f"ws{url.removeprefix('http')}/v1/realtime"

    def keep(self, name: str, samples: np.ndarray) -> str:
        """Writes int16 samples; the file's name."""
        path = self.folder / f"{name}.wav"
        soundfile.write(path, samples, RATE)
        return str(path)


def recording(words: str) -> np.ndarray:
    """int16 samples of a sentence of tests/words, at 24 kHz."""
    path = ROOT / "tests" / "words" / f"{words.replace(' ', '_')}.flac"
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    return samples


def quiet(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.zeros(round(seconds * rate), np.int16)


def said(words: str, before: float = 0.2, after: float = 1.0) -> np.ndarray:
    """A sentence with silence around it, as a microphone hears it."""
    return np.concatenate([quiet(before), recording(words), quiet(after)])


async def until(found: Callable[[], Any], what: str, explain: Callable[[], Any] = str) -> Any:
    """Waits for a true value and returns it."""
    end = time.monotonic() + LIMIT
    while not (value := found()):
        assert time.monotonic() < end, f"no {what}: {explain()}"
        await asyncio.sleep(0.01)
    return value


async def report(case: Callable[..., Any], servers: dict[str, Server]) -> None:
    wanted = {name: servers[name] for name in inspect.signature(case).parameters}
    error, seen = None, {}
    try:
        async with asyncio.timeout(2 * LIMIT):
            seen = await case(**wanted) or {}
    except Exception:
        error = traceback.format_exc(limit=-4)
    print(json.dumps({"case": case.__name__, "error": error, "seen": seen}), flush=True)


async def run_all(cases: list[Callable[..., Any]], servers: dict[str, Server]) -> None:
    for case in cases:
        await report(case, servers)


def main(*cases: Callable[..., Any]) -> None:
    """Runs the cases, whose arguments are `server` and `slow`."""
    url, slow, folder = sys.argv[1:4]
    servers = {"server": Server(url, Path(folder)), "slow": Server(slow, Path(folder))}
    chosen = [case for case in cases if not sys.argv[4:] or case.__name__ in sys.argv[4:]]
    asyncio.run(run_all(chosen, servers))
