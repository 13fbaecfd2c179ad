"""What `/metrics` shows, in Prometheus' form."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from time import perf_counter

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.requests import Request
from starlette.responses import Response

MOMENTS = (0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Bounds of buckets for waiting times, in seconds."""

FACTORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.5, 2, 4)
DURATIONS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters and histograms of one server.

    The compute thread and the event loop may both add to them.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "mimo_fast_requests", "Requests answered", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "mimo_fast_request_seconds",
            "From a request to the end of its answer",
            ["endpoint"],
            buckets=DURATIONS,
            registry=registry,
        )
        self._errors = Counter(
            "mimo_fast_errors", "Errors by their code", ["code"], registry=registry
        )
        self._waited = Histogram(
            "mimo_fast_queue_seconds",
            "Time that a request waited for its place",
            buckets=MOMENTS,
            registry=registry,
        )
        self._first = Histogram(
            "mimo_fast_first_audio_seconds",
            "From asking for speech to its first audio",
            buckets=MOMENTS,
            registry=registry,
        )
        self._turn = Histogram(
            "mimo_fast_turn_first_audio_seconds",
            "From the end of a turn, as declared, to the first audio of its reply",
            buckets=MOMENTS,
            registry=registry,
        )
        self._gaps = Histogram(
            "mimo_fast_chunk_gap_seconds",
            "Silence that a listener would have heard between two chunks",
            buckets=(0, *MOMENTS),
            registry=registry,
        )
        self._factors = Histogram(
            "mimo_fast_real_time_factor",
            "Time to make a stream of speech, over its duration",
            buckets=FACTORS,
            registry=registry,
        )
        self._audio = Counter(
            "mimo_fast_audio_seconds", "Seconds of speech made", registry=registry
        )

    def show(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is asked for when it is shown."""
        Gauge(f"mimo_fast_{name}", help, registry=self.registry).set_function(value)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def failed(self, code: str | None) -> None:
        self._errors.labels(code or "unknown").inc()

    def waited(self, seconds: float) -> None:
        """A request has got its place."""
        self._waited.observe(seconds)

    def turn(self, first_audio: float) -> None:
        """A spoken turn was answered; interrupted ones are not counted."""
        self._turn.observe(first_audio)

    def speech(self) -> SpeechMeter:
        """Follows one stream of speech from when it was asked for."""
        return SpeechMeter(self)


class SpeechMeter:
    """First audio, gaps and real-time factor of one stream of speech."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._begun = metrics, perf_counter()
        self._dry: float | None = None
        self._seconds = 0.0

    def heard(self, seconds: float, hungry: bool = True) -> None:
        """A chunk with so much audio was made; `hungry`: its reader had nothing else to read."""
        now = perf_counter()
        if self._dry is None:
            self._metrics._first.observe(now - self._begun)
        else:
            self._metrics._gaps.observe(max(0.0, now - self._dry) if hungry else 0.0)
        self._dry = max(self._dry or 0.0, now) + seconds
        self._seconds += seconds
        self._metrics._audio.inc(seconds)

    def ended(self) -> None:
        """Nothing follows."""
        if self._seconds:
            self._metrics._factors.observe((perf_counter() - self._begun) / self._seconds)


def threads() -> float:
    return float(threading.active_count())


def merged(texts: Iterable[tuple[str, str]]) -> str:
    """Metrics of several replicas in one text: each sample has the label `replica`."""
    heads = dict[str, list[str]]()
    samples = dict[str, list[str]]()
    for tag, text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                _, kind, name, *_rest = line.split(" ", 3)
                if kind == "HELP":
                    family = name
                known = heads.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line:
                name, value = line.rsplit(" ", 1)
                bare, _, labels = name.rstrip("}").partition("{")
                labelled = ",".join(filter(None, (f'replica="{tag}"', labels)))
                samples.setdefault(family, []).append(f"{bare}{{{labelled}}} {value}")
    lines = (line for family in heads for line in (*heads[family], *samples.get(family, ())))
    return "".join(f"{line}\n" for line in lines)


async def show_metrics(request: Request) -> Response:
    """`GET /metrics`."""
    found = generate_latest(request.app.state.metrics.registry)
    return Response(found, headers={"Content-Type": CONTENT_TYPE_LATEST})
