"""The language model: patch encoder -> backbone -> text head and patch decoder (upstream `MiMoAudioForCausalLM`).

    ids [C + 1, T G] -> embed [T, D] -> backbone -> hidden [D] -> text token
                                                               -> patch decoder, G + max delay steps -> codes [C, G]
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..config import LMConfig
from ..kernels.patch_embed import patch_embed
from ..kernels.qmatmul import matmul
from ..kernels.rope import rope_table
from ..kernels.sample import SamplerTensors
from ..kernels.sample_codes import code_steps, patch_noise, sample_codes
from ..kernels.sample_text import sample_text
from ..kernels.text_embed import input_embed
from ..quantization import WeightSource
from .state import DecodeState
from .transformer import Attend, cached_attend, prefill_attend, self_attend, transformer, transformer_weights

PREFILL_CHUNK = 1024
"""Positions prefilled at once: bounds the activations of a long prompt."""

TEXT_SLOT = 0
"""Random slot of the text draw; the frames of a patch draw in the slots after it."""


class LM:
    """Weights and pure functions over them; all that changes is in the `DecodeState` passed in.

    Args:
        config: dimensions.
        empty_id: text id of `<|empty|>`, which marks audio positions.
        source: its weights, on the device and in the dtype to compute in.
    """

    def __init__(self, config: LMConfig, empty_id: int, source: WeightSource) -> None:
        self.config, self.empty_id = config, empty_id
        self.backbone = transformer_weights("model", config.backbone, source)
        self.patch_encoder = transformer_weights("input_local_transformer", config.patch_encoder, source)
        self.patch_decoder = transformer_weights("local_transformer", config.patch_decoder, source)
        self.text_embeddings = source("model.embed_tokens.weight")
        self.text_head = source.weight("model.embed_tokens" if config.tie_embeddings else "lm_head")
        channels = range(config.channels)
        self.code_embeddings = torch.cat([source(f"speech_embeddings.{c}.weight") for c in channels])
        self.code_heads = torch.cat([source(f"local_transformer_lm_heads.{c}.weight") for c in channels])
        # Projecting the table once makes each decoder step a plain gather.
        self.decoder_embeddings = self.code_embeddings
        if config.patch_encoder.dim != config.patch_decoder.dim:
            projection = source.weight("speech_embeddings_to_local")
            self.decoder_embeddings = matmul(self.code_embeddings, projection)
        self.patch_to_backbone = source.weight("speech_group_downcast")
        self.backbone_to_patch = source.weight("hidden_states_downcast")
        self.device, self.dtype = self.text_embeddings.device, self.text_embeddings.dtype
        self._make_tables()

    def _make_tables(self) -> None:
        config, device = self.config, self.device
        self.code_offsets = torch.tensor([0, *accumulate(config.code_sizes[:-1])], device=device)
        self.empty_codes = torch.tensor(config.empty_codes, device=device)
        self.code_steps = code_steps(config.code_sizes, config.empty_codes, config.delays, config.group_size, device)
        encoder, decoder = config.patch_encoder, config.patch_decoder
        self.encoder_rope = rope_table(encoder.head_dim, encoder.rope_theta, config.group_size, device)
        self.decoder_rope = rope_table(decoder.head_dim, decoder.rope_theta, config.patch_steps, device)

    @cached_property
    def backbone_rope(self) -> Tensor:
        config = self.config.backbone
        return rope_table(config.head_dim, config.rope_theta, self.config.max_positions, self.device)

    def new_state(self, seeds: Sequence[int], capacity: int) -> DecodeState:
        """A state of len(seeds) slots that hold up to `capacity` groups each."""
        return DecodeState.allocate(self.config, list(seeds), capacity, self.dtype, self.device)

    def embed(self, text: Tensor, codes: Tensor) -> Tensor:
        """text [N] (one id a group), codes [N, C, G] -> backbone inputs [N, D].

        A text position adds no speech and an audio position (`<|empty|>`) no text, so each goes its own way.
        """
        is_audio = text == self.empty_id
        patches = torch.empty(len(text), self.config.backbone.dim, dtype=self.dtype, device=self.device)
        if (spoken := codes[is_audio]).numel():
            patches[is_audio] = self.encode_patches(spoken)
        return input_embed(text, patches, self.text_embeddings, self.empty_id)

    def encode_patches(self, codes: Tensor) -> Tensor:
        """Patch encoder: codes [N, C, G] -> [N, D]."""
        config = self.config
        frames = patch_embed(codes, self.code_embeddings, self.code_offsets, self.empty_codes)
        attend = self_attend(config.patch_encoder, self.encoder_rope, config.patch_encoder_causal)
        encoded = transformer(frames, self.patch_encoder, config.patch_encoder.norm_eps, attend)
        return matmul(encoded.flatten(1), self.patch_to_backbone)

    def prefill(self, ids: Tensor, state: DecodeState, slot: int) -> None:
        """Appends prompt ids [C + 1, T G] to a slot and leaves its last hidden state in `state.hidden[slot]`."""
        groups = ids.to(self.device).unflatten(1, (-1, self.config.group_size))
        text, codes = groups[0, :, 0], groups[1:].transpose(0, 1)
        for text_part, code_part in zip(text.split(PREFILL_CHUNK), codes.split(PREFILL_CHUNK), strict=True):
            start = state.cache.lengths[slot]
            attend = prefill_attend(self.config.backbone, self.backbone_rope, state.cache, slot, start)
            state.hidden[slot] = self._backbone(self.embed(text_part, code_part)[None], attend)[0, -1]
            state.cache.lengths[slot] += len(text_part)

    def step(self, text: Tensor, codes: Tensor, state: DecodeState, slots: list[int]) -> None:
        """Feeds one group a row, text [R] and codes [R, C, G], and updates `state.hidden[slots]`."""
        cache = state.cache
        places = torch.tensor(slots, device=self.device)
        starts = torch.tensor([cache.lengths[slot] for slot in slots], device=self.device)
        attend = cached_attend(self.config.backbone, self.backbone_rope, cache, places, starts, cache.capacity)
        state.hidden[slots] = self._backbone(self.embed(text, codes)[:, None], attend)[:, 0]
        for slot in slots:
            cache.lengths[slot] += 1

    def _backbone(self, x: Tensor, attend: Attend) -> Tensor:
        return transformer(x, self.backbone, self.config.backbone.norm_eps, attend)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary]."""
        return matmul(hidden, self.text_head)

    def local_hidden(self, hidden: Tensor) -> Tensor:
        """The patch decoder's first input: [N, D] -> [N, D of the patch decoder]."""
        return matmul(hidden, self.backbone_to_patch)

    def sample_text(
        self, state: DecodeState, slots: list[int], settings: SamplerTensors, banned: Tensor | None = None
    ) -> Tensor:
        """Text token of each row, int64 [R]; banned bool [R, vocabulary]."""
        logits = self.text_logits(state.hidden[slots])
        return sample_text(logits, settings, state.seeds[slots], state.draws[slots], banned, TEXT_SLOT)

    def sample_patch(self, state: DecodeState, slots: list[int], settings: SamplerTensors) -> Tensor:
        """Codes [R, C, G] of the patch that follows each row's hidden state."""
        return self.decode_patch(self.local_hidden(state.hidden[slots]), state, slots, settings)

    def decode_patch(self, local: Tensor, state: DecodeState, slots: list[int], settings: SamplerTensors) -> Tensor:
        """Patch decoder (upstream `local_forward`): local [R, D of the patch decoder] -> codes [R, C, G].

        Channel c produces frame t - delay[c] at step t; the next input is the sum of the codes just drawn.
        """
        config, rows = self.config, len(slots)
        cache = state.patch_cache
        places = torch.tensor(slots, device=self.device)
        noise = None
        if not settings.all_greedy:
            size = sum(config.code_sizes)
            noise = patch_noise(state.seeds[slots], state.draws[slots], config.group_size, size)
        codes = torch.empty(rows, config.channels, config.group_size, dtype=torch.int64, device=self.device)
        x = local
        for position, step in enumerate(self.code_steps):
            starts = torch.full_like(places, position)
            attend = cached_attend(config.patch_decoder, self.decoder_rope, cache, places, starts, cache.capacity)
            hidden = transformer(x[:, None], self.patch_decoder, config.patch_decoder.norm_eps, attend)[:, 0]
            x = sample_codes(hidden, step, self.code_heads, settings, noise, codes, self.decoder_embeddings)
        return codes
