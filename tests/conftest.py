"""Fixtures that every test may use. Nothing here may be changed by a test: copy before altering."""

import copy
import ctypes
from pathlib import Path

import pytest
import torch
from emulated import SOURCES, compiled_once
from helpers import KIT, KIT_PAIR, THREE, write_pair
from replies import CAPACITY, GREEDILY, SAMPLED, Drawn, RequestSpec, drawn
from safetensors.torch import load_file
from variants import VARIANTS, Loaded

import mimo_fast
from mimo_fast.kernels.cuda import graph_conditional, library
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import Limits
from mimo_fast.sampling import GREEDY
from mimo_fast.testing.parity import Golden

try:
    from hypothesis import settings
except ImportError:  # A bare machine with a GPU runs the tests that do without.
    pass
else:
    # Machines differ in speed, and no test is about time.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")

# Small matrices: more threads only cost synchronisation.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, in tests marked `gpu`, the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def kit() -> Path:
    """The parity kit: checkpoint/lm, checkpoint/codec, audio/*.wav, golden/*."""
    return KIT


@pytest.fixture(scope="session")
def audio(kit: Path) -> list[Path]:
    """24 kHz mono, 16 kHz mono, 24 kHz stereo."""
    return [kit / "audio" / name for name in ("en_m_24k.wav", "en_f_16k.wav", "zh_24k_stereo.wav")]


@pytest.fixture(scope="session")
def golden(kit: Path) -> Golden:
    return Golden(kit)


@pytest.fixture(scope="session")
def model() -> mimo_fast.MimoAudio:
    """The kit's tiny checkpoint pair on the CPU, float32."""
    return mimo_fast.load(*KIT_PAIR, device="cpu")


@pytest.fixture(scope="session")
def tuned() -> mimo_fast.MimoAudio:
    """The kit's pair with three adapters, of which each request chooses one or none."""
    return mimo_fast.load(*KIT_PAIR, device="cpu", adapters=THREE, merge_adapters=False)


@pytest.fixture
def greedy(model: mimo_fast.MimoAudio) -> mimo_fast.MimoAudio:
    """A model whose dialogues are greedy, and whose engine remembers no voice."""
    greedy = copy.copy(model)
    greedy.engine.steps.prefixes.clear()
    greedy.task_sampler_configs = {"spoken_dialogue": {"global": GREEDY, "local": GREEDY}}
    return greedy


@pytest.fixture(scope="session", params=VARIANTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Random checkpoint pairs of several dimensions, one after the other."""
    variant = VARIANTS[request.param]
    lm, codec = write_pair(tmp_path_factory.mktemp(request.param), variant.lm, variant.codec)
    return Loaded(mimo_fast.load(lm, codec, device="cpu"), load_file(lm / "model.safetensors"))


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of CUDA kernels, compiled for the CPU."""
    path = compiled_once(tmp_path_factory, "cuda", sorted(SOURCES.glob("*.cu")))
    return graph_conditional.declared(library.declared(ctypes.CDLL(str(path))))


@pytest.fixture(scope="session")
def requests(model: mimo_fast.MimoAudio, golden: Golden) -> list[RequestSpec]:
    """Six prompts of several tasks, greedy and sampled in turn, with and without stop tokens."""
    special = model.tokenizer.special
    stops = frozenset({special.eos, special.eostm, special.im_end})
    made = []
    for i, name in enumerate(sorted(golden.meta["prompts"])[:6]):
        limits = Limits(9 + 3 * i, min_new=4 * (i % 3), stop_ids=stops if i % 2 else frozenset())
        ids = golden.get(f"prompts:{name}").long()
        ids = ids[:, : 4 * min(ids.shape[1] // 4, 36)]
        made.append(RequestSpec(ids, 100 + i, (GREEDILY, SAMPLED)[i % 2], limits))
    return made


@pytest.fixture(scope="session")
def alone(model: mimo_fast.MimoAudio, requests: list[RequestSpec]) -> list[Drawn]:
    """What each request gives in an engine of its own."""
    return [drawn(list(request.start(Engine(model.lm, 1, CAPACITY)))) for request in requests]


@pytest.fixture
def engine(model: mimo_fast.MimoAudio) -> Engine:
    return Engine(model.lm, 3, CAPACITY)
