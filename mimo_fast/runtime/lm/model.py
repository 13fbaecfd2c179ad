"""The language model (upstream `MiMoAudioForCausalLM`).

ids [C + 1, T G] -> embed [T, D] -> backbone -> hidden [D] -> text token
                                                           -> patch decoder, G + max delay steps ->
                                                           codes [C, G]
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mimo_fast.arguments import checked, suggestion
from mimo_fast.config import LMConfig, TransformerConfig
from mimo_fast.json_files import shown
from mimo_fast.kernels.cpu.transformer import Product
from mimo_fast.kernels.matmul.product import AnyWeight, matmul, matmul_by_part
from mimo_fast.kernels.patch_embed import patch_embed
from mimo_fast.kernels.rope import rope_rows, rope_table
from mimo_fast.kernels.sample import SamplerTensors
from mimo_fast.kernels.sample_codes import code_steps
from mimo_fast.kernels.sample_text import TEXT_SLOT, sample_text
from mimo_fast.kernels.text_embed import input_embed
from mimo_fast.process import Owner
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.lm.executor import AnyProduct, Executor, FusedBackbone, choose
from mimo_fast.runtime.lm.network import Network
from mimo_fast.runtime.lm.persistent import Persistent
from mimo_fast.runtime.lm.state import NO_POSITION, DecodeState
from mimo_fast.runtime.lm.transformer import (
    padded_attend,
    prefill_attend,
    transformer,
    transformer_weights,
)

PREFILL_CHUNK = 512
"""Positions prefilled at once: bounds a prompt's activations, and how long other streams wait."""

Frequencies = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Rotary frequencies of backbone, patch encoder and patch decoder."""

TABLES = (
    *("code_offsets", "empty_codes", "code_steps"),
    *("backbone_rope", "encoder_rope", "decoder_rope"),
)
"""What follows from the config alone."""


class PlacedIds(NamedTuple):
    """Prompt ids [C + 1, T G] for positions start ... start + T - 1 of a slot."""

    ids: Tensor
    slot: int
    start: int = 0


@checked
class LM:
    """Weights and pure functions over them; all that changes is in the `DecodeState` passed in.

    Args:
        config: dimensions.
        empty_id: text id of `<|empty|>`, which marks audio positions.
        source: its weights, on the device and in the dtype to compute in.
        frequencies: rotary frequencies [Dh / 2] of backbone, patch encoder and patch decoder; None
            for those of the config.
        base: the model that this one is a variant of; what both have in common is shared.

    Attributes:
        adapters: Names of the adapters that a slot may have, in order. Place 0 of
            `DecodeState.adapters` is the model without one, place i + 1 is adapters[i].
        adapter_digests: What tells the adapters of all places from others; "" for place 0.
    """

    _variants: "tuple[LM, ...]" = ()
    adapters: tuple[str, ...] = ()
    adapter_digests: tuple[str, ...] = ("",)

    def __init__(
        self,
        config: LMConfig,
        empty_id: int,
        source: WeightSource,
        frequencies: Frequencies = (None, None, None),
        base: "LM | None" = None,
    ) -> None:
        self.config, self.empty_id, self.owner = config, empty_id, Owner()
        self.frequencies = frequencies
        self.backbone = transformer_weights("model", config.backbone, source)
        encoder, decoder = config.patch_encoder, config.patch_decoder
        self.patch_encoder = transformer_weights("input_local_transformer", encoder, source)
        self.patch_decoder = transformer_weights("local_transformer", decoder, source)
        self.text_embeddings = source.table("model.embed_tokens")
        self.text_head = source.weight("model.embed_tokens" if config.tie_embeddings else "lm_head")
        self.code_embeddings, self.code_heads = (
            source.stacked(*(f"{table}.{c}.weight" for c in range(config.channels)))
            for table in ("speech_embeddings", "local_transformer_lm_heads")
        )
        # Projecting the table once makes each decoder step a plain gather.
        self.decoder_embeddings = self.code_embeddings
        self.embeddings_to_local: AnyWeight | None = None
        if encoder.dim != decoder.dim:
            self.embeddings_to_local = source.weight("speech_embeddings_to_local")
            self.decoder_embeddings = self._projected(base)
        self.patch_to_backbone = source.weight("speech_group_downcast")
        self.backbone_to_patch = source.weight("hidden_states_downcast")
        self.device, self.dtype = self.code_embeddings.device, self.code_embeddings.dtype
        self._make_tables(base)
        self._executor: Executor = choose(self.network)

    def _projected(self, base: "LM | None") -> Tensor:
        table, weight = self.code_embeddings, self.embeddings_to_local
        assert weight is not None
        if base and base.code_embeddings is table and base.embeddings_to_local is weight:
            return base.decoder_embeddings
        return matmul(table, weight)

    def _make_tables(self, base: "LM | None") -> None:
        if base:
            vars(self).update({name: getattr(base, name) for name in TABLES})
            return
        config, device = self.config, self.device
        offsets = [0, *accumulate(config.code_sizes[:-1])]
        self.code_offsets = torch.tensor(offsets, dtype=torch.int64, device=device)
        self.empty_codes = torch.tensor(config.empty_codes, dtype=torch.int64, device=device)
        delays = config.delays, config.group_size
        self.code_steps = code_steps(config.code_sizes, config.empty_codes, *delays, device)

        def rope(stack: TransformerConfig, positions: int, given: Tensor | None) -> Tensor:
            if given is not None:
                return rope_rows(given.to(device, torch.float32), positions)
            return rope_table(stack.head_dim, stack.rope_theta, positions, device)

        backbone, encoder, decoder = self.frequencies
        self.backbone_rope = rope(config.backbone, config.max_positions, backbone)
        self.encoder_rope = rope(config.patch_encoder, config.group_size, encoder)
        self.decoder_rope = rope(config.patch_decoder, config.patch_steps, decoder)

    @property
    def network(self) -> Network:
        """What an executor computes with."""
        return Network(
            config=self.config,
            backbone=self.backbone,
            patch_encoder=self.patch_encoder,
            patch_decoder=self.patch_decoder,
            backbone_rope=self.backbone_rope,
            encoder_rope=self.encoder_rope,
            decoder_rope=self.decoder_rope,
            code_heads=self.code_heads,
            decoder_embeddings=self.decoder_embeddings,
            code_steps=self.code_steps,
            patch_to_backbone=self.patch_to_backbone,
            backbone_to_patch=self.backbone_to_patch,
            text_head=self.text_head,
        )

    def threads(self) -> AbstractContextManager[None]:
        """See `Executor.threads`."""
        return self._executor.threads()

    def persistent_of(self, state: DecodeState) -> Persistent | None:
        """The persistent kernels that decode rows of a state; None for none."""
        return self._executor.persistent_of(state)

    def gave_up(self) -> bool:
        """Whether one of them gave up since this was last asked; see `Persistent.gave_up`."""
        persistent = self._executor.persistent
        return persistent is not None and persistent.gave_up()

    @cached_property
    def fingerprint(self) -> str:
        """Tells this model from others: its dimensions, adapters and some of its weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        # Most leave the weights below as they were.
        digest.update("".join(self.config.adapters).encode())
        for tensor in (self.backbone.norm, self.patch_decoder.norm, self.code_embeddings[:4]):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def place_of(self, adapter: str | None) -> int:
        """The place of an adapter by its name; 0 for None.

        Raises:
            ValueError: the model has no adapter of that name.
        """
        if adapter is None:
            return 0
        if adapter not in self.adapters:
            known = "load the model with adapters={name: folder}"
            if self.adapters:
                known = f"{suggestion(adapter, self.adapters)} Use {', '.join(self.adapters)}"
            raise ValueError(f"no adapter {shown(adapter)}: {known}")
        return 1 + self.adapters.index(adapter)

    def variant(self, place: int) -> "LM":
        """The model with the adapter of one place, for rows that all have it; 0 for none.

        Raises:
            ValueError: no adapter has that place.
        """
        if not 0 <= place <= len(self.adapters):
            raise ValueError(f"place must be 0 to {len(self.adapters)}, not {place}")
        return self._variants[place] if self._variants else self

    @property
    def adapter_nbytes(self) -> int:
        """Bytes that its adapters hold beside the model's own weights."""
        return 0

    @property
    def prefill_chunk(self) -> int:
        """Positions of a prompt that are computed before other rows get their turn."""
        return PREFILL_CHUNK

    def new_state(
        self, seeds: Sequence[int], capacity: int, quantized_cache: bool = False
    ) -> DecodeState:
        """A state of len(seeds) slots of up to `capacity` groups; a quantized cache is int8."""
        place = self.dtype, self.device
        return DecodeState.allocate(self.config, seeds, capacity, *place, quantized_cache)

    def embed(self, text: Tensor, codes: Tensor) -> Tensor:
        """A prompt's backbone inputs: text [N] (one id a group), codes [N, C, G] -> [N, D]."""
        # A text position adds no speech, and an audio position (`<|empty|>`) no text. Ids on the
        # host tell which it is without asking the device.
        is_audio = (text == self.empty_id).nonzero()[:, 0]
        text, codes, is_audio = (x.to(self.device) for x in (text, codes[is_audio], is_audio))
        shape = (len(text), self.config.backbone.dim)
        patches = torch.empty(shape, dtype=self.dtype, device=self.device)
        if len(codes):
            patches[is_audio] = self.encode_patches(codes)
        return input_embed(text, patches, self.text_embeddings, self.empty_id)

    def encode_patches(self, codes: Tensor) -> Tensor:
        """Patch encoder: codes [N, C, G] -> [N, D]."""
        encoded = self._executor.patch_encoder.encode(self._frames(codes)).flatten(1)
        return _times(encoded, self._executor.patch_to_backbone, self.patch_to_backbone)

    def _frames(self, codes: Tensor) -> Tensor:
        """The patch encoder's inputs: codes [N, C, G] -> [N, G, D of it]."""
        return patch_embed(codes, self.code_embeddings, self.code_offsets, self.empty_codes)

    def prefill(self, ids: Tensor, state: DecodeState, slot: int, start: int = 0) -> None:
        """Writes prompt ids [C + 1, T G] to positions start ... start + T - 1 of a slot.

        Leaves the last one's hidden state in `state.hidden[slot]`.
        """
        self.prefill_together([PlacedIds(ids, slot, start)], state)

    def prefill_together(self, parts: Sequence[PlacedIds], state: DecodeState) -> None:
        """`prefill` of parts of prompts, each of a slot of its own.

        In a small model on a CPU they are rows of the same native calls, PREFILL_CHUNK positions at
        a time; each has the bits that it has alone, and that it has in smaller parts.
        """
        slots = [part.slot for part in parts]
        if len({*slots}) != len(slots):
            raise ValueError(f"two parts are of one slot: {slots}")
        backbone = self._executor.backbone
        if not isinstance(backbone, FusedBackbone) or not backbone.prefills(state):
            for ids, slot, start in parts:
                for hidden in self.hidden_chunks(ids, state, slot, start):
                    state.hidden[slot] = hidden[-1]
                    start += len(hidden)
                state.lengths[slot] = start
        elif parts:
            hidden = torch.cat([*self._fused_chunks(parts, backbone, state)])
            counts = [part.ids.shape[1] // self.config.group_size for part in parts]
            state.hidden[slots] = hidden[[end - 1 for end in accumulate(counts)]]
            for (_, slot, start), count in zip(parts, counts, strict=True):
                state.lengths[slot] = start + count

    def prefills_alike(self, state: DecodeState) -> bool:
        """Whether a prompt has the same bits in whatever parts `prefill` gets it."""
        backbone = self._executor.backbone
        return isinstance(backbone, FusedBackbone) and backbone.prefills(state)

    def _fused_chunks(
        self, parts: Sequence[PlacedIds], backbone: FusedBackbone, state: DecodeState
    ) -> Iterator[Tensor]:
        """Hidden states [n, D] of the parts one after the other, n <= PREFILL_CHUNK."""
        groups = torch.cat([part.ids.cpu() for part in parts], dim=1)
        groups = groups.unflatten(1, (-1, self.config.group_size))
        places = [
            (slot, start + i)
            for ids, slot, start in parts
            for i in range(ids.shape[1] // self.config.group_size)
        ]
        slots, starts = (
            torch.tensor(column, dtype=torch.int64, device=self.device)
            for column in zip(*places, strict=True)
        )
        rows = groups[0, :, 0], groups[1:].transpose(0, 1), slots, starts
        for text, codes, *place in zip(*(x.split(PREFILL_CHUNK) for x in rows), strict=True):
            yield backbone.prefill(self.embed(text, codes), state, *place)

    def hidden_chunks(
        self, ids: Tensor, state: DecodeState, slot: int, start: int = 0
    ) -> Iterator[Tensor]:
        """What `prefill` computes: hidden states [n, D] by chunks, n <= PREFILL_CHUNK."""
        backbone = self._executor.backbone
        if isinstance(backbone, FusedBackbone) and backbone.prefills(state):
            yield from self._fused_chunks([PlacedIds(ids, slot, start)], backbone, state)
            return
        groups = ids.cpu().unflatten(1, (-1, self.config.group_size))
        text, codes = groups[0, :, 0], groups[1:].transpose(0, 1)
        config = self.config.backbone
        chunks = (x.split(PREFILL_CHUNK) for x in (text, codes))
        for text_part, code_part in zip(*chunks, strict=True):
            attend = prefill_attend(config, self.backbone_rope, state.cache, slot, start)
            x = self.embed(text_part, code_part)[None]
            yield transformer(x, self.backbone, config.norm_eps, attend)[0]
            start += len(text_part)

    def prefill_padded(self, ids: Tensor, place: Tensor, state: DecodeState) -> Tensor:
        """`prefill_packed` of one prompt: ids int64 [C + 1, T, G], place int64 [3] -> [1, D]."""
        return self.prefill_packed(ids[None], place[None], state)

    def prefill_packed(self, ids: Tensor, places: Tensor, state: DecodeState) -> Tensor:
        """`prefill` of N prompts of at most T groups that reads the device alone.

        ids int64 [N, C + 1, T, G], places int64 [N, 3]: slot, start, number of groups. The other
        groups are padding and leave no trace. With no group and start -1 a prompt only writes the
        scratch row. Each prompt has the bits that it has alone. Returns the hidden state of each
        one's last group [N, D].
        """
        config, count = self.config.backbone, ids.shape[2]
        rows = torch.arange(count, dtype=torch.int64, device=self.device)
        slots, starts, lengths = places.unbind(1)
        # Shapes are fixed, so every group passes the patch encoder: 1/16 of the backbone's work,
        # and as much as a compact list of the audio groups would cost, which has no shorter bound.
        x = torch.stack([self._embed_all(part) for part in ids])
        positions = (starts[:, None] + rows).masked_fill(rows >= lengths[:, None], NO_POSITION)
        attend = padded_attend(
            config,
            self.backbone_rope,
            state.cache,
            slots[:, None].expand(-1, count).contiguous(),
            positions,
        )
        hidden = transformer(x, self.backbone, config.norm_eps, attend, matmul_by_part)
        prompts = torch.arange(len(ids), dtype=torch.int64, device=self.device)
        last = hidden[prompts, (lengths - 1).clamp(min=0)]
        state.hidden[slots] = last
        state.lengths[slots] = starts + lengths
        return last

    def _embed_all(self, ids: Tensor) -> Tensor:
        """`embed` of ids [C + 1, T, G] that asks nothing of the host -> [T, D]."""
        text, codes = ids[0, :, 0], ids[1:].transpose(0, 1)
        return input_embed(text, self.encode_patches(codes), self.text_embeddings, self.empty_id)

    def stage(self, state: DecodeState, slot: int, text: int, codes: Tensor) -> None:
        """Makes a group, its token and its codes [C, G], the one that the next step feeds."""
        state.text[slot] = text
        state.codes[slot] = codes
        if text == self.empty_id:
            state.patches[slot] = self._encode_drawn(codes.to(self.device)[None], state)[0]

    def _encode_drawn(self, codes: Tensor, state: DecodeState) -> Tensor:
        """`encode_patches` of codes that rows of a state have drawn."""
        persistent = self.persistent_of(state)
        if persistent is None or persistent.encoder is None:
            return self.encode_patches(codes)
        return persistent.encoder.encode(self._frames(codes))

    def step(self, state: DecodeState, slots: Tensor) -> Tensor | None:
        """Feeds the last groups of R different slots, int64 [R]; updates `state.hidden[slots]`.

        Returns their `text_logits` where these come with them.
        """
        x, starts = self._last_groups(state, slots)
        persistent, logits = self.persistent_of(state), None
        if persistent is None or persistent.backbone is None:
            hidden = self._executor.backbone.step(x, state, slots, starts)
        else:
            hidden, logits = persistent.backbone.step(x, state, slots, starts)
        self._take_hidden(state, slots, starts, hidden)
        return logits if self._executor.text_head.weight is self.text_head else None

    def step_text(
        self,
        state: DecodeState,
        slots: Tensor,
        settings: SamplerTensors,
        banned: Tensor | None = None,
    ) -> Tensor:
        """`step` and `sample_text`; where a persistent kernel takes the rows, its launch does
        both."""
        persistent = self.persistent_of(state)
        own_head = self._executor.text_head.weight is self.text_head
        if persistent is None or persistent.backbone is None or not own_head:
            return self.sample_text(state, slots, settings, banned, self.step(state, slots))
        x, starts = self._last_groups(state, slots)
        draws = state.draws[slots]
        place = x, state, slots, starts
        hidden, text = persistent.backbone.step_text(*place, settings, draws, banned)
        self._take_hidden(state, slots, starts, hidden)
        return self._take_text(state, slots, draws, text)

    def _last_groups(self, state: DecodeState, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's inputs of the groups that a step feeds [R, D], and their positions [R]."""
        last = state.text[slots], state.patches[slots]
        return input_embed(*last, self.text_embeddings, self.empty_id), state.lengths[slots]

    def _take_hidden(
        self, state: DecodeState, slots: Tensor, starts: Tensor, hidden: Tensor
    ) -> None:
        """Makes the hidden states of a step [R, D] the rows' last ones."""
        state.hidden[slots] = hidden
        state.lengths[slots] = starts + (starts != NO_POSITION)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary]."""
        return _times(hidden, self._executor.text_head, self.text_head)

    def local_hidden(self, hidden: Tensor) -> Tensor:
        """The patch decoder's first input: [N, D] -> [N, D of the patch decoder]."""
        return _times(hidden, self._executor.backbone_to_patch, self.backbone_to_patch)

    def sample_text(
        self,
        state: DecodeState,
        slots: Tensor,
        settings: SamplerTensors,
        banned: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Draws the next groups' text, int64 [R], into `state.text`; banned bool [R, V].

        logits: those of `state.hidden[slots]`, if they are known.
        """
        draws = state.draws[slots]
        if logits is None:
            logits = self.text_logits(state.hidden[slots])
        text = sample_text(logits, settings, state.seeds[slots], draws, banned, TEXT_SLOT)
        return self._take_text(state, slots, draws, text)

    def _take_text(self, state: DecodeState, slots: Tensor, draws: Tensor, text: Tensor) -> Tensor:
        """Makes what was drawn, int64 [R], the text of groups number `draws`; returns it."""
        state.text[slots] = text
        state.draws[slots] = draws + 1
        return text

    def sample_patch(self, state: DecodeState, slots: Tensor, settings: SamplerTensors) -> Tensor:
        """Draws the codes [R, C, G] of the groups drawn last into `state.codes`; encodes them."""
        hidden, persistent = state.hidden[slots], self.persistent_of(state)
        if persistent is None or persistent.decoder is None:
            codes = self.decode_patch(self.local_hidden(hidden), state, slots, settings)
        else:
            codes = persistent.decoder.decode(hidden, state, slots, settings)
        state.codes[slots] = codes
        state.patches[slots] = self._encode_drawn(codes, state)
        return codes

    def decode_patch(
        self, local: Tensor, state: DecodeState, slots: Tensor, settings: SamplerTensors
    ) -> Tensor:
        """Patch decoder (upstream `local_forward`): local [R, D of it] -> codes [R, C, G].

        Channel c produces frame t - delay[c] at step t; the next input sums the codes just drawn.
        """
        return self._executor.patch_decoder.decode(local, state, slots, settings)


def _times(x: Tensor, product: AnyProduct | Product, weight: AnyWeight) -> Tensor:
    """x W^T as the executor computes it, unless the model has got another weight since."""
    return product(x) if product.weight is weight else matmul(x, weight)
