"""The codec: in int8 beside the full one, streams beside one-shot decoding, look-aheads.

SNR and mel distance (mean absolute difference of the natural log-mel) are of the audio that is
decoded from the same codes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.mel import log_mel
from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, Lookahead
from mimo_fast.runtime.codec.model import Codec

FIRST_PATCHES = 4
"""Patches of the beginning, 0.64 s, in which an elastic stream holds less back."""

EDGE = 360
"""Samples at an end within which the inverse STFT mixes in what comes after."""


@dataclass(frozen=True)
class CodecQuality:
    """A quantized codec beside the full one; `code_agreement` is of its own codes."""

    snr_db: float
    mel_distance: float
    code_agreement: float


def compare_codec(
    full: Codec, quantized: Codec, wavs: Sequence[Tensor], channels: int
) -> CodecQuality:
    """Compares the codecs over all recordings together."""
    signal = noise = distance = frames = same = codes_ = 0.0
    for wav in wavs:
        codes = full.encode(wav, channels)
        want, got = full.decode(codes).cpu(), quantized.decode(codes).cpu()
        signal += float(want.double().square().sum())
        noise += float((got.double() - want.double()).square().sum())
        difference = (log_mel(got, full.config) - log_mel(want, full.config)).abs()
        distance, frames = distance + float(difference.sum()), frames + difference.numel()
        own = quantized.encode(wav, channels)
        same, codes_ = same + float((own == codes).sum()), codes_ + codes.numel()
    return CodecQuality(_decibels(signal, noise), distance / frames, same / codes_)


def round_trip(codec: Codec, wav: Tensor, channels: int) -> Tensor:
    """Speech [n] encoded and decoded at once, on the host."""
    return codec.decode(codec.encode(wav, channels)).cpu()


def compare_streams(codec: Codec, codes: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """Exact and elastic streams beside one-shot decoding of the same codes [Q, T].

    Returns:
        For each look-ahead `patches_before_audio`, and as mean and worst of the utterances:
        `snr_db`, `mel_distance`, and `beginning_snr_db` of the first four patches. An SNR is None
        where there is no difference at all.
    """
    wanted = [codec.decode(each).cpu() for each in codes]
    found = dict[str, dict[str, Any]]()
    ways: tuple[Lookahead, ...] = ("exact", "elastic")
    with tqdm(total=len(ways) * len(codes), desc="streams", leave=False, disable=None) as bar:
        for way in ways:
            snr, distance, beginning, patches = [], [], [], []
            for each, want in zip(codes, wanted, strict=True):
                wav, before = streamed(codec, each, way)
                end = FIRST_PATCHES * PATCH_FRAMES * len(want) // each.shape[1] - EDGE
                snr.append(_snr(wav, want))
                beginning.append(_snr(wav[:end], want[:end]))
                spectra = log_mel(wav, codec.config) - log_mel(want, codec.config)
                distance.append(float(spectra.abs().mean()))
                patches.append(before)
                bar.update(1)
            found[str(way)] = {
                "patches_before_audio": max(patches),
                "snr_db": _spread(snr, min),
                "beginning_snr_db": _spread(beginning, min),
                "mel_distance": _spread(distance, max),
            }
    return found


def streamed(codec: Codec, codes: Tensor, lookahead: Lookahead) -> tuple[Tensor, int]:
    """Codes [Q, T] decoded patch by patch: audio [n], and patches given when the first came."""
    stream, parts, before = codec.stream(lookahead), list[Tensor](), None
    chunks = codes.split(PATCH_FRAMES, dim=1)
    for given, chunk in enumerate(chunks, 1):
        parts.append(stream.push(chunk).cpu())
        if before is None and len(parts[-1]):
            before = given
    parts.append(stream.finish().cpu())
    return torch.cat(parts), before or len(chunks)


def _snr(got: Tensor, want: Tensor) -> float:
    wide = want.double()
    return _decibels(float(wide.square().sum()), float((got.double() - wide).square().sum()))


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _spread(values: Sequence[float], worst: Any) -> dict[str, float | None]:
    """Mean and worst; JSON has no infinity, which stands for no difference at all."""
    mean, least = statistics.fmean(values), worst(values)
    return {
        "mean": mean if math.isfinite(mean) else None,
        "worst": least if math.isfinite(least) else None,
    }
