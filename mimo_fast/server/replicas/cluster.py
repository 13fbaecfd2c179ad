"""Starts Ray Serve with our replicas, waits, and stops it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

from mimo_fast.errors import ConfigError, MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.server.logs import log, set_up_logs
from mimo_fast.server.service import Service
from mimo_fast.server.serving import PROMPT, listen, url_of
from mimo_fast.server.settings import Settings

APPLICATION = "mimo-fast"

QUIET = {
    # Nothing is reported to anybody, and lines of the log are not summed up.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    # A replica that is promised no GPU sees those of its machine.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Ray's environment, unless it is set already."""

ALONE = {
    # Ray's own ports on 127.0.0.1: the name is of its other use, on desktops.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's workers are of niceness 15: speech would come after all else that a machine does.
    "RAY_worker_niceness": "0",
    # A busy machine starts a proxy in more than the usual 5 s, and an agent in more than 15 s.
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}
"""The same for a cluster that is this server's own."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

OBJECTS = 100 << 20
"""Bytes of Ray's object store, which sessions hardly use: their messages are small."""

PROXY_START = 300
"""Seconds that a proxy may take to begin."""

CONNECTING = 5.0
"""Seconds that a cluster's address may take to answer."""

LEAVING = 30.0
"""Seconds beyond the drain that Ray has to stop its processes."""


def serve_replicas(
    load: Callable[[], MimoAudio],
    make: Callable[[MimoAudio], Service],
    settings: Settings,
    gpus: float,
    announce: Callable[[str], None],
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        load: loads the model, in each replica; it is pickled.
        make: makes its service of it; it is pickled too.
        gpus: of each replica.
        announce: called with the address once it answers.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        MimoFastError: the cluster cannot be reached, or has not what replicas need.
    """
    with listen(settings) as bound:
        # Ray's proxy binds it itself; a port in use is found before anything is started.
        port, url = bound.getsockname()[1], url_of(bound, settings)
    for variable, value in (QUIET | ({} if settings.ray_address else ALONE)).items():
        os.environ.setdefault(variable, value)
    with Stopping() as stopping:
        ray = _connect(settings, gpus)
        # Ray has put handlers of its own in their place.
        stopping.handle()
        try:
            _run(settings, load, make, gpus, port)
            announce(url)
            stopping.wait()
        except KeyboardInterrupt:
            pass
        finally:
            stopping.leave()
            _stop(settings, stopping)
            ray.shutdown()


class Stopping:
    """Signals: before all runs they interrupt, later they are waited for.

    Attributes:
        prompt: Whether it was Ctrl-C, which leaves a moment alone.
        forced: Whether there was a second one.
    """

    def __init__(self) -> None:
        self.prompt = self.forced = False
        self._asked, self._waits = threading.Event(), False

    def __enter__(self) -> Stopping:
        self._before = {each: signal.getsignal(each) for each in SIGNALS}
        self.handle()
        return self

    def __exit__(self, *_error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def handle(self) -> None:
        for each in SIGNALS:
            signal.signal(each, self._handle)

    def wait(self) -> None:
        self._waits = True
        # With a limit, or a signal would not be seen on some systems.
        while not self._asked.wait(1.0):
            pass

    def leave(self) -> None:
        """Signals interrupt nothing any more."""
        self._waits = True
        self._asked.set()

    def _handle(self, number: int, _frame: object) -> None:
        if self._asked.is_set():
            self.forced = True
            return
        self.prompt = number == signal.SIGINT
        self._asked.set()
        if not self._waits:
            raise KeyboardInterrupt


def _check_address(address: str) -> None:
    """Raises where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        # "auto", which Ray looks up.
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise MimoFastError(
            f"--ray-address {address}: no cluster answers there ({error}); 'ray start --head' "
            "starts one"
        ) from error


def _connect(settings: Settings, gpus: float) -> Any:
    if settings.ray_address:
        # Before Ray is imported, which takes seconds.
        _check_address(settings.ray_address)
    import ray
    from ray._private import worker

    set_up_logs(settings.log_level)
    _quieten("ray")
    # Lines of replicas come as they were written, not behind the name of a process.
    worker.print_to_stdstream = as_json_lines(sys.stderr)
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECTS}
    if settings.ray_address:
        options = {"address": settings.ray_address}
    try:
        ray.init(configure_logging=False, log_to_driver=True, namespace=APPLICATION, **options)
    except Exception as error:  # of no common class
        ray.shutdown()
        problem = f"--ray-address {settings.ray_address}" if settings.ray_address else "--ray"
        raise MimoFastError(f"{problem}: {str(error).strip().splitlines()[0]:.300}") from error
    try:
        check_resources(ray, settings, gpus)
    except BaseException:
        ray.shutdown()
        raise
    return ray


def _quieten(name: str) -> None:
    """Makes a logger of Ray's write warnings as lines of our log."""
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.WARNING)


def check_resources(ray: Any, settings: Settings, gpus: float) -> None:
    """Raises where replicas would wait for ever for what this machine has not."""
    with suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        raise MimoFastError(
            "Ray Serve runs on this cluster already, with proxies that are not this server's: stop "
            "it with 'serve shutdown', or leave --ray-address out"
        )
    if settings.ray_address:
        # Its autoscaler may add machines.
        return
    found, count = ray.cluster_resources(), max(settings.replicas, settings.max_replicas)
    for kind, each, option in (
        ("CPU", settings.cpus_per_replica, "--cpus-per-replica"),
        ("GPU", gpus, "--gpus-per-replica"),
    ):
        if each * count > found.get(kind, 0) + 1e-6:
            raise ConfigError(
                f"{count} replicas with {each:g} {kind}s each need {each * count:g}; this machine "
                f"has {found.get(kind, 0):g}: lower {option} or the number of replicas"
            )


def _run(
    settings: Settings,
    load: Callable[[], MimoAudio],
    make: Callable[[MimoAudio], Service],
    gpus: float,
    port: int,
) -> None:
    from ray import serve
    from ray.serve._private import api as ray_api

    from mimo_fast.server.replicas.proxy import ProxyBounds
    from mimo_fast.server.replicas.replica import deployment

    certificate = {} if settings.ssl_certfile is None else _certificate(settings)
    environment = ProxyBounds.of(settings).variables() | {
        each: os.environ[each] for each in ALONE if each in os.environ
    }
    _quieten("ray.serve")
    # Ray waits for no longer than a minute, which a busy machine's imports alone may take.
    ray_api.HTTP_PROXY_TIMEOUT = PROXY_START
    quiet = {"encoding": "JSON", "log_level": "WARNING", "enable_access_log": False}
    serve.start(
        http_options={"host": settings.host.strip("[]"), "port": port, **certificate},
        logging_config=quiet,
        controller_options={"runtime_env": {"env_vars": environment}},
    )
    serve.run(deployment(load, make, settings, gpus), name=APPLICATION, route_prefix="/")


def _certificate(settings: Settings) -> dict[str, str]:
    return {
        "ssl_certfile": str(settings.ssl_certfile),
        "ssl_keyfile": str(settings.ssl_keyfile),
    }


def _stop(settings: Settings, stopping: Stopping) -> None:
    """Lets replicas end what runs, then stops all that was started."""
    from ray import serve

    patience = min(settings.drain_seconds, PROMPT) if stopping.prompt else settings.drain_seconds
    log("stopping", seconds=patience)
    with suppress(Exception):
        handle = serve.get_app_handle(APPLICATION)
        asked = handle.broadcast("stop", patience)
        _wait(lambda: asked.results(timeout_s=patience + LEAVING), stopping)
    with suppress(Exception):
        _wait(serve.shutdown, stopping)
    log("stopped")


def _wait(work: Callable[[], Any], stopping: Stopping) -> None:
    """Runs it in a thread, until it ends or a second signal comes."""
    thread = threading.Thread(target=_quietly, args=(work,), daemon=True)
    thread.start()
    while thread.is_alive() and not stopping.forced:
        thread.join(0.1)


def _quietly(work: Callable[[], Any]) -> None:
    with suppress(Exception):
        work()


def as_json_lines(stream: TextIO) -> Callable[..., None]:
    """What prints lines that Ray's processes have written."""

    def handle(data: Any, **_named: Any) -> None:
        # Tables of a cluster's resources, every five seconds.
        lines = () if data.get("pid") == "autoscaler" else data.get("lines", ())
        for line in lines:
            if data.get("pid") == "raylet" and "Task ServeController." in line:
                # It is told of a controller that was stopped.
                continue
            found = line
            if not line.startswith("{"):
                shown = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "level": "info",
                    "event": line,
                    "logger": "ray",
                    "pid": data.get("pid"),
                }
                found = json.dumps(shown, default=str)
            print(found, file=stream, flush=True)

    return handle
