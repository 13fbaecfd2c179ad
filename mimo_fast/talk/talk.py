"""One talk: what the microphone hears goes to the partner, what comes back is heard and shown.

microphone -> (echo) -> partner -> player -> speaker
                           └ words -> screen, as they are heard
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np

from mimo_fast.errors import MimoFastError
from mimo_fast.server.realtime.items import Reply
from mimo_fast.talk.card import BLOCK
from mimo_fast.talk.echo import EchoCanceller
from mimo_fast.talk.files import Recorder
from mimo_fast.talk.partner import Partner
from mimo_fast.talk.player import Player, Utterance, gaps_in
from mimo_fast.talk.screen import Screen

TICK = 0.02
"""Seconds between two looks at what has been heard."""

MOST_UNSENT = 500
"""Blocks of the microphone that may wait for the partner, 10 s; then newer ones are dropped."""

QUIET = 1.5
"""Seconds of silence after which a talk that has no more input is over."""

LOST = 60.0
"""Seconds that a talk without more input waits for a reply."""

WORD = 300.0
"""Milliseconds of a word, where its end is not known yet."""

DEAF = 3.0
"""Seconds of a microphone's zeros after which it is remarked that it gives nothing."""


@dataclass
class Heard:
    """A reply that is being said.

    Attributes:
        words: As the session core keeps them: which of them were heard is its rule.
        shown: Characters of them that the screen has.
    """

    utterance: Utterance
    words: Reply = field(default_factory=Reply)
    shown: int = 0
    over: bool = False
    timed: bool = False

    def text(self, rate: int) -> str:
        """The words that have been heard."""
        words, heard = self.words, 1000 * self.utterance.heard() / rate
        words.ms = 1000 * self.utterance.samples / rate
        if not self.over and words.words:
            # The last ones take longer than the audio that has come so far.
            start = words.words[-1][1]
            last = [text for text, at in words.words if at == start]
            words.ms = max(words.ms, start + WORD * len("".join(last).split()))
        return words.heard_by(heard)


class Talk:
    """A talk; implements `Listener`.

    Args:
        by_hand: turns begin and end by `press`.
        echo: cleans what the microphone hears.
        recorder: is given both sides.

    Attributes:
        latencies: Seconds from the end of each turn to the first audio of its reply.
        interruptions: Replies that were not heard to their end.
        dropped: Blocks of the microphone that the partner was too slow for.
    """

    def __init__(
        self,
        partner: Partner,
        player: Player,
        screen: Screen,
        by_hand: bool = False,
        echo: EchoCanceller | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._partner, self._player, self._screen = partner, player, screen
        self._by_hand, self._echo, self._recorder = by_hand, echo, recorder
        self._player.records = recorder is not None
        self._unsent = asyncio.Queue[Callable[[], Awaitable[None]]]()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replies = dict[str, Heard]()
        self._cut = set[str]()
        self._speaks = self._waits = False
        self._muted = by_hand
        self._turn_ended = 0.0
        self._turns = 0
        self._finishing: float | None = None
        self._calm_since = perf_counter()
        self._heard_sound, self._zeros = False, 0.0
        self.latencies = list[float]()
        self.interruptions = self.dropped = 0

    @property
    def state(self) -> str:
        if self._speaks:
            return "you speak"
        if any(reply.utterance.first is not None for reply in self._replies.values()):
            return "speaking"
        if self._waits:
            return "thinking"
        if self._by_hand:
            return "press space and speak"
        return "muted: press space" if self._muted else "listening"

    @property
    def summary(self) -> str:
        """The talk in a line."""
        found = [f"{self._turns} turn{'' if self._turns == 1 else 's'}"]
        if self.latencies:
            ms = round(1000 * median(self.latencies))
            found.append(f"first audio {ms} ms after a turn in the median")
        if self.interruptions:
            found.append(f"{self.interruptions} interrupted")
        if self._player.gaps:
            found.append(f"{gaps_in(self._player)}: the model was too slow")
        if self.dropped:
            found.append(f"{self.dropped * BLOCK:.1f} s of the microphone lost: it was too slow")
        return ", ".join(found)

    async def run(self, *drivers: Callable[[], Awaitable[None]]) -> None:
        """Talks until `stop`, or until there is no more to come after `finish`.

        Args:
            drivers: what else is to run meanwhile.

        Raises:
            MimoFastError: the partner, the microphone or the speaker has gone.
        """
        works = (self._send, self._tick, *drivers)
        tasks = [asyncio.ensure_future(work()) for work in works]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            await self._over
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._player.stop()
            self._screen.close()

    def _ended(self, task: asyncio.Future[None]) -> None:
        if not task.cancelled() and task.exception() is not None and not self._over.done():
            self._over.set_exception(task.exception())  # type: ignore[arg-type]

    def stop(self) -> None:
        """Ends the talk."""
        if not self._over.done():
            self._over.set_result(None)

    def finish(self) -> None:
        """Ends the talk once what was said has been answered."""
        if self._finishing is None:
            self._finishing = perf_counter()

    # The user

    def microphone(self, block: np.ndarray) -> None:
        """What the microphone hears, float32 [n]."""
        self._look_for_sound(block)
        if self._echo is not None:
            block = self._echo.clean(block, self._player)
        if self._recorder is not None:
            self._recorder.add(0, [np.zeros_like(block) if self._muted else block])
        if self._muted:
            return
        if self._unsent.qsize() >= MOST_UNSENT:
            self.dropped += 1
            return
        self._unsent.put_nowait(partial(self._partner.hear, block))

    def _look_for_sound(self, block: np.ndarray) -> None:
        if self._heard_sound:
            return
        self._heard_sound = bool(block.any())
        self._zeros += len(block) / self._player.rate
        if not self._heard_sound and self._zeros > DEAF:
            self._heard_sound = True
            self._screen.note(
                "warning: the microphone gives nothing but zeros: is it muted, or not allowed to "
                "this terminal (macOS: System Settings, Privacy & Security, Microphone)?"
            )

    def press(self) -> None:
        """Begins and ends a turn by hand; otherwise mutes the microphone."""
        if not self._by_hand:
            self._muted = not self._muted
            return
        self._muted = not self._muted
        if not self._muted:
            self.turn_began()
            self._unsent.put_nowait(self._partner.begin_turn)
        else:
            self._unsent.put_nowait(self._partner.take_turn)
            self.turn_ended()

    async def _send(self) -> None:
        while True:
            await (await self._unsent.get())()

    # The partner

    def turn_began(self) -> None:
        self._speaks, self._waits = True, False
        self._interrupt()

    def _interrupt(self) -> None:
        """Silence at once; the partner learns what was heard, to the sample."""
        for utterance in self._player.stop():
            heard, name = utterance.heard(), utterance.name
            if utterance.ended and heard >= utterance.samples:
                continue
            self.interruptions += 1
            self._cut.add(name)
            ms = 1000 * heard / self._player.rate
            self._unsent.put_nowait(partial(self._partner.truncate, name, ms))
            if (reply := self._replies.pop(name, None)) is not None:
                self._reveal(reply)
            self._screen.reply_ends(name, "[interrupted]")

    def turn_ended(self) -> None:
        self._speaks, self._waits = False, True
        self._turn_ended = perf_counter()
        self._turns += 1
        self._screen.user_turn()

    def user_said(self, item: str, text: str, whole: bool) -> None:
        self._screen.user_said(item, text, whole)

    def reply_began(self, item: str) -> None:
        self._replies[item] = Heard(self._player.begin(item))
        self._screen.reply_begins(item)

    def reply_said(self, item: str, text: str, audio: np.ndarray) -> None:
        reply = self._replies.get(item)
        if reply is None:
            # It was interrupted.
            return
        if text:
            at = 1000 * reply.utterance.samples / self._player.rate
            reply.words.words.append((text, at))
        reply.utterance.push(audio)

    def reply_ended(self, item: str | None, problem: str | None) -> None:
        reply = self._replies.get(item or "")
        if reply is not None:
            reply.utterance.ended = reply.over = True
        elif item is None or item not in self._cut:
            self._waits = False
        self._cut.discard(item or "")
        if problem is not None:
            self._waits = False
            self._screen.note(f"the reply failed: {problem}")

    def failed(self, problem: str) -> None:
        self._waits = False
        self._screen.note(problem)

    def gone(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    # What is heard

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            for name, reply in [*self._replies.items()]:
                self._follow(name, reply)
            if self._recorder is not None:
                played = self._player.played
                blocks = [played.popleft() for _ in range(len(played))]
                if blocks:
                    self._recorder.add(1, blocks)
            self._screen.show(self.state)
            self._end_if_calm()

    def _follow(self, name: str, reply: Heard) -> None:
        """Shows the words that have been heard; takes a reply away that has been."""
        utterance = reply.utterance
        if utterance.first is not None and not reply.timed:
            reply.timed, self._waits = True, False
            self.latencies.append(utterance.first - self._turn_ended)
            self._screen.timed(name, self.latencies[-1])
        self._reveal(reply)
        if reply.over and utterance.drained and utterance.heard() >= utterance.samples:
            whole = "".join(text for text, _ in reply.words.words)
            self._screen.reply_says(name, whole[reply.shown :])
            del self._replies[name]
            self._waits = False
            self._screen.reply_ends(name)

    def _reveal(self, reply: Heard) -> None:
        text = reply.text(self._player.rate)
        if len(text) > reply.shown:
            self._screen.reply_says(reply.utterance.name, text[reply.shown :])
            reply.shown = len(text)

    def _end_if_calm(self) -> None:
        now = perf_counter()
        if self._finishing is None or self._speaks or self._waits or self._replies:
            self._calm_since = now
        if self._finishing is None:
            return
        if now - max(self._calm_since, self._finishing) >= QUIET and self._unsent.empty():
            self.stop()
        elif now - self._finishing > LOST and not self._replies:
            self.gone(MimoFastError(f"no reply came in {LOST:.0f} s"))
