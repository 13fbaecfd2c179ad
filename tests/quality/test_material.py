"""Where the words of recordings come from."""

import re
import shutil

import pytest
from helpers import AUDIO

from mimo_fast.errors import EvaluationError
from mimo_fast.quality.material import read_recordings, read_words


@pytest.fixture
def recordings(tmp_path):
    for name in ("a", "b", "c"):
        shutil.copy(AUDIO, tmp_path / f"{name}.wav")
    return [tmp_path / f"{name}.wav" for name in ("a", "b", "c")]


def test_words_come_from_the_table_or_from_the_file_beside(recordings, tmp_path):
    table = tmp_path / "words.tsv"
    table.write_text("a\tseven of them\n\nb.wav\teight\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("not these\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("\ufeff nine \n", encoding="utf-8")
    assert [each.words for each in read_recordings(recordings, table)] == [
        "seven of them",
        "eight",
        "nine",
    ]
    assert [each.words for each in read_recordings(recordings)] == [None, "not these", "nine"]


def test_a_file_without_words_gives_none(recordings, tmp_path):
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    found = read_recordings(recordings[:1])[0]
    assert found.words is None
    assert found.seconds == len(found.wav) / 24000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a seven", "line 1 of words.tsv is not a recording's name, a tab and its words"),
        (b"\na\t \n", "line 2 of words.tsv"),
        (b"a\t\xff", "cannot read words.tsv: it is not UTF-8"),
        (b"d\tseven\n", "words.tsv has words of d, which is not given"),
        (None, "cannot read words.tsv: No such file or directory"),
    ],
)
def test_a_wrong_table_is_one_line(recordings, tmp_path, monkeypatch, content, problem):
    monkeypatch.chdir(tmp_path)
    table = recordings[0].with_name("words.tsv").relative_to(tmp_path)
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(EvaluationError, match=re.escape(problem)):
        read_recordings(recordings, table)


def test_names_and_words_may_hold_anything_but_tabs(tmp_path):
    table = tmp_path / "words.tsv"
    table.write_text("a b.wav\t “Ja”, he said\n", encoding="utf-8")
    assert read_words(table) == {"a b.wav": "“Ja”, he said"}
