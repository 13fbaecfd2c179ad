"""The `mimo-fast` command: exit codes and one-line errors.

Exit codes are 0 done, 1 failed, 2 bad usage, 130 interrupted. Results go to stdout, everything else
to stderr. What a command takes is in `parser.py`, what it does in the module of its name, imported
once it is asked for: `--help` does not wait for torch.
"""

import argparse
import os
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from mimo_fast.cli.arguments import (
    check_arguments,
    whole_checkpoints,
)
from mimo_fast.cli.early import INTERRUPTED
from mimo_fast.cli.parser import build_parser
from mimo_fast.cli.process import (
    Interrupts,
    OutputError,
    StandardStream,
    is_closed_pipe,
    standard_streams,
    written,
)
from mimo_fast.cli.reports import TRACEBACK, report, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    written.clear()
    args = argparse.Namespace(writes=False, folders=())
    with standard_streams() as output, Interrupts() as interrupts:
        try:
            code = _run(arguments, args, output, interrupts)
            output.finish()
            return code
        except OutputError as error:
            if not is_closed_pipe(error):
                report(error)
            return 1
        except KeyboardInterrupt:
            return _end_interrupted(args)
        except Exception as error:
            if interrupts.seen:
                return _end_interrupted(args)
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            report(error)
            return 1
        finally:
            with suppress(OutputError):
                output.finish()


def _run(
    arguments: Sequence[str] | None,
    args: argparse.Namespace,
    output: StandardStream,
    interrupts: Interrupts,
) -> int:
    try:
        build_parser().parse_args(arguments, args)
        check_arguments(args)
    except SystemExit:
        # --help and --version have printed.
        output.finish()
        raise
    output.patient = args.writes
    command = import_module(f"mimo_fast.cli.{args.module}")
    interrupts.working = True
    return int(command.run(args))


def _end_interrupted(args: argparse.Namespace) -> int:
    done = [f"wrote {', '.join(written)}"] if written else []
    for folder in args.folders:
        done += [f"wrote {each}" for each in whole_checkpoints(folder) if each not in args.before]
        files = folder.iterdir() if folder.is_dir() else ()
        if not done and any(file not in args.before for file in files):
            done.append(f"{folder} is incomplete")
    if not done and args.writes:
        done.append("nothing was written")
    say("; ".join(["mimo-fast: interrupted", *done]))
    return INTERRUPTED
