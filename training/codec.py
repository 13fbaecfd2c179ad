"""Training of the codec: it reconstructs clean speech from noisy speech, through codes.

    loss = spectral(output, speech) + 0.25 commitment + 0.3 CTC(phones | first codebooks)

The first steps go without quantization: with codebooks on an untrained encoder, only the first of
them would be learned.

The CTC term is the audio-to-text loss of the technical report's first stage in small: a linear
layer, discarded after training, reads the synthesizer's phones from the codes. Most of a batch is
only encoded and not decoded again, at a third of the arithmetic: learning which words codes tell
takes many more speakers and sentences than learning how to speak.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.audio.mel import log_mel
from mimo_fast.config import CodecConfig
from mimo_fast.runtime.codec.model import Codec

from . import parallel
from .augmentation import augment, masked, other_speaker, vary
from .codes import SAID
from .data import Part
from .loop import Losses, Run, Schedule
from .losses import ctc, envelope_distance, mel_distance
from .parameters import Tensors, build_codec, config_json, initial_codec, is_fixed, trainable
from .rvq import Quantizer, unquantized
from .synthesis import PHONES, RATE

NAME = "codec"
SCHEDULE = Schedule(steps=3600, rate=2e-3)
UNQUANTIZED_SHARE = 0.05
"""Share of the steps before quantization starts."""

BATCH, LISTENED = 4, 16
"""Utterances a step: decoded again, and only encoded."""

LONGEST = 4.0
"""Seconds of an utterance that are used; phones beyond them are left out."""

COMMITMENT, CTC, ENVELOPE = 0.25, 0.3, 0.5
CTC_CODEBOOKS = 2
ALL_CODEBOOKS_SHARE = 0.6
"""Share of utterances that use every codebook; with fewer, a prefix of codes is speech too."""

VALIDATION = 24


def codec_config() -> CodecConfig:
    return CodecConfig.from_dict(config_json("codec"))


def initial_tensors(config: CodecConfig, seed: int) -> Tensors:
    """Tensors of the codec and of the linear layer that reads phones."""
    classes = len(PHONES) + 1
    head = {"ctc.weight": torch.zeros(classes, config.dim), "ctc.bias": torch.zeros(classes)}
    return initial_codec(config, seed) | head


@dataclass(frozen=True)
class Spoken:
    """One utterance as the codec hears it and as it should sound, float32 [n], and its phones."""

    heard: Tensor
    wanted: Tensor
    phones: list[int]


class CodecTraining:
    """The codec, its data and its losses."""

    def __init__(
        self,
        directory: Path,
        parts: dict[str, Part],
        schedule: Schedule = SCHEDULE,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.config = codec_config()
        initial = initial_tensors(self.config, seed)
        tensors = {name: tensor.to(device) for name, tensor in initial.items()}
        self.quantizer = Quantizer(self.config, tensors)
        self.tensors, self.seed, self.device = tensors, seed, device
        # Replies are what the language model will say: a third of the utterances.
        self.parts = [parts[name] for name in ("speech", "speech", "replies")]
        listened = ("speech", "speech", "strangers", "strangers", "replies")
        self.listened = [parts[name] for name in listened]
        self.unheard = parts["unheard"]
        fixed = {name: tensor for name, tensor in tensors.items() if is_fixed(name)}
        self.run = Run(directory, NAME, trainable(tensors), fixed, schedule)

    def train(self) -> None:
        self.run.train(self.losses, self.validate)

    def losses(self, step: int) -> Losses:
        """One batch forward, and the codebooks moved by it."""
        rng = random.Random(f"{parallel.seed_of(self.seed)}/codec/{step}")
        batch = [draw(self.parts, rng) for _ in range(parallel.share(BATCH))]
        heard = batch + [draw(self.listened, rng) for _ in range(parallel.share(LISTENED))]
        codec = build_codec(self.config, self.tensors)
        mels = [log_mel(each.heard.to(self.device), self.config) for each in heard]
        mels[len(batch) :] = [masked(other_speaker(mel, rng), rng) for mel in mels[len(batch) :]]
        hidden = [codec.encode_mel(mel) for mel in mels]
        lengths = [len(x) for x in hidden]
        joined = torch.cat(hidden)
        used = torch.tensor([codebooks_used(rng, len(self.config.codebook_sizes)) for _ in heard])
        n_q = torch.repeat_interleave(used, torch.tensor(lengths)).to(self.device)
        starting = step < UNQUANTIZED_SHARE * self.run.schedule.steps
        quantized = unquantized(joined) if starting else self.quantizer(joined, n_q)
        pairs = zip(quantized.rows.split(lengths), batch, strict=False)
        got = [codec.decode_hidden(rows)[: len(each.wanted)] for rows, each in pairs]
        wanted = torch.cat([each.wanted for each in batch]).to(self.device)
        spectral, mel = spectral_distance(torch.cat(got), wanted, self.config.sample_rate)
        read = joined if starting else self.quantizer.prefix(joined, quantized.codes, CTC_CODEBOOKS)
        told = self._ctc(read.split(lengths), [each.phones for each in heard])
        loss = spectral + COMMITMENT * quantized.commitment + CTC * told
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        dead = 0 if starting else self.quantizer.update(joined, quantized.codes, generator)
        parallel.follow(self.quantizer.state)
        shown = {"mel": mel, "commitment": quantized.commitment, "ctc": told}
        shown = {name: value.detach() for name, value in shown.items()}
        return {"loss": loss, **shown, "dead": float(dead)}

    def validate(self) -> dict[str, float]:
        """Metrics of a voice that training never hears: sound and phones."""
        codec = build_codec(self.config, self.tensors)
        spoken = [self.unheard[i] for i in range(min(VALIDATION, len(self.unheard)))]
        with torch.no_grad():
            codes = [codec.encode(each.wav.to(self.device)) for each in spoken]
            rows = tuple(codec.dequantize(each[:CTC_CODEBOOKS]) for each in codes)
            told = self._ctc(rows, [each.phones for each in spoken])
        return reconstruction(codec, self.unheard) | {"ctc": float(told)}

    def _ctc(self, rows: tuple[Tensor, ...], phones: list[list[int]]) -> Tensor:
        """Cross entropy of the phones per phone, from rows [T, D] of each utterance's codes."""
        known = [i for i, each in enumerate(phones) if each]
        weight, bias = self.tensors["ctc.weight"], self.tensors["ctc.bias"]
        scores = [F.linear(rows[i], weight, bias).log_softmax(-1) for i in known]
        return ctc(scores, [[phone + 1 for phone in phones[i]] for i in known], blank=0)


def spectral_distance(got: Tensor, wanted: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """Distance of waveforms [n]: of spectra and envelopes, to be minimized; of spectra alone."""
    mel = mel_distance(got, wanted, sample_rate)
    return mel + ENVELOPE * envelope_distance(got, wanted, sample_rate), mel


@torch.no_grad()
def reconstruction(codec: Codec, part: Part) -> dict[str, float]:
    """Mel distance on some utterances of a part, without noise, with all and with two codebooks."""
    total, count = [0.0, 0.0], min(VALIDATION, len(part))
    for i in range(count):
        wav = part[i].wav.to(codec.device)
        codes = codec.encode(wav)
        for place, used in enumerate((codes, codes[:2])):
            got = codec.decode(used)[: len(wav)]
            total[place] += float(mel_distance(got, wav, codec.sample_rate)) / count
    return {"mel": total[0], "mel_2": total[1]}


def draw(parts: Sequence[Part], rng: random.Random, noise_share: float = 0.5) -> Spoken:
    """An utterance at some level, maybe in noise; varied, unless it is what the model says."""
    part = rng.choice(parts)
    drawn = part[rng.randrange(len(part))]
    wav, longest = drawn.wav if part.name in SAID else vary(drawn.wav, rng), int(LONGEST * RATE)
    heard, wanted = augment(wav[:longest], rng, noise_share)
    return Spoken(heard, wanted, drawn.phones if len(wav) <= longest else [])


def codebooks_used(rng: random.Random, every: int) -> int:
    """Number of codebooks that an utterance uses."""
    return every if rng.random() < ALL_CODEBOOKS_SHARE else rng.randrange(1, every)
