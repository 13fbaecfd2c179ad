"""`mimo-fast serve`: the model behind the OpenAI API's speech endpoints."""

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mimo_fast.checkpoint.embedded import NAME, NANO, resolve_pair
from mimo_fast.cli.common import load_model
from mimo_fast.cli.reports import say
from mimo_fast.cli.server_options import settings_of
from mimo_fast.errors import ConfigError, MimoFastError
from mimo_fast.runtime.loading import find_device
from mimo_fast.server.settings import Settings

MISSING = (
    "the server needs more packages, of which {} is missing: install them with pip install "
    "'mimo-fast[server]'"
)

MISSING_RAY = (
    "--ray needs Ray Serve, of which {} is missing: install it with pip install 'mimo-fast[ray]'"
)

LOCAL = ("parser", "run")
"""What parsed options hold besides values."""


def run(args: argparse.Namespace) -> int:
    with ended_by_sigterm():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        settings = settings_of(args)
    except ConfigError as error:
        args.parser.error(str(error))
    try:
        # Starlette asks for it when the first form comes.
        import python_multipart  # noqa: F401

        from mimo_fast.server.app import create_app
        from mimo_fast.server.logs import set_up_logs
        from mimo_fast.server.memory import settled
        from mimo_fast.server.service import Service
        from mimo_fast.server.serving import Server, check_certificate, listen, url_of
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mimo_fast"):
            raise
        name = (error.name or "").partition(".")[0]
        raise MimoFastError(MISSING.format(name)) from error
    check_certificate(settings)
    if settings.ray:
        _serve_replicas(args, settings)
        say("stopped")
        return 0
    with listen(settings) as bound:
        url = url_of(bound, settings)
        load = partial(load_model, args, max_batch=args.streams)
        service = Service(load(), _name(args))
        try:
            set_up_logs(settings.log_level)
            app = create_app(service, settings, load)
            with settled():
                Server(app, settings, lambda: _announce(url, service.name, settings)).run([bound])
        finally:
            service.close()
    say("stopped")
    return 0


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Ends the process with 0 on SIGTERM before it serves, as when a model is loaded.

    The first process of a container has no default for that signal: it would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number: int, _frame: object) -> None:
        say("stopped")
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve_replicas(args: argparse.Namespace, settings: Settings) -> None:
    try:
        from mimo_fast.server.replicas.cluster import serve_replicas

        gpus = settings.gpus_per_replica
        if gpus < 0:
            gpus = 1.0 if find_device(args.device).type == "cuda" else 0.0
        name = _name(args)
        # A parser, and a text that knows its variable, are not for other processes.
        values = {name: value for name, value in vars(args).items() if name not in LOCAL}
        plain = {name: str(v) if isinstance(v, str) else v for name, v in values.items()}
        given = argparse.Namespace(**plain)
        load = partial(load_model, given, max_batch=args.streams)
        serve_replicas(load, name, settings, gpus, lambda url: _announce(url, name, settings))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mimo_fast"):
            raise
        raise MimoFastError(MISSING_RAY.format(error.name or "a package")) from error


def _name(args: argparse.Namespace) -> str:
    """What clients call the model: the last part of its folder or hub id."""
    if args.served_name:
        return str(args.served_name)
    lm = Path(resolve_pair(args.model, args.codec, args.published)[0])
    return NAME if lm.parent == NANO else lm.name


def _announce(url: str, name: str, settings: Settings) -> None:
    say(f"listening on {url} (OpenAI's API: {url}/v1, model {name}); Ctrl-C ends it")
    body = f'{{"model": "{name}", "voice": "alloy", "input": "good morning"}}'
    key = "" if settings.api_key is None else '-H "Authorization: Bearer $MIMO_FAST_API_KEY" '
    insecure = "" if settings.ssl_certfile is None else "-k "
    say(
        f"hear it:  curl {insecure}{url}/v1/audio/speech {key}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)} -o speech.mp3"
    )
    if settings.ssl_certfile is None and sys.stderr.isatty():
        port = url.rpartition(":")[2]
        say(
            "from another machine, whose browser gives a microphone to localhost only:  "
            f"ssh -N -L {port}:127.0.0.1:{port} THIS-MACHINE"
        )
