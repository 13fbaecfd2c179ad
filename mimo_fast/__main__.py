"""The `mimo-fast` command, also as `python -m mimo_fast`."""

import signal

from mimo_fast.cli.early import end_at_once


def main() -> int:
    """`mimo_fast.cli.main.main` in a process of its own."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, end_at_once)
    try:
        from mimo_fast.cli.main import main as run

        return run()
    finally:
        # Nothing is left to lose while the interpreter ends, which may take a second.
        if listens:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    raise SystemExit(main())
