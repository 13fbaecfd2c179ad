"""Clients of `mimo-fast serve`, by HTTP and by WebSocket: `engine.py`'s people, over the wire.

    python -m benchmarks.load.server '{"streams": 16, "profile": "listeners", "seconds": 15}'

Listeners post to /v1/audio/speech and read PCM as they play it: with no room they read nothing, so
that the server's and the kernel's buffers fill. People hold a session of /v1/realtime each: an
utterance goes out in pieces of a tenth of a second, in real time; the reply is asked for at its
end, and is cancelled and truncated at what was heard when it is interrupted. Memory and time of the
processor are those of the server's process. Groups are not seen here: one of audio counts for each
160 ms, so that groups a second are patches a second.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import mimo_fast
from benchmarks.load.engine import GRACE, PATCH, Point
from benchmarks.load.people import Heard, Person, Turn, people, recording_files, summary
from benchmarks.serving import Served, served
from benchmarks.serving_clients import PCM_S, RATE, Connection, posted
from mimo_fast.bench.player import Player

PIECE = 0.1
"""Seconds of an utterance that are sent at once."""

PATCH_BYTES = round(PATCH * RATE) * 2
NAP = 0.005
DELTA = "response.output_audio.delta"


class Crowd:
    """All people of a point, and the server that answers them."""

    def __init__(self, point: Point, server: Served) -> None:
        self.point, self.server = point, server
        self.until = point.ramp + point.seconds
        self.heard = list[Heard]()
        self._began = 0.0
        talks = point.profile == "people"
        self.utterances = [
            _pcm(mimo_fast.load_audio(path, RATE)) for path in (recording_files() if talks else ())
        ]

    def now(self) -> float:
        return time.perf_counter() - self._began

    async def measure(self) -> dict[str, Any]:
        point = self.point
        await self._warm_up()
        self._began = time.perf_counter()
        crowd = people(point.profile, point.streams, point.ramp, point.seed)
        live = self._talk if point.profile == "people" else self._listen
        tasks = [asyncio.ensure_future(live(person)) for person in crowd]
        await self._until(point.ramp)
        before = self._cpu_seconds()
        await self._until(self.until)
        used, ended = self._cpu_seconds() - before, self.now()
        heard = [*self.heard]
        _, late = await asyncio.wait(tasks, timeout=GRACE)
        for task in late:
            task.cancel()
        failed = [e for task in tasks if task.done() and (e := _error(task)) is not None]
        if failed:
            raise failed[0]
        found = summary(heard, point.ramp, self.until)
        return (
            asdict(point)
            | found
            | {
                "cpus": used / (ended - point.ramp),
                "peak_bytes": self._peak_bytes(),
                "load": os.getloadavg()[0],
            }
        )

    async def _warm_up(self) -> None:
        first = people("listeners", 1, 1.0, self.point.seed)[0]
        for _ in range(2):
            asked = Connection(self.server.url)
            (status, code), _ = await asked.ask(_speech(first.turn(0)))
            asked.hang_up()
            if status != 200:
                raise mimo_fast.MimoFastError(f"/v1/audio/speech answered {status} {code}")

    # Listeners

    async def _listen(self, person: Person) -> None:
        await self._until(person.arrives)
        connection, index = Connection(self.server.url), 0
        while self.now() < self.until:
            heard = Heard(self.now(), Player(RATE))
            self.heard.append(heard)
            request = _speech(person.turn(index))
            index += 1
            try:
                await self._hear(heard, connection, request)
            except (OSError, EOFError, ValueError) as error:
                connection.hang_up()
                heard.error = type(error).__name__
                await asyncio.sleep(0.5)
            heard.ended = self.now()
        connection.hang_up()

    async def _hear(self, heard: Heard, connection: Connection, request: Any) -> None:
        player, got = heard.player, 0
        async for status, part in connection.parts(request):
            if status != 200:
                heard.error = str(status)
                await asyncio.sleep(0.5)
                return
            now = self.now()
            player.hear(now, (got + len(part)) // 2 - got // 2)
            got += len(part)
            self._count(heard, now, got)
            await self._until(now + player.buffered(now) - self.point.room)
            if self.now() > self.until:
                connection.hang_up()
                return
        await self._until(min(player.dry_at, self.until))

    def _count(self, heard: Heard, now: float, nbytes: int) -> None:
        new = nbytes // PATCH_BYTES - len(heard.patches)
        heard.patches.extend([now] * new)
        heard.groups.extend([now] * new)

    # People

    async def _talk(self, person: Person) -> None:
        await self._until(person.arrives)
        where = self.server.url.replace("http", "ws", 1) + "/v1/realtime"
        options: dict[str, Any] = {"compression": None, "ping_interval": None, "close_timeout": 1}
        async with connect(where, **options) as socket:
            detection = {"input": {"turn_detection": None}}
            await _send(socket, "session.update", session={"type": "realtime", "audio": detection})
            index = 0
            while self.now() < self.until:
                try:
                    await self._exchange(socket, person.turn(index))
                except ConnectionClosed:
                    self.heard[-1].error = "ConnectionClosed"
                    return
                index += 1

    async def _exchange(self, socket: ClientConnection, turn: Turn) -> None:
        assert turn.said is not None
        await asyncio.sleep(turn.pause)
        pcm, step = self.utterances[turn.said], round(PIECE * PCM_S)
        begun = self.now()
        for i in range(0, len(pcm), step):
            await self._until(begun + i / PCM_S)
            audio = base64.b64encode(pcm[i : i + step]).decode()
            await _send(socket, "input_audio_buffer.append", audio=audio)
        await self._until(begun + len(pcm) / PCM_S)
        if self.now() >= self.until:
            return
        heard = Heard(self.now(), Player(RATE))
        self.heard.append(heard)
        await _send(socket, "input_audio_buffer.commit")
        await _send(socket, "response.create")
        await self._answer(socket, heard, turn)
        heard.ended = self.now()

    async def _answer(self, socket: ClientConnection, heard: Heard, turn: Turn) -> None:
        player, got, item, over, cut = heard.player, 0, "", False, False
        while not (over and (cut or player.dry_at <= self.now())):
            barges = turn.barge_in is not None and player.first is not None
            if barges and not cut and player.played(self.now()) >= (turn.barge_in or 0.0):
                heard.ended, cut = self.now(), True
                played = round(1000 * player.played(self.now()))
                if not over:
                    await _send(socket, "response.cancel")
                where = {"item_id": item, "content_index": 0, "audio_end_ms": played}
                await _send(socket, "conversation.item.truncate", **where)
            if self.now() > self.until + GRACE:
                return
            try:
                async with asyncio.timeout(NAP):
                    event = json.loads(await socket.recv())
            except TimeoutError:
                continue
            if event["type"] == DELTA and not cut:
                item = event["item_id"]
                data = base64.b64decode(event["delta"])
                got += len(data)
                player.hear(self.now(), len(data) // 2)
                self._count(heard, self.now(), got)
            elif event["type"] == "response.done":
                over = True
                if event["response"]["status"] == "failed":
                    heard.error = "failed"
            elif event["type"] == "error" and not cut:
                heard.error = str(event["error"]["code"])
                return

    # Clocks and counters

    async def _until(self, moment: float) -> None:
        if (left := moment - self.now()) > 0:
            await asyncio.sleep(left)

    def _cpu_seconds(self) -> float:
        stat = Path(f"/proc/{self.server.pid}/stat").read_text(encoding="utf-8")
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _peak_bytes(self) -> int:
        status = Path(f"/proc/{self.server.pid}/status").read_text(encoding="utf-8")
        (found,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(found.split()[1]) * 1024


def _speech(turn: Turn) -> Any:
    content = {"model": "tts-1", "voice": "alloy", "input": turn.text, "response_format": "pcm"}
    return posted("/v1/audio/speech", content)


def _pcm(wav: Any) -> bytes:
    return (wav.clamp(-1, 1) * 32767).short().numpy().tobytes()


async def _send(socket: ClientConnection, kind: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": kind} | fields))


def _error(task: asyncio.Future[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


def main(request: str, start: Callable[..., Any] = served) -> None:
    point = Point(**json.loads(request))
    count = str(max(point.streams, 4))
    options = ["--streams", str(point.streams), "--max-sessions", count, "--max-requests", count]
    options += ["--max-connections", str(4 * int(count) + 64), "--max-rate", "100000"]
    options += ["--max-seq-len", str(point.max_seq_len), "--log-level", "warning"]
    options += ["--device", point.device]
    if point.model != "nano":
        options += ["--model", point.model, "--codec", point.codec]
    with start(options) as server:
        print(json.dumps(asyncio.run(Crowd(point, server).measure())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
