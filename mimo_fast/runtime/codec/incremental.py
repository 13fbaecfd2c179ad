"""The codec's decoder, a few code frames at a time, at a cost that does not grow with the stream.

    codes -> rows -> transposed conv, norm -> 32 causal layers -> norm -> transposed conv -> mel
    mel of the newest P + n frames -> norm -> 16 windowed layers -> head -> overlap-add -> samples

A position passes once through each of the decoder's layers; its keys and values stay in a ring
buffer. The vocoder looks ahead, 10 frames a layer, so its newest P frames are pending: each chunk
computes them again from the end of the decoder on. That reads 2% of the decoder's weights, and a
chunk of 8 rows is bound by reading weights. Keys and values of earlier frames are final and kept.

The statistics of the norms over time are updated with each chunk, and the pending frames are
recomputed with them: the input of the decoder's layers is normed again, and what the layers added
to it is kept. This is a good approximation, because a new scale passes the residual stream
unchanged and the layers norm their own inputs.

While a stream is young its statistics change most, and then it may be decoded again from the start
with the latest ones, as upstream does at each call: `CodecState.again` says up to how many code
frames, `SETTLING` how often. At 0, for machines without the time, that happens only for large
pushes: while a stream is short and has had no more than three of them.

Nothing here waits for the device, and after P frames every shape follows from the chunk's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.kernels.rope import rope_frequencies
from mimo_fast.runtime.codec.layers import CodecStack, synthesize
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.prior import norm_statistics
from mimo_fast.runtime.codec.state import (
    BLOCK,
    RESTART_LIMIT,
    SETTLING,
    WHOLE_UTTERANCE,
    CodecState,
    MeanVariance,
    NormStatistics,
    Prior,
    StackState,
    decoder_context,
    row_moments,
)

VOCODER_BLOCK = 256
"""Largest number of new vocoder frames computed at once."""


def decode_chunk(
    codec: CodecNetwork,
    state: CodecState,
    hidden: Tensor,
    lookahead: int,
    statistics: NormStatistics | Prior | None,
    ended: bool,
    held: Tensor | None = None,
) -> Tensor:
    """The next dequantized codes [T, D], T >= 0 -> samples that are final now, float32 [m].

    It can be captured in a graph: of the state on the host it reads only `frames`, `committed` and
    `largest`, and writes only the first two.

    Args:
        lookahead: vocoder frames that must follow a frame before it is final.
        statistics: norm statistics to use, or sums of rows to reckon with; None estimates them
            from the codes so far.
        ended: no codes follow, so all frames become final.
        held: vocoder frames held back before this chunk, int64 scalar on the device, for a graph
            that serves any number of them; the chunk has at most VOCODER_BLOCK frames then.
    """
    mel, norm = _decode(codec, state, hidden, statistics, ended)
    pending = len(state.entered) * codec.config.decoder_stride
    new = len(mel) - pending
    parts = []
    for start in range(0, max(1, new), VOCODER_BLOCK):
        end = min(start + VOCODER_BLOCK, new)
        last = ended and end == new
        state.frames += end - start
        decided = state.frames if last else max(state.committed, state.frames - lookahead)
        rows = codec.to_mel.normalise(mel[start : end + pending], *norm)
        head = _vocode(codec, state, rows, end - start, decided, held)
        parts.append(_overlap_add(codec, state, head, last))
    return torch.cat(parts)


def codes_to_decode(state: CodecState, hidden: Tensor, ended: bool) -> Tensor:
    """Codes to decode now: the new ones or, for a stream that is decoded again, all so far."""
    past = sum(map(len, state.past))
    total = past + len(hidden)
    if state.frames and not past:
        return hidden
    if total > (state.again or RESTART_LIMIT):
        state.past.clear()
        return hidden
    state.past.append(hidden)
    if past and not _decodes_again(state, past, total, ended):
        return hidden
    state.decoded = total
    if not past:
        return hidden
    state.rewind()
    return torch.cat(state.past)


def _decodes_again(state: CodecState, past: int, total: int, ended: bool) -> bool:
    """Whether a stream of `past` code frames is decoded again now that it has `total`."""
    if not state.again:
        return past <= 2 * state.largest
    return ended or (total - state.decoded) * SETTLING >= total**2


def _decode(
    codec: CodecNetwork,
    state: CodecState,
    hidden: Tensor,
    statistics: NormStatistics | Prior | None,
    ended: bool,
) -> tuple[Tensor, MeanVariance]:
    """Codes [T, D] -> mel [P + T pool stride, n_mels], pending and new, and its norm statistics."""
    first, settled = state.position - len(state.entered), ended or state.largest >= WHOLE_UTTERANCE
    entered, added = _run_decoder(codec, state, hidden.to(codec.dtype), statistics, settled)
    x = codec.decoder_norm((entered.float() + added).to(codec.dtype))
    # Rows before position 0 are zeroed, so that the convolution adds nothing of them.
    x = x * (first + torch.arange(len(x), device=x.device, dtype=torch.int64) >= 0)[:, None]
    inputs = torch.cat((state.history, x))
    new = len(x) - len(state.entered)
    stride = codec.to_mel.stride
    out = codec.to_mel.convolve(inputs)[len(state.history) * stride :]
    state.history.copy_(inputs[new : new + len(state.history)])
    known = statistics.to_mel if statistics else None
    moments = row_moments(out)
    sums = state.to_mel.with_rows(moments, first * stride)
    norm = norm_statistics(state.to_mel, known, sums, settled)
    # At the end the sums are those of the whole stream, which later ones may begin with.
    state.to_mel.add(moments if ended else moments[: new * stride], first * stride)
    return out[: len(x) * stride], norm


def _run_decoder(
    codec: CodecNetwork,
    state: CodecState,
    x: Tensor,
    statistics: NormStatistics | Prior | None,
    ended: bool,
) -> tuple[Tensor, Tensor]:
    """Inputs of the layers, pending and new [P / stride + T pool, D], and what the layers add."""
    if codec.unpool is not None and len(x):
        x = codec.unpool.convolve(x)
        state.unpool.add(row_moments(x), state.position)
    raw, new = torch.cat((state.entered, x)), len(x)
    state.entered.copy_(raw[new:])
    entered = raw
    if codec.unpool is not None:
        known = statistics.unpool if statistics else None
        norm = norm_statistics(state.unpool, known, state.unpool.sums, ended)
        entered = codec.unpool.normalise(raw, *norm)
    added = [state.added]
    for block in entered[len(raw) - new :].split(BLOCK):
        if len(block):
            added.append(_decoder_block(codec, state, block).float() - block.float())
    joined = torch.cat(added)
    state.added.copy_(joined[new:])
    return entered, joined


def _decoder_block(codec: CodecNetwork, state: CodecState, x: Tensor) -> Tensor:
    """The next decoder inputs [n, D], n <= BLOCK -> outputs of the last layer [n, D]."""
    stack, ring = codec.decoder, state.decoder
    size = ring.k.shape[2]
    positions = state.position + torch.arange(len(x), device=x.device, dtype=torch.int64)
    table, slots = _rope_rows(stack, x.shape[1], positions), positions % size
    # The position that each slot of the ring holds once the block is written.
    held = (
        positions[-1]
        - (positions[-1] - torch.arange(size, device=x.device, dtype=torch.int64)) % size
    )
    past = positions[:, None] - held
    visible = (past >= 0) & (past <= decoder_context(stack.window)) & (held >= 0)

    out = stack.executor.run(x, table, ring.k, ring.v, slots, visible)
    state.position += len(x)
    return out


def _vocode(
    codec: CodecNetwork,
    state: CodecState,
    mel: Tensor,
    new: int,
    end: int,
    held: Tensor | None,
) -> Tensor:
    """Normed mel [P + new, n_mels] -> head outputs of the frames from `committed` to end - 1."""
    stack, before = codec.vocoder, state.vocoder
    (left, right), kept = stack.window, before.k.shape[2]
    positions = (
        state.frame
        + new
        - len(mel)
        + torch.arange(-kept, len(mel), device=mel.device, dtype=torch.int64)
    )
    queries = positions[kept:]
    table = _rope_rows(stack, codec.config.vocoder_dim, queries)
    ahead = positions - queries[:, None]
    # Rows before the first frame attend to one another only, and no frame attends to them.
    visible = (ahead >= -left) & (ahead <= right) & ((positions >= 0) == (queries >= 0)[:, None])

    room = before.k.new_empty(*before.k.shape[:2], len(mel), before.k.shape[3])
    buffer = StackState(torch.cat((before.k, room), dim=2), torch.cat((before.v, room), dim=2))
    slots = torch.arange(kept, kept + len(mel), device=mel.device, dtype=torch.int64)
    x = matmul(mel, codec.vocoder_in)
    x = stack.executor.run(x, table, buffer.k, buffer.v, slots, visible)
    before.k.copy_(buffer.k[:, :, new : new + kept])
    before.v.copy_(buffer.v[:, :, new : new + kept])
    state.frame += new
    first = len(mel) - state.frames
    decided = x[first + state.committed : first + end]
    if held is not None:
        places = torch.arange(end - state.committed, device=mel.device, dtype=torch.int64)
        decided = x[len(mel) - new - held + places]
    state.committed = end
    return matmul(codec.vocoder_norm(decided), codec.vocoder_out)


def _overlap_add(codec: CodecNetwork, state: CodecState, head: Tensor, last: bool) -> Tensor:
    """Head outputs [n, n_fft + 2] of the frames just committed -> samples that are final now."""
    hop, overlap = codec.config.hop, state.tail.shape[1]
    done = len(head) * hop
    sums = synthesize(head, codec.window, hop) if len(head) else state.tail.new_zeros(2, overlap)
    sums[:, :overlap] += state.tail
    state.tail.copy_(sums[:, done:])
    first = max(0, state.trim - (state.committed * hop - done))
    wave, weight = sums[:, first : done + state.trim if last else done]
    return wave / weight


def _rope_rows(stack: CodecStack, width: int, positions: Tensor) -> Tensor:
    """Rows of `rope_table` for positions [T] on the device; float64 keeps large angles exact."""
    form = width // stack.heads, stack.rope_theta, positions.device, stack.rounding
    angles = torch.outer(positions.double(), rope_frequencies(*form).double())
    return torch.stack((angles.cos(), angles.sin())).float()
