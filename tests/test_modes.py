"""Torch's modes of a caller change no bit, whether they surround `load`, the calls, or both."""

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KIT_PAIR, slow_after, snr_db
from torch import Tensor
from torch.utils._device import _device_constructors

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.modes import in_own_modes
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.engine.engine import Engine

PACKAGE = Path(mimo_fast.__file__).parent

FACTORIES = {function.__name__.removeprefix("fft_") for function in _device_constructors()}
"""Functions of torch whose results follow the default device, by torch's own list."""

KEEPS_DTYPE = {"as_tensor", "asarray"}
"""Those of them whose dtype is their argument's."""


def careless(source: str) -> Iterator[str]:
    """Uses of a factory that is not called with dtype= and device= on the spot."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            taken = FACTORIES & {alias.name for alias in node.names}
            yield from (f"line {node.lineno}: from torch import {name}" for name in taken)
        if isinstance(node, ast.Attribute) and node.attr in FACTORIES:
            owner = ast.unparse(node.value)
            if owner != "torch" and not owner.startswith("torch."):
                continue
            call = calls.get(id(node))
            given = {keyword.arg for keyword in call.keywords} if call else set()
            needed = {"device"} if node.attr in KEEPS_DTYPE else {"device", "dtype"}
            if not needed <= given:
                yield f"line {node.lineno}: {ast.unparse(call or node)}"


def test_every_tensor_is_made_with_a_dtype_and_a_device():
    found = [
        f"{path.relative_to(PACKAGE)}, {place}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for place in careless(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3)",
        "torch.zeros(3, device=x.device)",
        "torch.arange(3, dtype=torch.int64)",
        "torch.tensor([1], **place)",
        "torch.fft.fftfreq(3)",
        "partial(torch.zeros, device='cpu')",
        "from torch import zeros",
        "torch.as_tensor(x)",
    ],
)
def test_the_search_finds(line):
    assert list(careless(line))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "cpu": lambda: default_device("cpu"),
    "block of a device": lambda: torch.device("meta"),
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
}

WAV = torch.sin(torch.arange(24000, dtype=torch.float32) * 0.05)
SHORT = {"max_new_tokens": 8, "seed": 3}


def outcome(model: MimoAudio, folder: Path) -> dict[str, Any]:
    """What each way into a model gives."""
    codes = model.codec.encode(WAV)
    prompt = model.get_tts_sft_prompt("Hello there.", seed=1)
    session = model.session(seed=5)
    wav, rate = load_audio(WAV[:9999].clone(), 24000, source_rate=16000), model.codec.sample_rate
    stream = model.codec.stream()
    parts = [stream.push(part) for part in codes[:, :24].split(4, dim=1)]
    samplers = {"global_sampler": model.default_global_sampler}
    found = {
        "load_audio": wav,
        "encode": codes,
        "decode": model.codec.decode(codes),
        "codec stream": torch.cat([*parts, stream.finish()]),
        "prompt": prompt,
        "forward": model.forward(prompt, return_audio=True, min_new_tokens=8, **SHORT),
        "text": model.asr_sft(WAV, **SHORT),
        "stream": torch.cat([c.audio for c in model.stream("tts", "Hi.", **SHORT)]),
        "session": torch.cat([c.audio for c in session.stream(WAV, max_new_tokens=8)]),
        "dialogue": session.ids,
        "generate": mimo_fast.generate(model, prompt, max_new_tokens=8, seed=[4], **samplers),
        "rate": rate,
    }
    model.tts_sft("Hello there.", folder / "out.wav", max_new_tokens=30, min_new_tokens=30, seed=3)
    found["file"] = (folder / "out.wav").read_bytes()
    session.save(folder / "session")
    again = model.restore_session(folder / "session")
    found["restored"] = torch.cat([c.audio for c in again.stream(WAV, max_new_tokens=3)])
    return found


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, Tensor):
            assert got[name].dtype == value.dtype, name
            assert got[name].device == value.device, name
            assert not got[name].requires_grad, name
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> dict[str, Any]:
    return outcome(mimo_fast.load(*KIT_PAIR, device="cpu"), tmp_path_factory.mktemp("wanted"))


@pytest.mark.parametrize("mode", slow_after(4, MODES))
def test_around_everything(mode, wanted, tmp_path):
    with MODES[mode]():
        same(outcome(mimo_fast.load(*KIT_PAIR, device="cpu"), tmp_path), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_around_load_alone(mode, wanted, tmp_path):
    with MODES[mode]():
        model = mimo_fast.load(*KIT_PAIR, device="cpu")
        model.engine.sequence(1)
    same(outcome(model, tmp_path), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_around_calls_alone(mode, wanted, tmp_path):
    model = mimo_fast.load(*KIT_PAIR, device="cpu")
    with MODES[mode]():
        same(outcome(model, tmp_path), wanted)
    same(outcome(model, tmp_path), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("mode", ["float64", "meta", "inference", "autocast"])
def test_quantized_models(mode, quantization, tmp_path):
    options = {"device": "cpu", "quantization": quantization}
    want = outcome(mimo_fast.load(*KIT_PAIR, **options), tmp_path)
    with MODES[mode]():
        same(outcome(mimo_fast.load(*KIT_PAIR, **options), tmp_path), want)


def test_the_number_of_threads_changes_no_token_and_no_code(wanted, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        got = outcome(mimo_fast.load(*KIT_PAIR, device="cpu"), tmp_path)
    finally:
        torch.set_num_threads(before)
    for name, value in wanted.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # oneDNN's convolutions sum in an order that depends on the number of threads.
            assert snr_db(got[name], value) > 100, name
        elif isinstance(value, Tensor):
            assert torch.equal(got[name], value), name
        elif name != "file":
            assert got[name] == value, name


def test_a_mode_is_the_callers_own_again_after_an_error():
    model = mimo_fast.load(*KIT_PAIR, device="cpu")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with pytest.raises(ValueError, match="codes must be"):
                model.codec.decode(torch.zeros(1, dtype=torch.int64))
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")


class Guard:
    """Stands in for torch.cuda.device."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.index, self.before = device.index, Guard.current

    def __enter__(self) -> None:
        Guard.current = self.index

    def __exit__(self, *_: object) -> None:
        Guard.current = self.before


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of which the first is current."""
    monkeypatch.setattr(Guard, "current", 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: Guard.current)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:0", "cuda", "cpu"])
def test_the_device_of_a_model_is_current_while_it_computes(cards, device):
    class Model:
        def __init__(self) -> None:
            self.device = torch.device(device)

        @in_own_modes
        def compute(self) -> int:
            return torch.cuda.current_device()

    class Stream:
        @in_own_modes
        def __init__(self, model: Model) -> None:
            self.made = torch.cuda.current_device()

    expected = int(device == "cuda:1")
    assert Model().compute() == expected
    assert Stream(Model()).made == expected
    assert torch.cuda.current_device() == 0


def test_what_launches_work_knows_its_device(model):
    codec = model.codec
    for each in (model.engine, codec, codec.stream(), model.lm):
        assert each.device == torch.device("cpu")
    for owner, names in (
        (Engine, "__init__ warmup export _step"),
        (Codec, "encode encode_together encode_later warmup warm_up_encoder"),
        (CodecNetwork, "encode decode moments"),
        (CodecStream, "__init__ push finish"),
    ):
        for name in names.split():
            assert hasattr(vars(owner)[name], "__wrapped__"), f"{owner.__name__}.{name}"
