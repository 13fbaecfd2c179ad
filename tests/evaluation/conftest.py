"""The small model, and a set of its words on disk."""

from pathlib import Path

import pytest
from evaluations import write_data

import mimo_fast
from mimo_fast import MimoAudio


@pytest.fixture(scope="session")
def nano() -> MimoAudio:
    return mimo_fast.load(max_batch=3, device="cpu")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("sets"))
