"""Errors that a user can act on. Each message is one line and names the fix; the CLI prints it
without a traceback."""


class MimoFastError(Exception):
    """Base class of every error that mimo_fast raises on purpose."""


class ConfigError(MimoFastError):
    """A config.json lacks a key, contradicts itself or asks for something unsupported."""


class CheckpointError(MimoFastError):
    """A checkpoint cannot be found, or its tensors are not those its config describes."""


class AudioError(MimoFastError):
    """Audio cannot be read, is too large, or holds nothing usable."""


class PromptError(MimoFastError):
    """A prompt is malformed or does not fit into the context."""


class BusyError(MimoFastError):
    """As many replies wait as may: try again later."""


class DeviceMemoryError(MimoFastError):
    """The device has not enough memory for what was asked of it."""
