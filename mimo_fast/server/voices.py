"""Voices that may be asked for by name: the model's own, and recordings in a folder.

VOICES/anna.wav      a recording
VOICES/anna.txt      optional: who consented to its use, and to what
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast.audio.files import DecodeLimits, load_audio
from mimo_fast.audio.writing import save_wav
from mimo_fast.errors import ConfigError
from mimo_fast.runtime.examples import NAME, NOTE, SHORTEST_NOTE, is_note
from mimo_fast.server.errors import ApiError
from mimo_fast.server.service import TTS

ALIASES = (
    *("alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer"),
    *("verse", "marin", "cedar"),
)
"""OpenAI's names, which stock clients send."""

DEFAULT = "default"
"""The model's own voice, unless the folder has a recording of this name."""

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MOST = 256
"""Voices of a folder at most."""

SAMPLE_RATE = 24000
SHORTEST, LONGEST = 1.0, 30.0
"""Seconds of an uploaded recording."""


@dataclass(frozen=True)
class Voice:
    """A voice: `path` is its recording, None for the model's own."""

    name: str
    path: Path | None = None
    consent: bool = False

    def described(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "audio.voice",
            "name": self.name,
            "consent": self.consent,
            "own": self.path is None,
        }


class Voices:
    """The voices of a server; names never become paths, they are looked up.

    Attributes:
        shared: Whether other processes add voices to the folder.

    Raises:
        ConfigError: two recordings have one name, or there are more than `MOST`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self.shared = folder, False
        self._seen = folder.stat().st_mtime_ns if folder else 0
        self._found = {voice.name: voice for voice in _read(folder)} if folder else {}

    def __iter__(self) -> Any:
        """All voices, aliases of the default one last."""
        self._refresh()
        names = dict.fromkeys([DEFAULT, *sorted(self._found), *ALIASES])
        return iter([voice for name in names if (voice := self.find(name)) is not None])

    def _refresh(self) -> None:
        """Reads a shared folder again if files came or went."""
        if self._folder is None or not self.shared:
            return
        # What cannot be read now was not put there by a server.
        with suppress(OSError, ConfigError):
            written = self._folder.stat().st_mtime_ns
            if written != self._seen:
                self._found = {voice.name: voice for voice in _read(self._folder)}
                self._seen = written

    def find(self, name: object) -> Voice | None:
        """The voice of a name; OpenAI's names are the default one's where no recording has them."""
        self._refresh()
        if not isinstance(name, str):
            return None
        if (voice := self._found.get(name)) is not None:
            return voice
        if name == DEFAULT or name in ALIASES:
            own = self._found.get(DEFAULT)
            return Voice(name, own.path if own else None, own.consent if own else False)
        return None

    def add(self, name: str, audio: bytes, consent: str) -> Voice:
        """Keeps a recording under a name that is free; decodes it, so not for an event loop.

        Raises:
            ApiError: name, recording or note is not what it must be.
        """
        if self._folder is None:
            raise ApiError("this server keeps no voices", 403, "voice_upload_disabled")
        if NAME.fullmatch(name) is None:
            rule = "1 to 40 letters, digits, - and _"
            raise ApiError(f"a voice's name has {rule}", 400, "invalid_value", "name")
        if name.lower() in {each.lower() for each in (*self._found, *ALIASES, DEFAULT)}:
            raise ApiError(f"there is a voice {name} already", 409, "voice_exists", "name")
        if len(self._found) >= MOST:
            raise ApiError(f"the server has {MOST} voices already", 409, "voices_full")
        if not is_note(consent):
            rule = f"in {SHORTEST_NOTE} to {NOTE} characters"
            problem = f"say {rule} who consented to the use of this voice"
            raise ApiError(problem, 400, "consent_required", "consent")
        wav = load_audio(audio, SAMPLE_RATE, limits=DecodeLimits(LONGEST, 1 << 28))
        if len(wav) < SHORTEST * SAMPLE_RATE:
            problem = f"a voice needs at least {SHORTEST:.0f} s of speech"
            raise ApiError(problem, 400, "invalid_audio", "audio_sample")
        note, path = self._folder / f"{name}.txt", self._folder / f"{name}.wav"
        taken = ApiError(f"there is a voice {name} already", 409, "voice_exists", "name")
        # Two processes that are asked for one name make this file once.
        claim = self._folder / f".{name}.part"
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            raise taken from None
        try:
            if path.exists():
                raise taken
            note.write_text(consent.strip() + "\n", encoding="utf-8")
            save_wav(path, wav, SAMPLE_RATE)
        finally:
            claim.unlink()
        self._found[name] = Voice(name, path, True)
        return self._found[name]


def _read(folder: Path) -> list[Voice]:
    found = dict[str, Voice]()
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        if NAME.fullmatch(file.stem) is None:
            problem = "its name must be 1 to 40 letters, digits, - and _"
            raise ConfigError(f"voices: {file} cannot be asked for: {problem}")
        if file.stem in found:
            raise ConfigError(f"voices: {found[file.stem].path} and {file} have one name")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"voices: {file} cannot be read")
        found[file.stem] = Voice(file.stem, file, file.with_suffix(".txt").is_file())
    if len(found) > MOST:
        raise ConfigError(f"voices: {folder} has more than {MOST} recordings")
    return list(found.values())


async def list_voices(request: Request) -> Response:
    """`GET /v1/audio/voices`: none of a model that does not speak."""
    state = request.app.state
    voices = state.voices if state.service.knows(TTS) else ()
    found = [voice.described() for voice in voices]
    return JSONResponse({"object": "list", "data": found, "voices": found})


async def add_voice(request: Request) -> Response:
    """`POST /v1/audio/voices`: form fields `name`, `audio_sample` and `consent`."""
    _check_allowed(request)
    async with request.form(max_files=1, max_fields=8) as form:
        name, consent = form.get("name"), form.get("consent")
        audio = form.get("audio_sample") or form.get("file")
        if not isinstance(name, str) or not isinstance(consent, str):
            missing = "consent" if isinstance(name, str) else "name"
            raise ApiError(f"the form needs a text field {missing}", 400, "missing_field", missing)
        if not isinstance(audio, UploadFile):
            raise ApiError("the form needs a recording", 400, "missing_field", "audio_sample")
        data = await audio.read()
    state = request.app.state
    # Decoding computes, and what computes does so in one thread.
    voice = await state.service.worker.call(state.voices.add, name, data, consent)
    return JSONResponse(voice.described(), 201)


def _check_allowed(request: Request) -> None:
    if not request.app.state.settings.allow_voice_upload:
        raise ApiError(
            "clients may not change voices here: start the server with --allow-voice-upload",
            403,
            "voice_upload_disabled",
        )
