"""What was said when: segments of a recording, and the files in which players expect them."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

NO_SPACES = ((0x2E80, 0x9FFF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF))
"""Ranges of characters that no space stands beside: Chinese and Japanese, wide forms."""


@dataclass(frozen=True)
class TranscriptSegment:
    """What was said between two pauses.

    Attributes:
        start, end: Seconds in the recording.
        text: What was said, without space at its ends; may be empty.
        finish_reason: "stop", or "length" or "context" where the text was cut.
        confidence: How far the text can be relied on, 0 to 1; None where the checkpoint does not
            state how to tell.
        warning: A sentence for the user where it cannot.
    """

    start: float
    end: float
    text: str
    finish_reason: str | None = "stop"
    confidence: float | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Transcript:
    """A recording in words.

    Attributes:
        text: All segments, joined.
        segments: In the order in which they were said.
        duration: Seconds of the recording.
    """

    text: str
    segments: tuple[TranscriptSegment, ...]
    duration: float


def join(before: str, after: str) -> str:
    """Two texts, with a space between them where their letters need one."""
    if not before or not after:
        return before + after
    letters = ord(before[-1]), ord(after[0])
    close = any(low <= letter <= high for letter in letters for low, high in NO_SPACES)
    return before + after if close else f"{before} {after}"


def as_text(transcript: Transcript) -> str:
    return f"{transcript.text}\n"


def as_json(transcript: Transcript) -> str:
    return json.dumps(as_object(transcript), ensure_ascii=False, indent=1) + "\n"


def as_object(transcript: Transcript) -> dict[str, Any]:
    """An object of JSON: text, duration, segments of start, end, text and what is unusual."""
    segments = []
    for segment in transcript.segments:
        found = asdict(segment) | {"start": round(segment.start, 3), "end": round(segment.end, 3)}
        if found["confidence"] is not None:
            found["confidence"] = round(found["confidence"], 3)
        usual = {"finish_reason": "stop", "confidence": None, "warning": None}
        segments.append({k: v for k, v in found.items() if k not in usual or v != usual[k]})
    duration = round(transcript.duration, 3)
    return {"text": transcript.text, "duration": duration, "segments": segments}


def as_srt(transcript: Transcript) -> str:
    """SubRip."""
    cues = enumerate(_cues(transcript.segments), 1)
    return "\n".join(
        f"{i}\n{_clock(s.start, ',')} --> {_clock(s.end, ',')}\n{_line(s.text)}\n" for i, s in cues
    )


def as_vtt(transcript: Transcript) -> str:
    """WebVTT (W3C), in which `&`, `<` and `>` have a meaning."""
    cues = _cues(transcript.segments)
    return "WEBVTT\n" + "".join(
        f"\n{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n"
        f"{html.escape(_line(s.text), quote=False)}\n"
        for s in cues
    )


def as_tsv(transcript: Transcript) -> str:
    """Tab-separated: milliseconds at start and end, text."""
    rows = (
        f"{round(1000 * s.start)}\t{round(1000 * s.end)}\t{_line(s.text)}\n"
        for s in _cues(transcript.segments)
    )
    return "start\tend\ttext\n" + "".join(rows)


WRITERS: dict[str, Callable[[Transcript], str]] = {
    "text": as_text,
    "json": as_json,
    "srt": as_srt,
    "vtt": as_vtt,
    "tsv": as_tsv,
}
"""Format -> what a file of it holds."""

SUFFIXES = {"text": ".txt"} | {name: f".{name}" for name in WRITERS if name != "text"}


def _cues(segments: Iterable[TranscriptSegment]) -> Iterable[TranscriptSegment]:
    return (segment for segment in segments if segment.text)


def _line(text: str) -> str:
    """On one line: an empty line would end a cue, and an arrow in it begin another."""
    return " ".join(text.split()).replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    whole, milliseconds = divmod(round(1000 * seconds), 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{milliseconds:03}"
