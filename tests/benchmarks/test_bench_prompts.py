"""The study of prompts as graphs runs through without a GPU, and notices a path that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import prompts
from mimo_fast import LM


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    small = {
        "LENGTHS": (5, 40),
        "STARTS": (0, 9),
        "LATE": (5, 70),
        "CHECKED": ((5, 0), (12, 9)),
        "EXACT": ((12, 9),),
        "USUAL": 12,
    }
    for name, value in small.items():
        monkeypatch.setattr(prompts, name, value)
    output = tmp_path / "prompts.json"
    command = ["prompts", "--preset", "tiny", "--device", "cpu", "-o", str(output)]
    monkeypatch.setattr("sys.argv", command)

    def run() -> dict[str, Any]:
        prompts.main()
        return json.loads(output.read_text())

    return run


def test_every_part_is_measured(run) -> None:
    found = run()
    parts = {"capture", "check", "times", "exact", "kernels", "settings", "products"}
    assert parts <= set(found)
    assert not any("error" in found[part] for part in parts)
    *rows, last = found["check"]
    assert all(row["hidden"] < 0.01 and row["same token"] for row in rows)
    assert all(row["nothing beyond"] and row["length right"] for row in rows)
    assert last["same bits in any slot and order"]
    assert all(row["accepted"] for row in found["exact"])
    assert len(found["times"]) == 5


@pytest.mark.slow
def test_a_wrong_prompt_is_seen(run, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = LM.prefill_padded

    def one_too_late(self: LM, ids, place, state):
        return padded(self, ids, place + torch.tensor([0, 1, 0]), state)

    monkeypatch.setattr(LM, "prefill_padded", one_too_late)
    found = run()
    assert not any(row.get("length right") for row in found["check"])
    assert not all(row["accepted"] for row in found["exact"])
