"""Some of the page's endurance run: it talks, interrupts, counts, and nothing fails."""

import argparse
import json

from benchmarks.page import ALLOWED, Talk, new_record, problems, verdict, wear


def test_some_seconds_of_it_count_everything(browser, nano, microphone, capsys):
    kept = list[str]()
    args = argparse.Namespace(talk=12.0, parts=2, again=1)
    record = new_record(args)
    # In the browser and against the server of the other tests: an hour has its own.
    wear(Talk(browser, nano), args, record, lambda: kept.append(json.dumps(record)))
    assert problems(record) == []
    assert record["talk_s"] >= 12
    assert record["replies"] > record["interrupted"] > 0
    assert len(record["calm"]) == 3
    assert len(record["again"]) == 1
    assert all(set(each) == {"at_s", *ALLOWED} for each in (*record["calm"], *record["again"]))
    # It is kept after each part, and progress is told.
    assert [len(json.loads(each)["calm"]) for each in kept] == [1, 2, 3, 3]
    assert capsys.readouterr().err.count(" s of talk in ") == 3
    # An hour of it is judged; seconds are not enough.
    assert verdict(record).startswith("too short")
