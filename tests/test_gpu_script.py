"""benchmarks/gpu.sh on a CPU: every part runs or is skipped by name, results are written, failures
are named last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.records import read_records

ROOT = Path(__file__).parent.parent
GPU_ONLY = ["tests", "e2e-int8-bf16", "profile-bf16", "baseline-compiled"]
MEASURED = ["ops-products", "e2e-int4", "profile-int4", "baseline-eager", "ops-others", "e2e-wide"]


def script(out: Path, **variables: str) -> tuple[int, dict[str, str], str]:
    """(exit code, what became of each part, the last line)."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OUT": str(out),
        "SKIP": "native",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh"],
        cwd=out,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    fates = dict(line.split(maxsplit=1) for line in lines if line and not line[0].isspace())
    return done.returncode, fates, (lines or [done.stderr.strip()])[-1]


def test_rehearsal_on_a_cpu(tmp_path: Path) -> None:
    code, fates, last = script(tmp_path, DEVICE="cpu", PRESET="tiny")
    log = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert code == 0, f"{fates}\n{log[-3000:]}"
    assert last.startswith("all is well after")
    assert fates["native"].startswith("skipped")
    assert {fates[name] for name in GPU_ONLY} == {"skipped: needs a CUDA device"}
    assert all(fates[name].startswith("ok, ") for name in MEASURED)
    kinds = {}
    for path in tmp_path.glob("*.jsonl"):
        assert path.name[4] == path.name[7] == "-"
        assert path.name[10:].startswith("-cpu-")
        for record in read_records(path):
            kinds.setdefault(path.stem.rpartition("-")[2], set()).add(record["kind"])
            assert record["environment"]["device"]["type"] == "cpu"
    assert kinds == {
        "ops": {"op"},
        "e2e": {"groups", "request"},
        "profile": {"profile"},
        "baselines": {"baseline"},
    }


def test_parts_that_fail_are_named_and_the_others_run(tmp_path: Path) -> None:
    left_out = "native ops-others profile-int4 baseline-eager"
    code, fates, last = script(tmp_path, DEVICE="cpu", PRESET="none-such", SKIP=left_out)
    wrong = ["e2e-int4", "e2e-wide"]
    assert code == 1
    assert all(fates[name].startswith("FAILED: exit code 2") for name in wrong)
    assert fates["ops-products"].startswith("ok, ")
    assert fates["ops-others"] == "skipped: SKIP names it"
    assert last.endswith(f"s: {' '.join(wrong)}")


def test_without_time_or_device_it_says_so(tmp_path: Path) -> None:
    code, fates, _ = script(tmp_path, DEVICE="cpu", LIMIT="1")
    assert code == 0
    assert {fates[name] for name in MEASURED} == {"skipped: no time left"}


def test_a_missing_gpu_is_one_line(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, fates, last = script(tmp_path)
    assert (code, fates) == (2, {})
    assert last == "no CUDA device here; DEVICE=cpu PRESET=tiny rehearses without one"
