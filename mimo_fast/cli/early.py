"""The answer to Ctrl-C before there is any work; nothing else is imported that takes time."""

import os

INTERRUPTED = 130


def end_at_once(number: int = 0, frame: object = None) -> None:
    """Ends the process, as long as modules are imported.

    A KeyboardInterrupt would not do: initialisers of native modules make other errors of it.
    """
    try:
        os.write(2, b"mimo-fast: interrupted; nothing was written\n")
    finally:
        os._exit(INTERRUPTED)
