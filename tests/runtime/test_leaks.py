"""A thousand requests of every kind, good and bad, leave memory as it was."""

import gc

import pytest
import torch
from helpers import raising
from memory import resident_memory

from mimo_fast import LM, MimoAudio, generate
from mimo_fast.runtime.engine.engine import Engine

REQUESTS, WARM = 1000, 250


@pytest.fixture
def served(model: MimoAudio, monkeypatch: pytest.MonkeyPatch):
    """request(i): the i-th of an endless mix of whole, abandoned, failing and batched requests."""
    texts = ("Hi.", "今天天气真好", "The quick brown fox.")
    prompts = [model.pack([text]).to(model.device) for text in texts]
    engine = Engine(model.lm, 2, 64)
    monkeypatch.setattr(model.pipeline, "_engine", engine)
    refuse, failing = raising(ConnectionError), raising(RuntimeError, "device lost")

    def request(i: int) -> None:
        prompt, kind = prompts[i % 3], i % 5
        if kind == 0:
            generate(model, prompt, max_new_tokens=2, seed=i)
        elif kind == 1:
            generate(model, prompts, max_new_tokens=2, seed=i)
        elif kind == 2:
            next(model.stream("tts", "Hi.", seed=i))
        elif kind == 3:
            with pytest.raises(ConnectionError):
                generate(model, prompt, stopping_criteria=[refuse], max_new_tokens=3)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(LM, "step", failing)
                with pytest.raises(RuntimeError, match="device lost"):
                    generate(model, prompt, max_new_tokens=3)

    request.engine = engine
    return request


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_requests(model, served):
    after = list[int]()
    for i in range(REQUESTS + 1):
        served(i)
        if i in (WARM, REQUESTS):
            gc.collect()
            after.append(resident_memory())
    warm, end = after
    assert end <= 1.02 * warm, f"resident memory grew from {warm / 1e6:.0f} to {end / 1e6:.0f} MB"
    assert not served.engine._requests


def test_requests_leave_no_objects_behind(model, served):
    def objects() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = list[int]()
    for block in (range(20), range(20, 40)):
        for i in block:
            served(i)
        model.clear_history()
        # Beginnings of prompts are kept on purpose, within their bound.
        served.engine.steps.prefixes.clear()
        counts.append(objects())
    assert counts[1] <= counts[0]
