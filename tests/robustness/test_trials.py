"""What the children report: every kind of failure is seen, and nothing else is one."""

import pytest
from trials import Failure, chunk_bounds, failures, rng_of, summary

pytestmark = pytest.mark.slow

CASES = """
import ctypes, json, os, threading
from mimo_fast.audio.resample import check_rate
from mimo_fast.errors import AudioError
from trials import PACKAGE, Wrong

SECONDS = 2

def fine(): pass
def own_error(): raise AudioError("one line")
def checked(): check_rate("x")
def signature(): check_rate(1, 2, 3, 4)
def leak(): exec(compile("None.field", PACKAGE + "config.py", "exec"))
def foreign(): json.loads("{")
class Lines(AudioError): __str__ = Exception.__str__
def lines(): raise Lines("one\\ntwo")
def silent(): raise AudioError("")
def wrong(): raise Wrong("not so")
def asks():
    try:
        input("run the code? ")
    except EOFError:
        pass
def thread():
    running = threading.Thread(target=lambda: [][0])
    running.start()
    running.join()
def memory(): bytearray(2**34)
def hang(): threading.Event().wait()
def abort(): os.abort()
def crash(): ctypes.string_at(0)
def opens():
    for _ in range(3):
        os.open("/dev/null", os.O_RDONLY)

ALL = [fine, own_error, checked, signature, leak, foreign, lines, silent, wrong, asks, thread]
ALL += [memory, hang, abort, crash, fine, opens, fine]

def prepare(folder):
    def case(rng, note):
        function = ALL[NUMBER[rng.random()]]
        note(function.__name__)
        function()
    return case

from trials import rng_of
NUMBER = {rng_of("toy", i).random(): i for i in range(len(ALL))}
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Failure]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "test_toy.py").write_text(CASES, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        return failures("toy", 0, 18, folder)


@pytest.mark.parametrize(
    ("note", "what"),
    [
        ("leak", "AttributeError at mimo_fast/config.py"),
        ("foreign", "JSONDecodeError at "),
        ("lines", "Lines of several lines"),
        ("silent", "AudioError without a message"),
        ("wrong", "wrong result: not so"),
        ("asks", "asks on stdin"),
        ("thread", "IndexError ends a thread"),
        ("memory", "MemoryError at "),
        ("hang", "hangs at "),
        ("abort", "ends the process (-6)"),
        ("crash", "ends the process (-11)"),
        ("cases 15 to 17", "file descriptors stay open"),
    ],
)
def test_a_failure_is_reported(found: list[Failure], note: str, what: str) -> None:
    told = [failure.what for failure in found if failure.note == note]
    assert len(told) == 1
    assert what in told[0]


def test_what_is_right_is_not(found: list[Failure]) -> None:
    notes = {failure.note for failure in found}
    assert not notes & {"fine", "own_error", "checked", "signature", "opens"}


def test_a_summary_says_how_to_try_again(found: list[Failure]) -> None:
    text = summary(found)
    assert "12 cases failed in 12 ways" in text
    assert "python tests/robustness/trials.py toy 12" in text
    assert "ctypes" in text


def test_cases_are_the_same_in_every_run() -> None:
    assert rng_of("toy", 3).random() == rng_of("toy", 3).random()
    assert rng_of("toy", 3).random() != rng_of("toy", 4).random()
    bounds = [chunk_bounds(10, 3, chunk) for chunk in range(3)]
    assert bounds[0][0] == 0
    assert [end for _, end in bounds[:-1]] == [begin for begin, _ in bounds[1:]]
