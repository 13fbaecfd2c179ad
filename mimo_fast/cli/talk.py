"""`mimo-fast talk`: a spoken dialogue with microphone and speaker."""

import argparse
import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import numpy as np

from mimo_fast.audio.paths import name_of
from mimo_fast.cli.common import SAMPLE_RATE, adapter_of, load_model, load_recording
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import say
from mimo_fast.errors import MimoFastError
from mimo_fast.talk import card
from mimo_fast.talk.echo import EchoCanceller
from mimo_fast.talk.files import Recorder, WavMicrophone, WavSpeaker
from mimo_fast.talk.keys import keys
from mimo_fast.talk.partner import Partner, Wishes
from mimo_fast.talk.player import Player
from mimo_fast.talk.screen import Screen
from mimo_fast.talk.talk import Talk

ROWS = 3
"""A reply, one that is begun before a turn is over, and a transcript."""

STALLED = 5.0
"""Seconds without a block after which a microphone has gone."""


def run(args: argparse.Namespace) -> int:
    if args.list_devices:
        print(card.list_devices())
        return 0
    # What may be missing is found out before a model is loaded.
    wav = None if args.input is None else load_recording(args.input).numpy()
    device_in = None if wav is not None else card.find_device(args.device_in, "input")
    device_out = None if args.output else card.find_device(args.device_out, "output")
    echo = EchoCanceller(SAMPLE_RATE) if args.echo_cancel else None
    if echo is None and wav is None and args.output is None:
        say("wear headphones, or give --echo-cancel: else the model hears itself")
    with ExitStack() as stack:
        partner = _partner(args, stack)
        sides = wav, device_in, device_out
        with _interruptible() as stops:
            asyncio.run(_talk(args, partner, sides, echo, stops))
    return 0


def _partner(args: argparse.Namespace, stack: ExitStack) -> Partner:
    voice = None if args.voice is None else str(args.voice)
    wishes = Wishes(args.instructions, voice, args.push)
    if args.server is not None:
        from mimo_fast.talk.remote import RemotePartner

        return RemotePartner(args.server, args.api_key or None, wishes)
    try:
        from mimo_fast.server.service import Service
        from mimo_fast.talk.local import LocalPartner
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "mimo_fast":
            raise
        fix = "pip install 'mimo-fast[talk]'"
        raise MimoFastError(f"talk needs the package {name}, which is missing: {fix}") from error
    model = load_model(args, max_batch=ROWS)
    service = stack.enter_context(closing(Service(model, "talk", adapter=adapter_of(model, args))))
    return LocalPartner(service, wishes)


class _Stops:
    """Ctrl-C and SIGTERM: the first ends the talk, the next Ctrl-C the command."""

    def __init__(self) -> None:
        self.came = False
        self._act: Any = None

    def connect(self, act: Any) -> None:
        self._act = act
        if self.came:
            act()

    def __call__(self, number: int, frame: object) -> None:
        if self.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.came = True
        if self._act is not None:
            self._act()


@contextmanager
def _interruptible() -> Iterator[_Stops]:
    stops = _Stops()
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    handled = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(each, stops) for each in handled]
    try:
        yield stops
    finally:
        for each, handler in zip(handled, before, strict=True):
            signal.signal(each, handler)


async def _talk(
    args: argparse.Namespace,
    partner: Partner,
    sides: tuple[np.ndarray | None, int | None, int | None],
    echo: EchoCanceller | None,
    stops: _Stops,
) -> None:
    wav, device_in, device_out = sides
    loop, rate = asyncio.get_running_loop(), SAMPLE_RATE
    player = Player(rate, keeps_far=echo is not None)
    with ExitStack() as stack:
        recorder = None
        if args.save is not None:
            recorder = stack.enter_context(closing(Recorder(args.save, rate)))
        talk = Talk(partner, player, Screen(), args.push, echo, recorder)
        stops.connect(partial(loop.call_soon_threadsafe, talk.stop))
        drivers = list[Any]()
        if args.output is not None:
            speaker = stack.enter_context(closing(WavSpeaker(args.output, player)))
            drivers.append(speaker.run)
        if wav is not None:
            drivers.append(partial(_play_in, WavMicrophone(wav, rate, talk.microphone), talk))
        try:
            await partner.open(talk)
            delay = 0.0
            if wav is None:
                watch = _Watch(loop, talk)
                hearing = card.Input(rate, watch.heard, watch.gone, device_in)
                stack.enter_context(hearing)
                drivers.append(watch.run)
                delay += hearing.latency
            if args.output is None:

                def over() -> None:
                    loop.call_soon_threadsafe(talk.gone, card.gone("output"))

                playing = card.Output(rate, player.fill, over, device_out)
                stack.enter_context(playing)
                delay += playing.latency
            if echo is not None:
                echo.set_delay(delay)
            stack.enter_context(
                keys(talk.press, talk.finish if args.input else talk.stop, args.push)
            )
            say(f"{_how(args)}; Ctrl-C ends the talk")
            await talk.run(*drivers)
        finally:
            await partner.close()
    for file in filter(None, (args.save, args.output)):
        written.append(name_of(file))
    files = f"; wrote {', '.join(written)}" if written else ""
    say(talk.summary + files)


def _how(args: argparse.Namespace) -> str:
    """What the user can do."""
    if not sys.stdin.isatty():
        return "a line begins and ends what you say" if args.push else "speak"
    return "space begins and ends what you say" if args.push else "speak, space mutes"


async def _play_in(microphone: WavMicrophone, talk: Talk) -> None:
    """A recording as the microphone; the talk ends once it has been answered."""
    running = asyncio.ensure_future(microphone.run())
    try:
        while microphone.silent < card.BLOCK:
            await asyncio.sleep(card.BLOCK)
        talk.finish()
        await running
    finally:
        running.cancel()


class _Watch:
    """Brings the microphone's blocks into the event loop, and knows when no more come."""

    def __init__(self, loop: asyncio.AbstractEventLoop, talk: Talk) -> None:
        self._loop, self._talk = loop, talk
        self._last = loop.time()

    def heard(self, block: np.ndarray) -> None:
        """In the card's thread."""
        self._loop.call_soon_threadsafe(self._take, block)

    def gone(self) -> None:
        """In the card's thread."""
        self._loop.call_soon_threadsafe(self._talk.gone, card.gone("input"))

    def _take(self, block: np.ndarray) -> None:
        self._last = self._loop.time()
        self._talk.microphone(block)

    async def run(self) -> None:
        self._last = self._loop.time()
        while self._loop.time() - self._last < STALLED:
            await asyncio.sleep(STALLED / 10)
        raise card.gone("input")
