"""The table and its files: figures, what is published beside them, what was not measured."""

import json
from dataclasses import replace

import pytest

from mimo_fast.evaluation.items import Answer, Item, Options
from mimo_fast.evaluation.rates import Words
from mimo_fast.evaluation.report import (
    EVALUATED,
    RELEASED,
    markdown_of,
    report_of,
    rows_of,
    table_of,
    write_report,
)
from mimo_fast.evaluation.run import Asked, Evaluation, Measured
from mimo_fast.evaluation.sets import SETS

ABOUT = {
    "split": "en",
    "task": "tts_sft",
    "model": "0123",
    "codec": "4567",
    "format": None,
    "dtype": "float32",
    "seed": 3,
    "sampled": False,
    "max_new_tokens": 9,
}


def evaluation(name="seedtts", split="en", heard=("a b", "a x"), mode="plain", **how):
    asked = Asked(SETS[name], split, Options(mode=mode), **how)
    words = Words("en", heard=True)
    answers, found = [], []
    for i, text in enumerate(heard):
        kind = {"instruction": ("APS", "DSD")[i]}
        item = Item(str(i), {}, {"text": "a b", "language": "en"}, kind)
        answers.append(Answer(item, seconds=1.5, error="it broke" if text is None else None))
        hypothesis = text or ""
        found.append((answers[-1], {"reference": "a b", "hypothesis": hypothesis}))
    return Evaluation(asked, ABOUT, answers, [Measured(words, found)])


def report(tools=None, limit=None, **how):
    return report_of(evaluation(**how), tools or {"recogniser": "own:ears"}, "cpu", limit)


def test_published_scores_are_beside():
    rows = rows_of(report())
    assert rows[0] == (
        "WER, mean of utterances",
        "25.00%",
        "2",
        "5.37% MiMo-Audio-7B-Instruct (technical report, table 9)",
    )
    assert rows[1] == ("WER, corpus", "25.00%", "2", "")


@pytest.mark.parametrize("how", [{"mode": "voice"}, {"name": "librispeech", "split": "test_other"}])
def test_where_nothing_is_published_it_says_so(how):
    found = report(**how)
    assert all(not each[3] for each in rows_of(found))
    assert "no published score is known of this split" in table_of(found)


def test_groups_are_counted_apart():
    rows = rows_of(report())
    assert rows[2] == ("  APS: WER, mean of utterances", "0.00%", "1", "")
    assert rows[4] == ("  DSD: WER, mean of utterances", "50.00%", "1", "")


def test_what_was_not_measured_names_its_option():
    bare = evaluation()
    measured = [Measured(Words("en", heard=True), (), frozenset({"recogniser"}))]
    found = report_of(replace(bare, measured=measured), {}, "cpu")
    assert rows_of(found) == [("words heard", "not measured: give --recogniser", "", "")]


def test_remarks():
    text = table_of(report(heard=("a b", None), limit=2))
    assert "Seed-TTS-Eval, en: the first 2 items" in text
    assert "weights: the checkpoint's own, float32; seed 3, at most 9 groups a reply" in text
    assert "1 items failed and count as wrong, the first: 1: it broke" in text
    assert RELEASED in text
    assert EVALUATED in table_of(report(as_evaluated=True))
    assert "by the model itself" in table_of(report({"recogniser": "self"}))
    assert report({"recogniser": "a:b", "judge": "c:d"})["tools"] == {"recogniser": "a:b"}
    partly = evaluation()
    failed = replace(partly.measured[0], failed=["no answer", "nor here"])
    text = table_of(report_of(replace(partly, measured=[failed]), {}, "cpu"))
    assert "words heard: 2 answers were not measured, the first: no answer" in text


def test_files(tmp_path):
    found = report()
    write_report(tmp_path, found)
    known = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert known["figures"]["WER, corpus"]["value"] == 25
    assert known["groups"]["instruction"]["DSD"]["WER, corpus"]["value"] == 50
    assert known["environment"]["packages"]["mimo-fast"]
    assert known["tools"] == {"recogniser": "own:ears"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == markdown_of(found)
    assert "| WER, corpus | 25.00% | 2 |  |" in text
    assert text.startswith("# Seed-TTS-Eval, en\n")


def test_published_scores_are_of_known_figures():
    """Each stands in the row of a figure that its set measures, in one of its splits."""
    for chosen in SETS.values():
        for each in chosen.published:
            assert each.split is None or each.split in chosen.splits, each
            assert each.source, each
