"""The codec's decoder, a few code frames at a time: what a chunk costs does not depend on what came before.

    codes -> rows -> transposed conv, norm -> 32 causal layers -> norm -> transposed conv -> mel
    mel of the newest P + n frames -> norm -> 16 layers with a window -> head -> overlap-add -> samples

A decoder position goes once through each layer; its keys and values stay in a ring. The vocoder sees frames that are
still to come, 10 a layer, and the norm before it learns with every chunk, so its newest P frames are computed again
each time, from the mel on: 2% of the decoder's weights, which at a chunk's 8 rows are what costs. Keys and values of
the frames before those are final and kept.

Nothing here waits for the device, and every shape follows from the chunk's size alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.qmatmul import matmul
from .codec_layers import synthesize
from .codec_state import BLOCK, CodecState, Moments, NormMoments, decoder_context

if TYPE_CHECKING:
    from .codec import Codec

VOCODER_BLOCK = 256
"""New vocoder frames computed at once at most."""


def advance(
    codec: Codec, state: CodecState, hidden: Tensor | None, lookahead: int, moments: Moments | None, ended: bool
) -> Tensor:
    """Dequantized codes [T, D] that come next, if any -> the samples that are now decided, float32 [m].

    Args:
        lookahead: vocoder frames that must have come after one before it is decided.
        moments: of the norms over time, in place of those of what has come.
        ended: nothing follows, so everything is decided.
    """
    raw = state.mel[:0] if hidden is None else _decode(codec, state, hidden, moments, ended)
    norm = state.to_mel.moments(codec.to_mel, ended) if moments is None else moments.to_mel
    blocks = raw.split(VOCODER_BLOCK)
    parts = []
    for i, block in enumerate(blocks):
        last = ended and i == len(blocks) - 1
        state.frames += len(block)
        end = state.frames if last else max(state.committed, state.frames - lookahead)
        head = _vocode(codec, state, block, norm, end)
        parts.append(_overlap_add(codec, state, head, last))
    return torch.cat(parts)


def _decode(codec: Codec, state: CodecState, hidden: Tensor, moments: Moments | None, ended: bool) -> Tensor:
    """Dequantized codes [T, D] -> vocoder frames before their norm [T pool stride, n_mels]."""
    x = hidden.to(codec.dtype)
    if codec.unpool is not None and state.unpool is not None:
        out = state.unpool.extend(codec.unpool, x)
        fixed = None if moments is None else moments.unpool
        x = codec.unpool.normalise(out, *(fixed or state.unpool.moments(codec.unpool, ended)))
    x = torch.cat([_decoder_block(codec, state, block) for block in x.split(BLOCK)])
    return state.to_mel.extend(codec.to_mel, codec.decoder_norm(x))


def _decoder_block(codec: Codec, state: CodecState, x: Tensor) -> Tensor:
    """Decoder inputs [n, D] that come next, n <= BLOCK -> the last layer's outputs [n, D]."""
    stack, ring = codec.decoder, state.decoder
    size = ring.k.shape[2]
    positions = state.position + torch.arange(len(x), device=x.device)
    table, slots = _turns(codec, x.shape[1] // stack.heads, positions), positions % size
    # The newest position that each slot holds once the block is written.
    held = positions[-1] - (positions[-1] - torch.arange(size, device=x.device)) % size
    past = positions[:, None] - held
    visible = (past >= 0) & (past <= decoder_context(stack.window)) & (held >= 0)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = stack.split_heads(qkv, table)
        keys, values = ring.k[layer].index_copy_(1, slots, k), ring.v[layer].index_copy_(1, slots, v)
        return _masked_attention(q, keys, values, visible)

    out = stack.run(x, attend)
    state.position += len(x)
    return out


def _vocode(codec: Codec, state: CodecState, raw: Tensor, norm: NormMoments, end: int) -> Tensor:
    """New frames before their norm [n, n_mels] -> head outputs of the frames committed ... end - 1."""
    stack, before = codec.vocoder, state.vocoder
    raw, new = torch.cat((state.mel, raw)), len(raw)
    (left, right), kept = stack.window, before.k.shape[2]
    positions = state.frame - len(state.mel) + torch.arange(-kept, len(raw), device=raw.device)
    queries = positions[kept:]
    table = _turns(codec, codec.config.vocoder_dim // stack.heads, queries)
    ahead = positions - queries[:, None]
    # Before the first frame there are rows too: they see one another, and no frame sees them.
    visible = (ahead >= -left) & (ahead <= right) & ((positions >= 0) == (queries >= 0)[:, None])

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = stack.split_heads(qkv, table)
        keys, values = torch.cat((before.k[layer], k), dim=1), torch.cat((before.v[layer], v), dim=1)
        before.k[layer].copy_(keys[:, new : new + kept])
        before.v[layer].copy_(values[:, new : new + kept])
        return _masked_attention(q, keys, values, visible)

    x = stack.run(matmul(codec.to_mel.normalise(raw, *norm), codec.vocoder_in), attend)
    state.mel.copy_(raw[new:])
    state.frame += new
    first = len(raw) - state.frames + state.committed
    count = end - state.committed
    state.committed = end
    return matmul(codec.vocoder_norm(x[first : first + count]), codec.vocoder_out)


def _overlap_add(codec: Codec, state: CodecState, head: Tensor, last: bool) -> Tensor:
    """Head outputs [n, n_fft + 2] of the frames just committed -> the samples that no later frame adds to."""
    hop, overlap = codec.config.hop, state.tail.shape[1]
    done = len(head) * hop
    sums = synthesize(head, codec.window, hop) if len(head) else state.tail.new_zeros(2, overlap)
    sums[:, :overlap] += state.tail
    state.tail.copy_(sums[:, done:])
    # Of the first window, the part before the waveform is trimmed, and as much at the end.
    trim = overlap // 2
    first = max(0, trim - (state.committed * hop - done))
    wave, weight = sums[:, first : done + trim if last else done]
    return wave / weight


def _turns(codec: Codec, head_dim: int, positions: Tensor) -> Tensor:
    """Rows of `rope_table` for any positions [T], on the device; float64, so that they stay exact however far."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = torch.outer(positions.double(), (1.0 / codec.config.rope_theta**exponents).double())
    return torch.stack((angles.cos(), angles.sin())).float()


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [H, T, Dh], k and v [H, S, Dh], visible bool [T, S] -> [T, H Dh]."""
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible)[0]
    return out.transpose(0, 1).flatten(1)
