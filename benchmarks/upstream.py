"""MiMo-Audio as upstream runs it: batch 1, eager modules, one token of Python at a time.

transformers' modules use the tensors of a dense `LM` (nothing is copied) and a DynamicCache. Each
step feeds the last group and appends the new one to all ids; the text token and every code go
through the host or modules of their own; the patch decoder gets a new cache for each patch; audio
is decoded after the last token. `Compiled` is the same with static caches and torch.compile around
both decoders, as a user would speed it up.

It has two advantages over upstream: the speech embeddings are projected to the patch decoder's
width beforehand, as ours are, and tokens are greedy, which costs less than upstream's sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, Qwen2Config, Qwen2Model, StaticCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.transformer import TransformerWeights

Choose = Callable[[Tensor], int]
"""Scores [V] -> the token taken."""


def greedy(scores: Tensor) -> int:
    return int(scores.argmax())


class Upstream:
    """Upstream's `MiMoAudioForCausalLM` over the tensors of a dense `LM`.

    Raises:
        TypeError: the weights are quantized.
    """

    name = "transformers eager"

    def __init__(self, lm: LM, longest: int) -> None:
        if not isinstance(lm.text_head, Weight) or not isinstance(lm.text_embeddings, Tensor):
            raise TypeError("the baselines run dense weights: use bf16 or float32")
        config = self.config = lm.config
        self.empty_id, self.longest = lm.empty_id, longest
        self.backbone = qwen2_model(config.backbone, lm.backbone, lm.text_embeddings, longest)
        self.patch_encoder = qwen2_model(config.patch_encoder, lm.patch_encoder)
        self.patch_decoder = qwen2_model(config.patch_decoder, lm.patch_decoder)
        self.text_head = lm.text_head.blocks[0]
        self.embeddings = lm.code_embeddings.split(config.code_sizes)
        self.decoder_embeddings = lm.decoder_embeddings.split(config.code_sizes)
        self.heads = lm.code_heads.split(config.code_sizes)
        (self.patch_to_backbone,), (self.backbone_to_patch,) = (
            weight.blocks
            for weight in (lm.patch_to_backbone, lm.backbone_to_patch)
            if isinstance(weight, Weight)
        )

    @torch.no_grad()
    def generate(
        self, ids: Tensor, groups: int, choose: Choose = greedy, plan: Sequence[int] = ()
    ) -> Iterator[tuple[int, Tensor]]:
        """Groups after a prompt [C + 1, T G]: the text token and codes [C, G].

        Args:
            choose: takes every token; the empty code's score is -inf.
            plan: text tokens to continue with instead, as in `ScheduledLM`.
        """
        size, cache = self.config.group_size, self.cache(self.backbone)
        ids = ids.to(self.text_head.device)[None]
        fed = ids
        for i in range(groups):
            hidden = self.step(fed, cache)
            token = choose(F.linear(hidden, self.text_head)[0])
            token = plan[i] if i < len(plan) else token
            if token == self.empty_id:
                codes = self.patch(F.linear(hidden, self.backbone_to_patch)[:, None], choose)
            else:
                codes = torch.tensor(self.config.empty_codes, device=ids.device)[:, None].expand(
                    -1, size
                )
            group = torch.cat((codes.new_full((1, size), token), codes))[None]
            ids = torch.cat((ids, group), dim=-1)
            fed = ids[..., -size:]
            yield token, codes

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """New ids [1, C + 1, T G] -> the last position's hidden state [1, D]."""
        return self.run(self.backbone, self.embed(ids), cache)[:, -1]

    def embed(self, ids: Tensor) -> Tensor:
        """ids [1, C + 1, T G] -> [1, T, D]."""
        config = self.config
        text = ids[:, 0, :: config.group_size]
        codes = ids[:, 1:].unflatten(-1, (-1, config.group_size)).transpose(1, 2)
        speech = (text == self.empty_id)[..., None]
        shape = (*codes.shape[:2], config.group_size, config.patch_encoder.dim)
        frames = torch.zeros(shape, dtype=self.text_head.dtype, device=ids.device)
        tables = zip(self.embeddings, config.empty_codes, strict=True)
        for channel, (table, empty) in enumerate(tables):
            some = codes[:, :, channel]
            frames += F.embedding(some, table).masked_fill((some == empty)[..., None], 0)
        frames = frames * speech[..., None]
        mask, square = None, (1, 1, config.group_size, config.group_size)
        if not config.patch_encoder_causal:
            mask = {"full_attention": torch.ones(square, dtype=torch.bool, device=ids.device)}
        run = self.patch_encoder(inputs_embeds=frames.flatten(0, 1), attention_mask=mask)
        encoded = run.last_hidden_state
        patches = F.linear(encoded.view(*codes.shape[:2], -1) * speech, self.patch_to_backbone)
        words = self.backbone.embed_tokens(text).masked_fill(speech, 0)
        return words + patches

    def patch(self, local: Tensor, choose: Choose) -> Tensor:
        """The patch decoder's first input [1, 1, D] -> codes [C, G]."""
        config, cache = self.config, self.cache(self.patch_decoder)
        shape = (config.channels, config.group_size)
        codes = torch.zeros(shape, dtype=torch.int64, device=local.device)
        for step in range(config.patch_steps):
            hidden = self.run(self.patch_decoder, local, cache)[0, -1]
            local = torch.zeros_like(local)
            for channel, delay in enumerate(config.delays):
                if delay <= step < delay + config.group_size:
                    scores = F.linear(hidden, self.heads[channel])
                    scores[config.empty_codes[channel]] = -torch.inf
                    code = choose(scores)
                    codes[channel, step - delay] = code
                    local = local + self.decoder_embeddings[channel][code]
        return codes

    def cache(self, model: Qwen2Model) -> Cache:
        return DynamicCache(config=model.config)

    def run(self, model: Callable[..., Any], x: Tensor, cache: Cache) -> Tensor:
        """A decoder's hidden states of new vectors."""
        return model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state


class Compiled(Upstream):
    """The same with static caches.

    Single steps of both decoders go through torch.compile, prompts do not.
    """

    name = "transformers compiled"

    def __init__(self, lm: LM, longest: int) -> None:
        super().__init__(lm, longest)
        mode = "reduce-overhead" if lm.device.type == "cuda" else None
        lengths = {self.backbone: longest, self.patch_decoder: lm.config.patch_steps}
        self._steps = {m: torch.compile(m, mode=mode, dynamic=False) for m in lengths}
        # Kept, since a captured graph uses their addresses.
        self._caches = {
            m: StaticCache(config=m.config, max_cache_len=length) for m, length in lengths.items()
        }

    def cache(self, model: Qwen2Model) -> Cache:
        self._caches[model].reset()
        return self._caches[model]

    def run(self, model: Callable[..., Any], x: Tensor, cache: Cache) -> Tensor:
        if x.shape[1] > 1:
            return super().run(model, x, cache)
        torch.compiler.cudagraph_mark_step_begin()
        # The next replay overwrites it.
        return super().run(self._steps[model], x, cache).clone()


def qwen2_model(
    config: TransformerConfig,
    weights: TransformerWeights,
    embeddings: Tensor | None = None,
    longest: int = 64,
) -> Qwen2Model:
    """A stack as transformers runs it, with scaled_dot_product_attention.

    Args:
        embeddings: of text, [V, D]; None for a stack that is fed vectors alone.
        longest: positions it is used with.

    Raises:
        TypeError: the weights are quantized.
    """
    table = weights.norm.new_zeros(1, config.dim) if embeddings is None else embeddings
    wanted = Qwen2Config(
        vocab_size=len(table),
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=config.norm_eps,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = Qwen2Model(wanted)
    state = {"norm.weight": weights.norm, "embed_tokens.weight": table}
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for i, layer in enumerate(weights.layers):
        state |= {
            f"layers.{i}.input_layernorm.weight": layer.attention_norm,
            f"layers.{i}.post_attention_layernorm.weight": layer.ffn_norm,
        }
        for weight, names, rows in (
            (layer.qkv, ("self_attn.q", "self_attn.k", "self_attn.v"), (q, kv, kv)),
            (layer.out, ("self_attn.o",), (config.dim,)),
            (layer.gate_up, ("mlp.gate", "mlp.up"), (config.ffn_dim, config.ffn_dim)),
            (layer.down, ("mlp.down",), (config.dim,)),
        ):
            for name, matrix, bias in zip(names, *_blocks(weight, rows), strict=True):
                state[f"layers.{i}.{name}_proj.weight"] = matrix
                if bias is not None:
                    state[f"layers.{i}.{name}_proj.bias"] = bias
    model.load_state_dict(state, strict=True, assign=True)
    # Computed from the config, in no state dict, and so still on the meta device.
    model.rotary_emb = Qwen2RotaryEmbedding(wanted).to(weights.norm.device)
    return model.eval().requires_grad_(False)


def _blocks(weight: Any, rows: tuple[int, ...]) -> tuple[Sequence[Tensor], Sequence[Any]]:
    """A weight's row blocks and their biases, or None; on a GPU they are joined."""
    if not isinstance(weight, Weight):
        raise TypeError("the baselines run dense weights: use bf16 or float32")
    if len(weight.blocks) == len(rows):
        return weight.blocks, weight.biases
    (matrix,), (bias,) = weight.blocks, weight.biases
    return matrix.split(rows), [None] * len(rows) if bias is None else bias.split(rows)
