"""The study of first audio, on the tiny preset: how many groups come before it, not how long."""

from pathlib import Path

from benchmarks.studies.first_audio import first_audio, scheduled
from mimo_fast.checkpoint.initialize import init_checkpoint


def test_elastic_replies_are_heard_after_two_groups_where_it_was_eleven(tmp_path: Path) -> None:
    init_checkpoint(tmp_path, "tiny", progress=False)
    found = first_audio(scheduled(tmp_path), "It begins to speak.", rounds=1, most=None)
    groups = {name: found[name]["groups_before_audio"] for name in ("exact", "elastic", "known")}
    assert groups == {"exact": 11, "elastic": 2, "known": 2}
    assert found["share"]["exact"] == 1
    assert all(found[name]["least_ms"] <= found[name]["most_ms"] for name in groups)
