"""Training of the codec's decoder and vocoder alone, over the codes of the trained encoder.

    loss = spectral(output, speech) + |encoder(output) - encoder(speech)| / |encoder(speech)|

The second of the technical report's two stages, without its discriminators: the encoder, which was
taught to tell phones apart, listens in their place. The codes are final before it, so the language
model can be trained beside it.
"""

import random
from pathlib import Path

import torch

from mimo_fast.audio.mel import log_mel
from mimo_fast.runtime.codec.model import Codec

from . import parallel
from .augmentation import noise
from .codec import codebooks_used, codec_config, draw, reconstruction, spectral_distance
from .data import Part
from .loop import Losses, Run, Schedule
from .parameters import Tensors, build_codec, trainable

NAME = "decoder"
SCHEDULE = Schedule(steps=10800, rate=1.5e-3)
BATCH = 3
NOISE_SHARE = 0.1
"""Of utterances: the codes that the language model draws are those of clean speech."""

PERCEIVED = 1.0
HISS = 3e-3
"""Of the level, under what the encoder hears: differences of silences do not count."""


class DecoderTraining:
    """The decoder, its data and its loss. trained: the tensors of the first stage."""

    def __init__(
        self,
        directory: Path,
        parts: dict[str, Part],
        trained: Tensors,
        schedule: Schedule = SCHEDULE,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.config, self.seed, self.device = codec_config(), seed, device
        self.tensors = {
            name: tensor.to(device, copy=True)
            for name, tensor in trained.items()
            if not name.startswith("ctc.")
        }
        leaves = trainable(
            {name: tensor for name, tensor in self.tensors.items() if name.startswith("decoder.")}
        )
        fixed = {name: tensor for name, tensor in self.tensors.items() if name not in leaves}
        # What the language model will say gets most of the attention.
        self.parts = [parts[name] for name in ("speech", "replies", "readings", "replies")]
        self.unheard = parts["unheard"]
        self.run = Run(directory, NAME, leaves, fixed, schedule)

    def train(self) -> None:
        self.run.train(self.losses, self.validate)

    def model(self) -> Codec:
        return build_codec(self.config, self.tensors)

    def losses(self, step: int) -> Losses:
        """One batch forward."""
        rng = random.Random(f"{parallel.seed_of(self.seed)}/decoder/{step}")
        codec, count = self.model(), parallel.share(BATCH)
        spectral, mel, perceived = (torch.zeros((), device=self.device) for _ in range(3))
        for spoken in (draw(self.parts, rng, NOISE_SHARE) for _ in range(count)):
            wanted = spoken.wanted.to(self.device)
            hiss = (
                HISS
                * float(wanted.square().mean().sqrt())
                * noise(len(wanted), rng).to(self.device)
            )
            with torch.no_grad():
                codes = codec.encode(
                    spoken.heard.to(self.device), codebooks_used(rng, len(codec.codebooks))
                )
                right = codec.encode_mel(log_mel(wanted + hiss, self.config))
            got = codec.decode_hidden(codec.dequantize(codes))[: len(wanted)]
            whole, spectra = spectral_distance(got, wanted, self.config.sample_rate)
            spectral, mel = spectral + whole / count, mel + spectra.detach() / count
            heard = codec.encode_mel(log_mel(got + hiss, self.config))
            perceived = perceived + (heard - right).abs().mean() / right.abs().mean() / count
        return {
            "loss": spectral + PERCEIVED * perceived,
            "mel": mel,
            "perceived": perceived.detach(),
        }

    def validate(self) -> dict[str, float]:
        return reconstruction(self.model(), self.unheard)
