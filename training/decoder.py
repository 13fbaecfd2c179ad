"""Training of the codec's decoder and vocoder alone, over the codes of the trained encoder.

    loss = spectral(output, speech) + |encoder(output) - encoder(speech)| / |encoder(speech)|

It is the second of the technical report's two stages, without its discriminators: the encoder,
which was trained to tell phones apart, replaces them. The codes no longer change, so the language
model can be trained at the same time.
"""

import random
from pathlib import Path

import torch

from mimo_fast.audio.mel import log_mel
from mimo_fast.config import CodecConfig
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
"""Share of noisy utterances: few, as the language model draws codes of clean speech."""

PERCEIVED = 1.0
HISS = 3e-3
"""Floor under the encoder's input, relative to the level: silences may differ."""


class DecoderTraining:
    """The decoder, its data and its loss.

    Args:
        trained: the tensors of the first stage.
        config: dimensions of the codec; by default the recipe's.
        name: of the run.
        prefix: of the tensors that are trained.
    """

    def __init__(
        self,
        directory: Path,
        parts: dict[str, Part],
        trained: Tensors,
        schedule: Schedule = SCHEDULE,
        seed: int = 0,
        device: str = "cpu",
        config: CodecConfig | None = None,
        name: str = NAME,
        prefix: str = "decoder.",
    ) -> None:
        self.config, self.name = config or codec_config(), name
        self.seed, self.device = seed, device
        codec = [each for each in trained if not each.startswith("ctc.")]
        self.tensors = {each: trained[each].to(device, copy=True) for each in codec}
        learning = [each for each in codec if each.startswith(prefix)]
        leaves = trainable({each: self.tensors[each] for each in learning})
        fixed = {each: tensor for each, tensor in self.tensors.items() if each not in leaves}
        # Most utterances are of the kind that the language model will say.
        self.parts = [parts[each] for each in ("speech", "replies", "readings", "replies")]
        self.unheard = parts["unheard"]
        self.run = Run(directory, name, leaves, fixed, schedule)

    def train(self) -> None:
        self.run.train(self.losses, self.validate)

    def model(self) -> Codec:
        return build_codec(self.config, self.tensors)

    def losses(self, step: int) -> Losses:
        """One batch forward."""
        rng = random.Random(f"{parallel.seed_of(self.seed)}/{self.name}/{step}")
        codec, count = self.model(), parallel.share(BATCH)
        spectral, mel, perceived = (torch.zeros((), device=self.device) for _ in range(3))
        for spoken in (draw(self.parts, rng, NOISE_SHARE) for _ in range(count)):
            wanted = spoken.wanted.to(self.device)
            level = HISS * float(wanted.square().mean().sqrt())
            hiss = level * noise(len(wanted), rng).to(self.device)
            with torch.no_grad():
                used = codebooks_used(rng, len(codec.codebooks))
                codes = codec.encode(spoken.heard.to(self.device), used)
                right = codec.encode_mel(log_mel(wanted + hiss, self.config))
            got = codec.decode_hidden(codec.dequantize(codes))[: len(wanted)]
            whole, spectra = spectral_distance(got, wanted, self.config.sample_rate)
            spectral, mel = spectral + whole / count, mel + spectra.detach() / count
            heard = codec.encode_mel(log_mel(got + hiss, self.config))
            perceived = perceived + (heard - right).abs().mean() / right.abs().mean() / count
        loss = spectral + PERCEIVED * perceived
        return {"loss": loss, "mel": mel, "perceived": perceived.detach()}

    def validate(self) -> dict[str, float]:
        return reconstruction(self.model(), self.unheard)
