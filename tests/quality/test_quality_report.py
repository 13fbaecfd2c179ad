"""The report's forms, made again of nano's committed figures."""

import copy
import re

import pytest
from test_by_hand import REPORT

from mimo_fast.quality.plots import draw
from mimo_fast.quality.report import markdown

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def report():
    return copy.deepcopy(REPORT)


def test_all_pictures_are_drawn_and_shown(report, tmp_path):
    names = draw(report, tmp_path)
    assert names == ["losses.png", "speed.png", "heads.png"]
    for name in names:
        data = (tmp_path / name).read_bytes()
        assert data.startswith(PNG)
        # Hundreds of pixels wide and high.
        assert all(200 < int.from_bytes(data[i : i + 4]) < 3000 for i in (16, 20))
    text = markdown(report, names)
    assert [f"({name})" in text for name in names] == [True] * 3
    assert "](losses.png)" not in markdown(report, [])


def test_the_report_has_every_figure(report):
    text = markdown(report, [])
    assert report["advice"]["sentence"] in text
    for each in report["formats"].values():
        assert f"{100 * each['hearing']['rate']:.2f}%" in text
        assert f"{each['speed']['real_time_factor']:.3f}" in text
        for head in each.get("heads", ()):
            assert f"| {head['kl']:.5f} | {100 * head['agreement']:.2f}% |" in text
    for text_said in report["texts"]:
        assert f"| {text_said} |" in text
    # Every table has as many cells in each row as in its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" | ") for line in table.splitlines()}) == 1


def test_what_was_not_measured_is_called_so(report, tmp_path):
    for each in report["formats"].values():
        for name in ("voice", "sound", "hearing", "speech", "heads"):
            each.pop(name, None)
        each.update(losses={}, speed={})
    report["codecs"] = {"int8": None, "round_trips": {}}
    report.update(streaming=None, texts=[], voices=[], recordings=[])
    report["not_measured"] = {"sound": "DNSMOS needs the package requests: pip install it"}
    assert draw(report, tmp_path) == ["speed.png"]
    text = markdown(report, ["speed.png"])
    assert "| sound | DNSMOS needs the package requests" in text
    assert text.count("not measured") >= 10


def test_words_that_look_like_markdown_are_words(report):
    report["formats"]["int8"]["speech"]["heard"][0] = "a | b [c](d)\ne"
    assert "a \\| b \\[c\\](d) e" in markdown(report, [])
