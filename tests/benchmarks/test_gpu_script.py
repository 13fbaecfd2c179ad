"""benchmarks/gpu.sh: every part is a command that exists, a second call goes on where the first
ended, failures are named last. A program in the interpreter's place notes what would run; two parts
run on this CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import parser
from benchmarks.kernel_cache import pack, unpack
from benchmarks.ops import select
from benchmarks.records import read_records, study_records

ROOT = Path(__file__).parents[2]
GPU_ONLY = {"tests-kernels", "tests-model", "baseline-compiled", "profile-bf16"}
GPU_ONLY |= {"e2e-int8-bf16", "tasks-int8-bf16", "engine-costs"}
MEASURED = {"profile-int4", "e2e-int4", "requests-int4", "tasks-int4", "energy-int4", "e2e-wide"}
MEASURED |= {"ops-products", "ops-others", "baseline-eager"}

NOTES = """#!/usr/bin/env bash
[[ $1 == - ]] && { [[ $2 == c* ]] && echo a-card; exit 0; }
[[ $1 == -c ]] && exit 1
echo "$*" >>"$(dirname "$0")/noted"
[[ $* != *${WRONG:-none}* ]] || exit 3
"""


def script(out: Path, *parts: str, **variables: str) -> tuple[int, dict[str, str], str]:
    """(exit code, what became of each part, the last line)."""
    environment = os.environ | {"OUT": str(out), "TRITON_CACHE_DIR": str(out / "triton")}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", *parts],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    fates = dict(line.split(maxsplit=1) for line in lines if line and not line[0].isspace())
    return done.returncode, fates, (done.stderr.strip().splitlines() or lines)[-1]


@pytest.fixture
def noting(tmp_path: Path) -> str:
    """A program that notes what it would run, in `noted` beside it."""
    program = tmp_path / "python"
    program.write_text(NOTES)
    program.chmod(0o755)
    return str(program)


def test_every_part_is_a_command_that_exists(tmp_path: Path, noting: str) -> None:
    gpu_fates: dict[str, str] = {}
    for device, wanted in (("cuda", MEASURED | GPU_ONLY), ("cpu", MEASURED)):
        code, fates, last = script(tmp_path / device, PYTHON=noting, DEVICE=device)
        assert code == 0
        assert last.startswith("all is well after")
        assert {name for name in MEASURED | GPU_ONLY if fates[name].startswith("ok, ")} == wanted
        assert fates["native"] == "skipped: is built already"
        gpu_fates = fates if device == "cuda" else gpu_fates
    lines = (tmp_path / "noted").read_text().splitlines()
    commands = [line.split()[2:] for line in lines if line.startswith("-m benchmarks ")]
    # Both calls end in what README quotes.
    ends = [command for command in commands if command[0] == "report"]
    assert [command[:2] for command in ends] == 2 * [["report", "--figures"]]
    assert commands[-1] in ends
    commands = [command for command in commands if command[0] != "report"]
    assert len(commands) == 2 * len(MEASURED | GPU_ONLY) - len(GPU_ONLY) - 2
    for command in commands:
        args = parser().parse_args(command)
        if command[0] == "ops":
            assert select(args.op, args.m, args.format, quick=args.quick)
    # After the tests what the engine's cost model is calibrated by, then what no GPU has run; each
    # study writes where it is told.
    parts = [name for name, fate in gpu_fates.items() if fate.startswith("ok, ")]
    first = [name for name in parts if gpu_fates[name].endswith(", the first time on a GPU")]
    assert parts[2 : 3 + len(first)] == ["engine-micro", *first]
    assert parts[3 + len(first)] == "engine-costs"
    assert first == ["study-engine", "study-turns", "study-row_tiles", "study-gemm"]
    studies = [name.removeprefix("study-") for name in parts if name.startswith("study-")]
    assert {"engine", "overlap", "products"} <= {*studies}
    for name in studies:
        assert '"--out' in (ROOT / "benchmarks" / "studies" / f"{name}.py").read_text()
    code, listed, _ = script(tmp_path, "--list", PYTHON=noting)
    assert code == 0
    new = {name for name, about in listed.items() if about.endswith(", no GPU has run it")}
    assert new == {*first}
    tests = [line for line in lines if line.startswith("-m pytest")]
    kernels, model = ({Path(word).name for word in line.split()} for line in tests)
    assert "test_gpu_kernels.py" in kernels
    # Every file with tests of a GPU, and one that is about nothing else.
    marked = {
        path.name
        for path in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.gpu" in path.read_text()
    }
    assert marked | {"test_gpu.py"} <= kernels | model


@pytest.mark.slow
def test_two_calls_on_this_cpu(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    here = {"PYTHON": sys.executable, "DEVICE": "cpu", "PRESET": "tiny", "OMP_NUM_THREADS": "1"}
    others = " ".join(MEASURED - {"ops-others", "profile-int4"})
    code, fates, _ = script(first, "ops-others", **here)
    assert (code, [*fates][:1]) == (0, ["ops-others"])
    code, fates, _ = script(second, EARLIER=str(first), SKIP=f"native study-turns {others}", **here)
    log = "".join(path.read_text() for path in second.glob("*.log"))
    assert code == 0, f"{fates}\n{log[-3000:]}"
    assert {fates[name] for name in GPU_ONLY} == {"skipped: needs a CUDA device"}
    assert fates["native"] == "skipped: SKIP names it"
    assert fates["ops-others"].startswith("skipped: done before, on cpu in ")
    assert fates["profile-int4"].startswith("ok, ")
    for call, (folder, kind) in enumerate(((first, "op"), (second, "profile")), 1):
        (path,) = folder.glob("*.jsonl")
        assert path.name[4] == path.name[7] == "-"
        assert path.name[10:] == f"-cpu-{call}.jsonl"
        for record in read_records(path):
            assert record["kind"] == kind
            assert record["environment"]["device"]["type"] == "cpu"


def test_parts_that_fail_are_named_and_the_others_run(tmp_path: Path, noting: str) -> None:
    wrong = ["e2e-int4", "requests-int4", "energy-int4", "tasks-int4", "e2e-wide"]
    code, fates, last = script(tmp_path, PYTHON=noting, DEVICE="cpu", WRONG="benchmarks e2e")
    assert code == 1
    assert {name for name in MEASURED if fates[name].startswith("FAILED: exit code 3")} == {*wrong}
    assert fates["ops-others"].startswith("ok, ")
    assert set(last.partition("s: ")[2].split()) == {*wrong}
    # What failed is not done, and runs again; what is done runs where it is forced or named.
    code, fates, last = script(tmp_path, PYTHON=noting, DEVICE="cpu")
    assert code == 0
    again = {name for name in MEASURED if fates[name].startswith("ok, ")}
    assert again == {*wrong}
    code, fates, last = script(tmp_path, PYTHON=noting, DEVICE="cpu", FORCE="1")
    assert all(fates[name].startswith("ok, ") for name in MEASURED)
    code, fates, last = script(tmp_path, "ops-others", PYTHON=noting, DEVICE="cpu")
    assert [name for name in MEASURED if name in fates] == ["ops-others"]


def test_without_time_it_says_so(tmp_path: Path, noting: str) -> None:
    code, fates, _ = script(tmp_path, PYTHON=noting, LIMIT="1")
    assert code == 0
    late = {fates[name] for name in MEASURED | GPU_ONLY}
    assert all(fate.startswith("left for the next call: it takes about") for fate in late)


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (["--help"], 0, "OUT      folder for results [benchmarks/results]"),
        (["--list"], 0, "baseline-compiled  about 60 s"),
        (["--lst"], 2, "gpu.sh: no option --lst; see --help"),
        (["e2e-int3"], 2, "gpu.sh: no part e2e-int3; see --list"),
    ],
)
def test_usage(tmp_path: Path, noting: str, arguments: list[str], code: int, printed: str) -> None:
    environment = os.environ | {"PYTHON": noting, "OUT": str(tmp_path), "DEVICE": "cpu"}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert printed in done.stdout + done.stderr


def test_one_command_prepares_library_and_kernels(tmp_path: Path, noting: str) -> None:
    code, _, last = script(tmp_path, "--prepare", "90", "120", PYTHON=noting)
    assert code == 0
    assert last.startswith(
        "prepared: mimo_fast/libmimo_fast_cuda.so, benchmarks/studies/libmicro.so"
    )
    assert (tmp_path / "noted").read_text().splitlines() == [
        "setup.py build_ext --inplace",
        "-m benchmarks.studies.engine --build",
        "-m benchmarks.kernel_cache compile 90 120",
        f"-m benchmarks.kernel_cache pack {tmp_path}",
    ]
    code, _, last = script(tmp_path, "--prepare", PYTHON=noting, WRONG="build_ext")
    assert (code, last) == (1, "gpu.sh: the library was not built")


def test_kernels_are_compiled_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from benchmarks import compile_matrix, kernel_cache

    compiled = []
    monkeypatch.setattr(compile_matrix, "compile_case", lambda *case: compiled.append(case))
    count = len(list(compile_matrix.cases()))
    assert kernel_cache.compile_for([90, 120]) == 2 * count == len(compiled)
    assert {architecture for _, architecture in compiled} == {90, 120}


def test_a_missing_gpu_is_one_line(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, fates, last = script(tmp_path, PYTHON=sys.executable)
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
