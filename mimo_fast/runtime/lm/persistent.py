"""The three transformers as one persistent kernel each, where it takes them.

    backbone        a step: every layer, attention over the cache, the text head, the text's draw
    patch decoder   a patch: the product before it, all its steps with their draws
    patch encoder   patches of codes that were just drawn: every layer, and the product after it

They decode states of up to MOST_ROWS slots with a 16-bit cache. In such a state no row ever takes
another way, so the rows beside it do not change its bits. Prompts do not come here.

A launch that is refused, or whose blocks wait for one another in vain, leaves NaN, and NOT_FINITE
for what is drawn; `gave_up` tells this from values of the model itself. The model then decodes as
if there were none of this.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.cuda import engine_launch as cuda
from mimo_fast.kernels.cuda.engine import (
    MOST_ACTIVE,
    MOST_IDS,
    MOST_ROWS,
    MOST_STEPS,
    MOST_TOGETHER,
    OWN_BYTES,
)
from mimo_fast.kernels.cuda.engine_launch import ErrorWord, Grid, Launcher
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.sample import ROWS_OF, SamplerTensors
from mimo_fast.kernels.sample_codes import patch_noise
from mimo_fast.runtime.device.host_copy import HostCopy
from mimo_fast.runtime.lm.network import Network
from mimo_fast.runtime.lm.programs import (
    backbone_tables,
    patch_decoder_tables,
    patch_encoder_tables,
)
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.runtime.lm.transformer import TransformerWeights


class PersistentBackbone:
    """Backbone and text head."""

    def __init__(
        self, network: Network, grid: Grid, error: Tensor, loaded: ctypes.CDLL | None = None
    ) -> None:
        self._network = network
        self.launcher = Launcher(backbone_tables(network, grid.blocks), grid, error, loaded)

    def step(
        self, x: Tensor, state: DecodeState, slots: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`LayerByLayer.step`, and the logits of its hidden states [R, vocabulary]."""
        return self._launch(x, state, slots, starts, [])

    def step_text(
        self,
        x: Tensor,
        state: DecodeState,
        slots: Tensor,
        starts: Tensor,
        settings: SamplerTensors,
        draws: Tensor,
        banned: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states, and what `sample_text` draws from their logits: int64 [R]."""
        seeds, tokens = state.seeds[slots], torch.empty_like(slots)
        fields = {"tokens": tokens, "seeds": seeds, "draws": draws.contiguous()}
        if not settings.all_greedy:
            fields |= {name: getattr(settings, name) for name in ROWS_OF}
        if banned is not None:
            fields["banned"] = banned.contiguous()
        hidden, _ = self._launch(x, state, slots, starts, [tokens], **fields)
        return hidden, tokens

    def _launch(
        self,
        x: Tensor,
        state: DecodeState,
        slots: Tensor,
        starts: Tensor,
        drawn: list[Tensor],
        **fields: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and logits. drawn: what else the launch writes; fields: of `Program`."""
        cache, vocabulary = state.cache, self._network.text_head.shape[0]
        hidden = torch.empty_like(x, memory_format=torch.contiguous_format)
        logits = x.new_empty(len(x), vocabulary)
        self.launcher.attempt(
            len(x),
            {"x": x.contiguous(), "hidden": hidden, "logits": logits},
            [hidden, logits, *drawn],
            banned_stride=vocabulary,
            keys=cache.k,
            values=cache.v,
            layer_stride=cache.k.stride(0),
            slot_stride=cache.k.stride(1),
            head_stride=cache.k.stride(2),
            capacity=cache.capacity,
            slots=slots,
            starts=starts,
            **fields,
        )
        return hidden, logits


class PersistentEncoder:
    """Patch encoder, and the product that makes patches the backbone's input."""

    def __init__(
        self, network: Network, grid: Grid, error: Tensor, loaded: ctypes.CDLL | None = None
    ) -> None:
        config = network.config
        self._group, self._dim = config.group_size, config.backbone.dim
        self.launcher = Launcher(patch_encoder_tables(network, grid.blocks), grid, error, loaded)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [N, G, D] -> patches [N, D of the backbone]."""
        made = frames.new_empty(len(frames), self._dim)
        together = MOST_ROWS // self._group
        for some, patches in zip(
            frames.contiguous().split(together), made.split(together), strict=True
        ):
            given = {"frames": some, "patches": patches}
            self.launcher.attempt(len(some) * self._group, given, [patches])
        return made


class PersistentDecoder:
    """The product before the patch decoder, and all of its steps."""

    def __init__(
        self, network: Network, grid: Grid, error: Tensor, loaded: ctypes.CDLL | None = None
    ) -> None:
        self._network, decoder = network, network.config.patch_decoder
        tables = patch_decoder_tables(network, grid.blocks, grid.kept_bytes)
        heads = decoder.layers * decoder.heads * MOST_ROWS
        cache = torch.empty(heads * OWN_BYTES, dtype=torch.uint8, device=error.device)
        tables.set(own_cache=cache)
        self.launcher = Launcher(tables, grid, error, loaded)

    def decode(
        self, hidden: Tensor, state: DecodeState, slots: Tensor, settings: SamplerTensors
    ) -> Tensor:
        """Hidden states of the backbone [R, D] -> codes int64 [R, C, G], drawn."""
        config, rows = self._network.config, len(slots)
        shape = (rows, config.channels, config.group_size)
        codes = torch.empty(shape, dtype=torch.int64, device=hidden.device)
        fields = dict[str, int | Tensor](codes=codes)
        if not settings.all_greedy:
            draws = state.seeds[slots], state.draws[slots] - 1
            fields["noise"] = patch_noise(*draws, config.group_size, sum(config.code_sizes))
            fields |= {name: getattr(settings, name) for name in ROWS_OF}
        self.launcher.attempt(rows, {"hidden": hidden.contiguous()}, [codes], **fields)
        return codes


class Persistent:
    """Those of the three that the persistent kernel takes.

    Args:
        grid: how its device is divided; by default as the device is.
        loaded: another build of the library than the package's.

    Attributes:
        backbone, encoder, decoder: None where it is refused.
        error: What launches tell when they give up.
    """

    def __init__(
        self, network: Network, grid: Grid | None = None, loaded: ctypes.CDLL | None = None
    ) -> None:
        self._arguments = network, grid, loaded
        device = network.code_heads.device
        grid = grid or Grid.of(device)
        warning = "the persistent kernel gave up; decoding goes on without it"
        self.error = ErrorWord(device, warning)
        self._held = dict[tuple[int, int], bool]()
        how = grid, self.error.word, loaded
        self.backbone = None if refuses_backbone(network) else PersistentBackbone(network, *how)
        self.encoder = None if refuses_encoder(network) else PersistentEncoder(network, *how)
        self.decoder = None if refuses_decoder(network) else PersistentDecoder(network, *how)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy reads the copied weights.
        return type(self), self._arguments

    def takes(self, state: DecodeState) -> bool:
        """Whether it decodes rows of a state."""
        fits = state.slots <= MOST_ROWS and state.cache.k_scales is None
        return self.error.on and fits and self._holds(state.slots, state.capacity)

    def _holds(self, rows: int, capacity: int) -> bool:
        if (rows, capacity) not in self._held:
            needs = (
                (self.backbone, rows, capacity),
                (self.encoder, MOST_ROWS, 0),
                (self.decoder, rows, 0),
            )
            self._held[rows, capacity] = all(
                part is None or part.launcher.holds(*need) for part, *need in needs
            )
        return self._held[rows, capacity]

    def error_copy(self) -> HostCopy:
        """Starts a copy of what is not 0 if a launch so far gives up; it waits for none."""
        return HostCopy(self.error.word)

    def gave_up(self) -> bool:
        """`ErrorWord.gave_up`; no state is taken from then on."""
        return self.error.gave_up()


def persistent(network: Network) -> Persistent | None:
    """Those of the three that are to be persistent kernels; None for none."""
    device = network.code_heads.device
    if not enabled(NewPath.ENGINE, device) or cuda.refuses_device(device):
        return None
    made = Persistent(network)
    return made if made.backbone or made.encoder or made.decoder else None


def refuses_backbone(network: Network) -> str:
    """Why the backbone is no persistent kernel, or "" where it can be one."""
    backbone, dtype = network.config.backbone, network.code_heads.dtype
    if (vocabulary := network.text_head.shape[0]) > MOST_IDS:
        return f"{vocabulary} text ids"
    return (
        cuda.refuses_cache_of(backbone.head_dim)
        or _refuses_layers(network.backbone, backbone.dim, dtype)
        or cuda.refuses_weight(network.text_head, dtype)
    )


def refuses_encoder(network: Network) -> str:
    """Why the patch encoder is no persistent kernel, or "" where it can be one."""
    encoder, dtype = network.config.patch_encoder, network.code_heads.dtype
    group = network.config.group_size
    if group > MOST_TOGETHER:
        return f"groups of {group} frames"
    return (
        cuda.refuses_few_positions(encoder.heads, encoder.kv_heads, encoder.head_dim, group)
        or _refuses_layers(network.patch_encoder, encoder.dim, dtype)
        or cuda.refuses_weight(network.patch_to_backbone, dtype)
    )


def refuses_decoder(network: Network) -> str:
    """Why the patch decoder is no persistent kernel, or "" where it can be one."""
    decoder, dtype = network.config.patch_decoder, network.code_heads.dtype
    active = [step.heads.shape[1] for step in network.code_steps]
    if len(active) > MOST_STEPS or max(active) > MOST_ACTIVE or not min(active):
        return f"{len(active)} steps of {min(active)} to {max(active)} codes"
    heads = Weight.stack([network.code_heads])
    return (
        cuda.refuses_few_positions(decoder.heads, decoder.kv_heads, decoder.head_dim, len(active))
        or _refuses_layers(network.patch_decoder, decoder.dim, dtype)
        or cuda.refuses_weight(network.backbone_to_patch, dtype)
        or cuda.refuses_weight(heads, dtype, octets=False)
    )


def _refuses_layers(weights: TransformerWeights, dim: int, dtype: torch.dtype) -> str:
    found = cuda.refuses_width(dim)
    for layer in weights.layers:
        for weight in (layer.qkv, layer.out, layer.gate_up, layer.down):
            found = found or cuda.refuses_weight(weight, dtype)
        # SwiGLU makes octets of the two halves.
        if not found and layer.gate_up.shape[0] % 16:
            found = f"an FFN of {layer.gate_up.shape[0] // 2} columns"
    return found
