"""Sampler settings, stop rules and the presets of the tasks; names and values are upstream's."""

import copy
import operator
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.json_files import shown
from mimo_fast.kernels.sample import TAIL_OFF, SamplerTensors

Seed = int | Sequence[int] | Tensor | np.ndarray | None
"""One seed for all rows, one for each row, or None for fresh ones, see `fresh_seed`."""

SEEDS = 2**63
"""Number of seeds: the samplers read an int64 that is not negative."""


@checked
@dataclass
class MiMoSampler:
    """Settings of one sampler (upstream `MiMoSampler`); None leaves a step out.

    It is greedy without do_sample, and at temperature 0, by which upstream divides.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, not {self.top_p}")


@runtime_checkable
class Sampler(Protocol):
    """What has the settings of a `MiMoSampler`, as upstream's class of that name does."""

    do_sample: Any
    temperature: Any
    top_k: Any
    top_p: Any


def as_sampler(settings: Sampler) -> MiMoSampler:
    """Anybody's settings, checked as our own are."""
    if isinstance(settings, MiMoSampler):
        return settings
    named = ("do_sample", "temperature", "top_k", "top_p")
    return MiMoSampler(**{name: getattr(settings, name) for name in named})


GREEDY = MiMoSampler(do_sample=False)
DEFAULT_GLOBAL_SAMPLER = MiMoSampler(do_sample=True, temperature=0.6, top_k=50, top_p=0.95)
DEFAULT_LOCAL_SAMPLER = MiMoSampler(do_sample=True, temperature=0.9, top_k=50, top_p=0.95)

_SPEECH = MiMoSampler(do_sample=True, temperature=0.9, top_p=0.95)
_TEXT = {
    "asr": MiMoSampler(do_sample=False, temperature=1.0, top_p=1.0),
    "tts": MiMoSampler(do_sample=True, temperature=0.6, top_p=1.0),
    "spoken_dialogue": MiMoSampler(do_sample=True, temperature=0.6, top_p=0.95),
    "audio_understanding": MiMoSampler(do_sample=True, temperature=0.3, top_p=0.95),
    "text_chat": MiMoSampler(do_sample=True, temperature=0.4, top_p=0.95),
    "in_context_learning_s2s": MiMoSampler(do_sample=False, temperature=1.0, top_p=1.0),
    # MiMo-Audio-Eval's, of the base model.
    "qa": MiMoSampler(do_sample=False, temperature=1.0, top_p=1.0),
    "mmlu": MiMoSampler(do_sample=False, temperature=1.0, top_p=1.0),
}
TASK_SAMPLERS: dict[str, dict[str, MiMoSampler]] = {
    task: {"global": sampler, "local": _SPEECH} for task, sampler in _TEXT.items()
}
"""Samplers by task (`MimoAudio.task_sampler_configs`): "global" for text, "local" for codes."""


def task_samplers(greedy: Iterable[str] = ()) -> dict[str, dict[str, MiMoSampler]]:
    """A copy of upstream's samplers by task; the tasks in `greedy` get greedy ones."""
    chosen = {name: {"global": replace(GREEDY), "local": replace(GREEDY)} for name in greedy}
    return copy.deepcopy(TASK_SAMPLERS) | chosen


def sampler_tensors(
    samplers: Sequence[MiMoSampler], device: torch.device | str = "cpu"
) -> SamplerTensors:
    """Settings of one sampler a row, on the device; upstream's `MiMoSampler`s work too."""
    greedy = [not s.do_sample or s.temperature == 0 for s in samplers]
    tails = [1 - float(s.top_p) if s.top_p and 0 < s.top_p <= 1 else TAIL_OFF for s in samplers]
    return SamplerTensors(
        temperature=torch.tensor(
            [s.temperature or 1.0 for s in samplers], dtype=torch.float32, device=device
        ),
        top_k=torch.tensor(
            # No vocabulary is as large as what an int64 holds.
            [min(max(s.top_k or 0, 0), SEEDS - 1) for s in samplers],
            dtype=torch.int64,
            device=device,
        ),
        tail=torch.tensor(tails, dtype=torch.float32, device=device),
        greedy=torch.tensor(greedy, dtype=torch.bool, device=device),
        all_greedy=all(greedy),
        any_top_k=any(s.top_k for s in samplers),
    )


def check_seed(seed: Any) -> int:
    """A seed as an int, from one of any integer type (numpy's, or a tensor of one value).

    Raises:
        TypeError: it is no integer; True and False are none.
        ValueError: it is not between 0 and 2**63 - 1.
    """
    try:
        value = seed.item() if hasattr(seed, "item") else seed
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"a seed is an integer, not {shown(seed)}") from None
    if not 0 <= value < SEEDS:
        raise ValueError(f"a seed is between 0 and 2**63 - 1, not {value}")
    return value


def fresh_seed() -> int:
    """A seed from torch's global generator of the CPU, which it advances; any thread may call it.

    So a script that begins with `torch.manual_seed` repeats. The CPU's serves models on a GPU too:
    reading that of the GPU would wait for everything that is queued there.
    """
    return int(torch.randint(SEEDS - 1, (), dtype=torch.int64, device="cpu").item())


class DrawnSeed(int):
    """A fresh seed that is drawn before its call begins, by a caller in another thread.

    Which of several calls at once draws first is then up to their order, not to their threads.

    Attributes:
        templates: The seed of its templates, from Python's `random`.
    """

    templates: int

    @classmethod
    def draw(cls) -> "DrawnSeed":
        drawn = cls(fresh_seed())
        drawn.templates = random.getrandbits(63)
        return drawn


def one_seed(seed: Any) -> int:
    """`check_seed`; a fresh one for None, see `fresh_seed`."""
    return fresh_seed() if seed is None else check_seed(seed)


def row_seeds(seed: Seed, rows: int) -> list[int]:
    """One seed a row.

    Raises:
        TypeError, ValueError: see `check_seed`, or the number of seeds is not the number of rows.
    """
    if seed is None:
        return [one_seed(None) for _ in range(rows)]
    try:
        given: Any = seed.tolist() if hasattr(seed, "tolist") else seed
    except Exception:  # Each library has its own for arrays that have no values, or odd ones.
        raise TypeError(f"seeds are integers, not {type(seed).__name__}s without any") from None
    if not isinstance(given, list | tuple | range):
        return [check_seed(given)] * rows
    if len(given) != rows:
        raise ValueError(f"{len(given)} seeds for {rows} prompts; give one, or one a prompt")
    return [check_seed(each) for each in given]


@checked
class MiMoStopper:
    """Stops a row at a stop token or at a length in groups, prompt included.

    Upstream `MiMoStopper`. Called with flattened ids [B, T * G * (C + 1)] it returns bool [B], one
    for each row; upstream checks only row 0.
    """

    def __init__(
        self,
        group_size: int,
        audio_channels: int,
        stop_tokens: Iterable[int] | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
    ) -> None:
        self.group_size, self.audio_channels = group_size, audio_channels
        self.step = (audio_channels + 1) * group_size
        self.stop_token_ids = set() if stop_tokens is None else set(map(int, stop_tokens))
        self.max_length, self.min_length = max_length, min_length or 0

    def __call__(self, input_ids: Tensor, _scores: Tensor | None = None) -> Tensor:
        groups = input_ids.shape[-1] // self.step
        too_long = bool(self.max_length and groups >= self.max_length)
        done = input_ids.new_full((len(input_ids),), too_long, dtype=torch.bool)
        if self.stop_token_ids and groups > 0 and groups >= self.min_length:
            last = input_ids[:, -self.step]
            done |= torch.isin(last, last.new_tensor(sorted(self.stop_token_ids)))
        return done
