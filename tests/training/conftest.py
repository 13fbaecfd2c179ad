"""A training of a few utterances without a synthesizer, for the tests beside this file."""

from dataclasses import replace

import pytest

from training import codec, codes, data, lm, synthesis
from training.codec import CodecTraining
from training.lm import LMTraining
from training.tokenizer import build_tokenizer

STEPS = 4


@pytest.fixture(scope="session")
def sizes() -> data.Sizes:
    heard = {"strangers": 4, "strange_words": 4, "strange_questions": 4}
    small = {"readings": 4, "spellings": 3, "letters": 4, "unheard": 2, "unsaid": 2}
    return data.Sizes(6, 12, 5, 6, 4, **small, **heard)


@pytest.fixture(scope="module")
def parts(sizes: data.Sizes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, data.Part]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("has_flite", "has_festival", "has_espeak", "has_pico"):
            patch.setattr(synthesis, name, lambda: False)
        return data.make(tmp_path_factory.mktemp("data"), sizes)


@pytest.fixture(scope="module")
def codec_training(parts, tmp_path_factory) -> CodecTraining:
    schedule = replace(codec.SCHEDULE, steps=STEPS)
    return CodecTraining(tmp_path_factory.mktemp("codec"), parts, schedule)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lm_training(parts, codec_training, tokenizer, tmp_path_factory) -> LMTraining:
    config, directory = lm.lm_config(), tmp_path_factory.mktemp("lm")
    trained = codec.build_codec(codec_training.config, codec_training.tensors)
    found = codes.make(directory / "codes", parts, trained, config.channels, config.group_size)
    return LMTraining(directory, found, tokenizer, replace(lm.SCHEDULE, steps=STEPS))
