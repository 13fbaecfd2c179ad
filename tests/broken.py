"""The kit's models with one value of one tensor replaced, and what is asked of them."""

import math
import re
from functools import cache
from typing import Any

import pytest
import torch
from helpers import KIT, kit_config
from torch import Tensor
from variants import random_prompt

from mimo_fast import LM, Codec, MimoAudio, load_audio
from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.layout import codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import Limits, Samplers
from mimo_fast.sampling import MiMoSampler

GROUPS = 60
"""Groups in which any broken tensor must have shown itself."""

SAMPLED = Samplers(MiMoSampler(True, 1.0, top_p=0.95), MiMoSampler(True, 1.0))

LM_TENSORS = tuple(lm_shapes(LMConfig.from_dict(kit_config("lm"))))
CODEC_TENSORS = tuple(codec_shapes(CodecConfig.from_dict(kit_config("codec"))))
"""Every tensor of the kit that inference reads."""


@cache
def weights(part: str) -> dict[str, Tensor]:
    stored = open_weights(KIT / "checkpoint" / part)
    return {name: stored.get(name) for name in stored.names()}


def prompt(model: MimoAudio) -> Tensor:
    """Ids [C + 1, T G] of text and speech; the last group is open speech, so that it goes on."""
    return random_prompt(model.lm.config, model.lm.empty_id, 12)


@cache
def recording() -> Tensor:
    """One second at 24 kHz."""
    return load_audio(KIT / "audio" / "en_m_24k.wav", 24000)[:24000]


@cache
def recorded(codec: Codec) -> Tensor:
    return codec.encode(recording())


def by_kind(names: tuple[str, ...]) -> list[Any]:
    """Names as parameters: for `make test` the first of each kind, layers and channels aside."""
    kinds = set[str]()
    found = []
    for name in names:
        kind = re.sub(r"\d+", "0", name)
        found.append(pytest.param(name, marks=pytest.mark.slow) if kind in kinds else name)
        kinds.add(kind)
    return found


def place(model: MimoAudio, name: str) -> tuple[int, ...]:
    """An element that computing cannot leave out: of an embedding, in a row that is used."""
    shape = weights("lm" if name in LM_TENSORS else "codec")[name].shape
    middle = tuple(size // 2 for size in shape)
    ids = prompt(model).unflatten(1, (-1, model.lm.config.group_size))
    if name == "model.embed_tokens.weight":
        return int(ids[0, 0, 0]), *middle[1:]
    if name.startswith("speech_embeddings."):
        return int(ids[1 + int(name.split(".")[1]), 1, 0]), *middle[1:]
    if name.endswith("_codebook.embed"):
        return int(recorded(model.codec)[int(name.split(".")[4]), 3]), *middle[1:]
    return middle


def replaced(part: str, name: str, at: tuple[int, ...], value: float) -> WeightSource:
    tensors = dict(weights(part))
    tensors[name] = tensors[name].clone()
    tensors[name][at] = value
    return WeightSource(tensors.__getitem__, torch.float32)


def broken_lm(model: MimoAudio, name: str, value: float = math.nan) -> LM:
    source = replaced("lm", name, place(model, name), value)
    return LM(model.lm.config, model.lm.empty_id, source)


def broken_codec(model: MimoAudio, name: str, value: float = math.nan) -> Codec:
    source = replaced("codec", name, place(model, name), value)
    return Codec(model.codec.config, source, codebook=source)


def converse(lm: LM, ids: Tensor, engine: Engine | None = None) -> None:
    """Decodes GROUPS groups, words and speech, sampled, unless an error ends it."""
    engine = engine or Engine(lm, 1, ids.shape[1] // lm.config.group_size + GROUPS + 1)
    sequence = engine.sequence(7)
    sequence.add(ids)
    for _ in engine.decode(sequence, Limits(GROUPS), SAMPLED):
        pass
