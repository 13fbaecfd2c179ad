"""What a command shares with its surroundings: standard streams, Ctrl-C, and what was written.

Only the standard library is imported, since Ctrl-C may come while the rest is.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Any, TextIO

from mimo_fast.cli.early import end_at_once

written: list[str] = []
"""What the command in progress has written, for the message of an interrupt."""


class OutputError(OSError):
    """Standard output takes no more."""


class StandardStream:
    """A standard stream whose failure does not lose what a command does besides.

    Attributes:
        patient: Whether a failure waits for `finish`, as it must while there are files to write;
            else it is raised at once.
    """

    def __init__(self, stream: TextIO, patient: bool = False) -> None:
        self._stream, self.patient = stream, patient
        self._failure: OutputError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text), self.patient)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush, self.patient)

    def write_bytes(self, data: bytes) -> None:
        """Writes what is the command's result itself, so that a failure cannot wait."""

        def act() -> None:
            self._stream.buffer.write(data)
            self._stream.buffer.flush()

        self._try(act, patient=False)

    def finish(self) -> None:
        """Raises the failure that has waited, or comes with the last characters."""
        self._try(self._stream.flush, patient=False)

    def _try(self, act: Callable[[], object], patient: bool) -> None:
        if self._failure is None:
            try:
                act()
            except OSError as error:
                problem = f"cannot write to standard output: {error.strerror or error}"
                self._failure = OutputError(error.errno, problem)
                self._silence()
        if self._failure is not None and not patient:
            raise self._failure

    def _silence(self) -> None:
        """Python writes what is still in the buffer once more when it ends, and would complain."""
        with suppress(OSError, io.UnsupportedOperation):
            number = os.open(os.devnull, os.O_WRONLY)
            os.dup2(number, self._stream.fileno())
            os.close(number)


@contextmanager
def standard_streams() -> Iterator[StandardStream]:
    """Standard output, while both streams are replaced by ones that do not fail in the middle."""
    fill_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal or file of another encoding takes what it can.
        sys.stdout.reconfigure(errors="replace")
    output = StandardStream(sys.stdout)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(output))
        # Nothing that is said there may stop the work.
        stack.enter_context(redirect_stderr(StandardStream(sys.stderr, patient=True)))
        yield output


def fill_standard_streams() -> None:
    """Opens those that the caller has closed, or the first files opened would take their place.

    What is then written to standard output fails, as it should; other output disappears.
    """
    modes = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}
    for number, mode in modes.items():
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


class Interrupts:
    """Ctrl-C in a command: it ends at once until `working` is set, later by KeyboardInterrupt.

    Attributes:
        seen: Whether it came; native code may then have made another error of it.
    """

    def __init__(self) -> None:
        self.working = self.seen = False

    def __enter__(self) -> "Interrupts":
        # A caller with a handler of its own keeps it.
        ours = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, end_at_once)
        self._active = ours and threading.current_thread() is threading.main_thread()
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.working:
            end_at_once()
        self.seen = True
        raise KeyboardInterrupt


def is_closed_pipe(error: OSError) -> bool:
    """Whether the reader of standard output has gone, as `| head` does: nothing to complain of."""
    return error.errno == errno.EPIPE
