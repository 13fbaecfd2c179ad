"""Errors that a user can act on.

Each message is one line and names the fix; the CLI prints it without a traceback.
"""


class MimoFastError(Exception):
    """Base class of every error that mimo_fast raises on purpose."""


class ConfigError(MimoFastError):
    """A config.json lacks a key, contradicts itself or asks for something unsupported."""


class CheckpointError(MimoFastError):
    """A checkpoint cannot be found, or its tensors do not match its config."""


class AudioError(MimoFastError):
    """Audio cannot be read, is too large, or is too short to use."""


class PromptError(MimoFastError):
    """A prompt is malformed or does not fit into the context."""


class BusyError(MimoFastError):
    """The engine's queue is full: try again later."""


class DeviceMemoryError(MimoFastError):
    """The device has too little memory for the model or the request."""


class ClosedError(MimoFastError):
    """The model has been closed, or was loaded by the process that this one was forked from."""


class NumericError(MimoFastError):
    """Logits, codes or samples are not finite: a weight is not, or a value overflows its dtype."""
