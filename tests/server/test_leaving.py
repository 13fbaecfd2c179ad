"""Of a client that is killed nothing is computed any more; counted in steps of the model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from servers import Running, Serve, until

from benchmarks.serving_leaver import STATES
from mimo_fast.server.service import Service

ROOT = Path(__file__).parents[2]

STEPS = 3
"""Steps that may begin after a client has gone: the compute thread goes on while the event loop
waits for its turn to see it. Closing a stream is a step, too, and comes on top."""

LATEST = 30.0
"""Seconds after which something will not happen any more; the machine may be busy."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def speech(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody who speaks, 16-bit PCM at 24 kHz."""
    said = service.model.stream("tts", "what is three plus four", seed=1)
    wav = torch.cat([chunk.audio for chunk in said])
    file = tmp_path_factory.mktemp("leaving") / "speech.pcm"
    file.write_bytes((wav.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())
    return file


@contextmanager
def client(server: Running, state: str, speech: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has got into a state."""
    command = [sys.executable, "-m", "benchmarks.serving_leaver", state, server.url, str(speech)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"here\n"
            yield process
        finally:
            process.kill()


def held(server: Running) -> tuple[int, ...]:
    """Places, and streams of the model."""
    state = server.app.state
    streams = state.service.worker.streams
    return state.sessions.taken, state.requests.taken, state.requests.waiting, streams


def rests(service: Service) -> bool:
    """Whether streams wait for their readers, who have had more than they take."""
    before = service.worker.steps
    time.sleep(0.5)
    return service.worker.streams > 0 and service.worker.steps == before


@pytest.mark.parametrize("wait", [0.0, 0.3])
@pytest.mark.parametrize("state", STATES)
def test_a_killed_client_is_gone_within_some_steps(
    serve: Serve, service: Service, speech: Path, state: str, wait: float
) -> None:
    server = serve()
    with client(server, state, speech) as process:
        time.sleep(wait)
        if state == "lets pile up":
            until(lambda: rests(service), LATEST)
        process.kill()
        # The system has closed its sockets when this returns.
        process.wait()
        worker = service.worker
        before, streams = worker.steps, worker.streams
        until(lambda: not any(held(server)), LATEST)
        assert worker.steps - before <= streams + STEPS
    until(lambda: not server.server.server_state.connections, LATEST)
    assert not service.model.pipeline.engine._requests


def test_one_killed_in_the_queue_leaves_it(serve: Serve, speech: Path) -> None:
    server = serve(max_requests=1)
    places = server.app.state.requests
    with client(server, "waits", speech), client(server, "waits", speech) as second:
        until(lambda: places.waiting == 1, LATEST)
        second.kill()
        until(lambda: places.waiting == 0, LATEST)
        assert places.taken == 1
    until(lambda: not any(held(server)), LATEST)
