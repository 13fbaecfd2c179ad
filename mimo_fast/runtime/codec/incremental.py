"""The codec's decoder, a few code frames at a time, at a cost that does not grow with the stream.

    codes -> rows -> transposed conv, norm -> 32 causal layers -> norm -> transposed conv -> mel
    mel of the newest P + n frames -> norm -> 16 windowed layers -> head -> overlap-add -> samples

A position passes once through each of the decoder's layers; its keys and values stay in a ring
buffer. The vocoder looks ahead, 10 frames a layer, so its newest P frames are pending: each chunk
computes them again from the end of the decoder on. That reads 2% of the decoder's weights, and a
chunk of 8 rows is bound by reading weights. Keys and values of earlier frames are final and kept.

Streams whose chunks have the same `Shape` are computed together, so that weights are read once for
all of them; what differs between them, `RowNumbers` and their rows of state, is on the device.

The statistics of the norms over time are updated with each chunk, and the pending frames are
recomputed with them: the input of the decoder's layers is normed again, and what the layers added
to it is kept. This is a good approximation, because a new scale passes the residual stream
unchanged and the layers norm their own inputs.

While a stream is young its statistics change most, and then it may be decoded again from the start
with the latest ones, as upstream does at each call: `CodecState.again` says up to how many code
frames, `settling` how often. The vocoder then begins where its windows reach from the first frame
that is not yet in the waveform. At 0, for machines without the time, it happens only for large
pushes: while a stream is short and has had no more than three of them.

Nothing here waits for the device, and after P frames every shape follows from the chunk's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.kernels.rope import rope_frequencies
from mimo_fast.runtime.codec.geometry import vocoder_frames
from mimo_fast.runtime.codec.layers import CodecStack, synthesize
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.norms import NormKnowledge, row_moments, sums_of
from mimo_fast.runtime.codec.persistent import decoder_of, vocoder_of
from mimo_fast.runtime.codec.pools import CodecState
from mimo_fast.runtime.codec.schedule import Schedule
from mimo_fast.runtime.codec.state import (
    BLOCK,
    RESTART_LIMIT,
    MeanVariance,
    Rows,
    StackState,
    StateTensors,
    decoder_context,
    pending_frames,
)

VOCODER_BLOCK = 256
"""Largest number of new vocoder frames computed at once."""


@dataclass(frozen=True)
class Block:
    """Vocoder frames that are computed at once, beside the pending ones.

    Attributes:
        new: How many there are.
        decided: Frames that become final.
        trim: Samples that are dropped before them, at the start of the waveform.
    """

    new: int
    decided: int
    trim: int


@dataclass(frozen=True)
class Shape:
    """What decides the shapes of a chunk; chunks of equal ones are one computation.

    Attributes:
        codes: Code frames.
        anew: Whether the stream is decoded from its start, though it has begun.
        skipped: New vocoder frames before the first block, see `unread_frames`.
        blocks: The vocoder's blocks.
        ended: Whether no codes follow, so that all frames become final.
    """

    codes: int
    anew: bool
    skipped: int
    blocks: tuple[Block, ...]
    ended: bool

    @property
    def decided(self) -> int:
        """Vocoder frames that become final."""
        return sum(block.decided for block in self.blocks)

    @classmethod
    def of(
        cls,
        config: CodecConfig,
        schedule: Schedule,
        before: tuple[int, int],
        codes: int,
        anew: bool,
        ended: bool,
    ) -> Shape:
        """The next chunk of a stream.

        Args:
            before: vocoder frames before the chunk, and how many of them are in the waveform.
            codes: code frames to decode, all so far if `anew`.
        """
        frames, committed = before
        frames = 0 if anew else frames
        new = vocoder_frames(config, codes)
        lookahead = schedule.rows(config, frames + new)
        pending = pending_frames(config, schedule.lookahead)
        skipped = 0 if frames else unread_frames(config, committed, new, pending)
        # Where less than the vocoder's reach is held back, the ends of blocks are heard: skipping
        # must not move one at which frames become final.
        skipped = min(skipped, _block_end(committed + lookahead) - 1)
        blocks, trim, start = list[Block](), (config.n_fft - config.hop) // 2, skipped
        while not blocks or start < new:
            end = min(_block_end(start), new)
            last = ended and end == new
            total = frames + end
            decided = total if last else max(committed, total - lookahead)
            dropped = max(0, trim - committed * config.hop)
            blocks.append(Block(end - start, decided - committed, dropped))
            start, committed = end, decided
        return cls(codes, anew, skipped, tuple(blocks), ended)


def _block_end(frame: int) -> int:
    """Where the vocoder's block of a new frame ends, if so many come."""
    return (frame // VOCODER_BLOCK + 1) * VOCODER_BLOCK


def unread_frames(config: CodecConfig, committed: int, new: int, pending: int) -> int:
    """First of `new` vocoder frames of a stream decoded from its start that make no block of their
    own.

    Needed are the frames that are not in the waveform, the keys and values before the pending ones,
    and what these depend on: each layer sees so many frames to the left. A block computes as many
    frames before its own as are pending.
    """
    left = config.vocoder_window[0]
    needed = min(committed, new - pending - left) - config.vocoder_layers * left
    return min(new, max(0, needed) + pending)


@dataclass(frozen=True)
class RowNumbers:
    """What differs between the rows of a computation, int64 [3, N] on the device.

    Attributes:
        values: Vocoder frames before the chunk that are not in the waveform, negative where a
            stream is decoded anew; the `Known`; and whether no rows of norms are missing.
    """

    values: Tensor

    @property
    def held(self) -> Tensor:
        return self.values[0]

    def norm(self, state: StateTensors, rows: Rows, place: int) -> NormKnowledge:
        """What is known of a norm: 0 for `unpool`, 1 for `to_mel`."""
        given, prior, expected = (
            rows.read(each)[:, place] for each in (state.given, state.prior, state.expected)
        )
        return NormKnowledge(self.values[1], given, prior, expected, self.values[2] != 0)


def decode_rows(
    codec: CodecNetwork,
    state: StateTensors,
    rows: Rows,
    hidden: Tensor,
    numbers: RowNumbers,
    shape: Shape,
) -> Tensor:
    """The next dequantized codes [N, T, D] of N streams, T >= 0 -> samples that are final [N, m].

    It can be captured in a graph that reads rows, codes and numbers from the device.
    """
    if shape.anew:
        rows.rewind(state)
    mel, norm = _decode(codec, state, rows, hidden, numbers, shape)
    pending = state.entered.shape[1] * codec.config.decoder_stride
    if shape.skipped:
        rows.write(state.frame, torch.full_like(rows.read(state.frame), shape.skipped))
    parts, start, held = [], shape.skipped, numbers.held + shape.skipped
    for block in shape.blocks:
        part = mel[:, start : start + block.new + pending]
        normed = codec.to_mel.normalise(part, *(moment[:, None, None] for moment in norm))
        head = _vocode(codec, state, rows, normed, block, held)
        last = shape.ended and block is shape.blocks[-1]
        parts.append(_overlap_add(codec, state, rows, head, block.trim, last))
        start, held = start + block.new, held + block.new - block.decided
    return torch.cat(parts, dim=1)


def codes_to_decode(state: CodecState, hidden: Tensor, ended: bool) -> tuple[Tensor, bool]:
    """Codes to decode now: the new ones or, for a stream that is decoded anew, all so far.

    ended: whether it is decoded anew because these are the last ones.

    Returns:
        The codes, and whether it is decoded anew.
    """
    past = sum(map(len, state.past))
    total = past + len(hidden)
    if state.frames and not past:
        return hidden, False
    if total > (state.again or RESTART_LIMIT):
        state.past.clear()
        return hidden, False
    state.past.append(hidden)
    if past and not _decodes_again(state, past, total, ended):
        return hidden, False
    state.decoded = total
    if not past:
        return hidden, False
    return torch.cat(state.past), True


def _decodes_again(state: CodecState, past: int, total: int, ended: bool) -> bool:
    """Whether a stream of `past` code frames is decoded again now that it has `total`."""
    if not state.again:
        return past <= 2 * state.largest
    return ended or (total - state.decoded) * state.settling >= total**2


def _decode(
    codec: CodecNetwork,
    state: StateTensors,
    rows: Rows,
    hidden: Tensor,
    numbers: RowNumbers,
    shape: Shape,
) -> tuple[Tensor, MeanVariance]:
    """Codes [N, T, D] -> mel [N, P + T pool stride, n_mels], pending and new, and its statistics.

    The statistics are [N] each.
    """
    pending, stride = state.entered.shape[1], codec.to_mel.stride
    first = rows.read(state.position) - pending
    entered, added = _run_decoder(codec, state, rows, hidden.to(codec.dtype), numbers)
    x = codec.decoder_norm((entered.float() + added).to(codec.dtype))
    places = torch.arange(x.shape[1], device=x.device, dtype=torch.int64)
    # Rows before position 0 are zeroed, so that the convolution adds nothing of them.
    x = x * (first[:, None] + places >= 0)[..., None]
    history = rows.read(state.history)
    kept, new = history.shape[1], x.shape[1] - pending
    inputs = torch.cat((history, x), dim=1)
    out = codec.to_mel.convolve(inputs)[:, kept * stride :]
    rows.write(state.history, inputs[:, new : new + kept])
    moments, sums = row_moments(out), rows.read(state.to_mel)
    norm = numbers.norm(state, rows, 1).statistics(sums + sums_of(moments, first * stride))
    # At the end the sums are those of the whole stream, which later ones may begin with.
    final = moments if shape.ended else moments[:, : new * stride]
    rows.write(state.to_mel, sums + sums_of(final, first * stride))
    return out[:, : x.shape[1] * stride], norm


def _run_decoder(
    codec: CodecNetwork, state: StateTensors, rows: Rows, x: Tensor, numbers: RowNumbers
) -> tuple[Tensor, Tensor]:
    """Inputs of the layers, pending and new [N, P / stride + T pool, D], and what they add."""
    if codec.unpool is not None and x.shape[1]:
        x = codec.unpool.convolve(x)
        sums = sums_of(row_moments(x), rows.read(state.position))
        rows.write(state.unpool, rows.read(state.unpool) + sums)
    raw, new = torch.cat((rows.read(state.entered), x), dim=1), x.shape[1]
    rows.write(state.entered, raw[:, new:])
    entered = raw
    if codec.unpool is not None:
        norm = numbers.norm(state, rows, 0).statistics(rows.read(state.unpool))
        entered = codec.unpool.normalise(raw, *(moment[:, None, None] for moment in norm))
    added = [rows.read(state.added)]
    for block in entered[:, raw.shape[1] - new :].split(BLOCK, dim=1):
        if block.shape[1]:
            added.append(_decoder_block(codec, state, rows, block).float() - block.float())
    joined = torch.cat(added, dim=1)
    rows.write(state.added, joined[:, new:])
    return entered, joined


def _decoder_block(codec: CodecNetwork, state: StateTensors, rows: Rows, x: Tensor) -> Tensor:
    """The next decoder inputs [N, n, D], n <= BLOCK -> outputs of the last layer [N, n, D]."""
    stack, ring = codec.decoder, state.decoder
    size, before = ring.k.shape[3], rows.read(state.position)
    positions = before[:, None] + torch.arange(x.shape[1], device=x.device, dtype=torch.int64)
    table, persistent = _rope_rows(stack, x.shape[2], positions), decoder_of(codec, x.shape[1])
    if persistent is not None:
        out = persistent.run(x, table, ring.k, ring.v, rows.numbers, before)
        rows.write(state.position, before + x.shape[1])
        return out
    slots = positions % size
    # The position that each slot of the ring holds once the block is written.
    newest, ring_slots = positions[:, -1:], torch.arange(size, device=x.device, dtype=torch.int64)
    held = (newest - (newest - ring_slots) % size)[:, None]
    past = positions[..., None] - held
    visible = (past >= 0) & (past <= decoder_context(stack.window)) & (held >= 0)

    if rows.first is None:
        out = stack.executor.run_rows(x, table, ring.k, ring.v, slots, visible, rows.numbers)
    else:
        out = stack.executor.run_rows(
            x, table, rows.read(ring.k), rows.read(ring.v), slots, visible
        )
    rows.write(state.position, before + x.shape[1])
    return out


def _vocode(
    codec: CodecNetwork, state: StateTensors, rows: Rows, mel: Tensor, block: Block, held: Tensor
) -> Tensor:
    """Normed mel [N, P + new, n_mels] -> head outputs of the frames that become final.

    held: int64 [N], frames before the new ones that are not in the waveform.
    """
    count, length = mel.shape[:2]
    x = matmul(mel.flatten(0, 1), codec.vocoder_in).unflatten(0, (count, length))
    x = _vocoder_layers(codec, state, rows, x, block)
    if not block.decided:
        return x.new_zeros(count, 0, codec.config.n_fft + 2)
    final = torch.arange(block.decided, device=mel.device, dtype=torch.int64)
    places = (length - block.new - held)[:, None] + final
    decided = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    return matmul(codec.vocoder_norm(decided), codec.vocoder_out)


def _vocoder_layers(
    codec: CodecNetwork, state: StateTensors, rows: Rows, x: Tensor, block: Block
) -> Tensor:
    """Inputs of the vocoder's layers [N, P + new, D] -> outputs of the last one."""
    stack, kept, (count, length) = codec.vocoder, state.vocoder.k.shape[3], x.shape[:2]
    frame = rows.read(state.frame) + block.new
    steps = torch.arange(-kept, length, device=x.device, dtype=torch.int64)
    positions = frame[:, None] - length + steps
    queries = positions[:, kept:]
    table = _rope_rows(stack, x.shape[2], queries)
    if persistent := vocoder_of(codec, length):
        how = table, *state.vocoder, rows.numbers, frame - length, block.new
        x, *later = persistent.run(x, *how)
    else:
        (left, right), before = stack.window, StackState(*map(rows.read, state.vocoder))
        ahead = positions[:, None] - queries[..., None]
        # Rows before the first frame attend to one another only, and no frame attends to them.
        side = (positions >= 0)[:, None] == (queries >= 0)[..., None]
        visible = (ahead >= -left) & (ahead <= right) & side

        layers, heads, _, width = before.k.shape[1:]
        room = before.k.new_empty(count, layers, heads, length, width)
        buffer = StackState(*(torch.cat((each, room), dim=3) for each in before))
        slots = steps[kept:].add(kept).expand(count, -1)
        x = stack.executor.run_rows(x, table, *buffer, slots, visible)
        later = [each[:, :, :, block.new : block.new + kept] for each in buffer]
    for each, new in zip(state.vocoder, later, strict=True):
        rows.write(each, new)
    rows.write(state.frame, frame)
    return x


def _overlap_add(
    codec: CodecNetwork, state: StateTensors, rows: Rows, head: Tensor, trim: int, last: bool
) -> Tensor:
    """Head outputs [N, n, n_fft + 2] of the frames just committed -> samples [N, m] final now."""
    hop, tail = codec.config.hop, rows.read(state.tail)
    done, overlap = head.shape[1] * hop, tail.shape[2]
    if done:
        sums = synthesize(head, codec.window, hop)
        sums[..., :overlap] += tail
    else:
        sums = tail.clone()
    rows.write(state.tail, sums[..., done:])
    wave, weight = sums[..., trim : done + overlap // 2 if last else done].unbind(1)
    return wave / weight


def _rope_rows(stack: CodecStack, width: int, positions: Tensor) -> Tensor:
    """`rope_table` of positions [N, T] on the device, [2, N, T, half a head].

    float64 keeps large angles exact.
    """
    form = width // stack.heads, stack.rope_theta, positions.device, stack.rounding
    angles = positions.double()[..., None] * rope_frequencies(*form).double()
    return torch.stack((angles.cos(), angles.sin())).float()
