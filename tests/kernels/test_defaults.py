"""Which new GPU paths run by default."""

from pathlib import Path

import pytest
import torch

from mimo_fast.kernels import defaults
from mimo_fast.kernels.defaults import ENVIRONMENT, MEASURED, NewPath, describe, enabled

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch):
    """A card of the given major compute capability, as far as the choice can see."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)

    def pretend(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))

    return pretend


@pytest.mark.parametrize("path", NewPath)
def test_the_environment_decides(monkeypatch, path):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert not enabled(path, CPU)
    monkeypatch.setenv(ENVIRONMENT, "1")
    assert enabled(path, CPU)
    monkeypatch.setenv(ENVIRONMENT, "0")
    assert not enabled(path, CUDA)


@pytest.mark.parametrize("path", NewPath)
def test_a_path_is_on_where_it_was_measured(on_gpu, path):
    for major in (8, 9, 10, 12):
        on_gpu(major)
        assert enabled(path, CUDA) == (major in MEASURED[path])


def test_every_measurement_is_committed():
    for files in MEASURED.values():
        for file in files.values():
            assert (RESULTS / file).is_file()


def test_a_line_a_path_says_why(on_gpu, monkeypatch):
    on_gpu(9)
    lines = list(describe(CUDA))
    assert len(lines) == len(NewPath)
    assert lines[0] == "prompts as CUDA graphs: on (measured in 2026-11-28-h100-prompts.json)"
    assert lines[-1].endswith(": off (no GPU of this family has shown it right and faster)")
    monkeypatch.setenv(defaults.ENVIRONMENT, "1")
    assert all(": on (MIMO_FAST_EXPERIMENTAL asks for it)" in line for line in describe(CUDA))


def test_a_path_that_a_device_refuses_is_off(on_gpu, monkeypatch):
    on_gpu(9)
    path, asked = NewPath.ENGINE, list[torch.device]()

    def refuses(device: torch.device) -> str:
        asked.append(device)
        return "it cannot"

    for given in ({}, {path: refuses}):
        assert f"{path.value}: off (no GPU" in "\n".join(describe(CUDA, given))
    assert not asked
    monkeypatch.setenv(ENVIRONMENT, "1")
    lines = list(describe(CUDA, {path: refuses}))
    assert f"{path.value}: off (MIMO_FAST_EXPERIMENTAL asks for it, but it cannot)" in lines
    assert sum(": on (" in line for line in lines) == len(NewPath) - 1
    assert f"{path.value}: on (MIMO_FAST_EXPERIMENTAL asks for it)" in list(
        describe(CUDA, {path: lambda device: ""})
    )
