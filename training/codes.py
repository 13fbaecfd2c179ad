"""The trained codec's codes of all speech, encoded once, to train the language model."""

import random
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.mel import log_mel
from mimo_fast.audio.segments import prepare_speech
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.text.prompt import whole_patches

from .augmentation import other_speaker, recorded, vary
from .data import FRAME, SHARD, Part, joined, piece, save_whole
from .synthesis import PHONES, RATE, Utterance

PLAIN = ("speech", "letters", "words", "questions", "echoes")
HEARD = (*PLAIN, "strangers", "strange_words", "strange_questions")
"""Parts that the model listens to, each in `VARIANTS` recordings, varied, in noise."""

VARIANTS, NOISE_SHARE = 2, 0.6

PREPARED_SHARE = 0.7
"""Share of those recordings that have gone through the front end, as most will that it hears."""

SAID = ("replies", "readings", "spellings", "answers", "unsaid")
"""Parts that the model says, without the silence around, with places of words and phones."""

LEAD, TAIL = FRAME, 3 * FRAME
"""Seconds kept before the first word and after the last."""

AHEAD = 0.02
"""Seconds by which a word's text precedes its sound: sounds lean towards the next."""


class Codes:
    """Codes of a part, [C, n G] int64 an utterance and variant."""

    def __init__(self, directory: Path, part: Part, channels: int, group_size: int) -> None:
        self.directory, self.part = directory, part
        self._channels, self._group_size = channels, group_size
        self.variants = VARIANTS if part.name in HEARD else 1

    def __len__(self) -> int:
        return len(self.part)

    def text(self, index: int) -> str:
        return self.part.item(index).text

    def style(self, index: int) -> str:
        return self.part.item(index).style

    def get(self, index: int, variant: int = 0) -> Tensor:
        flat = self._piece("codes", index, self.variants, variant)
        return flat.long().view(-1, self._channels).T

    def places(self, index: int) -> list[int]:
        """The patch before which each word's text stands, in a part that is said."""
        return self._piece("places", index).tolist()

    def phones(self, index: int) -> list[int]:
        """The phones that are spoken."""
        return self._piece("phones", index).tolist()

    def frame_phones(self, index: int) -> Tensor:
        """The phone at each frame of a spoken part, int64 [n G]; `len(PHONES)` for silence."""
        return self._piece("frame_phones", index).long()

    def _piece(self, name: str, index: int, variants: int = 1, variant: int = 0) -> Tensor:
        shard, place = divmod(index, SHARD)
        return piece(_open(self._path(shard)), name, place * variants + variant)

    @property
    def shards(self) -> int:
        return -(-len(self) // SHARD)

    def make_shard(self, codec: Codec, shard: int) -> int:
        """Encodes a shard that is not there yet; returns how many utterances it has."""
        indices = range(shard * SHARD, min((shard + 1) * SHARD, len(self)))
        if not self._path(shard).exists():
            recordings = product(indices, range(self.variants))
            made = [self._encode(codec, *recording) for recording in recordings]
            codes, places, frame_phones = zip(*made, strict=True)
            phones = [torch.tensor(self.part[index].phones, dtype=torch.int16) for index in indices]
            tensors = joined("codes", codes) | joined("phones", phones)
            tensors |= joined("places", places) | joined("frame_phones", frame_phones)
            save_whole(self._path(shard), tensors)
        return len(indices)

    def _encode(self, codec: Codec, index: int, variant: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flat codes and, where needed, the places of words and the phones of frames."""
        spoken = self.part[index]
        rng = random.Random(f"{self.part.seed}/{self.part.name}/{index}/{variant}")
        heard, said = self.part.name in HEARD, self.part.name in SAID
        wav, start, frame = spoken.wav, 0, codec.config.samples_per_frame
        if heard:
            wav = recorded(vary(wav, rng), rng, NOISE_SHARE, lambda: self._other(rng))
            if rng.random() < PREPARED_SHARE:
                wav = prepare_speech(wav, RATE)
        elif said:
            start = max(0, spoken.starts[0] - round(LEAD * RATE))
            wav = wav[start : spoken.ends[-1] + round(TAIL * RATE)]
        mel = log_mel(wav.to(codec.device), codec.config)
        hidden = codec.encode_mel(other_speaker(mel, rng) if heard else mel)
        codes = whole_patches(codec.quantize(hidden, self._channels).cpu(), self._group_size)
        places = phones = torch.empty(0, dtype=torch.int16)
        if said:
            words = torch.tensor(spoken.starts)[spoken.words] - start - round(AHEAD * RATE)
            patches = words.div(frame * self._group_size, rounding_mode="floor")
            places = patches.clamp(min=0).to(torch.int16)
            phones = phones_at(start + frame * torch.arange(codes.shape[1]) + frame // 2, spoken)
        return codes.T.reshape(-1).to(torch.int16), places, phones

    def _other(self, rng: random.Random) -> Tensor:
        """What somebody else says at the same time, of the first shard, which stays in memory."""
        return vary(self.part[rng.randrange(min(SHARD, len(self)))].wav, rng)

    def _path(self, shard: int) -> Path:
        return self.directory / f"{self.part.name}-{shard:04d}.safetensors"


def phones_at(times: Tensor, spoken: Utterance) -> Tensor:
    """Samples [n] -> the phone there, int16 [n], `len(PHONES)` for silence."""
    starts, ends = torch.tensor(spoken.starts), torch.tensor(spoken.ends)
    place = (starts[None] <= times[:, None]).sum(1) - 1
    phones = torch.tensor(spoken.phones)[place]
    said = (place >= 0) & (times < ends[place])
    return phones.where(said, torch.tensor(len(PHONES))).to(torch.int16)


def make(
    directory: Path, parts: dict[str, Part], codec: Codec, channels: int, group_size: int
) -> dict[str, Codes]:
    """Codes of every part; only missing shards are encoded, one on each of torch's threads."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {name: Codes(directory, part, channels, group_size) for name, part in parts.items()}
    total, threads = sum(map(len, found.values())), torch.get_num_threads()
    # Sentences are too short to be split over threads.
    torch.set_num_threads(1)
    try:
        with (
            tqdm(total=total, desc="codes", unit="utterance", miniters=1) as bar,
            ThreadPoolExecutor(threads) as pool,
        ):
            shards = ((codes, i) for codes in found.values() for i in range(codes.shards))
            work = [pool.submit(codes.make_shard, codec, i) for codes, i in shards]
            try:
                for shard in as_completed(work):
                    bar.update(shard.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
    return found


@lru_cache(maxsize=512)
def _open(path: Path) -> dict[str, Tensor]:
    return load_file(path)
