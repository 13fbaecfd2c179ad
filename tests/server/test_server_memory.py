"""What large requests leave behind is given back."""

import platform
import subprocess
import sys

import pytest

from mimo_fast.server import memory
from mimo_fast.server.memory import Trimmer, resident

MB = 1 << 20


GIVEN_BACK = """
from mimo_fast.server.memory import Trimmer, resident
trimmer, before = Trimmer(lambda: False), resident()
# In pieces that are freed around small ones, which hold the heap's end.
parts, kept = [], []
for _ in range(4000):
    parts.append(bytes(50_000))
    kept.append(bytes(500))
del parts
held = resident() - before
trimmer.look()
print(held, resident() - before, trimmer.times)
"""
"""In a process of its own: elsewhere there may be room for all of it in the heap already."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_is_given_back():
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, check=True)
    held, left, times = map(int, done.stdout.split())
    assert held > 100 * MB
    assert times == 1
    assert left < held / 4


def test_it_waits_while_the_model_works(monkeypatch):
    found, busy = [1000 * MB], [True]
    monkeypatch.setattr(memory, "resident", lambda: found[0])
    trimmer = Trimmer(lambda: busy[0])
    if trimmer._trim is None:
        pytest.skip("nothing to trim here")
    trimmer.look()
    found[0] = 1200 * MB
    trimmer.look()
    assert trimmer.times == 0
    busy[0] = False
    trimmer.look()
    assert trimmer.times == 1
    # What remained is what is held from now on.
    trimmer.look()
    assert trimmer.times == 1
    busy[0], found[0] = True, 1800 * MB
    trimmer.look()
    assert trimmer.times == 2


def test_a_system_that_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATM", tmp_path / "none")
    assert resident() == 0
    Trimmer(lambda: False).look()
