"""`/page/config`: what the page offers is what this model and this server can do."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast import __version__
from mimo_fast.server.checks import Json
from mimo_fast.server.service import ASR, DIALOGUE, TTS, Service
from mimo_fast.server.voices import ALIASES

CALLS = "/v1/realtime/calls"
"""WebRTC's path, where there is one."""

FEW_WORDS: Json = {
    "talk": (
        "what is three plus four",
        "good morning",
        "what day comes after friday",
        "what color is the sea",
    ),
    "say": (
        "the dog is big and black. come here on monday.",
        "my mother and the teacher go to the market on friday",
        "what is three plus four",
    ),
    "recordings": (
        "what color is the sea",
        "the red house is near the river",
        "what month comes after may",
    ),
    "questions": (),
    "styles": ("speak slowly", "speak fast", "in a high voice", "in a low voice"),
    "conversions": (
        {
            "name": "Answer the question",
            "instruction": "Answer the question",
            "examples": (
                ("what is three plus four", "seven"),
                ("what day comes after friday", "saturday"),
            ),
            "recording": "what color is the sea",
        },
        {
            "name": "Say it again",
            "instruction": "Say it again in your own voice",
            "examples": (("good morning to you", None), ("the sea is blue", None)),
            "recording": "i live in the city near the river",
        },
    ),
}
"""Samples for a model of few words, all in its vocabulary.

An example is what is said before and after; None for the same words.
"""

MANY_WORDS: Json = {
    "talk": (
        "What can you tell me about the sea?",
        "Tell me a short story.",
        "How do you say good morning in Chinese?",
    ),
    "say": (
        "The best way to predict the future is to invent it.",
        "Good morning! It is a bright and windy day, and the ferry leaves at nine.",
    ),
    "recordings": ("The ferry to the island leaves at nine, and the last one back at six.",),
    "questions": ("What is said in this recording?", "How does the speaker sound?"),
    "styles": ("Speak slowly and calmly", "Sound excited", "Whisper"),
    "conversions": (
        {
            "name": "Repeat it",
            "instruction": "Repeat what is said in the voice of the examples",
            "examples": (("Good morning.", None),),
            "recording": "The ferry leaves at nine.",
        },
    ),
}
"""Samples for any other model."""


async def page_config(request: Request) -> Response:
    """What the page asks before anything else; a 401 says that it needs a key."""
    state: Any = request.app.state
    service: Service = state.service
    settings = state.settings
    few = bool(service.model.tokenizer.trained_words)
    found = {
        "version": __version__,
        "model": service.name,
        "sample_rate": service.sample_rate,
        "few_words": few,
        "knows": _knows(service),
        "samples": FEW_WORDS if few else MANY_WORDS,
        "voices": _voices(state, service),
        "example_sets": [each.described() for each in state.examples],
        "languages": ["en"] if few else ["en", "zh"],
        "webrtc": _has_calls(request) and find_spec("aiortc") is not None,
        "ice_servers": _ice_servers(settings),
        "limits": {
            "text_chars": settings.max_text_chars,
            "body_bytes": settings.max_body_bytes,
            "audio_seconds": settings.max_audio_seconds,
        },
    }
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


def _knows(service: Service) -> dict[str, bool]:
    """What of the page's tasks the model was trained for."""
    return {
        "talk": service.knows(DIALOGUE),
        "instructions": service.knows(DIALOGUE, "system_prompt"),
        "memory": service.knows(f"{DIALOGUE}_multiturn"),
        "say": service.knows(TTS),
        "styles": service.knows(TTS, "instruct"),
        "transcribe": service.knows(ASR),
        # Beside a recording a question is an instruction.
        "ask": service.knows(DIALOGUE, "system_prompt"),
        "convert": service.knows("in_context_learning_s2s"),
    }


def _voices(state: Any, service: Service) -> list[str]:
    """Voices that sound different: a model's own, and recordings that it can speak in."""
    if not service.knows(TTS, "prompt_speech"):
        return ["default"]
    listed = list(state.voices)
    return [each.name for each in listed if each.name not in ALIASES or each.path is not None]


def _has_calls(request: Request) -> bool:
    return any(getattr(route, "path", "") == CALLS for route in request.app.routes)


def _ice_servers(settings: Any) -> Sequence[Any]:
    """STUN and TURN servers as browsers take them; credentials are why this needs the key."""
    found: Sequence[Any] = getattr(settings, "ice_servers", None) or ()
    return [{"urls": each} if isinstance(each, str) else each for each in found]
