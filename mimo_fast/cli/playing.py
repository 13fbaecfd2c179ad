"""Speech on this machine's speaker, while it is made."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from mimo_fast.cli.reports import say
from mimo_fast.talk import card
from mimo_fast.talk.player import Player, gaps_in

LOOK = 0.02
"""Seconds between two looks at what has been heard."""


class Aloud:
    """What is being played.

    Raises:
        CardError: the speaker has gone.
    """

    def __init__(self, rate: int) -> None:
        self.player = Player(rate)
        self._said = self.player.begin("speech")
        self._gone = False

    def write(self, wav: Tensor) -> None:
        """More samples [n], to be heard after those before."""
        self._check()
        self._said.push(wav.float().cpu().numpy().astype(np.float32))

    def finish(self) -> None:
        """Returns when all of it has been heard."""
        self._said.ended = True
        while self._said.samples and self._said.heard() < self._said.samples:
            self._check()
            time.sleep(LOOK)
        if self.player.gaps:
            say(f"{gaps_in(self.player)}: this machine speaks slower than real time")

    def lose(self) -> None:
        """The speaker has gone."""
        self._gone = True

    def _check(self) -> None:
        if self._gone:
            raise card.gone("output")


@contextmanager
def aloud(rate: int, device: int | None) -> Iterator[Aloud]:
    """Opens the speaker; an error or Ctrl-C silences it at once.

    Args:
        rate: of what is written.
        device: number; None for the default one.
    """
    found = Aloud(rate)
    with card.Output(rate, found.player.fill, found.lose, device) as output:
        try:
            yield found
        except BaseException:
            output.abort()
            raise
