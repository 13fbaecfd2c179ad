"""The developers' benchmarks.

python -m benchmarks ops --quick                          every op once, at most three minutes on two cores
python -m benchmarks ops --op 'backbone.*' --m 1 4 -o FILE.jsonl
python -m benchmarks e2e --preset 7b --quantization int4  groups and whole requests, by batch, context and task
python -m benchmarks baselines                            a reply as upstream runs it, beside ours
python -m benchmarks profile                              where the time of an audio group goes, by kernel
python -m benchmarks --compare HEAD~1 --op '*.qkv'        is the working tree faster than that commit?
python -m benchmarks suite                                make bench: a CPU within ten minutes, and the report
python -m benchmarks --report                             docs/performance.md from benchmarks/results
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks import compare, report
from benchmarks.baselines.run import add_baselines
from benchmarks.e2e import add_e2e
from benchmarks.harness import print_outcome, run_cases
from benchmarks.ops import select
from benchmarks.profile import add_profile
from benchmarks.records import JsonLines
from benchmarks.suite import add_suite
from mimo_fast.bench.ceiling import ceiling
from mimo_fast.errors import MimoFastError

SECONDS, QUICK_SECONDS = 0.5, 0.1
"""Of measuring, for each row."""


def add_cases(parser: argparse.ArgumentParser) -> None:
    """Which cases, and where."""
    parser.add_argument("--op", default="*", metavar="GLOB", help="such as 'backbone.*' or '*.qkv'")
    parser.add_argument(
        "--format", default="*", metavar="GLOB", help="dense, int8, int4, nf4, bfloat16, ..."
    )
    parser.add_argument(
        "--m",
        type=int,
        nargs="+",
        metavar="M",
        help="rows; all that the op is measured at by default",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: one a core)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.jsonl", help="append a record for each row"
    )


def add_ops(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ops", help="time every op beside what the machine could do at best"
    )
    add_cases(parser)
    parser.add_argument(
        "--provider", action="append", metavar="GLOB", help="such as 'ours-*'; may be repeated"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rows, short runs, no torch.compile"
    )
    parser.add_argument(
        "--seconds", type=float, help=f"for each row (default {SECONDS}, quick {QUICK_SECONDS})"
    )
    parser.set_defaults(run=run_ops)


def add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare", help="the working tree against another commit; --compare REF is the same"
    )
    parser.add_argument("reference", metavar="REF", help="the other commit, such as HEAD~1")
    add_cases(parser)
    parser.add_argument(
        "--rounds",
        type=int,
        default=compare.ROUNDS,
        help="each has two pairs (default %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=compare.SECONDS, help="of each measurement"
    )
    parser.set_defaults(run=run_compare)


def run_ops(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cases = select(args.op, args.m, args.format, quick=args.quick)
    wanted = args.provider or ["*"]
    seconds = args.seconds if args.seconds is not None else QUICK_SECONDS if args.quick else SECONDS
    machine = ceiling(device)
    print(machine, flush=True)
    outcome = run_cases(
        cases,
        device,
        machine,
        JsonLines(args.output),
        seconds=seconds,
        providers=lambda name: any(fnmatch(name, glob) for glob in wanted),
    )
    print_outcome(outcome)
    if not outcome.records and not outcome.refused:
        print("nothing was measured: no wanted provider runs here", file=sys.stderr)
        return 1
    return outcome.exit_code


def run_compare(args: argparse.Namespace) -> int:
    wanted = {
        "op": args.op,
        "format": args.format,
        "m": args.m,
        "quick": args.m is None,
        "device": args.device,
        "threads": args.threads or torch.get_num_threads(),
    }
    # Unknown ops are bad usage, and known before anything is checked out.
    select(args.op, args.m, args.format)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, not {args.rounds}")
    # So that what was checked out is removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    compare.run_compare(
        args.reference, wanted, JsonLines(args.output), rounds=args.rounds, seconds=args.seconds
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    add_ops(commands)
    add_e2e(commands)
    add_baselines(commands)
    add_profile(commands)
    add_compare(commands)
    add_suite(commands)
    made_report = commands.add_parser("report")
    report.add_options(made_report.add_argument)
    made_report.set_defaults(run=report.run)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a wrong result or a failure, 2 for bad
    usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["--compare"], ["--report"]):
        given[0] = given[0].removeprefix("--")
    args = parser().parse_args(given)
    try:
        return args.run(args)
    except (compare.CompareError, MimoFastError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
