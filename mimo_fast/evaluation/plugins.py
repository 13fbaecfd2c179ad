"""Recognisers, speaker encoders and judges: by import path, or by the URL of an OpenAI-like server.

`package.module:name` is a function, or a class that is made once, without arguments; the working
directory is importable. `https://host/v1#model` is a server's transcriptions, or its chat
completions for a judge; its key is in the environment, MIMO_FAST_EVAL_KEY or OPENAI_API_KEY.
"""

from __future__ import annotations

import base64
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mimo_fast.errors import EvaluationError, MimoFastError
from mimo_fast.evaluation.items import Tools
from mimo_fast.evaluation.rates import evaluation_package
from mimo_fast.json_files import cut, shown
from mimo_fast.mimo_audio import MimoAudio

KINDS = ("recogniser", "speaker", "judge")

SELF = "self"
"""As a recogniser: the model that is evaluated transcribes its own speech."""

NAMED = {("speaker", "resemblyzer"): "mimo_fast.evaluation.voices:Resemblyzer"}
"""Plug-ins of the package, by kind and short name."""

KEYS = ("MIMO_FAST_EVAL_KEY", "OPENAI_API_KEY")
"""Environment variables that a server's key is read from."""

TRIES, AT_ONCE, PATIENCE = 8, 8, 120.0
"""Of a server: tries of a request, with exponential waits between them, requests at once, and
seconds that an answer may take."""


def load_tools(given: Mapping[str, str | None]) -> Tools:
    """Plug-ins by kind; None for those that are not given. `SELF` waits for `with_model`.

    Raises:
        EvaluationError: one cannot be imported, made or reached.
    """
    names = {kind: name for kind, name in given.items() if name is not None}
    ready = {kind: name for kind, name in names.items() if (kind, name) != ("recogniser", SELF)}
    tools = {kind: load_plugin(kind, name) for kind, name in ready.items()}
    return Tools(**tools, names=names)


def with_model(tools: Tools, model: MimoAudio) -> Tools:
    """The same tools, with the model as the recogniser where that is `SELF`."""
    if tools.names.get("recogniser") != SELF:
        return tools
    return Tools(OwnRecogniser(model), tools.speaker, tools.judge, tools.names)


def load_plugin(kind: str, given: str) -> Callable[..., Any]:
    """A plug-in of a kind, see the module.

    Raises:
        EvaluationError: there is none; the message says what was looked for.
    """
    if given.startswith(("http://", "https://")):
        return _of_server(kind, given)
    path = NAMED.get((kind, given), given)
    module, _, name = path.partition(":")
    if not module or not name:
        known = [name for of, name in NAMED if of == kind] + [SELF] * (kind == "recogniser")
        also = f", or {' or '.join(known)}" if known else ""
        raise EvaluationError(
            f"--{kind} is package.module:name or https://host/v1#model{also}, not {given!r:.80}"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if inspect.isclass(found):
            found = found()
    except MimoFastError:
        raise
    except Exception as error:
        # Whatever a foreign module raises.
        why = f"{type(error).__name__}: {cut(error, 200)}"
        raise EvaluationError(f"--{kind} {shown(path)} cannot be used: {why}") from error
    if not callable(found):
        raise EvaluationError(f"--{kind} {shown(path)} is a {type(found).__name__}, no function")
    plugin: Callable[..., Any] = found
    return plugin


class OwnRecogniser:
    """The model that is evaluated, as a recogniser: whole recordings, one wording."""

    def __init__(self, model: MimoAudio) -> None:
        self._model = model

    def __call__(self, audio: Path, language: str) -> str:
        architecture = self._model.lm.config.architecture
        tag = architecture.tag_of(language) if architecture.tags else ""
        return str(self._model.asr_sft(audio, tag, seed=0)).strip()


class _Server:
    """A model of an OpenAI-like server."""

    at_once = AT_ONCE

    def __init__(self, url: str, model: str) -> None:
        openai = evaluation_package("openai")
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "none")
        self._error: type[Exception] = openai.OpenAIError
        # Its own retries: exponential, with what a server says of when to come back.
        self._client = openai.OpenAI(
            base_url=url, api_key=key, max_retries=TRIES - 1, timeout=PATIENCE
        )
        self._url, self._model = url, model

    def _said(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._error as error:
            why = f"{type(error).__name__}: {cut(error, 200)}"
            raise EvaluationError(f"{self._url} ({self._model}) did not answer: {why}") from error


class ServerRecogniser(_Server):
    """Transcriptions of a server."""

    def __call__(self, audio: Path, language: str) -> str:
        def ask() -> Any:
            with audio.open("rb") as file:
                return self._client.audio.transcriptions.create(
                    model=self._model, file=(audio.name, file), language=language
                )

        return str(self._said(ask).text)


class ServerJudge(_Server):
    """Chat completions of a server, at temperature 0; recordings go behind the last message."""

    def __call__(self, messages: Sequence[Mapping[str, str]], audio: Sequence[Path] = ()) -> str:
        asked: list[dict[str, Any]] = [dict(each) for each in messages]
        if audio:
            parts: list[dict[str, Any]] = [{"type": "text", "text": asked[-1]["content"]}]
            for file in audio:
                data = base64.b64encode(file.read_bytes()).decode()
                heard = {"data": data, "format": file.suffix.removeprefix(".")}
                parts.append({"type": "input_audio", "input_audio": heard})
            asked[-1]["content"] = parts

        def ask() -> Any:
            return self._client.chat.completions.create(
                model=self._model, messages=asked, temperature=0
            )

        return str(self._said(ask).choices[0].message.content or "")


def _of_server(kind: str, given: str) -> Callable[..., Any]:
    url, _, model = given.partition("#")
    if not model:
        raise EvaluationError(f"--{kind} {given:.80} names no model: add #MODEL to the URL")
    if kind == "speaker":
        raise EvaluationError("--speaker has no URL: servers give no embeddings of voices")
    return (ServerRecogniser if kind == "recogniser" else ServerJudge)(url, model)
