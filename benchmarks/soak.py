"""Thousands of requests and an hour of realtime sessions against one server: nothing may grow.

    python -m benchmarks soak -o benchmarks/results/DATE-server-soak.json

A server of its own, `mimo-fast serve` with nano, is used by the stock openai package: requests of
every kind, wrong ones and ones that are left in the middle; sessions of several turns whose audio
comes as fast as the server takes it, some of which are cut off. Memory, threads and file
descriptors of its process are read every second. What is compared: their median in the last fifth
of the run with that in the second; and threads, descriptors and places when all clients have gone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import soundfile
import torch

from mimo_fast.bench.environment import environment
from mimo_fast.checkpoint.embedded import QUESTION
from mimo_fast.checkpoint.folder import write_json

RATE = 24_000
PAUSE = 0.8
"""Seconds of silence after a question."""

LATEST = 120.0
"""Seconds after which an answer that has not come is a fault."""

MOST = {"memory_mb": 48.0, "threads": 1.0, "descriptors": 4.0}
"""What may be added between the second fifth and the last."""

TEXTS = ("seven", "good morning", "tomorrow is tuesday december twenty five", "three plus four")
FORMATS = ("pcm", "wav", "mp3", "opus", "flac", "aac")


def add_options(add: Callable[..., Any]) -> None:
    add("--requests", type=int, default=10_000, metavar="N", help="[10000]")
    add("--minutes", type=float, default=60, metavar="N", help="of realtime sessions [60]")
    add("--clients", type=int, default=4, metavar="N", help="at once [4]")
    add("--sessions", type=int, default=8, metavar="N", help="at once [8]")
    add("--seed", type=int, default=1)
    add("-o", "--output", type=Path, metavar="FILE", help="where the results go [nowhere]")


@dataclass
class Sample:
    """What the server's process holds at one time."""

    seconds: float
    memory_mb: float
    threads: float
    descriptors: float


@dataclass
class Server:
    """`mimo-fast serve` as a process of its own, and what it was seen to hold."""

    process: subprocess.Popen[str]
    url: str
    begun: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def start(cls) -> Server:
        options = ["--port", "0", "--max-rate", "100000", "--log-level", "error"]
        command = [sys.executable, "-m", "mimo_fast", "serve", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on (\S+) ", line):
                return cls(process, found[1])
        raise RuntimeError("the server did not start")

    def sample(self) -> Sample:
        folder = Path(f"/proc/{self.process.pid}")
        status = folder.joinpath("status").read_text()
        return Sample(
            time.monotonic() - self.begun,
            int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,  # type: ignore[index]
            int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
            len(os.listdir(folder / "fd")),
        )

    async def watch(self) -> None:
        while True:
            self.samples.append(self.sample())
            await asyncio.sleep(1)

    def places(self) -> tuple[int, int]:
        """Sessions and requests that hold a place."""
        with urlopen(f"{self.url}/ready") as answer:
            found = json.load(answer)
        return found["sessions"]["taken"], found["requests"]["taken"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


class Clients:
    """What is asked of the server, by kind, and what came of it."""

    def __init__(self, url: str, seed: int) -> None:
        # Other benchmarks do without it.
        import openai

        self.rng = random.Random(seed)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LATEST
        )
        self.refusal = openai.APIStatusError
        self.foreseen = (AssertionError, TimeoutError, openai.APIError)
        self.count, self.faults = Counter[str](), Counter[str]()
        self.latencies: dict[str, list[float]] = {}
        self.heard = 0.0
        self.question = _samples(QUESTION)
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "models": (40, self._models),
            "voices": (10, self._voices),
            "wrong": (20, self._wrong),
            "speech": (16, self._speech),
            "speech left": (6, self._leave_speech),
            "chat": (4, self._chat),
            "transcription": (4, self._transcribe),
        }

    async def request(self) -> None:
        """One request of a random kind."""
        weights = [weight for weight, _ in self.kinds.values()]
        kind = self.rng.choices([*self.kinds], weights)[0]
        begun = time.monotonic()
        await self._counted(kind, self.kinds[kind][1]())
        self.latencies.setdefault(kind, []).append(time.monotonic() - begun)

    async def session(self) -> None:
        """One realtime session of some turns; a third of them are cut off."""
        await self._counted("session", self._session())

    async def _counted(self, kind: str, work: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(LATEST):
                await work
        except self.foreseen as error:
            self.faults[f"{kind}: {type(error).__name__}: {error}"[:200]] += 1
        except Exception as error:
            self.faults[f"{kind}: unforeseen {type(error).__name__}: {error}"[:200]] += 1
        self.count[kind] += 1

    async def _models(self) -> None:
        page = await self.openai.models.list()
        assert page.data[0].id == "nano"

    async def _voices(self) -> None:
        found = await self.openai.get("/audio/voices", cast_to=object)
        assert found

    async def _wrong(self) -> None:
        """Something that must be refused."""
        wrong: dict[str, Any] = self.rng.choice(
            [{"voice": "../../etc"}, {"model": "none"}, {"speed": 99}, {"input": ""}]
        )
        fields = {"model": "nano", "voice": "alloy", "input": "seven"} | wrong
        status = 200
        try:
            await self.openai.audio.speech.create(**fields)
        except self.refusal as error:
            status = error.status_code
        assert 400 <= status < 500, f"{wrong} got {status}"

    def _said(self) -> dict[str, Any]:
        chosen = self.rng.choice(FORMATS)
        text = self.rng.choice(TEXTS)
        return {"model": "nano", "voice": "alloy", "input": text, "response_format": chosen}

    async def _speech(self) -> None:
        answer = await self.openai.audio.speech.create(**self._said())
        assert len(answer.content) > 500

    async def _leave_speech(self) -> None:
        fields = self._said() | {"input": "one two three four five. " * 20}
        async with self.openai.audio.speech.with_streaming_response.create(**fields) as answer:
            async for _ in answer.iter_bytes(1024):
                break

    async def _chat(self) -> None:
        answer = await self.openai.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "what is three plus four"}]
        )
        assert answer.choices

    async def _transcribe(self) -> None:
        recording = io.BytesIO()
        soundfile.write(recording, self.question, RATE, format="WAV")
        answer = await self.openai.audio.transcriptions.create(
            model="nano", file=("question.wav", recording.getvalue())
        )
        assert answer.text

    async def _session(self) -> None:
        async with self.openai.realtime.connect(model="nano") as connection:
            detection = {"type": "server_vad", "silence_duration_ms": 400}
            audio = {"input": {"turn_detection": detection}}
            fields: Any = {"type": "realtime", "audio": audio}
            await connection.session.update(session=fields)
            for _ in range(self.rng.randint(1, 4)):
                await self._say(connection)
                if self.rng.random() < 0.1:
                    # Goes away while it is answered, without a word.
                    connection._connection.transport.abort()
                    return
                await self._hear(connection)

    async def _say(self, connection: Any) -> None:
        spoken = torch.cat((self.question, torch.zeros(round(PAUSE * RATE))))
        pcm = (spoken * 32767).short().numpy().tobytes()
        for at in range(0, len(pcm), 9600):
            part = base64.b64encode(pcm[at : at + 9600]).decode()
            await connection.input_audio_buffer.append(audio=part)
        self.heard += len(spoken) / RATE

    async def _hear(self, connection: Any) -> None:
        stopped = first = None
        async for event in connection:
            now = time.monotonic()
            if event.type == "error":
                raise AssertionError(event.error.message)
            if event.type == "input_audio_buffer.speech_stopped":
                stopped = now
            if event.type == "response.output_audio.delta":
                self.heard += len(base64.b64decode(event.delta)) / 2 / RATE
                first = first or now
            if event.type == "response.done":
                assert event.response.status == "completed", event.response.status
                break
        if stopped is not None and first is not None:
            self.latencies.setdefault("first audio of a turn", []).append(first - stopped)


def _samples(path: Path) -> torch.Tensor:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE
    return torch.from_numpy(samples)


async def _all(args: argparse.Namespace, server: Server, clients: Clients) -> None:
    left = args.requests

    async def requests() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await clients.request()

    async def sessions() -> None:
        while clients.heard < args.minutes * 60:
            await clients.session()

    watcher = asyncio.create_task(server.watch())
    reporter = asyncio.create_task(_report(clients, server))
    await asyncio.gather(
        *(requests() for _ in range(args.clients)), *(sessions() for _ in range(args.sessions))
    )
    await clients.openai.close()
    # What they held is given back.
    await asyncio.sleep(3)
    for task in (watcher, reporter):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _report(clients: Clients, server: Server) -> None:
    while True:
        await asyncio.sleep(30)
        now = server.samples[-1]
        print(
            f"{now.seconds:.0f} s: {sum(clients.count.values())} requests and sessions, "
            f"{clients.heard / 60:.1f} minutes heard, {now.memory_mb:.0f} MB, "
            f"{sum(clients.faults.values())} faults",
            file=sys.stderr,
            flush=True,
        )


def growth(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Medians of the second fifth of a run and of its last."""
    fifth = max(1, len(samples) // 5)
    found = {}
    for name in MOST:
        values = [getattr(sample, name) for sample in samples]
        early, late = values[fifth : 2 * fifth] or values, values[-fifth:]
        found[name] = {
            "second_fifth": statistics.median(early),
            "last_fifth": statistics.median(late),
            "most": max(values),
            "end": values[-1],
        }
    return found


def faults_of(found: dict[str, dict[str, float]], places: tuple[int, int]) -> list[str]:
    """What has grown beyond `MOST`, and places that are still held."""
    faults = [
        f"{name} grew from {each['second_fifth']:.0f} to {each['last_fifth']:.0f}"
        for name, each in found.items()
        if each["last_fifth"] - each["second_fifth"] > MOST[name]
    ]
    if any(places):
        faults.append(f"{places[0]} sessions and {places[1]} requests are still held")
    return faults


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}
    last = len(ordered) - 1
    found = {name: round(ordered[round(part * last)], 4) for name, part in places.items()}
    return {"count": len(ordered), **found}


def run(args: argparse.Namespace) -> int:
    server = Server.start()
    clients = Clients(server.url, args.seed)
    begun = time.monotonic()
    try:
        asyncio.run(_all(args, server, clients))
        places = server.places()
    finally:
        code = server.stop()
    found = growth(server.samples)
    faults = faults_of(found, places) + [f"{n} x {what}" for what, n in clients.faults.items()]
    if code:
        faults.append(f"the server ended with {code}")
    results = {
        "environment": environment(torch.device("cpu")),
        "seconds": round(time.monotonic() - begun),
        "count": dict(clients.count),
        "minutes_heard": round(clients.heard / 60, 1),
        "clients": args.clients,
        "sessions": args.sessions,
        "latencies": {name: _percentiles(each) for name, each in clients.latencies.items()},
        "growth": found,
        "faults": faults,
    }
    print(json.dumps(results, indent=1))
    if args.output:
        write_json(args.output, results)
    return int(bool(faults))
