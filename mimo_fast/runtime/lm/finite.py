"""Why a language model's values are not finite: which weight is not, else which layer overflows.

Of a model whose rows choose their adapter it is asked of the variant, `LM.variant`.

A reply that fails (`NOT_FINITE` in kernels/sample.py) asks it, in its consumer's thread. Before
that nothing here runs.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.kernels.matmul.product import AdaptedWeight, AnyWeight, QuantizedWeight
from mimo_fast.kernels.norm import rms_norm
from mimo_fast.kernels.patch_embed import patch_embed
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.runtime.lm.model import LM, PREFILL_CHUNK
from mimo_fast.runtime.lm.teacher_forcing import patch_inputs
from mimo_fast.runtime.lm.transformer import (
    layer_outputs,
    prefill_attend,
    self_attend,
)

Named = Iterator[tuple[str, Tensor]]


def explain(lm: LM, ids: Tensor, lost: Tensor | None, quantized_cache: bool = False) -> str:
    """Why the group after ids [C + 1, T G] is not finite, and what to do.

    Args:
        lost: its codes [C, G] where it is a patch, None where its text could not be drawn.
        quantized_cache: whether the KV cache was int8.
    """
    with lm.threads():
        return cause(tensors(lm), _steps(lm, ids, lost, quantized_cache), lm.dtype)


@torch.no_grad()
def cause(weights: Named, steps: Named, dtype: torch.dtype) -> str:
    """The first weight that is not finite or, if all are, the first of the named results, in the
    order of their computation; and what to do."""
    if weight := not_finite(weights):
        return f"{weight}; {_advice(dtype, weight)}"
    try:
        return _overflow(steps, dtype)
    except torch.OutOfMemoryError:
        return f"every weight is finite; {WIDER}"


def _overflow(steps: Named, dtype: torch.dtype) -> str:
    largest = 0.0
    for name, x in steps:
        if not bool(x.isfinite().all()):
            kind = str(dtype).removeprefix("torch.")
            problem = f"the result of {name} is the first that is not finite in {kind}"
            before = f" (largest value before it: {largest:.3g})" if largest else ""
            return f"every weight is finite, and {problem}{before}; {WIDER}"
        largest = float(x.abs().max()) if x.numel() else largest
    return f"every weight is finite, and so are the results when computed again; {WIDER}"


WIDER = "load it with dtype='bfloat16' or 'float32', or compare the checkpoint with its source"


def _advice(dtype: torch.dtype, weight: str) -> str:
    advice = "load an intact copy of the checkpoint"
    if dtype == torch.float16 and weight.endswith(" inf"):
        return f"{advice}, or with dtype='bfloat16' if the file holds what exceeds float16"
    return advice


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """What the first tensor that is not finite holds, after its name."""
    for name, tensor in named:
        finite = tensor.detach().isfinite()
        if not bool(finite.all()):
            nan = int(tensor.isnan().sum())
            infinite = finite.numel() - int(finite.sum()) - nan
            held = [f"{nan} NaN"] * bool(nan) + [f"{infinite} inf"] * bool(infinite)
            return f"{name} holds {' and '.join(held)}"
    return None


def tensors(lm: LM) -> Named:
    """Every floating tensor of a model, by its name in a checkpoint."""
    config, sizes = lm.config, lm.config.code_sizes
    rows = {name: shape[0] for name, shape in lm_shapes(config).items()}

    def of(weight: AnyWeight | Tensor, *modules: str) -> Named:
        return of_matrix(weight, modules, [rows[f"{module}.weight"] for module in modules])

    yield from of(lm.text_embeddings, "model.embed_tokens")
    for prefix, weights in (
        ("model", lm.backbone),
        ("input_local_transformer", lm.patch_encoder),
        ("local_transformer", lm.patch_decoder),
    ):
        for i, layer in enumerate(weights.layers):
            name = f"{prefix}.layers.{i}"
            yield f"{name}.input_layernorm.weight", layer.attention_norm
            yield from of(layer.qkv, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
            yield from of(layer.out, f"{name}.self_attn.o_proj")
            yield f"{name}.post_attention_layernorm.weight", layer.ffn_norm
            yield from of(layer.gate_up, *(f"{name}.mlp.{part}_proj" for part in ("gate", "up")))
            yield from of(layer.down, f"{name}.mlp.down_proj")
        yield f"{prefix}.norm.weight", weights.norm
    yield from of(lm.text_head, "model.embed_tokens" if config.tie_embeddings else "lm_head")
    for name, table in (
        ("speech_embeddings", lm.code_embeddings),
        ("local_transformer_lm_heads", lm.code_heads),
    ):
        for channel, part in enumerate(table.split(sizes)):
            yield f"{name}.{channel}.weight", part
    if lm.embeddings_to_local is not None:
        yield from of(lm.embeddings_to_local, "speech_embeddings_to_local")
    yield from of(lm.patch_to_backbone, "speech_group_downcast")
    yield from of(lm.backbone_to_patch, "hidden_states_downcast")


def of_matrix(weight: AnyWeight | Tensor, modules: Sequence[str], rows: Sequence[int]) -> Named:
    """The tensors of a matrix by the modules whose weights, of so many rows each, it stacks."""
    parts: dict[str, Sequence[Tensor | None]]
    if isinstance(weight, AdaptedWeight):
        yield from of_matrix(weight.base, modules, rows)
        yield from _of_adapter(weight, modules)
        return
    if isinstance(weight, Tensor):
        parts = {"weight": [weight]}
    elif isinstance(weight, QuantizedWeight):
        stacked = {"weight.scales": weight.scales, "weight.zeros": weight.zeros}
        stacked["bias"] = weight.bias
        parts = {name: x.split(list(rows)) for name, x in stacked.items() if x is not None}
    elif len(weight.blocks) == len(modules):
        parts = {"weight": weight.blocks, "bias": weight.biases}
    else:
        parts = {"weight": weight.blocks[0].split(list(rows))}
        if weight.biases[0] is not None:
            parts["bias"] = weight.biases[0].split(list(rows))
    for i, module in enumerate(modules):
        for name, blocks in parts.items():
            if (block := blocks[i]) is not None:
                yield f"{module}.{name}", block


def _of_adapter(weight: AdaptedWeight, modules: Sequence[str]) -> Named:
    """What an adapter has beside a matrix, by the modules whose weights that stacks."""
    where = ", ".join(modules)
    yield f"{where}.lora_A.weight", weight.a.blocks[0]
    for module, rows in zip(modules if len(weight.rows) > 1 else [where], weight.rows, strict=True):
        if rows.b is not None:
            yield f"{module}.lora_B.weight", rows.b.blocks[0]
    if weight.factor is not None:
        yield f"{where}.lora_magnitude_vector", weight.factor
    if weight.bias is not None:
        yield f"{where}.bias", weight.bias


def _steps(lm: LM, ids: Tensor, lost: Tensor | None, quantized_cache: bool) -> Named:
    """The results of a whole sequence computed again, layer by layer."""
    config = lm.config
    groups = ids.unflatten(1, (-1, config.group_size))
    text, codes = groups[0, :, 0], groups[1:].transpose(0, 1)
    if (unknown := (codes == NOT_FINITE).flatten(1).any(1)).any():
        # A patch of which the host learned by what followed.
        first = int(unknown.nonzero()[0, 0])
        text, codes, lost = text[:first], codes[:first], codes[first]
    state = lm.new_state([0], len(text), quantized_cache)
    hidden = torch.empty(0, dtype=lm.dtype, device=lm.device)
    for start in range(0, len(text), PREFILL_CHUNK):
        part = slice(start, start + PREFILL_CHUNK)
        if bool((spoken := text[part] == lm.empty_id).any()):
            yield from _patch_steps(lm, codes[part][spoken].to(lm.device))
        x = lm.embed(text[part], codes[part])[None]
        yield "model.embed_tokens", x
        attend = prefill_attend(config.backbone, lm.backbone_rope, state.cache, 0, start)
        eps = config.backbone.norm_eps
        for i, out in enumerate(layer_outputs(x, lm.backbone, eps, attend)):
            yield f"model.layers.{i}", out
            x = out
        hidden = rms_norm(x[0, -1:], lm.backbone.norm, eps)
        yield "model.norm", hidden
    if lost is None:
        yield "model.embed_tokens" if config.tie_embeddings else "lm_head", lm.text_logits(hidden)
    else:
        yield from _code_steps(lm, hidden, lost.to(lm.device)[None])


def _patch_steps(lm: LM, codes: Tensor) -> Named:
    """The patch encoder over codes [N, C, G]."""
    config = lm.config.patch_encoder
    tables = lm.code_embeddings, lm.code_offsets, lm.empty_codes
    x = patch_embed(codes, *tables)
    yield "speech_embeddings", x
    attend = self_attend(config, lm.encoder_rope, lm.config.patch_encoder_causal)
    for i, out in enumerate(layer_outputs(x, lm.patch_encoder, config.norm_eps, attend)):
        yield f"input_local_transformer.layers.{i}", out
    yield "speech_group_downcast", lm.encode_patches(codes)


def _code_steps(lm: LM, hidden: Tensor, codes: Tensor) -> Named:
    """The patch decoder from hidden [1, D] on, up to the step at which codes [1, C, G] fail."""
    config = lm.config
    yield "hidden_states_downcast", lm.local_hidden(hidden)
    failed = (codes[0] == NOT_FINITE).nonzero().tolist()
    steps = min((frame + config.delays[channel] for channel, frame in failed), default=0) + 1
    x = patch_inputs(lm, hidden, codes)[:, :steps]
    yield "speech_embeddings", x
    attend = self_attend(config.patch_decoder, lm.decoder_rope, causal=True)
    eps = config.patch_decoder.norm_eps
    for i, out in enumerate(layer_outputs(x, lm.patch_decoder, eps, attend)):
        yield f"local_transformer.layers.{i}", out
        x = out
    x = rms_norm(x[0, -1:], lm.patch_decoder.norm, eps)
    yield "local_transformer.norm", x
    for channel, head in enumerate(lm.code_heads.split(config.code_sizes)):
        yield f"local_transformer_lm_heads.{channel}", x @ head.T
