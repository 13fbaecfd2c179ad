"""What to expect of the published dimensions on the measured devices: one reading of the records.

The report's first table shows it, and mimo_fast/assets/cards.json carries it into the package,
where `mimo-fast bench` prints it beside a user's machine: benchmarks/results is not in the wheel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.projection import FORMATS
from benchmarks.records import Entry, Measured

SENTENCE = 107
"""Groups of the prompt of a text to be said, as `mimo-fast bench` has it."""

CONTEXT = 256
"""Groups of context of the steady state; the nearest measured one is taken."""


@dataclass(frozen=True)
class Expectation:
    """What is known of one format on one device.

    groups: the steady state of one row, or nothing. spoken: one request of a short sentence, or
    nothing. many: spoken requests of all numbers of rows. quick: tables of `mimo-fast bench`.
    """

    groups: Sequence[Entry]
    spoken: Sequence[Entry]
    many: Sequence[Entry]
    quick: Sequence[Entry]

    @classmethod
    def of(cls, measured: Measured, device: str | None, form: str) -> Expectation:
        """From the newest records; of a device that was not measured (None) nothing."""
        name = f"7b {form}"
        groups, requests = (
            [e for e in measured.find(kind) if e.device == device and e.title == name]
            for kind in ("groups", "request")
        )
        quick = [
            e
            for e in measured.find("quick")
            if e.device == device and f"{e.get('preset')} {e['quantization']}" == name
        ]
        single = [e for e in groups if e["batch"] == 1]
        nearest = sorted(single, key=lambda e: abs(e.context - CONTEXT))[:1]
        # Of the newest requests the one with the prompt of a short sentence.
        newest = sorted(
            (e for e in requests if e["batch"] == 1 and e["audio_ttfp"] is not None),
            key=lambda e: (e["task"] == "tts", e.date[:10], -abs(e["prompt_groups"] - SENTENCE)),
        )[-1:]
        return cls(nearest, newest, [e for e in requests if e["task"] == "tts"], quick)

    @property
    def used(self) -> list[Entry]:
        """The entries that it is from."""
        return [*self.groups, *self.spoken, *self.quick, *self.many]

    @cached_property
    def _factors(self) -> list[tuple[int, float]]:
        """Streams and their real-time factor."""
        rows = [(x["streams"], x["metrics"]["audio_rtf"]) for e in self.quick for x in e["rows"]]
        rows += [(e["batch"], e["audio_rtf"]) for e in self.many]
        return [(streams, rtf) for streams, rtf in rows if rtf is not None]

    @property
    def streams(self) -> int | None:
        """The largest measured number of streams in real time; None where none was measured."""
        if not self._factors:
            return None
        return max((streams for streams, rtf in self._factors if rtf < 1), default=0)

    @property
    def or_more(self) -> bool:
        """Whether that is the largest number that was tried."""
        tried = [streams for streams, _ in self._factors]
        return bool(tried) and self.streams == max(tried)

    def values(self) -> dict[str, Any]:
        """JSON values; seconds, bytes, and None for what was not measured."""
        group = self.groups[0].at if self.groups else _nothing
        spoken = self.spoken[0].at if self.spoken else _nothing
        return {
            "audio_group": group("audio_group.p50"),
            "of_floor": group("of_floor.audio_group"),
            "first_audio": spoken("audio_ttfp.p50"),
            "peak_bytes": spoken("peak_bytes"),
            "streams": self.streams,
            "or_more": self.or_more,
            "dates": sorted({e.date[:10] for e in self.used}),
            "sources": sorted({(e["file"], e["environment"]["commit"]) for e in self.used}),
        }


def _nothing(_path: str) -> None:
    """In place of a record's fields where there is no record."""


def cards(measured: Measured) -> list[dict[str, Any]]:
    """Each device on which the published dimensions were measured, GPUs first, and its formats."""
    found = []
    for device in measured.devices("groups", "request", "quick"):
        forms = {form: Expectation.of(measured, device, form) for form in FORMATS}
        used = sorted((e for each in forms.values() for e in each.used), key=lambda e: e.date)
        if used:
            known = {form: each.values() for form, each in forms.items() if each.used}
            about, read = used[-1]["environment"]["device"], used[-1]["ceiling"]["read_Bps"]
            card = {"name": device, "type": about["type"], "read_Bps": read, "formats": known}
            found.append(card)
    return found


def cards_text(measured: Measured) -> str:
    """The content of mimo_fast/assets/cards.json."""
    written = {"written_by": "python -m benchmarks --report", "cards": cards(measured)}
    return json.dumps(written, indent=1) + "\n"
