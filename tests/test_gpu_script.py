"""benchmarks/gpu.sh on a CPU: every part runs or is skipped by name, a second call goes on where the
first ended, results are written, failures are named last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_cache import pack, unpack
from benchmarks.records import read_records, study_records

ROOT = Path(__file__).parent.parent
GPU_ONLY = ["tests-kernels", "tests-model", "baseline-compiled", "e2e-int8-bf16", "tasks-int8-bf16"]
MEASURED = ["profile-int4", "e2e-int4", "requests-int4", "tasks-int4", "energy-int4", "e2e-wide"]
MEASURED += ["ops-products", "ops-others", "baseline-eager"]


def script(out: Path, *parts: str, **variables: str) -> tuple[int, dict[str, str], str]:
    """(exit code, what became of each part, the last line)."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OUT": str(out),
        "DEVICE": "cpu",
        "PRESET": "tiny",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(out / "triton"),
    }
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", *parts],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    fates = dict(line.split(maxsplit=1) for line in lines if line and not line[0].isspace())
    return done.returncode, fates, (done.stderr.strip().splitlines() or lines)[-1]


def test_rehearsal_in_two_calls_on_a_cpu(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    code, fates, last = script(first, "ops-others", "ops-products")
    assert code == 0, fates
    assert list(fates)[:2] == ["ops-products", "ops-others"]
    assert last.startswith("all is well after")
    code, fates, last = script(second, EARLIER=str(first), SKIP="native")
    log = "".join(path.read_text() for path in second.glob("*.log"))
    assert code == 0, f"{fates}\n{log[-3000:]}"
    assert {fates[name] for name in GPU_ONLY} == {"skipped: needs a CUDA device"}
    assert fates["native"] == "skipped: SKIP names it"
    assert fates.pop("ops-products").startswith("skipped: done before, on cpu in ")
    assert fates.pop("ops-others").startswith("skipped: done before")
    assert all(fates[name].startswith("ok, ") for name in MEASURED if name in fates)
    kinds = set()
    for call, folder in enumerate((first, second), 1):
        (path,) = folder.glob("*.jsonl")
        assert path.name[4] == path.name[7] == "-"
        assert path.name[10:] == f"-cpu-{call}.jsonl"
        for record in read_records(path):
            kinds.add(record["kind"])
            assert record["environment"]["device"]["type"] == "cpu"
    assert kinds == {"op", "groups", "request", "profile", "baseline"}


def test_parts_that_fail_are_named_and_the_others_run(tmp_path: Path) -> None:
    chosen = ["e2e-int4", "ops-others", "e2e-wide"]
    code, fates, last = script(tmp_path, *chosen, PRESET="none-such")
    wrong = ["e2e-int4", "e2e-wide"]
    assert code == 1
    assert all(fates[name].startswith("FAILED: exit code 2") for name in wrong)
    assert fates["ops-others"].startswith("ok, ")
    assert last.endswith(f"s: {' '.join(wrong)}")
    assert [line.split()[0] for line in (tmp_path / "gpu-done.txt").open()] == [
        "call",
        "ops-others",
    ]


def test_without_time_or_device_it_says_so(tmp_path: Path) -> None:
    code, fates, _ = script(tmp_path, LIMIT="1", SKIP="native")
    assert code == 0
    assert all(fates[name].startswith("left for the next call: it takes") for name in MEASURED)


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (["--help"], 0, "OUT      folder for results [benchmarks/results]"),
        (["--list"], 0, "baseline-compiled  about 60 s"),
        (["--lst"], 2, "gpu.sh: no option --lst; see --help"),
        (["e2e-int3"], 2, "gpu.sh: no part e2e-int3; see --list"),
    ],
)
def test_usage(tmp_path: Path, arguments: list[str], code: int, printed: str) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "DEVICE": "cpu"}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert printed in done.stdout + done.stderr


def test_a_missing_gpu_is_one_line(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, fates, last = script(tmp_path, DEVICE="cuda")
    assert (code, fates) == (2, {})
    assert last == "no CUDA device here; DEVICE=cpu PRESET=tiny rehearses without one"


def test_compiled_kernels_travel_and_what_is_there_stays(tmp_path: Path) -> None:
    here, there, folder = (tmp_path / name for name in ("here", "there", "archives"))
    files = {"A/k.cubin": os.urandom(3000), "A/k.ptx": b"ptx" * 1000, "B/__grp__k.json": b"{}"}
    for root in (here, there, folder):
        root.mkdir()
    for name, content in files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content)
    # Archives of bounded size: here one a file.
    assert len(pack(here, folder, limit=2**16)) == len(files)
    (there / "B").mkdir()
    (there / "B" / "__grp__k.json").write_bytes(b"older")
    assert unpack(folder, there) == 2
    found = {str(path.relative_to(there)): path.read_bytes() for path in there.rglob("*.*")}
    assert found == files | {"A/k.ptx": b"", "B/__grp__k.json": b"older"}
    assert unpack(folder, there) == 0


@pytest.mark.parametrize(
    "text", ['{"us": 3,\n "environment": {"date": "d"}}', '{"us": 3}\n{"us": 4}']
)
def test_what_a_study_wrote_becomes_records(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    records = study_records("engine", tmp_path / "a.json")
    assert {record["kind"] for record in records} == {"study"}
    assert [record["result"]["us"] for record in records] == [3, 4][: len(records)]
    assert records[0].get("environment") == ({"date": "d"} if len(records) == 1 else None)
