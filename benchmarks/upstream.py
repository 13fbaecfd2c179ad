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
from mimo_fast.runtime.lm.transformer import LayerWeights, TransformerWeights

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
        size, cache = self.config.group_size, self.backbone_cache()
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
        return self.run_backbone(self.embed(ids), cache)[:, -1]

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
        config, cache = self.config, self.patch_cache()
        shape = (config.channels, config.group_size)
        codes = torch.zeros(shape, dtype=torch.int64, device=local.device)
        for step in range(config.patch_steps):
            hidden = self.run_patch_decoder(local, cache)[0, -1]
            local = torch.zeros_like(local)
            for channel, delay in enumerate(config.delays):
                if delay <= step < delay + config.group_size:
                    scores = F.linear(hidden, self.heads[channel])
                    scores[config.empty_codes[channel]] = -torch.inf
                    code = choose(scores)
                    codes[channel, step - delay] = code
                    local = local + self.decoder_embeddings[channel][code]
        return codes

    def backbone_cache(self) -> Cache:
        return DynamicCache(config=self.backbone.config)

    def patch_cache(self) -> Cache:
        return DynamicCache(config=self.patch_decoder.config)

    def run_backbone(self, x: Tensor, cache: Cache) -> Tensor:
        return hidden_states(self.backbone, x, cache)

    def run_patch_decoder(self, x: Tensor, cache: Cache) -> Tensor:
        return hidden_states(self.patch_decoder, x, cache)


def hidden_states(model: Callable[..., Any], x: Tensor, cache: Cache) -> Tensor:
    return model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state


class Compiled(Upstream):
    """The same with static caches.

    Single steps of both decoders go through torch.compile, prompts do not.
    """

    name = "transformers compiled"

    def __init__(self, lm: LM, longest: int) -> None:
        super().__init__(lm, longest)
        mode = "reduce-overhead" if lm.device.type == "cuda" else None
        models = (self.backbone, self.patch_decoder)
        compiled = (torch.compile(model, mode=mode, dynamic=False) for model in models)
        self._step, self._patch_step = compiled
        # Kept, since a captured graph uses their addresses.
        lengths = zip(models, (longest, lm.config.patch_steps), strict=True)
        caches = (StaticCache(config=m.config, max_cache_len=length) for m, length in lengths)
        self._cache, self._patch_cache = caches

    def backbone_cache(self) -> Cache:
        self._cache.reset()
        return self._cache

    def patch_cache(self) -> Cache:
        self._patch_cache.reset()
        return self._patch_cache

    def run_backbone(self, x: Tensor, cache: Cache) -> Tensor:
        if x.shape[1] > 1:
            return super().run_backbone(x, cache)
        return self._compiled(self._step, x, cache)

    def run_patch_decoder(self, x: Tensor, cache: Cache) -> Tensor:
        return self._compiled(self._patch_step, x, cache)

    def _compiled(self, model: Callable[..., object], x: Tensor, cache: Cache) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # The next replay overwrites it.
        return hidden_states(model, x, cache).clone()


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
    device = weights.norm.device
    rows = 1 if embeddings is None else len(embeddings)
    wanted = Qwen2Config(
        vocab_size=rows,
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
    state = {"norm.weight": weights.norm}
    table = weights.norm.new_zeros(1, config.dim) if embeddings is None else embeddings
    state["embed_tokens.weight"] = table
    for i, layer in enumerate(weights.layers):
        state |= {f"layers.{i}.{name}": tensor for name, tensor in _layer(config, layer).items()}
    model.load_state_dict(state, strict=True, assign=True)
    # Computed from the config, in no state dict, and so still on the meta device.
    model.rotary_emb = Qwen2RotaryEmbedding(wanted).to(device)
    return model.eval().requires_grad_(False)


def _layer(config: TransformerConfig, layer: LayerWeights) -> dict[str, Tensor]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention, mlp = "self_attn.{}_proj".format, "mlp.{}_proj".format
    parts: list[tuple[Any, tuple[str, ...], tuple[int, ...]]] = [
        (layer.qkv, tuple(map(attention, "qkv")), (q, kv, kv)),
        (layer.out, (attention("o"),), (config.dim,)),
        (layer.gate_up, (mlp("gate"), mlp("up")), (config.ffn_dim, config.ffn_dim)),
        (layer.down, (mlp("down"),), (config.dim,)),
    ]
    named = {
        "input_layernorm.weight": layer.attention_norm,
        "post_attention_layernorm.weight": layer.ffn_norm,
    }
    for weight, names, rows in parts:
        if not isinstance(weight, Weight):
            raise TypeError("the baselines run dense weights: use bf16 or float32")
        # On a GPU the row blocks are joined.
        matrices = weight.blocks if len(weight.blocks) > 1 else weight.blocks[0].split(rows)
        named |= {f"{name}.weight": matrix for name, matrix in zip(names, matrices, strict=True)}
        if weight.biases[0] is not None:
            joined = len(weight.biases) == 1
            biases = weight.biases[0].split(rows) if joined else weight.biases
            named |= {f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)}
    return named
