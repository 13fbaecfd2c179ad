"""Transcripts as text, JSON, SRT, WebVTT and TSV."""

import csv
import html
import json

import pysubs2
import pytest

from mimo_fast.text.transcript import (
    SUFFIXES,
    WRITERS,
    Transcript,
    TranscriptSegment,
    as_json,
    as_srt,
    as_text,
    as_tsv,
    as_vtt,
    join,
)

SEGMENTS = (
    TranscriptSegment(0.192, 1.344, "how is your car"),
    TranscriptSegment(2.0, 2.1, ""),
    TranscriptSegment(59.9996, 61.5, "a < b & c --> d\n\nand\tmore"),
    TranscriptSegment(3 * 3600 + 1.25, 3 * 3600 + 2, "你好", "length"),
)
FOUND = Transcript("how is your car a < b 你好", SEGMENTS, 10803.0)


def test_each_format_has_a_suffix():
    assert WRITERS.keys() == SUFFIXES.keys()


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_players_read_the_times_and_words(form):
    read = pysubs2.SSAFile.from_string(WRITERS[form](FOUND), format_=form)
    assert [(line.start, line.end) for line in read] == [
        (192, 1344),
        (60_000, 61_500),
        (10_801_250, 10_802_000),
    ]
    words = [line.plaintext for line in read]
    assert words[0] == "how is your car"
    # SubRip has no way to write `<`, which its readers take for a tag.
    assert words[1].endswith(" d and more")
    if form == "vtt":
        assert html.unescape(words[1]) == "a < b & c -> d and more"
    assert words[2] == "你好"


def test_vtt_begins_as_the_standard_asks():
    assert as_vtt(FOUND).startswith("WEBVTT\n\n00:00:00.192 --> 00:00:01.344\nhow is your car\n\n")


def test_an_empty_transcript():
    nothing = Transcript("", (), 1.0)
    assert (as_text(nothing), as_srt(nothing), as_vtt(nothing)) == ("\n", "", "WEBVTT\n")
    assert json.loads(as_json(nothing)) == {"text": "", "duration": 1.0, "segments": []}


def test_json_says_why_a_piece_was_cut():
    read = json.loads(as_json(FOUND))
    assert read["segments"][0] == {"start": 0.192, "end": 1.344, "text": "how is your car"}
    assert read["segments"][-1]["finish_reason"] == "length"
    assert "你好" in as_json(FOUND)


def test_tsv_has_a_row_a_segment():
    rows = list(csv.reader(as_tsv(FOUND).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows[0] == ["start", "end", "text"]
    assert [row[:2] for row in rows[1:]] == [
        ["192", "1344"],
        ["60000", "61500"],
        ["10801250", "10802000"],
    ]


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["how is", "your car"], "how is your car"),
        (["你好。", "很好"], "你好。很好"),
        (["你好", "hello", "再见"], "你好hello再见"),
        (["안녕", "하세요"], "안녕 하세요"),
        (["", "a", "", "b", ""], "a b"),
    ],
)
def test_joining(parts, whole):
    text = ""
    for part in parts:
        text = join(text, part)
    assert text == whole
