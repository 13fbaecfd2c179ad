"""Errors that a user can act on.

Each message is one line and names the fix; the CLI prints it without a traceback.
"""

LONGEST = 4000
"""Characters of a message at most; of a longer one the middle is left out."""

END = 1000
"""Characters of its end that are kept: there is the fix."""


class MimoFastError(Exception):
    """Base class of every error that mimo_fast raises on purpose.

    Paths, keys and values of foreign files may hold anything: what cannot be printed, line ends
    included, is shown as an escape.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if not text.isprintable():
            text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST - END - 5]} ... {text[-END:]}"
        return text


class ConfigError(MimoFastError):
    """A config.json lacks a key, contradicts itself or asks for something unsupported."""


class CheckpointError(MimoFastError):
    """A checkpoint cannot be found, or its tensors do not match its config."""


class AudioError(MimoFastError):
    """Audio cannot be read, is too large, or is too short to use."""


class PromptError(MimoFastError):
    """A prompt is malformed or does not fit into the context."""


class TaskError(PromptError):
    """The loaded model does not do the task that was asked for."""


class BusyError(MimoFastError):
    """The engine's queue is full: try again later."""


class DeviceMemoryError(MimoFastError):
    """The device has too little memory for the model or the request."""


class ClosedError(MimoFastError):
    """The model has been closed, or was loaded by the process that this one was forked from."""


class NumericError(MimoFastError):
    """Logits, codes or samples are not finite: a weight is not, or a value overflows its dtype."""


class EvaluationError(MimoFastError):
    """An evaluation set, a plug-in that measures answers, or a record of answers cannot be used."""


class MarkingError(MimoFastError):
    """A mark or signed provenance cannot be made, or not be read."""
