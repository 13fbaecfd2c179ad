"""Rows that fail between others: an error ends its own reply alone and names its cause."""

import pytest
import torch
from helpers import raising, watch
from replies import CAPACITY, break_steps, drawn

from mimo_fast import LM
from mimo_fast.errors import BusyError, DeviceMemoryError
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.policy import Bounds


def test_a_row_that_fails_leaves_the_others_alone(engine, requests, alone, monkeypatch):
    replies = [requests[i].start(engine, ahead=None) for i in (3, 4, 5)]
    firsts = [next(reply) for reply in replies]
    break_steps(monkeypatch, ValueError("no such thing"), replies[1]._request.row.slot)
    with pytest.raises(ValueError, match="no such thing"):
        list(replies[1])
    for i, number in ((0, 3), (2, 5)):
        assert drawn([firsts[i], *replies[i]]) == alone[number]
    assert not engine._requests


def test_memory_running_out_says_what_to_do(engine, requests, monkeypatch):
    reply = requests[5].start(engine)
    next(reply)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
    break_steps(monkeypatch, error, reply._request.row.slot)
    advice = r"Tried to allocate 2 GiB\): lower max_batch or max_seq_len"
    with pytest.raises(DeviceMemoryError, match=advice):
        list(reply)


def test_an_error_in_a_prompt_is_that_reply_s_own(engine, requests, alone, monkeypatch):
    other = requests[5].start(engine, ahead=None)
    first, reply = next(other), requests[0].start(engine)
    with monkeypatch.context() as patch:
        patch.setattr(LM, "prefill_together", raising(RuntimeError, "device lost"))
        with pytest.raises(RuntimeError, match="device lost"):
            reply.prefill()
        assert list(reply) == []
    assert drawn([first, *other]) == alone[5]


def test_an_interrupt_in_the_middle_of_a_group_loses_nothing(engine, requests, alone, monkeypatch):
    """Ctrl-C reaches the thread that computes the group; all replies continue unchanged."""
    interrupted, other = (requests[i].start(engine, ahead=None) for i in (3, 5))
    before, first = [next(interrupted)], next(other)
    with monkeypatch.context() as patch:
        watch(patch, LM, "step", after=raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            before.extend(interrupted)
    assert drawn([first, *other]) == alone[5]
    assert drawn([*before, *interrupted]) == alone[3]


def test_a_hook_that_fails_ends_its_own_reply(engine, requests, alone):
    hook = raising(ConnectionError, "the client went away")
    failing = requests[4].start(engine, stop_hook=hook, ahead=None)
    other = requests[5].start(engine)
    with pytest.raises(ConnectionError, match="went away"):
        list(failing)
    assert drawn(list(other)) == alone[5]


def test_a_full_queue_says_so(model, requests):
    engine = Engine(model.lm, 1, CAPACITY, bounds=Bounds(queue=2))
    running = requests[5].start(engine, ahead=None)
    next(running)
    waiting = [requests[4].start(engine) for _ in range(2)]
    with pytest.raises(BusyError, match="1 replies are running and 2 wait: try again later"):
        requests[3].start(engine)
    waiting[0].close()
    requests[3].start(engine).close()
