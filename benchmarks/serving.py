"""What a server is after thousands of requests and an hour of talk: as it was before.

    python -m benchmarks serving -o benchmarks/results/DATE-serving.json

`mimo-fast serve` is driven by clients that ask right and wrong, leave in the middle, talk and
interrupt; a spoken session goes as fast as the machine. Between its parts the server is left
alone, and its memory, threads and file descriptors are counted: they must be those of the
beginning. Then clients are killed in the middle of things, and the time is taken until nothing
is left of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.serving_clients import (
    KINDS,
    TEXTS,
    Connection,
    Request,
    Sounds,
    Tally,
    one_request,
    posted,
)
from benchmarks.serving_leaver import STATES
from benchmarks.serving_sessions import one_session
from mimo_fast.bench.environment import ROOT, environment
from mimo_fast.checkpoint.folder import write_json
from mimo_fast.errors import MimoFastError

START = 120.0
"""Seconds that a server may take to load its model."""

CALM = 30.0
"""Seconds after which what is still held counts as never given back."""

ALLOWED = {"rss_mb": 32.0, "threads": 0, "fds": 0}
"""What may be more at the end than in the first half: pages that allocators keep."""

GONE = 0.5
"""Seconds in which nothing must be left of a client that was killed."""

HELD = ("sessions", "requests_running", "requests_waiting", "streams")
"""Gauges of what clients hold."""

FAILURE = re.compile(r'"level": "(error|critical)"|Traceback|never (awaited|retrieved)|ignored in')


@dataclass(frozen=True)
class State:
    """What a process holds."""

    rss_mb: float
    threads: int
    fds: int


class Served:
    """A server in a process of its own, or one that runs already."""

    def __init__(self, url: str, pid: int, log: Path | None = None) -> None:
        self.url, self.pid, self._log = url, pid, log
        self._asked = Connection(url)

    def state(self) -> State:
        folder = Path("/proc", str(self.pid))
        found = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        fds = len(os.listdir(folder / "fd"))
        return State(int(found["VmRSS"].split()[0]) / 1024, int(found["Threads"]), fds)

    async def metrics(self) -> dict[str, float]:
        """Every value that `/metrics` shows, by its name and labels."""
        (status, _), body = await self._asked.ask(Request("/metrics", method="GET"))
        if status != 200:
            raise MimoFastError(f"/metrics of {self.url} answered {status}")
        lines = (line.rpartition(" ") for line in body.decode().splitlines() if line[:1] != "#")
        return {name.removeprefix("mimo_fast_"): float(value) for name, _, value in lines}

    async def held(self) -> dict[str, float]:
        found = await self.metrics()
        return {name: found[name] for name in HELD if found[name]}

    async def quiet(self, fds: int | None = None) -> tuple[float, dict[str, float]]:
        """Waits until nothing is held, no more than `fds` file descriptors are among it ->
        the seconds that it took, and what was held to the end."""
        begun = time.perf_counter()
        while True:
            held = await self.held()
            if fds is not None and (found := self.state().fds) > fds:
                held["fds"] = found - fds
            seconds = time.perf_counter() - begun
            if not held or seconds > CALM:
                return seconds, held
            await asyncio.sleep(0.002)

    def failures(self) -> list[str]:
        """What the log tells of that nobody foresaw: its own lines, or what others wrote there,
        such as the interpreter, in one piece.
        """
        lines = [] if self._log is None else self._log.read_text(errors="replace").splitlines()
        found = list[str]()
        for is_own, group in groupby(lines, key=lambda line: line.startswith("{")):
            pieces = [*group]
            found += pieces if is_own else ["\n".join(pieces)]
        return [each for each in found if FAILURE.search(each)]


@contextmanager
def served(options: list[str]) -> Iterator[Served]:
    """`mimo-fast serve` with these options, on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-m", "mimo_fast", "serve", "--port", "0", *options]
        with log.open("wb") as file:
            # In a session of its own: Ctrl-C is for this process, which ends it.
            process = subprocess.Popen(command, stderr=file, cwd=ROOT, start_new_session=True)
        try:
            url = _announced(process, log)
            yield Served(url, process.pid, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _announced(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"listening on (http\S+)", log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.05)
    raise MimoFastError(f"the server did not start: {log.read_text(errors='replace')[-500:]}")


async def recordings(server: Served) -> Sounds:
    """The texts as the server itself says them."""
    asked = Connection(server.url)
    found = list[bytes]()
    for text in TEXTS:
        content = {"model": "tts-1", "voice": "alloy", "input": text, "response_format": "pcm"}
        (status, code), pcm = await asked.ask(posted("/v1/audio/speech", content))
        if status != 200:
            raise MimoFastError(f"/v1/audio/speech answered {status} {code}")
        found.append(pcm)
    asked.hang_up()
    return found


class Wear:
    """Wears a server out: requests and sessions, in parts."""

    def __init__(self, server: Served, sounds: Sounds, seed: int, bar: tqdm[Any]) -> None:
        self._server, self._sounds, self._seed, self._bar = server, sounds, seed, bar
        self.tally = Tally()
        self._requests = self._sessions = 0

    async def part(self, requests: int, talk: float, users: int, sessions: int) -> None:
        """So many more requests by so many users beside so many seconds of talk."""
        last, until = self._requests + requests, self.tally.talk + talk
        asking = (self._user(last) for _ in range(users))
        talking = (self._talker(until) for _ in range(sessions))
        async with asyncio.TaskGroup() as group:
            for each in (*asking, *talking):
                group.create_task(each)

    async def warm(self, at_once: int) -> None:
        """Uses everything once, so that what is made once is there; none of it is counted."""
        tally, server = Tally(), self._server
        for kind in KINDS:
            connections = [Connection(server.url) for _ in range(at_once)]
            asked = (
                one_request(each, random.Random(f"warm {i}"), self._sounds, tally, kind)
                for i, each in enumerate(connections)
            )
            await asyncio.gather(*asked)
            for each in connections:
                each.hang_up()
        await one_session(server.url, random.Random("warm"), self._sounds, tally)

    async def _user(self, last: int) -> None:
        connection = Connection(self._server.url)
        while self._requests < last:
            self._requests += 1
            rng = random.Random(f"{self._seed} request {self._requests}")
            await one_request(connection, rng, self._sounds, self.tally)
            self._bar.update()
        connection.hang_up()

    async def _talker(self, until: float) -> None:
        while self.tally.talk < until:
            self._sessions += 1
            rng = random.Random(f"{self._seed} session {self._sessions}")
            await one_session(self._server.url, rng, self._sounds, self.tally)
            self._bar.set_postfix_str(f"{self.tally.talk:.0f} s of talk")

    def counts(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "requests": self._requests,
            "sessions": self._sessions,
            "talk_s": round(tally.talk),
            "outcomes": {name: dict(each) for name, each in sorted(tally.outcomes.items())},
            "events": dict(sorted(tally.events.items())),
            "problems": dict(tally.problems),
        }


async def killed(server: Served, state: str, wait: float, speech: Path, clients: int = 1) -> float:
    """Seconds from `kill -9` of clients in this state until the server holds nothing of them."""
    _, held = await server.quiet()
    if held:
        raise MimoFastError(f"the server holds {held} before a client is killed")
    fds = server.state().fds
    command = [sys.executable, "-m", "benchmarks.serving_leaver", state, server.url, str(speech)]
    options: dict[str, Any] = {"cwd": ROOT, "start_new_session": True}
    leavers = [
        await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, **options)
        for _ in range(clients)
    ]
    try:
        for each in leavers:
            assert each.stdout is not None
            async with asyncio.timeout(START):
                if await each.stdout.readline() != b"here\n":
                    raise MimoFastError(f"a client that {state} did not get there")
        await asyncio.sleep(wait)
    finally:
        for each in leavers:
            if each.returncode is None:
                each.kill()
    seconds, _ = await server.quiet(fds)
    for each in leavers:
        await each.wait()
    return seconds


def problems(record: dict[str, Any]) -> list[str]:
    """What a record shows that must not be."""
    found = [f"{count} times {name}" for name, count in record["problems"].items()]
    found += [f"never given back: {each}" for each in record["held"]]
    found += [f"in the log: {line[:2000]}" for line in record["log"]]
    calm = record["calm"]
    before = calm[: len(calm) // 2]
    for name, allowed in ALLOWED.items() if before else ():
        first, last = max(each[name] for each in before), calm[-1][name]
        if last > first + allowed:
            found.append(f"{name} grew from {first:g} to {last:g} in the second half")
    return found


def late(record: dict[str, Any]) -> list[str]:
    """Killed clients of which something was left for too long."""
    return [
        f"a client that {state} was held for {max(times):.3f} s"
        for state, times in record["killed_s"].items()
        if times and max(times) > GONE
    ]


async def wear(
    server: Served, args: argparse.Namespace, record: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Fills a record, which is kept after each part."""
    sounds = await recordings(server)
    with tqdm(total=args.requests, unit="request", disable=None) as bar:
        all_of_it = Wear(server, sounds, args.seed, bar)
        await all_of_it.warm(args.users)
        begun = time.monotonic()
        for _ in range(args.parts):
            requests, talk = -(-args.requests // args.parts), args.talk / args.parts
            await all_of_it.part(requests, talk, args.users, args.sessions)
            _, held = await server.quiet(record["calm"][0]["fds"] if record["calm"] else None)
            if held:
                record["held"].append(held)
            record["calm"].append(vars(server.state()))
            record |= all_of_it.counts()
            record["seconds"] = round(time.monotonic() - begun)
            record["errors"] = await _errors(server)
            record["log"] = server.failures()[:20]
            keep()
    with tempfile.TemporaryDirectory() as folder:
        speech = Path(folder, "speech.pcm")
        speech.write_bytes(b"".join(sounds))
        rng = random.Random(f"{args.seed} killed")
        for i in tqdm(range(args.kills * len(STATES)), unit="client", disable=None):
            state = [*STATES][i % len(STATES)]
            seconds = await killed(server, state, rng.random(), speech)
            record["killed_s"].setdefault(state, []).append(round(seconds, 4))
            keep()
        if args.crowd:
            seconds = await killed(server, "waits", rng.random(), speech, args.crowd)
            record["killed_s"][f"waits, {args.crowd} at once"] = [round(seconds, 4)]
    record["log"] = server.failures()[:20]
    keep()


async def _errors(server: Served) -> dict[str, float]:
    """How often each code of error was answered."""
    pattern = re.compile(r'errors_total\{code="(.*)"\}')
    values = await server.metrics()
    return {found[1]: n for name, n in values.items() if (found := pattern.fullmatch(name))}


def new_record(args: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    record |= {name: getattr(args, name) for name in ("seed", "users", "parts")}
    return record | {"calm": [], "held": [], "log": [], "problems": {}, "killed_s": {}}


def add_options(option: Callable[..., Any]) -> None:
    option("--requests", type=int, default=10_000)
    option("--talk", type=float, default=3600.0, help="seconds that sessions say and hear")
    option("--users", type=int, default=6, help="requests at once")
    option("--sessions", type=int, default=3, help="realtime sessions at once")
    option("--parts", type=int, default=10, help="after each of which the server is looked at")
    option("--kills", type=int, default=10, help="clients killed in each state")
    option("--crowd", type=int, default=12, help="clients killed at once")
    option("--seed", type=int, default=1)
    option("--url", help="a server that runs already, such as http://127.0.0.1:8000")
    option("--pid", type=int, help="its process")
    option("--model", help="directory or hub id; by default nano")
    option("--codec", help="directory or hub id")
    option("-o", "--output", type=Path)


def run(args: argparse.Namespace) -> int:
    if not Path("/proc/self/status").exists():
        raise MimoFastError("memory and file descriptors are counted by /proc, which Linux has")
    if (args.url is None) != (args.pid is None):
        raise ValueError("--url and --pid belong together")
    # Whatever ends this process ends its server.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    record = new_record(args)

    def keep() -> None:
        if args.output:
            write_json(args.output, record)

    def go(server: Served) -> None:
        asyncio.run(wear(server, args, record, keep))

    if args.url:
        go(Served(args.url, args.pid))
    else:
        given = {"--model": args.model, "--codec": args.codec}
        options = [part for name, value in given.items() if value for part in (name, value)]
        # All clients have one address here.
        with served([*options, "--max-rate", "100000", "--log-level", "warning"]) as server:
            go(server)
    found = [*problems(record), *late(record)]
    record["verdict"] = found
    keep()
    for state in record["calm"]:
        print(json.dumps(state))
    for name, times in record["killed_s"].items():
        print(f"killed: {name:<22}{max(times):.3f} s at most of {len(times)}")
    for each in found:
        print(f"problem: {each}", file=sys.stderr)
    return 1 if found else 0
