"""The study of the persistent engine on its CPU build, at sizes that a CPU runs: what a GPU is to
measure is checked, timed and recorded as it is there."""

import ctypes
import json
from dataclasses import replace

import pytest
import torch
from emulated import HEADERS, SOURCES, compiled_once

from benchmarks.studies import engine as whole
from benchmarks.studies import engine_launches as study
from benchmarks.studies import engine_micro as micro
from benchmarks.studies.engine_launches import PIECES, Subject
from mimo_fast.bench.synthetic import preset_configs
from mimo_fast.config import LMConfig, TransformerConfig
from mimo_fast.kernels.cuda.engine_launch import Grid, declared

THREADS = 64


def small_config() -> LMConfig:
    """Of whole blocks of 128 columns."""
    local = TransformerConfig(128, 1, 8, 8, 16, 128, 640000.0, 1e-6)
    lm = TransformerConfig(128, 1, 4, 2, 32, 256, 640000.0, 1e-6)
    config, _ = preset_configs("tiny")
    return replace(
        config,
        vocab_size=128,
        backbone=lm,
        patch_encoder=local,
        patch_decoder=local,
        max_positions=256,
        channels=3,
        code_sizes=(17, 9, 6),
        empty_codes=(16, 8, 5),
        delays=(0, 1, 2),
    )


@pytest.fixture(scope="module")
def engine(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    return declared(emulated_cuda)


@pytest.fixture(scope="module")
def subject(engine: ctypes.CDLL) -> Subject:
    grid = Grid(3, 227 * 1024, threads=THREADS)
    sizes = {"context": 70, "capacity": 80}
    return Subject.random(
        small_config(), 4, torch.bfloat16, torch.device("cpu"), engine, grid, **sizes
    )


def passed(records: list[study.Record]) -> list[study.Record]:
    assert not [record for record in records if "failed" in record]
    json.dumps(records)
    return records


@pytest.mark.slow
def test_bits(subject: Subject) -> None:
    grids = [{"blocks": 2}, {"threads": 32}]
    found = passed([*study.check_bits(subject, grids)])
    assert [x["piece"] for x in found] == [x for x in PIECES for _ in range(2 + len(grids))]
    beside = [x for x in found if x["check"] == "the layers one by one"]
    assert beside[0]["first_alike"] >= study.ALIKE
    assert all(len(x["rms"]) == (2 if x["piece"] == "word" else 1) for x in beside[1:])


@pytest.mark.slow
def test_bits_that_differ_are_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one row's values, or the other way's, are changed."""
    run = Subject.run

    def changed(self, ways, piece, rows, **how):  # type: ignore[no-untyped-def]
        made = run(self, ways, piece, rows, **how)
        if len(rows) == 1 and rows.start == 5:
            made[0].view(-1)[0] += 1
        return made

    monkeypatch.setattr(Subject, "run", changed)
    found = [*study.check_bits(subject, [])]
    alone = [x for x in found if x["check"] == "a row alone"]
    assert [x["failed"] for x in alone] == ["rows [5] have other bits alone"] * len(PIECES)
    monkeypatch.setattr(study, "OFF", 0.0)
    off = [x for x in study.check_bits(subject, []) if x["check"] == "the layers one by one"]
    assert all(x["failed"].startswith("off by ") for x in off[1:])


@pytest.mark.slow
def test_times_clocks_and_patches_in_a_row(subject: Subject) -> None:
    found = passed([*study.times(subject, [{"depth": 4}, {"pause": 20}], rows=(1, 2))])
    assert [x["us"] > 0 for x in found] == [True] * (3 * 2 * 3 + 3)
    usual = [x for x in found if x["piece"] == "word" and x["rows"] == 2]
    assert [(x["depth"], x["pause"]) for x in usual] == [(8, 0), (4, 0), (8, 20)]
    assert {x["by"] for x in found if "by" in x} == {"layers one by one"}
    assert [x["patches"] for x in passed([*study.check_soak(subject, 10)])] == [10, 1]
    found = passed([*study.clocks(subject, rows=(1,))])
    # The CPU build has no clocks: what they are of counts.
    steps, layers = subject.lm.config.patch_steps, 1
    times = {(x["piece"], x["phase"]): x["times"] for x in found}
    assert times["patch decoder", "qkv and attention"] == layers * steps
    assert times["patch decoder", "joint"] == times["word", "text head"] == 1
    assert times["word", "attention"] == 1
    assert {x["phase"] for x in found if x["piece"] == "patch decoder"} == {
        *("joint", "qkv and attention", "out", "gate/up", "down"),
        *("code heads", "draw", "embed"),
    }


@pytest.mark.slow
def test_all_that_a_gpu_is_to_run(subject: Subject) -> None:
    found: list[study.Record] = []
    whole.measured(subject, lambda **values: found.append(values), 4, 10)
    passed(found)
    assert {x["bits"] for x in found} == {4}
    checks = [x["check"] for x in found if "check" in x]
    assert {*checks} == {
        *("a row alone", "another grid", "the layers one by one", "patches in a row"),
    }
    assert sum("us" in x for x in found) == 3 * (4 + 5 * 2 + 1)
    assert {x["piece"] for x in found if "clocks" in x} == {*PIECES}


def test_clocks_are_of_a_phase(engine: ctypes.CDLL, subject: Subject) -> None:
    tables = study.tables_of(subject.persistent(), "patch decoder")
    launch = study.Launch("", tables, subject.grid, 1)
    counted = torch.zeros(3, len(tables.phases), dtype=torch.int64)
    # Of `out`, block b has b thousand clocks in each step.
    index = [cost.name for cost in launch.steps[0]].index("out")
    counted[:, index] = torch.arange(3) * 1000 * tables.steps
    found = {x["phase"]: x["clocks"] for x in study.by_kind(launch, counted, {})}
    assert found["out"] == [1000, 0, 2000]
    assert found["down"] == [0, 0, 0]


def test_a_grid_that_does_not_fit_has_fewer_threads(subject: Subject) -> None:
    def threads(shared: int) -> int:
        own = replace(subject, grid=Grid(3, shared))
        launcher = study.launcher_of(own.persistent().backbone)
        return own.divided(launcher, "word", 8)[1][0]

    assert threads(227 * 1024) == 512 > threads(60 * 1024)
    with pytest.raises(ValueError, match="bytes of shared memory do not hold"):
        threads(1024)


@pytest.fixture(scope="module")
def exchanging(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = SOURCES / "engine" / "micro.cu"
    built = compiled_once(tmp_path_factory, "micro", [source], [HEADERS / "engine"])
    return micro.declared(ctypes.CDLL(str(built)))


@pytest.mark.parametrize(("parts", "waits", "depth"), [(2, True, 4), (0, True, 8), (3, False, 6)])
def test_phases_read_all_that_was_made_and_their_weights(
    exchanging: ctypes.CDLL, parts: int, waits: bool, depth: int
) -> None:
    blocks, threads, phases, columns = 3, 64, 5, 40 * 4
    own = micro.Phases(exchanging, torch.device("cpu"), megabytes=0.02)
    exchanging.set_seed_of_fibers(7)
    how = {"depth": depth, "blocks": blocks, "threads": threads, "phases": phases}
    launch, result = own.run(columns, parts, waits, **how)
    assert launch() == 0
    assert int(own.error) == 0
    assert torch.equal(result, wanted(own.weights, columns // 4, parts, waits, **how))


def wanted(
    weights: torch.Tensor,
    words: int,
    parts: int,
    waits: bool,
    depth: int,
    blocks: int,
    threads: int,
    phases: int,
) -> torch.Tensor:
    """Of each thread: n xor i of its words of every vector but the last; the first of each 16 bytes
    of weights that its lane has of its warp's parts, which take turns."""
    warps = threads // 32
    all_warps = blocks * warps
    pieces = weights.numel() * 4 // 1024 // all_warps * all_warps
    of_weights = weights[: pieces * 256].view(pieces, 64, 4)[:, :, 0].tolist()
    sums = []
    for block in range(blocks):
        for thread in range(threads):
            warp, lane = block * warps + thread // 32, thread % 32
            total = 0
            if waits:
                total += sum(
                    n ^ i for n in range(phases - 1) for i in range(thread, words, threads)
                )
            for turn in range(phases * parts):
                piece = of_weights[(warp + turn * all_warps) % pieces]
                total += piece[lane] + piece[32 + lane]
            sums.append((total + 2**31) % 2**32 - 2**31)
    return torch.tensor(sums, dtype=torch.int32).view(blocks, threads)
