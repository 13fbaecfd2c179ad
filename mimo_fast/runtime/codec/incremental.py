"""The codec's decoder, a few code frames at a time: a chunk costs the same whatever came before.

    codes -> rows -> transposed conv, norm -> 32 causal layers -> norm -> transposed conv -> mel
    mel of the newest P + n frames -> norm -> 16 layers with a window -> head -> overlap-add ->
    samples

A position goes once through each of the decoder's layers; its keys and values stay in a ring. The
vocoder sees frames that are still to come, 10 a layer, so its newest P frames are computed again
with each chunk, from the decoder's end on. That reads 2% of the decoder's weights, and weights are
what a chunk's 8 rows cost. Keys and values of the frames before those are final and kept.

The norms over time learn with each chunk. The pending frames follow: what entered the decoder's
layers is normed anew and what the layers added to it is kept, for a new scale passes the residual
stream unchanged and the layers, which norm their inputs, hardly see it.

Large pushes do better: a young stream of no more than three of them is decoded again as a whole
with each, with the statistics that are then known.

Nothing here waits for the device, and once P frames have come every shape follows from the chunk's
size alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.runtime.codec.layers import synthesize
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.state import (
    BLOCK,
    WHOLE,
    YOUNG,
    CodecState,
    Moments,
    NormMoments,
    StackState,
    decoder_context,
)

VOCODER_BLOCK = 256
"""New vocoder frames computed at once at most."""


def decode_chunk(
    codec: CodecNetwork,
    state: CodecState,
    hidden: Tensor,
    lookahead: int,
    moments: Moments | None,
    ended: bool,
) -> Tensor:
    """The next dequantized codes [T, D], T >= 0 -> samples that are final now, float32 [m].

    A graph may replay it: `frames`, `committed` and `largest` are all that it knows of the state on
    the host, and it changes the first two alone.

    Args:
        lookahead: vocoder frames that must have come after one before it is decided.
        moments: of the norms over time, in place of those of what has come.
        ended: nothing follows, so everything is decided.
    """
    mel, norm = _decode(codec, state, hidden, moments, ended or state.largest >= WHOLE)
    pending = len(state.entered) * codec.config.decoder_stride
    new = len(mel) - pending
    parts = []
    for start in range(0, max(1, new), VOCODER_BLOCK):
        end = min(start + VOCODER_BLOCK, new)
        last = ended and end == new
        state.frames += end - start
        decided = state.frames if last else max(state.committed, state.frames - lookahead)
        rows = codec.to_mel.normalise(mel[start : end + pending], *norm)
        parts.append(
            _overlap_add(codec, state, _vocode(codec, state, rows, end - start, decided), last)
        )
    return torch.cat(parts)


def with_the_past(state: CodecState, hidden: Tensor) -> Tensor:
    """Codes to decode now: the next ones, or all from the first on where that is worth it."""
    new, past = len(hidden), sum(map(len, state.past))
    if state.frames and not past:
        return hidden
    if past + new > YOUNG:
        state.past.clear()
        return hidden
    state.past.append(hidden)
    if not past or past > 2 * state.largest:
        return hidden
    state.rewind()
    return torch.cat(state.past)


def _decode(
    codec: CodecNetwork, state: CodecState, hidden: Tensor, moments: Moments | None, ended: bool
) -> tuple[Tensor, NormMoments]:
    """Codes [T, D] -> mel [P + T pool stride, n_mels], pending and new, and its moments."""
    first = state.position - len(state.entered)
    entered, added = _run_decoder(codec, state, hidden.to(codec.dtype), moments, ended)
    x = codec.decoder_norm((entered.float() + added).to(codec.dtype))
    # What precedes position 0 must not reach it through the convolution.
    x = x * (first + torch.arange(len(x), device=x.device) >= 0)[:, None]
    inputs, new, stride = (
        torch.cat((state.history, x)),
        len(x) - len(state.entered),
        codec.to_mel.stride,
    )
    out = codec.to_mel.convolve(inputs)[len(state.history) * stride :]
    state.history.copy_(inputs[new : new + len(state.history)])
    norm = state.to_mel.moments(out, first * stride, ended) if moments is None else moments.to_mel
    state.to_mel.add(out[: new * stride], first * stride)
    return out[: len(x) * stride], norm


def _run_decoder(
    codec: CodecNetwork, state: CodecState, x: Tensor, moments: Moments | None, ended: bool
) -> tuple[Tensor, Tensor]:
    """Pending and new decoder inputs [P / stride + T pool, D], and what the layers add to them."""
    if codec.unpool is not None and len(x):
        x = codec.unpool.convolve(x)
        state.unpool.add(x, state.position)
    raw, new = torch.cat((state.entered, x)), len(x)
    state.entered.copy_(raw[new:])
    entered = raw
    if codec.unpool is not None:
        known = moments and moments.unpool
        entered = codec.unpool.normalise(
            raw, *(known or state.unpool.moments(raw[:0], state.position, ended))
        )
    added = [state.added]
    for block in entered[len(raw) - new :].split(BLOCK):
        if len(block):
            added.append(_decoder_block(codec, state, block).float() - block.float())
    joined = torch.cat(added)
    state.added.copy_(joined[new:])
    return entered, joined


def _decoder_block(codec: CodecNetwork, state: CodecState, x: Tensor) -> Tensor:
    """Decoder inputs [n, D] that come next, n <= BLOCK -> the last layer's outputs [n, D]."""
    stack, ring = codec.decoder, state.decoder
    size = ring.k.shape[2]
    positions = state.position + torch.arange(len(x), device=x.device)
    table, slots = _rope_rows(codec, x.shape[1] // stack.heads, positions), positions % size
    # The newest position that each slot holds once the block is written.
    held = positions[-1] - (positions[-1] - torch.arange(size, device=x.device)) % size
    past = positions[:, None] - held
    visible = (past >= 0) & (past <= decoder_context(stack.window)) & (held >= 0)

    out = stack.executor.run(x, table, ring.k, ring.v, slots, visible)
    state.position += len(x)
    return out


def _vocode(codec: CodecNetwork, state: CodecState, mel: Tensor, new: int, end: int) -> Tensor:
    """Normed mel [P + new, n_mels] -> head outputs of the frames from `committed` to end - 1."""
    stack, before = codec.vocoder, state.vocoder
    (left, right), kept = stack.window, before.k.shape[2]
    positions = state.frame + new - len(mel) + torch.arange(-kept, len(mel), device=mel.device)
    queries = positions[kept:]
    table = _rope_rows(codec, codec.config.vocoder_dim // stack.heads, queries)
    ahead = positions - queries[:, None]
    # Before the first frame there are rows too: they see one another, and no frame sees them.
    visible = (ahead >= -left) & (ahead <= right) & ((positions >= 0) == (queries >= 0)[:, None])

    room = before.k.new_empty(*before.k.shape[:2], len(mel), before.k.shape[3])
    buffer = StackState(torch.cat((before.k, room), dim=2), torch.cat((before.v, room), dim=2))
    slots = torch.arange(kept, kept + len(mel), device=mel.device)
    x = matmul(mel, codec.vocoder_in)
    x = stack.executor.run(x, table, buffer.k, buffer.v, slots, visible)
    before.k.copy_(buffer.k[:, :, new : new + kept])
    before.v.copy_(buffer.v[:, :, new : new + kept])
    state.frame += new
    first = len(mel) - state.frames
    decided = x[first + state.committed : first + end]
    state.committed = end
    return matmul(codec.vocoder_norm(decided), codec.vocoder_out)


def _overlap_add(codec: CodecNetwork, state: CodecState, head: Tensor, last: bool) -> Tensor:
    """Head outputs [n, n_fft + 2] of frames just committed -> samples that are final now."""
    hop, overlap = codec.config.hop, state.tail.shape[1]
    done = len(head) * hop
    sums = synthesize(head, codec.window, hop) if len(head) else state.tail.new_zeros(2, overlap)
    sums[:, :overlap] += state.tail
    state.tail.copy_(sums[:, done:])
    first = max(0, state.trim - (state.committed * hop - done))
    wave, weight = sums[:, first : done + state.trim if last else done]
    return wave / weight


def _rope_rows(codec: CodecNetwork, head_dim: int, positions: Tensor) -> Tensor:
    """Rows of `rope_table` for positions [T] on the device; in float64, exact however far."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = torch.outer(positions.double(), (1.0 / codec.config.rope_theta**exponents).double())
    return torch.stack((angles.cos(), angles.sin())).float()
