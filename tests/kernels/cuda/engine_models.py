"""Small random language models, and their three transformers as persistent kernels on the CPU build
of the CUDA source."""

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any

import torch
from emulated import products_by_cuda
from engine_launches import SHARED, STALE, tighten
from helpers import kit_config
from torch import Tensor

from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig
from mimo_fast.kernels.cuda.engine import Operation
from mimo_fast.kernels.cuda.engine_launch import Grid, Launcher
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.sample import SamplerTensors
from mimo_fast.quantization import QuantizationConfig, WeightSource
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.persistent import (
    PersistentBackbone,
    PersistentDecoder,
    PersistentEncoder,
    refuses_backbone,
    refuses_decoder,
    refuses_encoder,
)
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.sampling import MiMoSampler, sampler_tensors

Raw = Mapping[str, Any]

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
KIT = {
    **HEADS,
    "hidden_size": 128,
    "intermediate_size": 384,
    "local_dim": 256,
    "input_local_dim": 384,
    "local_attn_heads": 32,
    "local_ffn_dim": 128,
}
"""Layers, channels, group and delays as the kit's: 11 steps a patch."""

SMALLEST = {
    **KIT,
    "local_dim": 128,
    "input_local_dim": 128,
    "local_attn_heads": 16,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "local_layers": 2,
    "input_local_layers": 2,
    "group_size": 2,
    "audio_channels": 3,
    "delay_pattern": "0-1-1",
    "speech_vocab_size": "33-17-9",
    "speech_zeroemb_idx": "32-16-8",
}
"""Two layers each, and 3 steps a patch."""

SHAPES: dict[str, Raw] = {
    "kit": KIT,
    "smallest": SMALLEST,
    # Heads of 12, of which two are three octets; one layer; one head of keys; three frames.
    "other heads": {
        **KIT,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "local_dim": 384,
        "local_attn_heads": 32,
        "local_layers": 1,
        "input_local_dim": 256,
        "input_local_layers": 3,
        "input_full_attention": False,
        "group_size": 3,
        "audio_channels": 5,
        "delay_pattern": "0-0-1-1-3",
        "speech_vocab_size": "65-33-17-17-9",
        "speech_zeroemb_idx": "64-32-16-16-8",
    },
    # Heads of 4, a group of 4, wide feed-forward layers with columns in two parts.
    "wide": {
        **KIT,
        "num_key_value_heads": 8,
        "local_dim": 128,
        "local_ffn_dim": 1152,
        "intermediate_size": 2176,
        "input_local_dim": 128,
        "local_attn_heads": 32,
    },
}

SMALL = [*SHAPES]

SHAPES["published"] = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "local_dim": 1024,
    "local_ffn_dim": 4096,
    "local_attn_heads": 64,
    "local_layers": 1,
    "input_local_dim": 1024,
    "input_local_layers": 1,
}
"""A layer each of the published model, with the kit's words and codes."""


def lm_of(raw: Raw, quantization: Any, dtype: torch.dtype, seed: int = 0) -> LM:
    """A random model whose activations stay of order 1."""
    config = LMConfig.from_dict(kit_config("lm") | raw)
    shapes = lm_shapes(config)
    names = {name: i for i, name in enumerate(sorted(shapes))}

    def read(name: str) -> Tensor:
        shape = shapes[name]
        generator = torch.Generator().manual_seed(1000 * seed + names[name])
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return values * 0.1 + (0 if name.endswith("bias") else 1)
        return values * (1.0 if "embed" in name else 1.5 / shape[1] ** 0.5)

    requested = QuantizationConfig.parse(quantization)
    return LM(config, 1, WeightSource(read, dtype, requested=requested))


@cache
def gpus_lm(
    library: ctypes.CDLL, name: str, quantization: Any, dtype: torch.dtype, seed: int = 0
) -> LM:
    """The model with weights as on a GPU, whose other products are those of the CUDA kernels."""
    with products_by_cuda(library):
        lm = lm_of(SHAPES[name], quantization, dtype, seed)
    if dtype == torch.float16:
        scales_in_half(lm)
    return lm


def scales_in_half(lm: LM) -> None:
    """Scales as a checkpoint of float16 stores them; their values stay."""
    own = lm.network
    stacks = own.backbone, own.patch_encoder, own.patch_decoder
    layers = (vars(layer).values() for stack in stacks for layer in stack.layers)
    for weight in (*chain(*layers), own.patch_to_backbone, own.backbone_to_patch, own.text_head):
        if isinstance(weight, QuantizedWeight):
            half = weight.scales.to(torch.float16)
            assert torch.equal(half.float(), weight.scales.float())
            object.__setattr__(weight, "scales", half)


class Whole:
    """The three transformers of a model as persistent kernels, and what they are given: random
    inputs of some rows, positions `starts` of which each is in a slot of its own.

    Each call is a launch over buffers that hold stale values, and gives all that blocks exchanged
    in it beside the result. `error` is not 0 where it gave up.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        lm: LM,
        rows: int = 2,
        blocks: int = 3,
        threads: int = 64,
        shared: int = SHARED,
        starts: tuple[int, ...] = (5, 0, 63, 64, 130, 1, 2, 3),
        tight: bool = False,
        **settings: int,
    ) -> None:
        network = lm.network
        for refuses in (refuses_backbone, refuses_encoder, refuses_decoder):
            assert not refuses(network), refuses(network)
        self.library, self.lm, self.rows, self.tight = library, lm, rows, tight
        grid, self.error = (
            Grid(blocks, shared, threads, **settings),
            torch.zeros(1, dtype=torch.int32),
        )
        how = network, grid, self.error, library
        self.backbone = PersistentBackbone(*how)
        self.encoder = PersistentEncoder(*how)
        self.decoder = PersistentDecoder(*how)
        for part in (self.backbone, self.encoder, self.decoder):
            # An error of a launch is not to pass for one that gave up.
            part.launcher.attempt = part.launcher.run  # type: ignore[method-assign]
        config, generator = lm.config, torch.Generator().manual_seed(7)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(lm.dtype)

        most = 8
        self.x = random(most, config.backbone.dim)[:rows]
        self.hidden = random(most, config.backbone.dim)[:rows]
        self.frames = random(most, config.group_size, config.patch_encoder.dim)
        self.frames = self.frames[: max(1, min(rows, most // config.group_size))]
        self.slots = torch.arange(most).flip(0)[:rows]
        self.starts = torch.tensor(starts)[:rows]
        self.capacity = max(starts) + 2
        samplers = [
            MiMoSampler(True, temperature=0.9, top_p=0.95),
            MiMoSampler(True, temperature=0.8, top_k=7),
            MiMoSampler(do_sample=False),
            MiMoSampler(True, temperature=1.1, top_k=9, top_p=0.9),
        ]
        self.settings: SamplerTensors = sampler_tensors((samplers * 2)[:rows])

    def state(self) -> DecodeState:
        """Of 8 slots, with random keys and values before the new positions and NaN behind."""
        state = self.lm.new_state([3] * 8, self.capacity)
        generator = torch.Generator().manual_seed(11)
        for part in (state.cache.k, state.cache.v):
            # Of all rows, whatever their number here.
            part.copy_(torch.randn(part.shape, generator=generator).to(part.dtype))
            for slot, start in zip(self.slots.tolist(), self.starts.tolist(), strict=True):
                part[:, slot, :, start:] = torch.nan
        state.draws[:] = 1
        return state

    def _launched(
        self,
        launcher: Launcher,
        rows: int,
        seed: int,
        run: Callable[[], Any],
        capacity: int = 0,
    ) -> Any:
        self.library.set_seed_of_fibers(seed)
        tables = launcher._tables
        launcher._room(tables.all_columns * rows).fill_(STALE)
        if self.tight:
            tighten(launcher, rows, capacity)
        made, last = run(), tables.phases[-1]
        # Of the text's draw each block has a place of its own, so their number decides about that.
        by_blocks = last.operation == Operation.TEXT
        count = (last.partial if by_blocks else tables.all_columns) * rows
        return made, launcher._exchanged[-1][:count].view(torch.int16).clone()

    def step(self, seed: int = 1, state: DecodeState | None = None) -> tuple[Any, Tensor]:
        """(hidden, logits, keys, values)."""
        state = state or self.state()

        def run() -> tuple[Tensor, ...]:
            made = self.backbone.step(self.x, state, self.slots, self.starts)
            return *made, state.cache.k, state.cache.v

        launcher = self.backbone.launcher
        return self._launched(launcher, self.rows, seed, run, state.cache.capacity)

    def step_text(self, banned: Tensor | None, seed: int = 1) -> tuple[Tensor, Tensor]:
        """(hidden, tokens)."""
        state, launcher = self.state(), self.backbone.launcher
        place = self.x, state, self.slots, self.starts

        def run() -> tuple[Tensor, Tensor]:
            draws = state.draws[self.slots]
            return self.backbone.step_text(*place, self.settings, draws, banned)

        made, _ = self._launched(launcher, self.rows, seed, run, state.cache.capacity)
        return made

    def encode(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        rows = self.frames.shape[0] * self.frames.shape[1]
        launcher = self.encoder.launcher
        return self._launched(launcher, rows, seed, lambda: self.encoder.encode(self.frames))

    def decode(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        state, slots = self.state(), torch.arange(self.rows)
        return self._launched(
            self.decoder.launcher,
            self.rows,
            seed,
            lambda: self.decoder.decode(self.hidden, state, slots, self.settings),
        )


def logits_of_codes(launcher: Launcher, lm: LM, rows: int) -> list[Tensor]:
    """What the last patch was drawn from: of each channel [R, G, V_c], from what was exchanged."""
    tables, config = launcher._tables, lm.config
    (draw,) = (each for each in tables.phases if each.operation == Operation.DRAW)
    exchanged = launcher._exchanged[-1]
    made = [exchanged.new_empty(rows, config.group_size, size) for size in config.code_sizes]
    for number, step in enumerate(lm.code_steps):
        begin = (draw.from_ + number * tables.loop_columns) * rows
        logits = exchanged[begin : begin + draw.columns * rows].view(rows, draw.columns)
        for channel, frame, first, size, _ in step.heads.T.tolist():
            made[channel][:, frame] = logits[:, first - step.first :][:, :size]
    return made


PROGRAMS = {"encoder": Whole.encode, "backbone": Whole.step, "decoder": Whole.decode}
DIVISIONS: dict[str, dict[str, Any]] = {
    "several blocks": {"blocks": 4, "threads": 32, "depth": 4},
    "several warps": {"blocks": 2, "threads": 96, "depth": 8},
    "one tile at a time": {"blocks": 2, "threads": 64, "depth": 4, "tight": True},
    "x in parts": {"blocks": 3, "threads": 64, "depth": 4, "x_columns": 128},
}
"""Of the smallest model, between them: more jobs than blocks, tiles that share a buffer, and more
columns than are staged at once."""


def results(made: Any) -> list[Tensor]:
    """As integers, so that NaN is equal to itself."""
    each = made if isinstance(made, tuple) else (made,)
    return [one.view(torch.int16) if one.is_floating_point() else one for one in each]


def everything(whole: Whole, program: str, seed: int = 1) -> list[Tensor]:
    """All that a launch has written, and all that was exchanged in it."""
    made, exchanged = PROGRAMS[program](whole, seed)
    assert int(whole.error) == 0
    return [*results(made), exchanged]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
