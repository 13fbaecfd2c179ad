"""The settings of a session in the GA dialect: defaults, merged updates, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mimo_fast.server.checks import (
    Json,
    boolean,
    mapping,
    metadata,
    needed,
    number,
    one_of,
    refusal,
    refuse_unknown,
    text,
    whole,
)
from mimo_fast.server.models import ALIASES
from mimo_fast.server.realtime.dialogue import Turns
from mimo_fast.server.realtime.hearing import Detection
from mimo_fast.server.realtime.responses import Manner
from mimo_fast.server.realtime.sound import FORMATS, PCM, Format

Kind = Literal["realtime", "transcription"]

EAGERNESS = {"low": 8000, "medium": 4000, "auto": 4000, "high": 2000}
"""Milliseconds of silence that end a turn: the API's waiting times of semantic_vad, as nothing here
judges whether a sentence is complete."""

SERVER_VAD: Json = {
    "type": "server_vad",
    "threshold": 0.5,
    "prefix_padding_ms": 300,
    "silence_duration_ms": 500,
    "idle_timeout_ms": None,
    "create_response": True,
    "interrupt_response": True,
}
SEMANTIC_VAD: Json = {
    "type": "semantic_vad",
    "eagerness": "auto",
    "create_response": True,
    "interrupt_response": True,
}

TRANSCRIBERS = (
    "whisper-1",
    "gpt-transcribe",
    "gpt-live-transcribe",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "gpt-4o-mini-transcribe-2025-12-15",
    "gpt-realtime-whisper",
)
"""Names of OpenAI's that mean the one model."""

MOST_TOKENS, MOST_TOOLS, MOST_TOOLS_JSON = 4096, 128, 2**18

MOST_INPUT = 256
"""Items that one response may be given."""

READ_ONLY = {"id", "object", "expires_at"}

Voices = Callable[[str], Path | None]
"""The recording of a voice, None for the model's own. Raises KeyError for one that is unknown."""


@dataclass
class Config:
    """Settings as a client sees them.

    Args:
        name: of the model that the client has connected to.
        models: the adapter by the name of each model; None for the model itself.
        longest: characters of a text.
    """

    kind: Kind
    id: str
    name: str
    models: Mapping[str, str | None]
    voices: Voices
    longest: int
    values: Json = field(init=False)

    def __post_init__(self) -> None:
        heard: Json = {
            "format": _format(PCM),
            "transcription": None,
            "noise_reduction": None,
            "turn_detection": dict(SERVER_VAD),
        }
        self.values = {"type": self.kind, "object": f"realtime.{self._object}", "id": self.id}
        if self.kind == "transcription":
            heard["transcription"] = {"model": self.name}
            for name in ("create_response", "interrupt_response"):
                del heard["turn_detection"][name]
            self.values |= {"include": None, "audio": {"input": heard}}
            return
        spoken = {"format": _format(PCM), "voice": "alloy", "speed": 1.0}
        self.values |= {
            "model": self.name,
            "output_modalities": ["audio"],
            "instructions": "",
            "tools": [],
            "tool_choice": "auto",
            "max_output_tokens": "inf",
            "truncation": "auto",
            "tracing": None,
            "prompt": None,
            "include": None,
            "audio": {"input": heard, "output": spoken},
        }

    @property
    def _object(self) -> str:
        return "session" if self.kind == "realtime" else "transcription_session"

    def update(self, given: Any) -> None:
        """Merges an update: what is left out stays, null clears.

        Raises:
            ApiError: a value is wrong; nothing has changed.
        """
        patch = mapping(given, "session")
        kind = needed(patch, "type", "session.type")
        if kind != self.kind:
            fix = "connect with ?intent=transcription" if kind == "transcription" else "leave it"
            problem = f"session.type is {self.kind!r} here and cannot change: {fix}"
            raise refusal(problem, "session.type")
        values = deepcopy(self.values)
        known = set(values) | READ_ONLY | {"reasoning", "parallel_tool_calls"}
        refuse_unknown(patch, known, "session")
        for name, value in patch.items():
            if name == "audio":
                self._update_audio(values["audio"], value)
            elif name not in READ_ONLY | {"type"}:
                values[name] = self._checked(name, value)
        self.values = values

    def _checked(self, name: str, value: Any) -> Any:
        param = f"session.{name}"
        if name == "model":
            return self._model(value, param)
        if name == "tracing":
            # Stock clients ask for it by themselves; nothing is traced, as the null says.
            return None
        if name in ("prompt", "reasoning", "include"):
            if value:
                raise refusal(f"this server has no {name}: leave {param} out", param)
            return None
        if name == "parallel_tool_calls":
            return None if value is None else boolean(value, param)
        if name == "truncation":
            return _truncation(value, param)
        return spoken_options({name: value}, "session", self.longest)[name]

    def _model(self, value: Any, param: str) -> str:
        if value is None or (isinstance(value, str) and value in ALIASES):
            return self.name
        found: str = one_of(value, param, self.models)
        return found

    def _update_audio(self, audio: Json, given: Any) -> None:
        patch = mapping(given if given is not None else {}, "session.audio")
        refuse_unknown(patch, audio, "session.audio")
        for side, values in patch.items():
            param = f"session.audio.{side}"
            values = mapping(values if values is not None else {}, param)
            refuse_unknown(values, audio[side], param)
            for name, value in values.items():
                audio[side][name] = self._audio_option(name, value, f"{param}.{name}")

    def _audio_option(self, name: str, value: Any, param: str) -> Any:
        if name == "format":
            return _format(read_format(value, param))
        if name == "voice":
            return self.voice_name(value, param)
        if name == "speed":
            return check_speed(value, param)
        if value is None:
            return None
        if name == "transcription":
            return self._transcription(mapping(value, param), param)
        if name == "noise_reduction":
            kind = one_of(mapping(value, param).get("type"), f"{param}.type", NOISE)
            return {"type": kind}
        return _detection(mapping(value, param), param, self.kind)

    def _transcription(self, given: Json, param: str) -> Json:
        texts, lists = ("model", "language", "prompt", "delay"), ("keywords", "languages")
        refuse_unknown(given, texts + lists, param)
        for name in texts:
            if given.get(name) is not None:
                text(given[name], f"{param}.{name}", self.longest)
        model = given.get("model")
        if model is not None:
            one_of(model, f"{param}.model", (*self.models, *TRANSCRIBERS))
        for name in lists:
            if not isinstance(given.get(name, []), list | None):
                raise refusal(f"{param}.{name} must be a list", f"{param}.{name}", "invalid_type")
            for each in given.get(name) or []:
                text(each, f"{param}.{name}", 256)
        return {name: value for name, value in given.items() if value is not None}

    def voice_name(self, value: Any, param: str) -> str:
        """The name of a voice that there is."""
        name = value.get("id") if isinstance(value, dict) else value
        if name is None:
            return "alloy"
        name = text(name, param, 128)
        try:
            self.voices(name)
        except KeyError:
            problem = f"there is no voice {name[:64]!r}; /v1/audio/voices lists those that are"
            raise refusal(problem, param) from None
        return name

    # What it means

    @property
    def input(self) -> Json:
        found: Json = self.values["audio"]["input"]
        return found

    @property
    def input_format(self) -> Format:
        return FORMATS[self.input["format"]["type"]]

    @property
    def detection(self) -> Detection | None:
        """None for turns by hand."""
        given = self.input["turn_detection"]
        if given is None:
            return None
        if given["type"] == "semantic_vad":
            return Detection(silence_ms=EAGERNESS[given["eagerness"]])
        names = "threshold", "prefix_padding_ms", "silence_duration_ms"
        return Detection(*(given[name] for name in names))

    @property
    def turns(self) -> Turns:
        given = self.input["turn_detection"] or {}
        talks = self.kind == "realtime"
        return Turns(
            answers=talks and given.get("create_response", False),
            interrupts=talks and given.get("interrupt_response", False),
            idle_ms=given.get("idle_timeout_ms") if talks else None,
            transcribes=self.input["transcription"] is not None,
            adapter=self._adapter((self.input["transcription"] or {}).get("model")),
        )

    def _adapter(self, model: str | None = None) -> str | None:
        """The adapter of a model by its name; a name of OpenAI's is the session's model."""
        own: str = self.values.get("model", self.name)
        return self.models[model if model is not None and model in self.models else own]

    def manner(self, response: Json | None = None) -> Manner:
        """How a reply is made: as the session says, but for what `response.create` does.

        Raises:
            ApiError: a value is wrong.
        """
        given = {name: value for name, value in (response or {}).items() if value is not None}
        options = self.values | spoken_options(given, "response", self.longest)
        output = dict(self.values["audio"]["output"])
        audio = mapping(given.get("audio", {}), "response.audio")
        refuse_unknown(audio, {"output"}, "response.audio")
        for name, value in mapping(audio.get("output") or {}, "response.audio.output").items():
            param = f"response.audio.output.{name}"
            refuse_unknown({name: value}, output, "response.audio.output")
            output[name] = self._audio_option(name, value, param)
        limit = options["max_output_tokens"]
        return Manner(
            instructions=self.values["instructions"] or None,
            asked=given.get("instructions"),
            voice=self.voices(output["voice"]),
            voice_name=output["voice"],
            speaks=options["output_modalities"] == ["audio"],
            most=None if limit == "inf" else limit,
            format=FORMATS[output["format"]["type"]],
            adapter=self._adapter(),
        )


NOISE = "near_field", "far_field"

RESPONSE = {
    *("audio", "conversation", "input", "instructions", "max_output_tokens", "metadata"),
    *("output_modalities", "parallel_tool_calls", "prompt", "reasoning", "tool_choice", "tools"),
}
"""Parameters of `response.create`."""


def check_response(given: Any) -> Json:
    """The parameters of `response.create`, those that `Config.manner` does not check."""
    response = mapping({} if given is None else given, "response")
    refuse_unknown(response, RESPONSE, "response")
    for name in ("prompt", "reasoning"):
        if response.get(name):
            problem = f"this server has no {name}: leave response.{name} out"
            raise refusal(problem, f"response.{name}")
    if response.get("conversation") is not None:
        one_of(response["conversation"], "response.conversation", ("auto", "none"))
    metadata(response.get("metadata"), "response.metadata")
    if not isinstance(response.get("input"), list | None):
        raise refusal("response.input must be a list", "response.input", "invalid_type")
    if len(response.get("input") or []) > MOST_INPUT:
        problem = f"response.input has more than {MOST_INPUT} items"
        raise refusal(problem, "response.input")
    return response


def spoken_options(given: Json, where: str, longest: int) -> Json:
    """Options that a session and a response have: those of them that are given, checked."""
    found: Json = {}
    for name, value in given.items():
        param = f"{where}.{name}"
        if name == "instructions":
            found[name] = text("" if value is None else value, param, longest)
        elif name == "output_modalities":
            if value not in (None, ["audio"], ["text"]):
                problem = f'{param} may be ["audio"], which has a transcript, or ["text"]'
                raise refusal(problem, param)
            found[name] = value or ["audio"]
        elif name == "max_output_tokens":
            limited = value not in (None, "inf")
            found[name] = whole(value, param, 1, MOST_TOKENS) if limited else "inf"
        elif name == "tools":
            found[name] = _tools(value, param)
        elif name == "tool_choice":
            choice = "auto" if value is None else value
            if choice not in ("auto", "none"):
                problem = f"the model calls no tools: {param} may be 'auto' or 'none'"
                raise refusal(problem, param)
            found[name] = choice
    return found


def check_speed(value: Any, param: str) -> float:
    speed = 1.0 if value is None else number(value, param, 0.25, 1.5)
    if speed != 1.0:
        raise refusal(f"{param} may be 1.0 only: this server does not change the speed", param)
    return speed


def read_format(value: Any, param: str) -> Format:
    given = {"type": PCM.name} if value is None else mapping(value, param)
    refuse_unknown(given, {"type", "rate"}, param)
    found = FORMATS[one_of(given.get("type"), f"{param}.type", FORMATS)]
    if given.get("rate") not in (None, found.rate):
        problem = f"{param}.rate of {found.name} is {found.rate}"
        raise refusal(problem, f"{param}.rate")
    return found


def _format(format: Format) -> Json:
    return {"type": format.name} | ({"rate": format.rate} if format is PCM else {})


def _tools(value: Any, param: str) -> list[Json]:
    tools = [] if value is None else value
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise refusal(f"{param} must be a list of at most {MOST_TOOLS} tools", param)
    for i, tool in enumerate(tools):
        one_of(mapping(tool, f"{param}[{i}]").get("type"), f"{param}[{i}].type", ("function",))
        text(needed(tool, "name", f"{param}[{i}].name"), f"{param}[{i}].name", 128)
    if len(json.dumps(tools)) > MOST_TOOLS_JSON:
        raise refusal(f"{param} has more than {MOST_TOOLS_JSON >> 10} KiB", param)
    return tools


def _truncation(value: Any, param: str) -> Any:
    if isinstance(value, dict):
        one_of(value.get("type"), f"{param}.type", ("retention_ratio",))
        number(value.get("retention_ratio"), f"{param}.retention_ratio", 0, 1)
        return {name: value[name] for name in ("type", "retention_ratio")}
    return "auto" if value is None else one_of(value, param, ("auto", "disabled"))


def _detection(given: Json, param: str, kind: Kind) -> Json:
    name = one_of(given.get("type"), f"{param}.type", ("server_vad", "semantic_vad"))
    found = dict(SERVER_VAD if name == "server_vad" else SEMANTIC_VAD)
    refuse_unknown(given, found, param)
    for option, value in given.items():
        where = f"{param}.{option}"
        if value is None or option == "type":
            continue
        if option == "threshold":
            found[option] = number(value, where, 0, 1)
        elif option == "eagerness":
            found[option] = one_of(value, where, EAGERNESS)
        elif option in ("create_response", "interrupt_response"):
            found[option] = boolean(value, where)
        else:
            least, most = LIMITS[option]
            found[option] = whole(value, where, least, most)
    if kind == "transcription":
        for option in ("create_response", "interrupt_response"):
            del found[option]
    return found


LIMITS = {
    "prefix_padding_ms": (0, 5000),
    "silence_duration_ms": (32, 20_000),
    "idle_timeout_ms": (5000, 30_000),
}
