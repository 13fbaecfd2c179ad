"""Clients of an engine in one process, a thread each, by the public API alone.

    python -m benchmarks.load.engine '{"streams": 16, "profile": "listeners", "seconds": 15}'
    python -m benchmarks.load.engine '{"replies": true, "model": "nano", "codec": "nano"}'

A process measures one point and prints it as a line of JSON, so that memory and time of the
processor are its own, and so that it also runs in the tree of an older commit.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mimo_fast
from benchmarks.load.people import (
    ROOM,
    Heard,
    Person,
    Turn,
    lines,
    people,
    recording_files,
    summary,
)
from mimo_fast.bench.player import Player

PATCH = 0.16
GRACE = 5.0
"""Seconds after the window in which a request that was made in it may still be heard first."""

WARM = 2


@dataclass(frozen=True)
class Point:
    """What is measured.

    Attributes:
        streams: People at once; as many slots has the engine.
        seconds: Of the window, which begins after the ramp.
        ramp: Seconds within which all arrive.
        room: Seconds of audio that a listener holds.
    """

    streams: int
    profile: str = "listeners"
    seconds: float = 15.0
    ramp: float = 4.0
    room: float = ROOM
    seed: int = 1
    lookahead: str = "elastic"
    model: str = "nano"
    codec: str = "nano"
    max_seq_len: int = 512
    device: str = "cpu"


class Watched:
    """Steps of an engine within a window, by what its `StepCost` is told of them.

    Attributes:
        rows: [steps, their seconds] by number of rows; prompts: [groups, their seconds].
    """

    def __init__(self, within: Callable[[], bool]) -> None:
        # An older commit, which is only measured, may have no such class.
        from mimo_fast.runtime.engine.policy import StepCost

        self.rows: dict[int, list[float]] = {}
        self.prompts = [0.0, 0.0]
        saw, saw_prompts = StepCost.saw, StepCost.saw_prompts

        def step(cost: Any, rows: int, seconds: float) -> None:
            saw(cost, rows, seconds)
            if within():
                found = self.rows.setdefault(rows, [0, 0.0])
                found[0] += 1
                found[1] += seconds

        def prompts(cost: Any, groups: int, seconds: float) -> None:
            saw_prompts(cost, groups, seconds)
            if within():
                self.prompts = [self.prompts[0] + groups, self.prompts[1] + seconds]

        StepCost.saw, StepCost.saw_prompts = step, prompts  # type: ignore[method-assign]


class Crowd:
    """All people of a point, and the engine that answers them."""

    def __init__(self, point: Point) -> None:
        self.point = point
        options: dict[str, Any] = {"max_batch": point.streams, "max_seq_len": point.max_seq_len}
        names = (point.model, point.codec)
        self.model = mimo_fast.load(*names, device=point.device, **options)
        rate = self.model.codec.sample_rate
        self.rate, self.patch = rate, round(PATCH * rate)
        talks = point.profile == "people"
        self.utterances = [
            mimo_fast.load_audio(path, rate) for path in (recording_files() if talks else ())
        ]
        self.heard = list[Heard]()
        self.failed = list[BaseException]()
        self._began = 0.0
        self.until = point.ramp + point.seconds
        self._prompts = {
            each: self.model.get_tts_sft_prompt(each).shape[1] // self.model.group_size
            for each in lines("sentences")
        }

    def now(self) -> float:
        return time.perf_counter() - self._began

    def measure(self, watch: bool = False) -> dict[str, Any]:
        """What was heard; with `watch` also the steps that made it."""
        point = self.point
        self._warm_up()
        watched = Watched(lambda: point.ramp <= self.now() <= self.until) if watch else None
        crowd = people(point.profile, point.streams, point.ramp, point.seed)
        self._began = time.perf_counter()
        threads = [threading.Thread(target=self._live, args=[each], daemon=True) for each in crowd]
        for thread in threads:
            thread.start()
        self._sleep_until(point.ramp)
        before = resource.getrusage(resource.RUSAGE_SELF)
        self._sleep_until(self.until)
        after = resource.getrusage(resource.RUSAGE_SELF)
        heard, until = [*self.heard], self.now()
        for thread in threads:
            thread.join(GRACE + 60)
        if self.failed:
            raise self.failed[0]
        used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        return (
            asdict(point)
            | summary(heard, point.ramp, self.until)
            | {
                "cpus": used / (until - point.ramp),
                "peak_bytes": after.ru_maxrss * 1024,
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0],
            }
            | ({} if watched is None else {"steps": watched.rows, "prefills": watched.prompts})
        )

    def _warm_up(self) -> None:
        """Whatever is made at the first use of it is made; none of it is counted."""
        for _ in range(WARM):
            first = people("listeners", 1, 1.0, self.point.seed)[0].turn(0)
            for _ in self.model.stream("tts", first.text, split=True, lookahead="elastic", seed=1):
                pass
        if self.utterances:
            for _ in self.model.session(seed=1).stream(self.utterances[0], lookahead="elastic"):
                pass
        running = [
            self._reply(Person(0, i, 0.0, "listeners"), 0) for i in range(self.point.streams)
        ]
        for each in running:
            next(each)
        for each in running:
            each.close()

    def _reply(self, person: Person, index: int) -> Any:
        options = {"split": True, "seed": 1 + index, "lookahead": self.point.lookahead}
        return self.model.stream("tts", person.turn(index).text, **options)

    def _live(self, person: Person) -> None:
        try:
            self._sleep_until(person.arrives)
            seed = person.seed + person.number
            talks = person.profile == "people"
            session = self.model.session(seed=seed) if talks else None
            index = 0
            while self.now() < self.until:
                self._turn(person, index, session)
                index += 1
        except BaseException as error:
            self.failed.append(error)

    def _turn(self, person: Person, index: int, session: Any) -> None:
        turn = person.turn(index)
        spoken = 0.0 if turn.said is None else len(self.utterances[turn.said]) / self.rate
        self._sleep_until(self.now() + turn.pause + spoken)
        if self.now() >= self.until:
            return
        prompt = sum(self._prompts[each] for each in turn.sentences)
        heard = Heard(self.now(), Player(self.rate), prompt=prompt)
        self.heard.append(heard)
        try:
            if turn.said is None:
                reply = self._reply(person, index)
            else:
                wav = self.utterances[turn.said]
                reply = session.stream(wav, lookahead=self.point.lookahead)
                heard.prompt = session.prefilled
            with closing(reply) as chunks:
                cut = self._listen(heard, chunks, turn)
            if cut and session is not None:
                session.interrupt(1000 * heard.player.played(self.now()))
        except mimo_fast.BusyError as error:
            heard.error = type(error).__name__
            self._sleep_until(self.now() + 0.5)
        heard.ended = self.now()

    def _listen(self, heard: Heard, chunks: Any, turn: Turn) -> bool:
        """Reads a reply as it is heard -> whether it was interrupted."""
        player, fast = heard.player, self.point.profile == "closed"
        samples = 0
        for chunk in chunks:
            now = self.now()
            player.hear(now, len(chunk.audio))
            samples += len(chunk.audio)
            # The last chunk ends the reply, and is no group where the reply was cut.
            heard.groups.extend([now] * (chunk.timing.groups - len(heard.groups)))
            heard.patches.extend([now] * (samples // self.patch - len(heard.patches)))
            if fast:
                if now > self.until:
                    return False
                continue
            if self._waits(player, player.buffered(now) - self.point.room, turn):
                return True
            # A request of the window may still be heard first.
            late = self.now() - self.until
            if late > 0 and (player.first is not None or late > GRACE):
                return False
        return not fast and self._waits(player, player.buffered(self.now()), turn)

    def _waits(self, player: Player, seconds: float, turn: Turn) -> bool:
        """Waits while the reply is played -> whether its listener interrupts meanwhile."""
        end = min(self.now() + max(seconds, 0.0), max(self.until, self.now()))
        if turn.barge_in is None or player.first is None:
            self._sleep_until(end)
            return False
        left = turn.barge_in - player.played(self.now())
        self._sleep_until(min(end, self.now() + max(left, 0.0)))
        return player.played(self.now()) >= turn.barge_in

    def _sleep_until(self, moment: float) -> None:
        if (left := moment - self.now()) > 0:
            time.sleep(left)


def replies(model: str, codec: str) -> dict[str, Any]:
    """What the model says of each sentence, for the simulation.

    Returns the groups of each prompt and the samples that come with each group; the samples of the
    pause between two sentences; and the seconds of a group of a prompt, the median over sentences.
    """
    with mimo_fast.load(model, codec, device="cpu", max_batch=1, max_seq_len=512) as loaded:
        rate = loaded.codec.sample_rate

        def said(text: str) -> tuple[list[int], float]:
            chunks = [*loaded.stream("tts", text, split=True, lookahead="elastic", seed=1)]
            samples = [len(each.audio) for each in chunks]
            # The end of a reply is a chunk without a group.
            groups = chunks[-1].timing.groups
            return [*samples[: groups - 1], sum(samples[groups - 1 :])], chunks[-1].timing.prefill

        found, seconds = dict[str, Any](), list[float]()
        for _ in range(2):
            for each in lines("sentences"):
                groups = loaded.get_tts_sft_prompt(each).shape[1] // loaded.group_size
                samples, prefill = said(f"{each}.")
                found[each] = {"prompt": groups, "samples": samples}
                seconds.append(prefill / groups)
        one, other = lines("sentences")[:2]
        both = sum(said(f"{one}. {other}.")[0])
        pause = both - sum(sum(found[each]["samples"]) for each in (one, other))
        middle = sorted(seconds[len(seconds) // 2 :])[len(seconds) // 4]
        return {"sentences": found, "pause": pause, "rate": rate, "prompt_seconds": middle}


def main(request: str) -> None:
    asked = json.loads(request)
    wants_replies = asked.pop("replies", False)
    watch = asked.pop("watch", False)
    made = replies(**asked) if wants_replies else Crowd(Point(**asked)).measure(watch)
    # Whoever reads it may be gone.
    with suppress(BrokenPipeError):
        print(json.dumps(made), flush=True)
    # Threads of replies that were cut end with the process.
    os._exit(0)


if __name__ == "__main__":
    if not Path("benchmarks").is_dir():
        sys.exit("run it in the root of a checkout")
    main(sys.argv[1])
