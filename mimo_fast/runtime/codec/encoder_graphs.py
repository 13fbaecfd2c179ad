"""CUDA graphs of the encoder: a recording of up to some seconds -> codes, in one launch.

    samples, their number -> log-mel -> convolutions -> encoder layers -> pooling -> RVQ -> codes

Captured once for each length in `BUCKETS` and number of codebooks. Samples and their number come in
one copy from host memory; everything that depends on the number is computed on the device: where
the signal is reflected, which rows are padding, how many codes there are. Padded rows are zero
where a convolution reads them and hidden from attention, so real rows are those of
`CodecNetwork.encode`, up to the order of sums where a library chooses it by the number of rows. The
last code is repeated to the end of the result, as prompts are padded to whole patches.

An encode is three launches: the copy of the samples, the graph, and the copy of the codes to the
host. Nobody waits: `PendingCodes` are on the device for whoever computes with them, and on the host
for whoever reads them.

Longer recordings, those that are on the device, and layers in host memory take the way without
graphs. A new path (kernels/defaults.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.mel import log_mel_of_frames, mel_tables
from mimo_fast.config import CodecConfig
from mimo_fast.kernels.attention import attention
from mimo_fast.kernels.rope import rope_table
from mimo_fast.kernels.sdpa import sdpa
from mimo_fast.runtime.codec.layers import ieee_convolutions
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.device.host_copy import HostCopy
from mimo_fast.runtime.lm.graphs import Capture, CudaCapture, Replay
from mimo_fast.runtime.lm.transformer import Attend

BUCKETS = (50, 100, 200, 400)
"""Code frames of captured encodes: the published codec has 25 a second, so up to 2, 4, 8, 16 s."""

SPARE = 32
"""Frames by which the last code is repeated beyond a bucket, for the patch that ends there."""


def code_frames(config: CodecConfig, samples: int) -> int:
    """Code frames of a recording of at most one segment."""
    mel = 1 + max(samples, config.n_fft // 2 + 1) // config.hop
    return -(-_rows(config, mel) // config.pool)


def longest_encode(config: CodecConfig, frames: int) -> int:
    """The largest number of samples that has no more than so many code frames."""
    rows, mel = frames * config.pool, frames * config.pool * config.stride
    while _rows(config, mel + 1) <= rows:
        mel += 1
    while _rows(config, mel) > rows:
        mel -= 1
    return mel * config.hop - 1


def _rows(config: CodecConfig, mel: int) -> int:
    """Rows of the encoder's layers for so many mel frames, see `CodecNetwork.convolved`."""
    first = mel + 3 - config.kernel
    second = (first + 2 - config.kernel) // config.stride + 1
    return min(second, (mel + 2 - config.kernel) // config.stride + 1)


class PaddedEncoder:
    """`CodecNetwork.encode` of at most `frames` code frames that asks nothing of the host.

    Attributes:
        inputs: float32 [S + 2] on the device: samples, zero after the last, and as two halves of an
            int64 their number.
    """

    def __init__(self, codec: CodecNetwork, frames: int, n_q: int) -> None:
        config, device = codec.config, codec.device
        self._codec, self._n_q, self._frames = codec, n_q, frames
        self.samples = longest_encode(config, frames)
        # The number lies at a multiple of its size.
        places = self.samples + self.samples % 2
        self.inputs = torch.zeros(places + 2, dtype=torch.float32, device=device)
        self._tables = mel_tables(config, device)
        self._mel = 1 + self.samples // config.hop
        width = config.dim // config.encoder_heads
        rows = _rows(config, self._mel)
        rounding = codec.encoder.rounding
        self._angles = rope_table(width, config.rope_theta, rows, device, rounding)

    def run(self) -> Tensor:
        """Codes int64 [n_q, frames + SPARE], the last real one repeated to the end."""
        codec, config = self._codec, self._codec.config
        half, device = config.n_fft // 2, codec.device
        samples = self.inputs[-2:].view(torch.int64).clamp(min=half + 1)
        mel = 1 + samples // config.hop
        rows = self._real_rows(mel)
        x = self._convolved(log_mel_of_frames(self._reflected(samples), config, self._tables), mel)
        places = torch.arange(len(x), device=device, dtype=torch.int64)
        real = places < rows
        x = codec.encoder.run(x, self._attend(places, real), config.skip_layer)
        x = codec.encoder_norm(x)
        if config.pool != 1:
            x = x.where(real[:, None], 0)
            x = torch.cat((x, x.new_zeros(-len(x) % config.pool, x.shape[1])))
            with ieee_convolutions():
                x = F.conv1d(x.T[None], codec.pool_conv, stride=config.pool)[0].T
            x = codec.pool_norm(F.gelu(x))
        codes = codec.quantize(x, self._n_q)
        frames = torch.arange(self._frames + SPARE, device=device, dtype=torch.int64)
        last = (rows + config.pool - 1) // config.pool - 1
        return codes.index_select(1, torch.minimum(frames, last))

    def _reflected(self, samples: Tensor) -> Tensor:
        """The samples with half a window on either side, as `log_mel` pads them."""
        half = self._codec.config.n_fft // 2
        places = torch.arange(
            -half, self.samples + half, device=self._codec.device, dtype=torch.int64
        ).abs()
        places = places.where(places < samples, 2 * (samples - 1) - places)
        return self.inputs[places.clamp(0, self.samples - 1)]

    def _real_rows(self, mel: Tensor) -> Tensor:
        """`_rows` on the device."""
        config = self._codec.config
        first = mel + 3 - config.kernel
        second = (first + 2 - config.kernel) // config.stride + 1
        return torch.minimum(second, (mel + 2 - config.kernel) // config.stride + 1)

    def _convolved(self, mel: Tensor, count: Tensor) -> Tensor:
        """`CodecNetwork.convolved` of `count` real frames; what follows them is zero.

        Each convolution reads zeros behind the last real row of its input.
        """
        codec, config = self._codec, self._codec.config

        def masked(x: Tensor, real: Tensor) -> Tensor:
            places = torch.arange(x.shape[1], device=x.device, dtype=torch.int64)
            return x.where(places < real, 0)

        with ieee_convolutions():
            x = masked(mel.to(codec.dtype).T, count)
            x = F.gelu(F.conv1d(x[None], *codec.conv1, padding=1))[0]
            x = masked(x, count + 3 - config.kernel)
            x = F.gelu(F.conv1d(x[None], *codec.conv2, stride=config.stride, padding=1))[0]
        return masked(x, self._real_rows(count)).T[: self._angles.shape[1]]

    def _attend(self, places: Tensor, real: Tensor) -> Attend:
        """The attention of the real rows; what padding gives is finite and read by nobody."""
        stack = self._codec.encoder
        left, right = stack.window
        right = 0 if stack.causal else right
        distance = places - places[:, None]
        visible = real.expand(len(places), -1)
        if left >= 0:
            visible = visible & (distance >= -left)
        if right >= 0:
            visible = visible & (distance <= right)
        # A row that sees no key would be NaN.
        visible = visible | ~visible.any(-1, keepdim=True)
        # Causal rows see no padding behind them.
        plain = stack.causal and left < 0

        def attend(_layer: int, qkv: Tensor) -> Tensor:
            q, k, v = stack.split_heads(qkv, self._angles)
            # A weight of zero times what is not finite is not zero.
            k, v = (x.where(real[:, None], 0) for x in (k, v))
            if plain:
                out = attention(q[None], k[None], v[None], causal=True)[0]
            else:
                out = sdpa(q[None], k[None], v[None], attn_mask=visible)[0]
            return out.transpose(0, 1).flatten(1)

        return attend


class PendingCodes:
    """Codes [n_q, frames] of a recording that an encoder's graph is still computing.

    They count as `frames` code frames, which may be cut, or padded with the last one.

    Attributes:
        check: Called once with the codes on the host; it raises where they are none.
    """

    def __init__(self, result: Tensor, frames: int, lock: threading.RLock) -> None:
        self._result: Tensor | None = result
        self._lock, self.frames = lock, frames
        # Of a result on the host nothing is copied, and the next replay would change it.
        self._copy: HostCopy | None = HostCopy(result if result.is_cuda else result.clone())
        self._codes: Tensor | None = None
        self.check: Callable[[Tensor], object] | None = None

    def wait(self) -> Tensor:
        """The codes on the host, int64 [n_q, frames]."""
        copy = self._copy
        if copy is not None:
            # Without the lock, so that other recordings are encoded meanwhile; two threads may find
            # the same. The clone frees the pinned memory, which is scarce.
            self._codes = copy.wait().clone()
            self._copy = None
        assert self._codes is not None
        if self.check is not None:
            self.check(self._codes)
            self.check = None
        return self._codes[:, : self.frames]

    def copy_to(self, out: Tensor, first: int) -> None:
        """Copies frames first ... of the codes to out [n_q, m] on the device; nobody waits."""
        with self._lock:
            source = self._codes if self._result is None else self._result
            assert source is not None
            out.copy_(source[:, first : first + out.shape[1]], non_blocking=True)

    def on_device(self) -> Tensor:
        """A copy of the codes on the device."""
        with self._lock:
            assert self._result is not None
            return self._result[:, : self.frames].clone()

    def keep(self) -> None:
        """Called before the next replay, which changes the graph's result."""
        with self._lock:
            if self._result is not None:
                self._result = self._result.clone()

    def drop(self) -> None:
        """Lets go of the device's memory, once the codes have been read on the host."""
        assert self._codes is not None
        with self._lock:
            self._result = None


@dataclass(frozen=True)
class CapturedEncoder:
    """One graph, and its result, codes [n_q, frames + SPARE]."""

    encoder: PaddedEncoder
    replay: Replay
    result: Tensor


class EncoderGraphs:
    """The encoder's graphs of one codec; they share a memory pool, so one result is valid at once.

    All run on one CUDA stream.

    Args:
        capture: makes a graph of a function; CUDA graphs by default.
    """

    def __init__(self, codec: CodecNetwork, capture: Capture | None = None) -> None:
        self._codec = weakref.ref(codec)
        self._capture = capture or CudaCapture()
        self._lock = threading.RLock()
        self._captured: dict[tuple[int, int], CapturedEncoder] = {}
        self._newest: weakref.ref[PendingCodes] | None = None

    def serves(self, codec: CodecNetwork, wav: Tensor) -> bool:
        """Whether a graph takes a waveform [n], and the codec's layers are those captured."""
        if codec is not self._codec() or not isinstance(codec.encoder.layers, tuple):
            return False
        fits = len(wav) > 0 and code_frames(codec.config, len(wav)) <= BUCKETS[-1]
        return fits and wav.device.type == "cpu"

    def warmup(self, n_q: int, progress: bool = True) -> None:
        """Captures every bucket, the longest first, so that others reuse its memory."""
        # tqdm shows the bar only on a terminal.
        show = None if progress else True
        for bucket in tqdm(
            BUCKETS[::-1], desc="capturing", unit="encoder", leave=False, disable=show
        ):
            with self._lock:
                self._graph(bucket, n_q)

    def encode(self, wav: Tensor, n_q: int) -> PendingCodes:
        """Launches the encoding of a waveform that `serves` takes; waits for nothing."""
        codec = self._codec()
        assert codec is not None
        frames = code_frames(codec.config, len(wav))
        bucket = next(size for size in BUCKETS if size >= frames)
        with self._lock:
            captured = self._graph(bucket, n_q)
            self._keep_newest()
            inputs = captured.encoder.inputs
            # Each run has its own buffer: the copy of the previous one may still be running.
            host = torch.zeros(
                len(inputs), dtype=torch.float32, pin_memory=inputs.is_cuda, device="cpu"
            )
            host[: len(wav)] = wav
            host[-2:].view(torch.int64)[0] = len(wav)
            inputs.copy_(host, non_blocking=True)
            captured.replay()
            codes = PendingCodes(captured.result, frames, self._lock)
            self._newest = weakref.ref(codes)
        return codes

    def _keep_newest(self) -> None:
        newest = None if self._newest is None else self._newest()
        if newest is not None:
            newest.keep()

    # A graph outlives the call it is captured for, and so that caller's inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _graph(self, bucket: int, n_q: int) -> CapturedEncoder:
        key = bucket, n_q
        if key not in self._captured:
            codec = self._codec()
            assert codec is not None
            # A capture runs the work, in memory that may hold the newest result.
            self._keep_newest()
            encoder = PaddedEncoder(codec, bucket, n_q)
            self._captured[key] = CapturedEncoder(encoder, *self._capture(encoder.run))
        return self._captured[key]
