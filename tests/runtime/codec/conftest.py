"""Fixtures of the codec's tests."""

import pytest
from helpers import write_pair
from torch import Tensor

import mimo_fast
from mimo_fast import Codec
from mimo_fast.testing.parity import Golden


@pytest.fixture(scope="session")
def stream_codes(golden: Golden) -> Tensor:
    """Codes of a recording [8, 182]."""
    return golden.get("codec:stream_codes")


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """A codec whose vocoder looks as far ahead as the published one: 16 layers of 10 frames."""
    lm, codec = write_pair(tmp_path_factory.mktemp("deep"), {}, {"vocoder_num_layers": 16})
    return mimo_fast.load(lm, codec, device="cpu").codec
