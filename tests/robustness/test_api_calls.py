"""Every public function and method with arguments that make no sense, and in odd surroundings."""

import contextlib
import inspect
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calls, inner_calls
from odd_values import changed
from pairs import Bystander, answer, check_speech, load_kit, same
from trials import Case, Note, Wrong, check

COUNT, CHUNKS, SECONDS = 1000, 2, 30

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_an_odd_call_has_a_result_or_an_error(chunk: int, tmp_path: Path) -> None:
    check("api_calls", COUNT, CHUNKS, chunk, tmp_path)


LEFT_OUT = {
    # Results: nobody but the package makes them.
    "BatchResult",
    "Chunk",
    "Conversion",
    "ReplyText",
    "Timing",
    # Takes the parts of a loaded model.
    "Codec",
    "Converter",
    "LM",
    "Session",
    # No arguments.
    "MimoAudio.clear_history",
    "MimoAudio.close",
    "Codec.offload_encoder",
    "Session.close",
    "Session.reset",
    "Session.take_back",
}


def test_every_public_function_is_called(tmp_path: Path) -> None:
    """A new one needs a line in `calls`."""
    import mimo_fast

    bystander = Bystander()
    tried = {**calls(bystander, tmp_path), **inner_calls(bystander)}
    named = {name.partition(" ")[0] for name in tried} | LEFT_OUT
    public = set[str]()
    for name in mimo_fast.__all__:
        thing = getattr(mimo_fast, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            continue
        public.add(name)
        if inspect.isclass(thing) and not issubclass(thing, str):
            members = inspect.getmembers_static(thing)
            public |= {
                f"{name}.{each}"
                for each, member in members
                if not each.startswith("_")
                and (inspect.isfunction(member) or isinstance(member, classmethod))
            }
    assert public <= named, f"not called: {', '.join(sorted(public - named))}"


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": lambda: _default_dtype(torch.float64),
    "float16": lambda: _default_dtype(torch.float16),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: _deterministic(),
    "float errors": lambda: np.errstate(all="raise"),
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def prepare(folder: Path) -> Case:
    bystander = Bystander()
    public, inner = [*calls(bystander, folder)], [*inner_calls(bystander)]

    def surrounded(rng: random.Random, note: Note) -> None:
        """A model is loaded and answers as ever, whatever torch is set to."""
        name = rng.choice([*SURROUNDINGS])
        fresh = rng.random() < 0.5
        note(f"{name} around {'load and' if fresh else ''} an answer")
        try:
            with SURROUNDINGS[name]():
                given = answer(load_kit() if fresh else bystander.model)
        except Exception as error:
            raise Wrong(f"{name} around it: {error!r}") from error
        if not same(given, bystander.expected):
            raise Wrong(f"{name} around it changes the answer")

    def case(rng: random.Random, note: Note) -> None:
        if rng.random() < 0.08:
            with bystander.watched(rng):
                surrounded(rng, note)
            return
        if rng.random() < 0.1:
            trusting(rng, note)
            return
        # What add_history continues, so that a case does not depend on those before it.
        bystander.model.clear_history()
        if rng.random() < 0.3:
            answer(bystander.model)
        name = rng.choice(public)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            function, arguments = calls(bystander, Path(own))[name]
            positional, named, what = changed(arguments, rng)
            note(f"{name}: {what}")
            with bystander.watched(rng):
                result = function(*positional, **named)
                if hasattr(result, "__next__"):
                    result = [*result]
                if isinstance(result, list) and result and hasattr(result[0], "audio"):
                    check_speech(result)

    def trusting(rng: random.Random, note: Note) -> None:
        """Functions over the weights trust the package's layers to give them tensors that fit. They
        may raise whatever torch raises, but not end the process or spoil the weights."""
        name = rng.choice(inner)
        function, arguments = inner_calls(bystander)[name]
        positional, named, what = changed(arguments, rng)
        note(f"{name}: {what}")
        try:
            with torch.no_grad():
                function(*positional, **named)
        except MemoryError:
            raise
        except Exception as error:
            bystander.check(error)
        else:
            bystander.check(None)

    return case
