"""Clients that are killed in the middle of something leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Serve
from servers import Running, until

from benchmarks.serving_leaver import STATES
from mimo_fast.server.service import Service

ROOT = Path(__file__).parents[2]

STEPS = 4
"""Steps of the model that may begin after a client was killed: the one in progress is one of them,
and the event loop may have to wait for its turn beside the compute thread."""


@pytest.fixture(scope="module")
def speech(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody who speaks, 16-bit PCM at 24 kHz."""
    wav = service.model.tts("what is three plus four", seed=1).audio
    file = tmp_path_factory.mktemp("leaving") / "speech.pcm"
    file.write_bytes((wav.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())
    return file


def held(server: Running) -> tuple[int, ...]:
    """What clients hold of a server: places, streams of the model, slots of its engine."""
    state = server.app.state
    streams = state.service.worker.streams
    return state.sessions.taken, state.requests.taken, state.requests.waiting, streams


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("busy_for", [0.0, 0.3])
def test_a_killed_client_is_gone_after_the_step_in_progress(
    serve: Serve, service: Service, speech: Path, state: str, busy_for: float
) -> None:
    server = serve()
    command = [sys.executable, "-m", "benchmarks.serving_leaver", state, server.url, str(speech)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as client:
        assert client.stdout.readline() == b"here\n"
        import time
        time.sleep(busy_for)
        h=held(server)
        client.kill()
        client.wait()
        before = service.worker.steps
        took = until(lambda: not any(held(server)))
        print(state, h, service.worker.steps - before, took)
