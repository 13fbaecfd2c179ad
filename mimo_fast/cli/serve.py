"""`mimo-fast serve`: the model behind the OpenAI API's speech endpoints."""

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from mimo_fast.cli.common import adapter_of, adapters_of, load_model
from mimo_fast.cli.marking import short_name
from mimo_fast.cli.reports import say
from mimo_fast.cli.server_options import settings_of
from mimo_fast.errors import ConfigError, MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.loading import find_device
from mimo_fast.server.settings import Settings, is_loopback

MISSING = (
    "the server needs more packages, of which {} is missing: install them with pip install "
    "'mimo-fast[server]'"
)

LOCAL = ("parser", "run")
"""What parsed options hold besides values."""


def run(args: argparse.Namespace) -> int:
    try:
        settings = settings_of(args)
    except ConfigError as error:
        args.parser.error(str(error))
    # As the model's marks are, wherever it is loaded.
    args.mark = settings.mark
    try:
        # Starlette asks for it when the first form comes.
        import python_multipart  # noqa: F401

        from mimo_fast.server.app import create_app
        from mimo_fast.server.logs import set_up_logs
        from mimo_fast.server.memory import settled
        from mimo_fast.server.serving import Server, bind, check_certificate, listen, url_of
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mimo_fast"):
            raise
        name = (error.name or "").partition(".")[0]
        raise MimoFastError(MISSING.format(name)) from error
    if settings.self_signed and settings.ssl_certfile is None:
        settings = _with_certificate(settings)
    check_certificate(settings)
    if settings.ray:
        _serve_replicas(args, settings)
        say("stopped")
        return 0
    make_wyoming = _wyoming(settings)
    with ExitStack() as stack:
        bound = stack.enter_context(listen(settings))
        home = None
        if make_wyoming is not None:
            fix = "give --wyoming another port"
            home = stack.enter_context(bind(*settings.wyoming_address, "--wyoming", fix))
        url = url_of(bound, settings)
        load = partial(load_model, args, max_batch=args.streams)
        with ended_by_sigterm():
            model = load()
        service = _service(args, model)
        try:
            set_up_logs(settings.log_level)
            app = create_app(service, settings, load)
            beside = make_wyoming(app, home) if make_wyoming is not None else None
            with settled():
                announce = partial(_announce, url, _models(args), settings)
                Server(app, settings, announce, beside).run([bound])
        finally:
            service.close()
    say("stopped")
    return 0


def _wyoming(settings: Settings) -> Any:
    """The class that serves Home Assistant; None where that is not asked for."""
    if settings.wyoming is None:
        return None
    try:
        from mimo_fast.server.wyoming import Wyoming
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "wyoming":
            raise
        fix = "pip install 'mimo-fast[wyoming]'"
        raise MimoFastError(f"--wyoming needs the package wyoming: {fix}") from error
    return Wyoming


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Ends the process with 0 on SIGTERM while a model is loaded.

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

        models, gpus = _models(args), settings.gpus_per_replica
        if gpus < 0:
            gpus = 1.0 if find_device(args.device).type == "cuda" else 0.0
        # A parser is not for other processes.
        given = argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in LOCAL})
        load = partial(load_model, given, max_batch=args.streams)
        announce = partial(_announce, models=models, settings=settings)
        serve_replicas(load, partial(_service, given), settings, gpus, announce)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise MimoFastError(
            "--ray needs Ray Serve: install it with pip install 'mimo-fast[ray]'"
        ) from error


def _service(args: argparse.Namespace, model: MimoAudio) -> Any:
    """The service of a loaded model."""
    from mimo_fast.server.service import Service

    return Service(model, _name(args), adapter=adapter_of(model, args))


def _models(args: argparse.Namespace) -> list[str]:
    """What clients call the model, and the model with each adapter that they may choose."""
    (adapters, merge), name = adapters_of(args), _name(args)
    chosen = () if merge is None else adapters or ()
    return [name, *(f"{name}:{adapter}" for adapter in chosen)]


def _name(args: argparse.Namespace) -> str:
    """What clients call the model: the last part of its folder or hub id."""
    if args.served_name:
        return str(args.served_name)
    return short_name(args)


def _with_certificate(settings: Settings) -> Settings:
    """The settings with a certificate of this machine's own."""
    from mimo_fast.server.certificates import own_names, self_signed

    pair = self_signed(own_names(settings))
    say(f"self-signed certificate {pair.public}: browsers warn once, and show its SHA-256:")
    say(f"  {pair.fingerprint}")
    return replace(settings, ssl_certfile=pair.file, ssl_keyfile=pair.file)


def _announce(url: str, models: Sequence[str], settings: Settings) -> None:
    say(f"talk to it in a browser:  {url}/")
    named = f"model {models[0]}" if len(models) == 1 else f"models {', '.join(models)}"
    say(f"listening on {url} (OpenAI's API: {url}/v1, {named}); Ctrl-C ends it")
    if settings.wyoming is not None:
        say(f"Home Assistant: Wyoming Protocol at {settings.wyoming}")
    body = f'{{"model": "{models[0]}", "voice": "alloy", "input": "good morning"}}'
    key = "" if settings.api_key is None else '-H "Authorization: Bearer $MIMO_FAST_API_KEY" '
    insecure = "" if settings.ssl_certfile is None else "-k "
    say(
        f"hear it:  curl {insecure}{url}/v1/audio/speech {key}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)} -o speech.mp3"
    )
    if settings.ssl_certfile is not None:
        return
    port = url.rpartition(":")[2]
    host = url.rpartition(":")[0].partition("//")[2]
    tunnel = f"ssh -N -L {port}:{host}:{port} THIS-MACHINE"
    if not is_loopback(settings.host):
        say(
            "without https the browsers of other machines give this server's page no microphone "
            f"(they do on localhost): start it with --self-signed, or run there:  {tunnel}"
        )
    elif sys.stderr.isatty():
        say("from another machine, whose browser gives a microphone to localhost only:  " + tunnel)
