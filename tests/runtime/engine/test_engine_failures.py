"""Rows that fail between others: each error ends its own reply, names its cause, and loses nothing
of the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from replies import CAPACITY, drawn
from torch import Tensor

from mimo_fast import LM
from mimo_fast.errors import BusyError, DeviceMemoryError
from mimo_fast.runtime.engine.engine import Engine


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int], None]:
    """Makes every step that a slot takes part in fail."""

    def arm(error: BaseException, slot: int) -> None:
        step = LM.step

        def failing(lm: LM, state: Any, slots: Tensor) -> None:
            step(lm, state, slots)
            if slot in slots.tolist():
                raise error

        monkeypatch.setattr(LM, "step", failing)

    return arm


def test_a_row_that_fails_leaves_the_others_alone(engine, requests, alone, broken):
    replies = [requests[i].start(engine, ahead=None) for i in (3, 4, 5)]
    firsts = [next(reply) for reply in replies]
    broken(ValueError("no such thing"), replies[1]._request.row.slot)
    with pytest.raises(ValueError, match="no such thing"):
        list(replies[1])
    for i, number in ((0, 3), (2, 5)):
        assert drawn([firsts[i], *replies[i]]) == alone[number]
    assert not engine._requests


def test_memory_running_out_says_what_to_do(engine, requests, broken):
    reply = requests[5].start(engine)
    next(reply)
    broken(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        reply._request.row.slot,
    )
    with pytest.raises(
        DeviceMemoryError, match=r"Tried to allocate 2 GiB\): lower max_batch or max_seq_len"
    ):
        list(reply)


def test_an_error_in_a_prompt_is_that_reply_s_own(engine, requests, alone, monkeypatch):
    other = requests[5].start(engine, ahead=None)
    first, prefill = next(other), LM.prefill
    monkeypatch.setattr(
        LM, "prefill", lambda *_: (_ for _ in ()).throw(RuntimeError("device lost"))
    )
    reply = requests[0].start(engine)
    with pytest.raises(RuntimeError, match="device lost"):
        reply.prefill()
    assert list(reply) == []
    monkeypatch.setattr(LM, "prefill", prefill)
    assert drawn([first, *other]) == alone[5]


def test_an_interrupt_in_the_middle_of_a_group_loses_nothing(engine, requests, alone, monkeypatch):
    """Ctrl-C comes to whoever does the work; the others go on where they were."""
    interrupted, other = (
        requests[3].start(engine, ahead=None),
        requests[5].start(engine, ahead=None),
    )
    before, first = [next(interrupted)], next(other)
    with monkeypatch.context() as patch:
        step = LM.step

        def failing(lm: LM, state: Any, slots: Tensor) -> None:
            step(lm, state, slots)
            raise KeyboardInterrupt

        patch.setattr(LM, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            before.extend(interrupted)
    assert drawn([first, *other]) == alone[5]
    assert drawn([*before, *interrupted]) == alone[3]


def test_a_hook_that_fails_ends_its_own_reply(engine, requests, alone):
    def hook(text: int, codes: Tensor) -> bool:
        raise ConnectionError("the client went away")

    failing, other = (
        requests[4].start(engine, stop_hook=hook, ahead=None),
        requests[5].start(engine),
    )
    with pytest.raises(ConnectionError, match="went away"):
        list(failing)
    assert drawn(list(other)) == alone[5]


def test_a_full_queue_says_so(model, requests):
    engine = Engine(model.lm, 1, CAPACITY, queue=2)
    running = requests[5].start(engine, ahead=None)
    next(running)
    waiting = [requests[4].start(engine) for _ in range(2)]
    with pytest.raises(BusyError, match="1 replies are running and 2 wait: try again later"):
        requests[3].start(engine)
    waiting[0].close()
    requests[3].start(engine).close()
