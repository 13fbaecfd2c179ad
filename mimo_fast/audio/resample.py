"""Waveform -> waveform at another rate, by windowed-sinc resampling.

It follows `torchaudio.functional.resample` with its defaults operation by operation, because audio
codes depend on it, and works in blocks, so that memory does not grow with the audio.
"""

import functools
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.errors import AudioError
from mimo_fast.json_files import shown
from mimo_fast.modes import in_own_modes

MIN_RATE, MAX_RATE = 1_000, 768_000

ZERO_CROSSINGS, ROLLOFF = 6, 0.99
DENSE_TABLE = 2**20  # entries of a filter table that is still applied as one convolution
TABLE_BLOCK = 2**20  # entries of a larger table that are computed at a time
BAND_PHASES = 16  # output phases that share their input samples in a larger table
RESAMPLE_SPAN = 2**21  # samples in or out at a time


def check_rate(rate: int, name: str = "the sample rate") -> int:
    """`rate` as an int. Raises AudioError unless it is whole hertz from 1 kHz to 768 kHz."""
    if not isinstance(rate, numbers.Integral) or not MIN_RATE <= int(rate) <= MAX_RATE:
        wanted = f"a whole number from {MIN_RATE} to {MAX_RATE}"
        raise AudioError(f"{name} is {shown(rate)} Hz; it must be {wanted}")
    return int(rate)


@in_own_modes
def resample(wav: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Resample `wav` [..., n] to float32 [..., ceil(n * target_rate / source_rate)].

    Equals `torchaudio.functional.resample` with its defaults on the CPU, where it is always
    computed: a GPU's TF32 convolutions lose digits. Where the reduced rates need a filter table
    beyond DENSE_TABLE entries (coprime rates, gigabytes in torchaudio) only its non-zero band is
    built, and in float64: torchaudio's float32 phases lose up to four digits there.

    Raises:
        AudioError: a rate outside 1 kHz..768 kHz, or samples that are not floating point.
    """
    source_rate = check_rate(source_rate, "the source rate")
    target_rate = check_rate(target_rate, "the target rate")
    if not wav.is_floating_point():
        fix = "convert them to float32 in [-1, 1) first"
        raise AudioError(f"cannot resample {wav.dtype} samples; {fix}")
    if source_rate == target_rate:
        return wav.to(torch.float32)
    n = wav.shape[-1]
    rows = wav.to("cpu", torch.float32).reshape(math.prod(wav.shape[:-1]), n)
    out = torch.empty(
        len(rows), _output_length(n, source_rate, target_rate), dtype=torch.float32, device="cpu"
    )
    for row, out_row in zip(rows, out, strict=True):
        done = 0
        for piece in resample_blocks(row.split(RESAMPLE_SPAN), source_rate, target_rate):
            out_row[done : done + len(piece)] = piece
            done += len(piece)
    return out.reshape(*wav.shape[:-1], out.shape[-1]).to(wav.device)


def resample_blocks(
    blocks: Iterable[Tensor], source_rate: int, target_rate: int
) -> Iterator[Tensor]:
    """`resample` of float32 audio [n] in blocks of any size; those yielded join to the result."""
    if source_rate == target_rate:
        yield from blocks
        return
    divisor = math.gcd(source_rate, target_rate)
    orig, new = source_rate // divisor, target_rate // divisor
    table = _polyphase_table(orig, new)
    span, margin = max(1, RESAMPLE_SPAN // max(orig, new)) * orig, table.width
    pending, held = [torch.zeros(margin, dtype=torch.float32, device="cpu")], margin
    received = emitted = 0
    for block in blocks:
        pending.append(block)
        received, held = received + len(block), held + len(block)
        while held >= span + 2 * margin:
            samples = torch.cat(pending)
            yield (piece := _convolve(samples[: span + 2 * margin], table))
            pending, held, emitted = [samples[span:]], held - span, emitted + len(piece)
    remaining = _output_length(received, orig, new) - emitted
    if remaining:
        yield _convolve(
            torch.cat([*pending, torch.zeros(margin + orig, dtype=torch.float32, device="cpu")]),
            table,
        )[:remaining]


def _output_length(n: int, source_rate: int, target_rate: int) -> int:
    return -(-n * target_rate // source_rate)


class _PolyphaseTable(NamedTuple):
    """Filters of the `new` output phases of `orig` input samples, in bands of consecutive phases.

    A phase sees `width` samples to either side. Band b computes its phases as taps[b] [phases,
    reach] times the `reach` samples from starts[b] on.
    """

    orig: int
    new: int
    width: int
    starts: Tensor
    taps: Tensor


def _convolve(samples: Tensor, table: _PolyphaseTable) -> Tensor:
    """Every whole period in `samples` [width + periods * orig + width] -> [periods * new]."""
    bands, _, reach = table.taps.shape
    if bands == 1:  # torchaudio's own convolution, for the same rounding
        out = F.conv1d(samples[None, None], table.taps[0][:, None], stride=table.orig)
        return out[0].T.reshape(-1)
    periods = (len(samples) - 2 * table.width) // table.orig
    offsets = (
        table.starts[:, None] + torch.arange(periods, dtype=torch.int64, device="cpu") * table.orig
    )
    out = samples.unfold(0, reach, 1)[offsets] @ table.taps.transpose(1, 2)
    return out.transpose(0, 1).reshape(periods, -1)[:, : table.new].reshape(-1)


@functools.lru_cache(maxsize=2)
def _polyphase_table(orig: int, new: int) -> _PolyphaseTable:
    base = min(orig, new) * ROLLOFF
    width = math.ceil(ZERO_CROSSINGS * orig / base)
    if new * (2 * width + orig) <= DENSE_TABLE:
        phases, reach, dtype = new, 2 * width + orig, torch.float32
    else:
        phases = BAND_PHASES
        reach = 2 * width + 1 - (-BAND_PHASES * orig // new)
        dtype = torch.float64
    firsts = torch.arange(0, new, phases, dtype=torch.int64, device="cpu")
    starts = (firsts * orig // new).clamp(max=2 * width + orig - reach)
    taps = torch.empty(len(firsts), phases, reach, dtype=torch.float32, device="cpu")
    # Many bands at a time: coprime rates have up to 48,000.
    together = max(1, TABLE_BLOCK // (phases * reach))
    for first, start, part in zip(
        firsts.split(together), starts.split(together), taps.split(together), strict=True
    ):
        outputs = _run(first, phases).to(dtype) / new
        inputs = _run(start - width, reach).to(dtype) / orig
        part.copy_(_windowed_sinc(outputs, inputs, base, base / orig))
    return _PolyphaseTable(orig, new, width, starts, taps)


def _run(firsts: Tensor, count: int) -> Tensor:
    """`count` whole numbers from each first one on: [b] -> [b, count]."""
    return firsts[:, None] + torch.arange(count, dtype=torch.int64, device="cpu")


def _windowed_sinc(outputs: Tensor, inputs: Tensor, base: float, gain: float) -> Tensor:
    """Hann-windowed sinc [b, p, k] of cutoff `base` between output times [b, p], inputs' [b, k]."""
    t = ((inputs[:, None] - outputs[:, :, None]) * base).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = torch.cos(t * math.pi / ZERO_CROSSINGS / 2) ** 2
    t = t * math.pi
    return (torch.where(t == 0, 1.0, t.sin() / t) * (window * gain)).to(torch.float32)
