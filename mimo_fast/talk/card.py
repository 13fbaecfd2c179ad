"""The sound card, through sounddevice; what goes wrong with it names its fix."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from mimo_fast.errors import MimoFastError
from mimo_fast.server.realtime.sound import Resampler

BLOCK = 0.02
"""Seconds of a block."""

LATENCY = 0.05
"""Seconds that a card may hold: callbacks wait for Python's lock now and then."""

Kind = Literal["input", "output"]
NAMES: dict[Kind, str] = {"input": "microphone", "output": "speaker"}
OPTIONS: dict[Kind, str] = {"input": "--device-in", "output": "--device-out"}
FILES: dict[Kind, str] = {"input": "--input FILE.wav", "output": "--output FILE.wav"}

INVALID_RATE, INVALID_DEVICE, UNAVAILABLE = -9997, -9996, -9985
"""Errors of PortAudio."""

LISTED = "--list-devices shows what there is"


class CardError(MimoFastError):
    """Microphone or speaker cannot be used."""


def library(what: str = "a microphone or a speaker") -> Any:
    """The module sounddevice.

    Raises:
        CardError: it, or the library that it needs, is not there.
    """
    try:
        import sounddevice
    except ImportError as error:
        fix = "pip install 'mimo-fast[talk]'"
        raise CardError(f"{what} needs the package sounddevice: {fix}") from error
    except OSError as error:
        raise CardError(
            f"{what} needs PortAudio, which sounddevice does not find: apt-get install "
            "libportaudio2 on Debian and Ubuntu, dnf install portaudio on Fedora"
        ) from error
    return sounddevice


def list_devices() -> str:
    """A line for each device: its number, name, what it is, and whether it is the default."""
    found = _devices(library("a list of devices"))
    if not found:
        raise CardError(_nothing("input") + "; nor is there a speaker")
    lines = []
    for device in found:
        kinds = [NAMES[kind] for kind in NAMES if device[f"max_{kind}_channels"] > 0]
        default = [f"default {NAMES[kind]}" for kind in NAMES if device["index"] == _default(kind)]
        what = ", ".join(default + [kind for kind in kinds if f"default {kind}" not in default])
        lines.append(f"{device['index']:>3}  {device['name']}  ({what or 'neither in nor out'})")
    return "\n".join(lines)


def find_device(given: str | None, kind: Kind) -> int | None:
    """The number of a device that is given by its number or part of its name; None: the default.

    Raises:
        CardError: there is none, or several are meant.
    """
    sounddevice = library(f"a {NAMES[kind]}")
    able = {
        device["index"]: str(device["name"])
        for device in _devices(sounddevice)
        if device[f"max_{kind}_channels"] > 0
    }
    if not able:
        raise CardError(_nothing(kind))
    if given is None:
        return None
    option = OPTIONS[kind]
    if given.strip().isdecimal():
        if int(given) in able:
            return int(given)
        raise CardError(f"{option}: device {given} is no {NAMES[kind]}; {LISTED}")
    exact = [index for index, name in able.items() if name.lower() == given.lower()]
    found = exact or [index for index, name in able.items() if given.lower() in name.lower()]
    if not found:
        raise CardError(f"{option}: no {NAMES[kind]} has {given!r} in its name; {LISTED}")
    if len(found) > 1 and not exact:
        names = ", ".join(f"{index} ({able[index]})" for index in found[:4])
        raise CardError(f"{option}: {given!r} may mean {names}: give its number")
    return found[0]


class Input:
    """A microphone; a context in which it is open.

    Args:
        heard: called with each block, float32 [n] at `rate`, in the card's thread.
        gone: called when it ends by itself.
        seconds: of a block.
        device: number; None for the default one.

    Raises:
        CardError: it cannot be opened.
    """

    def __init__(
        self,
        rate: int,
        heard: Callable[[np.ndarray], None],
        gone: Callable[[], None] | None = None,
        device: int | None = None,
        seconds: float = BLOCK,
    ) -> None:
        self._heard, self._rate = heard, rate
        self._resampler: Resampler | None = None
        self._ending = False
        self._stream = _opened("input", rate, device, seconds, self._push, self._ended, self)
        self._gone = gone

    def resample(self, native: int) -> None:
        """The card's own rate, where it has not the one that is wanted."""
        self._resampler = Resampler(native, self._rate)

    def _push(self, data: Any, frames: int, time: Any, status: Any) -> None:
        # A driver may leave anything in a buffer.
        block = np.clip(np.nan_to_num(data[:, 0]), -1, 1).astype(np.float32)
        if self._resampler is not None:
            block = self._resampler.push(torch.from_numpy(block)).numpy()
        self._heard(block)

    def _ended(self) -> None:
        if not self._ending and self._gone is not None:
            self._gone()

    @property
    def latency(self) -> float:
        """Seconds from the air to `heard`."""
        return _latency(self._stream)

    def __enter__(self) -> Input:
        _started(self._stream, "input")
        return self

    def __exit__(self, *error: object) -> None:
        self._ending = True
        self._stream.__exit__(*error)


class Output:
    """A speaker; a context in which it is open.

    Args:
        fill: fills a block float32 [n] at `rate`, and is told the seconds until its first sample
            is heard; in the card's thread, so it must not wait.
        gone: called when it ends by itself.
        device: number; None for the default one.

    Raises:
        CardError: it cannot be opened.
    """

    def __init__(
        self,
        rate: int,
        fill: Callable[[np.ndarray, float], None],
        gone: Callable[[], None] | None = None,
        device: int | None = None,
    ) -> None:
        self._fill, self._rate, self._native = fill, rate, rate
        self._resampler: Resampler | None = None
        self._rest = np.zeros(0, np.float32)
        self._ending = False
        self._stream = _opened("output", rate, device, BLOCK, self._pull, self._ended, self)
        self._gone = gone

    def resample(self, native: int) -> None:
        self._native, self._resampler = native, Resampler(self._rate, native)

    def _pull(self, data: Any, frames: int, time: Any, status: Any) -> None:
        out = data[:, 0]
        lead = 0.0
        if time is not None:
            lead = max(0.0, time.outputBufferDacTime - time.currentTime)
        if self._resampler is None:
            self._fill(out, lead)
            return
        while len(self._rest) < len(out):
            wanted = np.zeros(-(-len(out) * self._rate // self._native), np.float32)
            self._fill(wanted, lead + len(self._rest) / self._native)
            made = self._resampler.push(torch.from_numpy(wanted)).numpy()
            self._rest = np.concatenate((self._rest, made))
        out[:], self._rest = self._rest[: len(out)], self._rest[len(out) :]

    def _ended(self) -> None:
        if not self._ending and self._gone is not None:
            self._gone()

    @property
    def latency(self) -> float:
        """Seconds from `fill` to the air."""
        return _latency(self._stream)

    def abort(self) -> None:
        """Silence at once: what the card holds is dropped."""
        self._ending = True
        self._stream.abort()

    def __enter__(self) -> Output:
        _started(self._stream, "output")
        return self

    def __exit__(self, *error: object) -> None:
        self._ending = True
        self._stream.__exit__(*error)


def _devices(sounddevice: Any) -> list[Any]:
    found = list(sounddevice.query_devices())
    for index, device in enumerate(found):
        device.setdefault("index", index)
    return found


def _default(kind: Kind) -> int | None:
    sounddevice = library()
    try:
        return int(sounddevice.default.device[0 if kind == "input" else 1])
    except (AttributeError, IndexError, TypeError, ValueError):
        return None


def _latency(stream: Any) -> float:
    return float(getattr(stream, "latency", 0.0) or 0.0)


def _nothing(kind: Kind) -> str:
    fix = "plug one in"
    if sys.platform.startswith("linux"):
        fix += (
            ", and let your user use it (sudo usermod -aG audio $USER, then log in again; in a "
            "container pass /dev/snd)"
        )
    return (
        f"this machine has no {NAMES[kind]} that PortAudio finds: {fix}; or give {FILES[kind]} in "
        "its place"
    )


def _opened(
    kind: Kind,
    rate: int,
    device: int | None,
    seconds: float,
    callback: Callable[..., None],
    ended: Callable[[], None],
    user: Input | Output,
) -> Any:
    """A stream of the card at the rate, or at the card's own where it has not that one."""
    sounddevice = library(f"a {NAMES[kind]}")
    make = sounddevice.InputStream if kind == "input" else sounddevice.OutputStream
    options = {
        "channels": 1,
        "dtype": "float32",
        "callback": callback,
        "finished_callback": ended,
        "device": device,
        "latency": LATENCY,
    }
    try:
        try:
            return make(samplerate=rate, blocksize=int(seconds * rate), **options)
        except sounddevice.PortAudioError as error:
            if _code(error) != INVALID_RATE:
                raise
        native = int(sounddevice.query_devices(device, kind)["default_samplerate"])
        user.resample(native)
        return make(samplerate=native, blocksize=int(seconds * native), **options)
    except sounddevice.PortAudioError as error:
        raise CardError(_fault(error, kind)) from error
    except ValueError as error:
        # sounddevice's own, where there is no default device.
        raise CardError(f"{_nothing(kind)} ({error})") from error


def _started(stream: Any, kind: Kind) -> None:
    try:
        stream.__enter__()
    except library().PortAudioError as error:
        raise CardError(_fault(error, kind)) from error


def _code(error: Exception) -> int | None:
    return error.args[1] if len(error.args) > 1 and isinstance(error.args[1], int) else None


def _fault(error: Exception, kind: Kind) -> str:
    """What a PortAudio error means, and what to do."""
    name, text = NAMES[kind], " ".join(str(each) for each in error.args[:1]) or str(error)
    code, lower = _code(error), str(error).lower()
    if "permission" in lower or "denied" in lower or "not permitted" in lower:
        fix = "let this program use it in the system's privacy settings"
        if sys.platform.startswith("linux"):
            fix = "let your user use it: sudo usermod -aG audio $USER, then log in again"
        return f"the {name} may not be used ({text}): {fix}"
    if code == UNAVAILABLE or "busy" in lower or "unavailable" in lower:
        return (
            f"the {name} is in use by another program, or was unplugged ({text}): close what uses "
            f"it, or choose another with {OPTIONS[kind]} ({LISTED})"
        )
    if code == INVALID_DEVICE or "querying device" in lower:
        return f"{_nothing(kind)} ({text})"
    return f"the {name} cannot be opened ({text}): choose another with {OPTIONS[kind]} ({LISTED})"


def gone(kind: Kind) -> CardError:
    """The error of a device that was unplugged."""
    return CardError(
        f"the {NAMES[kind]} has gone: plug it in again, or choose another with {OPTIONS[kind]} "
        f"({LISTED})"
    )
