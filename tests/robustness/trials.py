"""Many odd cases of one kind, in child processes that must survive them.

A kind is a module `test_KIND.py` beside this file with `COUNT` cases, `CHUNKS` child processes,
`SECONDS` that one case may take, and `prepare(folder)`, which returns `case(rng, note)`: it tries
one case, all of whose chances come from `rng`, tells by `note(text)` what it is about to do, and
returns or raises. Case i of a kind always is the same.

What a case may end in: a result that it finds right, an error of the project (`MimoFastError`), or
a ValueError or TypeError that a `raise` statement of the package raises. Anything else is a
failure: other exceptions, the same ones from inside torch or json, a message of several lines, an
abort, a hang, too much memory, a question on stdin, an error in another thread, and at the end file
descriptors that are still open.

The whole of it takes some four minutes of one core. To widen a run:

    MIMO_FAST_FUZZ=10 pytest -m slow tests/robustness      ten times as many cases
    MIMO_FAST_FUZZ_SEED=2 pytest -m slow tests/robustness  other cases

A failing test prints the command that tries its case alone, in a process without limits:

    python tests/robustness/trials.py audio_files 1234
"""

import builtins
import dis
import faulthandler
import gc
import importlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent
ROOT = TESTS.parent
PACKAGE = str(ROOT / "mimo_fast") + os.sep

SEED = os.environ.get("MIMO_FAST_FUZZ_SEED", "mimo-fast 1")
"""Of all cases; another one gives other cases."""

FACTOR = float(os.environ.get("MIMO_FAST_FUZZ", "1"))
"""By which the number of cases is multiplied."""

MEMORY = 2 * 2**30
"""Bytes of address space that a child may use beyond what it has when its model is loaded."""

PREPARE_SECONDS = 180
MESSAGE = 4000
"""Characters of an error's message at most."""

DEATHS = 25
"""Children of one chunk that may die before the rest of it is given up."""

Note = Callable[[str], None]
Case = Callable[[random.Random, Note], None]


class Wrong(Exception):
    """A case came to a result that is not right."""


@dataclass
class Failure:
    """One case that failed.

    Attributes:
        kind, case: Which one.
        note: What it did.
        what: What is wrong, in a few words; equal failures have equal ones.
        detail: Traceback and message.
    """

    kind: str
    case: int
    note: str
    what: str
    detail: str


def rng_of(kind: str, case: int) -> random.Random:
    return random.Random(f"{SEED} {kind} {case}")


# In the child: what an exception means


def fault_of(error: BaseException) -> str | None:
    """What is wrong with an exception that a case ended in; None if nothing is."""
    from mimo_fast import MimoFastError

    kind = type(error).__name__
    if isinstance(error, Wrong):
        return f"wrong result: {error}"
    frames = [*traceback.walk_tb(error.__traceback__)]
    where = _place(error)
    message = str(error)
    if isinstance(error, MimoFastError):
        if not message.strip():
            return f"{kind} without a message at {where}"
        if len(message.splitlines()) != 1:
            return f"{kind} of several lines at {where}"
        return None if len(message) <= MESSAGE else f"{kind} of over {MESSAGE} characters, {where}"
    ours = [frame for frame, _ in frames if frame.f_code.co_filename.startswith(PACKAGE)]
    if not isinstance(error, ValueError | TypeError):
        return f"{kind} at {where}"
    if not ours:
        # Python itself refuses the arguments of a call; a fault of this folder looks alike, so the
        # message must be the interpreter's.
        signature = ("argument", "positional", "keyword", "abstract", "unhashable")
        return None if any(word in message for word in signature) else f"{kind} at {where}"
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not _raises(last):
        return f"{kind} leaks at {where}"
    if len(message.splitlines()) != 1 or len(message) > MESSAGE:
        return f"{kind} of several lines, or too long, at {where}"
    return None


def _raises(place: TracebackType) -> bool:
    """Whether the frame is the package's, and the instruction a `raise` statement's."""
    code = place.tb_frame.f_code
    if not code.co_filename.startswith(PACKAGE):
        return False
    return code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _place(error: BaseException) -> str:
    """The innermost line of the package, and the innermost line of all."""
    lines = traceback.extract_tb(error.__traceback__)
    ours = [line for line in lines if line.filename.startswith(PACKAGE)]
    shown = dict.fromkeys(_shown(line) for line in (*ours[-1:], *lines[-1:]))
    return " in ".join(reversed([*shown])) or "no line"


def _shown(line: traceback.FrameSummary) -> str:
    path = line.filename
    for base in (str(ROOT), sys.prefix):
        path = path.removeprefix(base + os.sep)
    return f"{path.rpartition('site-packages/')[2]}:{line.lineno} {line.name}"


# In the child: running cases


@dataclass
class Report:
    """A file of JSON lines; each is whole when `add` returns, whatever happens to the process."""

    descriptor: int

    def add(self, **fields: Any) -> None:
        os.write(self.descriptor, (json.dumps(fields) + "\n").encode())


def run_cases(kind: str, first: int, last: int, folder: Path) -> None:
    """The child's main function."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    report = Report(os.open(folder / "report", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    current, note = first, ""

    def add(what: str, detail: str) -> None:
        failure = Failure(kind, current, note, what, detail[-6000:])
        report.add(failure=asdict(failure))

    def write_note(text: str) -> None:
        nonlocal note
        note = text
        report.add(note=text)

    def on_thread(arguments: Any) -> None:
        error = arguments.exc_value
        add(f"{type(error).__name__} ends a thread at {_place(error)}", repr(error))

    def ask(*_: object) -> str:
        add("asks on stdin", "".join(traceback.format_stack()))
        raise EOFError

    threading.excepthook = on_thread
    builtins.input = ask
    faulthandler.dump_traceback_later(PREPARE_SECONDS, exit=True)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a child before this one
    work.mkdir()
    os.chdir(work)
    module = importlib.import_module(f"test_{kind}")
    case = module.prepare(work)
    _limit_memory()
    opened: set[str] | None = None
    for current in range(first, last):
        report.add(begin=current)
        note = ""
        faulthandler.dump_traceback_later(module.SECONDS, exit=True)
        try:
            case(rng_of(kind, current), write_note)
        except MemoryError as error:
            faulthandler.cancel_dump_traceback_later()
            add(f"MemoryError at {_place(error)}", _formatted(error))
            report.add(done=current)
            os._exit(3)  # It may be in any state.
        except BaseException as error:  # KeyboardInterrupt and Rust's panics too
            if what := fault_of(error):
                add(what, _formatted(error))
        faulthandler.cancel_dump_traceback_later()
        if opened is None:
            gc.collect()
            opened = _descriptors()
    gc.collect()
    note = f"cases {first} to {last - 1}"
    if opened is not None and (left := _descriptors() - opened):
        add("file descriptors stay open", ", ".join(sorted(left)))


def _formatted(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-12))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _descriptors() -> set[str]:
    """Open descriptors and what they are, without the one that lists them."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return found


# In the test


def chunk_bounds(count: int, chunks: int, chunk: int) -> tuple[int, int]:
    total = max(chunks, round(count * FACTOR))
    return total * chunk // chunks, total * (chunk + 1) // chunks


def failures(kind: str, first: int, last: int, folder: Path) -> list[Failure]:
    """Tries cases first ... last - 1 in children; the next one goes on after a case that ends
    one."""
    found: list[Failure] = []
    for _ in range(DEATHS):
        report = folder / "report"
        report.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-P", __file__, kind, str(first), str(last), str(folder)],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        lines = [*map(json.loads, report.read_text().splitlines())] if report.exists() else []
        found += [Failure(**line["failure"]) for line in lines if "failure" in line]
        if done.returncode == 0:
            return found
        begun = [line["begin"] for line in lines if "begin" in line]
        if not begun:
            tail = done.stderr[-6000:]
            return [*found, Failure(kind, first, "", "the child does not start", tail)]
        if not any("done" in line for line in lines):
            notes = [line["note"] for line in lines[_last_begin(lines) :] if "note" in line]
            what = _death(done.returncode, done.stderr)
            note = notes[-1] if notes else ""
            found.append(Failure(kind, begun[-1], note, what, done.stderr[-6000:]))
        first = begun[-1] + 1
        if first >= last:
            return found
    note = f"cases {first} to {last - 1}"
    return [*found, Failure(kind, first, note, "not tried: too many children died", "")]


def _last_begin(lines: list[dict[str, Any]]) -> int:
    return max(i for i, line in enumerate(lines) if "begin" in line)


def _death(code: int, stderr: str) -> str:
    """How a child ended, and where it was."""
    threads = stderr.split("hread 0x")
    main = next((text for text in threads if " in run_cases" in text), stderr)
    frames = [line for line in main.splitlines() if line.startswith('  File "')]
    shown = [frame.replace(str(ROOT) + os.sep, "").strip() for frame in frames]
    ours = [frame for frame in shown if '"mimo_fast/' in frame][:1]
    how = "hangs" if "Timeout (" in stderr else f"ends the process ({code})"
    return f"{how} at {' in '.join(dict.fromkeys([*shown[:1], *ours]))}"


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(HERE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def summary(found: list[Failure]) -> str:
    """Failures by what is wrong, each with its first case and how to try it again."""
    kinds: dict[str, list[Failure]] = {}
    for failure in found:
        kinds.setdefault(failure.what, []).append(failure)
    parts = [f"{len(found)} cases failed in {len(kinds)} ways (seed {SEED!r})"]
    for what, cases in sorted(kinds.items(), key=lambda item: -len(item[1])):
        case = cases[0]
        parts += [
            f"\n{len(cases)} x {what}",
            f"  case {case.case}: {case.note}",
            f"  again: python tests/robustness/trials.py {case.kind} {case.case}",
            *(f"  | {line}" for line in case.detail.splitlines()[-14:]),
        ]
    return "\n".join(parts)


def check(kind: str, count: int, chunks: int, chunk: int, folder: Path) -> None:
    """Fails with a summary if a case of the chunk does."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's account of memory and descriptors")
    found = failures(kind, *chunk_bounds(count, chunks, chunk), folder)
    if record := os.environ.get("MIMO_FAST_FUZZ_RECORD"):
        with open(record, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(failure)) + "\n" for failure in found)
    if found:
        pytest.fail(summary(found), pytrace=False)


def try_one(kind: str, case: int) -> None:
    """Tries a case in this process and shows what happens."""
    import tempfile

    sys.path[:0] = [str(ROOT), str(HERE), str(TESTS)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = importlib.import_module(f"test_{kind}").prepare(Path(folder))
        try:
            run(rng_of(kind, case), print)
        except BaseException as error:
            traceback.print_exc()
            print("fails:" if (what := fault_of(error)) else "as it should be", what or "")
        else:
            print("a result")


if __name__ == "__main__":
    # One module, whatever it is called: a second copy of `Wrong` would be another class.
    sys.modules["trials"] = sys.modules[__name__]
    if len(sys.argv) == 3:
        try_one(sys.argv[1], int(sys.argv[2]))
    else:
        run_cases(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
