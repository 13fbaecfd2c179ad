"""What happens to a recording on its way: codecs, telephones, cuts, levels, noise, speed."""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import numpy as np
import torch
from torch import Tensor

from mimo_fast.audio.resample import resample

RATE = 24000

Change = Callable[[Tensor], tuple[Tensor, int]]
"""Samples [n] at 24 kHz -> samples and their rate."""


def coded(codec: str, container: str, bits: int | None = None, rate: int = RATE) -> Change:
    """Encoded at a bit rate and decoded again."""

    def change(wav: Tensor) -> tuple[Tensor, int]:
        file = io.BytesIO()
        with av.open(file, "w", format=container) as box:
            stream = box.add_stream(codec, rate=rate, layout="mono")
            if bits:
                stream.bit_rate = bits
            form = stream.codec_context.codec.audio_formats[0].name
            size = stream.codec_context.frame_size or None
            fitted = av.AudioResampler(form, "mono", rate, size)
            samples = resample(wav, RATE, rate)[None].numpy()
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = rate
            for part in (*fitted.resample(frame), *fitted.resample(None), None):
                box.mux(stream.encode(part))
        file.seek(0)
        with av.open(file) as box:
            back = av.AudioResampler("fltp", "mono")
            frames = [part for frame in box.decode(audio=0) for part in back.resample(frame)]
            heard = np.concatenate([frame.to_ndarray()[0] for frame in frames])
            return torch.from_numpy(heard), box.streams.audio[0].rate

    return change


def at_rate(rate: int) -> Change:
    return lambda wav: (resample(wav, RATE, rate), rate)


def cut(start: float, end: float) -> Change:
    """The part between two shares of its length, at no round sample."""
    return lambda wav: (wav[int(start * len(wav)) + 111 : int(end * len(wav)) - 77], RATE)


def louder(decibels: float) -> Change:
    return lambda wav: ((wav * 10 ** (decibels / 20)).clamp(-1, 1), RATE)


def noisy(decibels: float) -> Change:
    """White noise that many decibels below."""

    def change(wav: Tensor) -> tuple[Tensor, int]:
        noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(0))
        return wav + noise * wav.square().mean().sqrt() * 10 ** (-decibels / 20), RATE

    return change


def played(speed: float) -> Change:
    """That many times as fast, its pitch with it."""
    return lambda wav: (resample(wav, round(RATE * speed), RATE), RATE)


CHANGES: dict[str, Change] = {
    "16 bits": lambda wav: ((wav * 2**15).round() / 2**15, RATE),
    "mp3 64": coded("libmp3lame", "mp3", 64_000),
    "mp3 128": coded("libmp3lame", "mp3", 128_000),
    "opus 24": coded("libopus", "ogg", 24_000, 48_000),
    "opus 12": coded("libopus", "ogg", 12_000, 48_000),
    "aac 64": coded("aac", "adts", 64_000),
    "telephone": coded("pcm_mulaw", "wav", rate=8_000),
    "16 kHz": at_rate(16_000),
    "22.05 kHz": at_rate(22_050),
    "48 kHz": at_rate(48_000),
    "without its start": cut(0.25, 1),
    "its middle": cut(0.25, 0.75),
    "6 dB louder": louder(6),
    "6 dB quieter": louder(-6),
    "20 dB quieter": louder(-20),
}
"""What a mark is to survive."""

SPEEDS = {f"{speed}x": played(speed) for speed in (0.9, 0.95, 1.05, 1.075, 1.1)}
"""What no mark survives, and what gives other speech something of one."""
