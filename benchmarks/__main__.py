"""The developers' benchmarks.

python -m benchmarks ops --quick                          every op once, in three minutes at most
python -m benchmarks ops --op 'backbone.*' --m 1 4 -o FILE.jsonl
python -m benchmarks e2e --preset 7b --quantization int4  groups and whole requests
python -m benchmarks baselines                            a reply as upstream runs it, beside ours
python -m benchmarks profile                              an audio group's time, by kernel
python -m benchmarks --compare HEAD~1 --op '*.qkv'        faster than that commit?
python -m benchmarks prompts                              a CPU's int4 and int8, of its integer peak
python -m benchmarks robustness                           words wrong in recordings as they are
python -m benchmarks serving                              make soak: a server after hours of use
python -m benchmarks page                                 make soak: the page after an hour of talk
python -m benchmarks load                                 hundreds of people at once
python -m benchmarks simulate --published                simulated: an H100, a 4090, eight
python -m benchmarks engine                               predicted: a persistent kernel's group
python -m benchmarks suite                                make bench: a CPU in ten minutes
python -m benchmarks --report                             docs/performance.md from the results
python -m benchmarks add FILE.json                        a shared `mimo-fast bench` into the report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import (
    baselines,
    community,
    compare,
    e2e,
    engine_report,
    ops,
    page,
    profile,
    prompts,
    report,
    robustness,
    serving,
    suite,
)
from benchmarks.load import command as load
from benchmarks.load import simulate
from mimo_fast.errors import MimoFastError

COMMANDS = {
    "ops": (ops, "time every op beside what the machine could do at best"),
    "e2e": (e2e, "groups and whole requests of a model or several"),
    "baselines": (baselines, "a spoken reply as upstream runs it, beside ours"),
    "profile": (profile, "where the time of an audio group goes, kernel by kernel"),
    "prompts": (prompts, "products of prompts on a CPU beside its integer peak"),
    "compare": (compare, "the working tree against another commit; --compare REF is the same"),
    "robustness": (robustness, "words wrong in quiet, noisy and long recordings"),
    "serving": (serving, "make soak: a server's memory, threads and files after hours of use"),
    "page": (page, "make soak: memory of the page and its server after an hour of talk"),
    "load": (load, "people at once: streams carried, first audio, groups a second"),
    "simulate": (simulate, "the engine's policy with measured or predicted step times"),
    "engine": (
        engine_report,
        "what a persistent kernel costs: predicted, beside what was measured",
    ),
    "suite": (suite, "make bench: the CPU's tables within ten minutes, and the report"),
    "report": (report, "docs/performance.md from benchmarks/results; --report is the same"),
    "add": (community, "check a file of `mimo-fast bench --json` and take it into the results"),
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, **style)
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        own = commands.add_parser(name, help=about, description=module.__doc__, **style)
        module.add_options(own.add_argument)
        own.set_defaults(run=module.run)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: success. 1: a wrong result or a failure. 2: bad usage.
    """
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
