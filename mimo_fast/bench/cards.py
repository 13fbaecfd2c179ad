"""Known machines: what the project measured of the published dimensions on them.

assets/cards.json is written by `python -m benchmarks --report` from committed results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CARDS = Path(__file__).parents[1] / "assets" / "cards.json"


@dataclass(frozen=True)
class Known:
    """One format on a known machine.

    Seconds and bytes; None: not measured. of_floor: share of its floor that a group of speech
    reaches. or_more: whether no larger number of streams was tried. dates: ISO days.
    """

    audio_group: float | None
    of_floor: float | None
    first_audio: float | None
    peak_bytes: int | None
    streams: int | None
    or_more: bool
    dates: Sequence[str]
    sources: Sequence[Sequence[str]]

    def __str__(self) -> str:
        parts = list[str]()
        if self.streams is not None:
            more = " or more" if self.or_more else ""
            parts.append(f"{self.streams or 'no'}{more} stream{'s' * (self.streams != 1)}")
        if self.first_audio is not None:
            parts.append(f"first audio {duration(self.first_audio)}")
        if self.of_floor is not None:
            parts.append(f"{100 * self.of_floor:.0f}% of its floor")
        return ", ".join(parts)


@dataclass(frozen=True)
class KnownMachine:
    """A known machine, with bytes a second that it reads, and its formats by name."""

    name: str
    type: str
    read_Bps: float
    formats: dict[str, Known]

    @property
    def days(self) -> str:
        """The first and the last day of its measurements."""
        days = sorted(day for known in self.formats.values() for day in known.dates)
        return " to ".join(dict.fromkeys((days[0], days[-1])))

    def __str__(self) -> str:
        forms = "; ".join(f"{name} {known}" for name, known in self.formats.items())
        return f"{self.name} (measured {self.days}): {self.read_Bps / 1e9:,.0f} GB/s; {forms}"


@cache
def known_machines() -> tuple[KnownMachine, ...]:
    """All known machines, GPUs first."""

    def machine(card: dict[str, Any]) -> KnownMachine:
        formats = {name: Known(**known) for name, known in card["formats"].items()}
        return KnownMachine(**card | {"formats": formats})

    return tuple(map(machine, json.loads(CARDS.read_text(encoding="utf-8"))["cards"]))


def usual_share(device_type: str, form: str) -> tuple[float, str] | None:
    """Share of the floor that a group of speech reaches in a format, and on which known machine.

    Of the machines of that type ("cpu" or "cuda") it is the lowest; None if there are none.
    """
    alike = [machine for machine in known_machines() if machine.type == device_type]
    found = [
        (known.of_floor, machine.name)
        for machine in alike
        for name, known in machine.formats.items()
        if name == form and known.of_floor is not None
    ]
    return min(found, default=None)


def beside() -> Iterator[str]:
    """Lines of known machines, to be read beside one's own."""
    yield "measured by the project in the published dimensions:"
    for machine in known_machines():
        yield f"  {machine}"


def duration(seconds: float) -> str:
    """Milliseconds, or seconds from ten of them on."""
    return f"{1e3 * seconds:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"
