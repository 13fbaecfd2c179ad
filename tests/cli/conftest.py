"""The command line runs on the tests' threads, and with no checkpoint of the machine's own."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    # A number of threads that a command sets would stay for the tests that follow.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for name in ("MIMO_FAST_MODEL", "MIMO_FAST_CODEC"):
        monkeypatch.delenv(name, raising=False)
