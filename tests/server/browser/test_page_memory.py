"""A minute of the page's endurance run: it talks, interrupts, counts, and nothing fails."""

import json
import subprocess
import sys

from benchmarks.chromium import ROOT
from benchmarks.page import ALLOWED, problems


# A thread has one Playwright: it runs in a process of its own.
def test_a_minute_of_it_counts_everything(tmp_path, playwright):
    file = tmp_path / "page.json"
    options = ["--talk", "60", "--parts", "2", "--again", "2", "-o", str(file)]
    command = [sys.executable, "-m", "benchmarks", "page", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert problems(found) == []
    assert found["talk_s"] >= 60
    assert found["replies"] > found["interrupted"] > 0
    assert len(found["calm"]) == 3
    assert len(found["again"]) == 2
    assert all(set(each) == {"at_s", *ALLOWED} for each in (*found["calm"], *found["again"]))
    # An hour of it is judged; a minute is not enough.
    assert found["verdict"].startswith("too short")
