"""What the small model is trained on: data, tokens, and examples made of them."""

import random
import subprocess
from itertools import groupby

import pytest
import torch
from helpers import seeded

from mimo_fast.text.templates import ASR_TEMPLATES, TTS_TEMPLATES
from training import augmentation, data, domain, lm, synthesis
from training.tokenizer import INSTRUCTIONS


def test_data_is_the_same_every_time(parts, sizes, tmp_path, monkeypatch):
    for name in ("has_flite", "has_festival", "has_espeak", "has_pico"):
        monkeypatch.setattr(synthesis, name, lambda: False)
    again = data.make(tmp_path, sizes)
    for name, part in parts.items():
        for i in range(len(part)):
            assert torch.equal(part[i].wav, again[name][i].wav)
            assert part[i].phones == again[name][i].phones
    wav = parts["speech"][0].wav
    noisy = augmentation.augment(wav, random.Random(3))[0]
    assert torch.equal(noisy, augmentation.augment(wav, random.Random(3))[0])
    assert not torch.equal(noisy, augmentation.augment(wav, random.Random(4))[0])


PACKAGES = {"slt": "flite", "ked": "festvox-kdlpc16k", "espeak en-us+m3": "espeak-ng"}


@pytest.mark.parametrize(("voice", "package"), PACKAGES.items())
def test_a_synthesizer_that_fails_names_its_package(voice, package, monkeypatch):
    for name in ("has_flite", "has_festival", "has_espeak", "has_pico"):
        monkeypatch.setattr(synthesis, name, lambda: True)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no such voice")
    monkeypatch.setattr(subprocess, "run", lambda *_, **given: in_kind(given, failed))
    message = f"no such voice.*apt-get install .*{package}"
    with pytest.raises(synthesis.SynthesisError, match=message):
        synthesis.synthesize("seven", synthesis.Manner(voice))


def in_kind(given: dict, failed: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """As text or bytes, as it was asked for."""
    text = given.get("text", False)
    return failed if text else subprocess.CompletedProcess([], 1, b"", failed.stderr.encode())


def test_the_grid_of_words_is_that_of_patches(codec_training):
    config = codec_training.config
    assert round(data.FRAME * config.sample_rate) == config.samples_per_frame
    assert round(data.PATCH / data.FRAME) == lm.lm_config().group_size


def test_masks_hide_some_bands_and_frames_and_leave_the_rest():
    mel = torch.randn(200, 80, generator=seeded(0))
    for seed in range(20):
        same = augmentation.masked(mel, random.Random(seed)) == mel
        bands, frames = ~same.any(0), ~same.any(1)
        assert bands.sum() <= augmentation.MASKS * augmentation.MASKED_BANDS * 80
        assert frames.sum() <= augmentation.MASKS * augmentation.MASKED_FRAMES
        assert same[~frames][:, ~bands].all()
    masks = [augmentation.masked(mel, random.Random(seed)) for seed in range(3)]
    assert not all(torch.equal(masked, mel) for masked in masks)


def test_parts_keep_apart_what_is_held_out():
    assert all(domain.is_held_out(data.item("unsaid", i).text) for i in range(50))
    trained = [data.item(part, i) for part in ("speech", "replies") for i in range(200)]
    assert not any(domain.is_held_out(each.text) for each in trained)
    assert {data.item("unheard", i).manner.voice for i in range(5)} == {data.UNHEARD_VOICE}
    assert data.UNHEARD_VOICE not in {data.item("speech", i).manner.voice for i in range(100)}
    strangers = [data.item("strangers", i) for i in range(100)]
    assert all(each.manner.voice.startswith(synthesis.ESPEAK) for each in strangers)
    assert not any(domain.is_held_out(each.text) for each in strangers)
    assert data.item("strange_questions", 3).text in domain.dialogue()
    texts = [data.item("speech", i).text for i in range(300)]
    assert {word for text in texts for word in text.split()} <= set(domain.vocabulary())
    assert domain.dialogue()["what day comes after sunday"] == "monday"
    assert domain.dialogue()["what is nine plus nine"] == "eighteen"
    assert domain.spoken("the word is a b") == "the word is ay b"
    assert domain.spoken("i see a dog") == "i see a dog"


def test_words_are_looked_for_where_they_are_heard(lm_training):
    rng, examples = random.Random(1), lm_training.examples
    special, size = examples._tokenizer.special, lm_training.config.group_size
    expected = {"words": 6, "tts": 0, "styled": 0}
    expected |= dict.fromkeys(("spliced", "asr", "written", "dialogue"), 1)
    for task in lm.JOINT:
        drawn = examples.draw(task, rng)
        text = drawn.ids[0, ::size]
        if task in expected:
            assert len(drawn.spans) == expected[task]
        else:
            assert len(drawn.spans) > 1
        for span in drawn.spans:
            assert text[span.start - 1] == special.sosp
            assert text[span.stop - 1] == special.eosp
            assert (text[span.start : span.stop - 1] == special.empty).all()
            assert span.words
            assert not drawn.learned[span.start : span.stop].any()


def test_a_word_is_written_where_it_is_said(lm_training, parts, tokenizer):
    examples, special, size = lm_training.examples, tokenizer.special, lm_training.config.group_size
    patch = 24_000 // 25 * size
    for part in ("replies", "readings", "answers"):
        spoken, text = parts[part][0], parts[part].item(0).text
        drawn = examples.reading(part, 0)
        said = drawn.ids[0, ::size][drawn.learned].tolist()
        written = [token for token in said if token != special.empty]
        assert written == [*tokenizer.encode(text), special.eot, special.eostm]
        patches, starts = 0, []
        for token in said:
            patches += token == special.empty
            if token not in (special.empty, special.eot, special.eostm):
                starts.append(patches * patch)
        words = [(spoken.starts[word] - spoken.starts[0]) / 24_000 for word in spoken.words]
        assert len(starts) == len(words)
        # The patch that holds the instant 20 ms before the word; the first word begins at most 40
        # ms into the reply.
        late = [at / 24_000 - want for at, want in zip(starts, words, strict=True)]
        assert all(-0.181 < each < 0.021 for each in late)
        assert patches * patch < spoken.ends[-1] - spoken.starts[0] + 0.4 * 24_000
        phones = drawn.phones[drawn.learned]
        assert torch.equal(phones[:, 0] >= 0, torch.tensor(said) == special.empty)
        said_phones = phones[phones >= 0].tolist()
        assert said_phones[-1] == len(synthesis.PHONES), "it ends in silence"
        runs = [phone for phone, _ in groupby(said_phones)]
        assert runs[:-1] == [phone for phone, _ in groupby(spoken.phones)]


def test_what_is_fed_has_errors_where_something_is_spoken(lm_training, monkeypatch):
    config, rng = lm_training.config, random.Random(2)
    batch = lm.collate([lm_training.examples.draw("dialogue", rng) for _ in range(8)], config, 0)
    monkeypatch.setattr(lm, "LOST_SHARE", 0.25)
    fed = lm.blurred(batch, config, seeded(0))
    sizes = torch.tensor(config.empty_codes)[:, None]
    spoken, replies = batch.codes != sizes, batch.learned[:, :, None, None].expand_as(batch.codes)
    assert torch.equal(fed[~spoken], batch.codes[~spoken])
    missing = (fed == sizes) & spoken
    lost = missing[:, :, :1] & ~replies[:, :, :1]
    assert torch.equal(missing & ~replies, lost & spoken), "a part of a frame is lost"
    assert 0.15 < lost.sum() / (spoken & ~replies)[:, :, :1].sum() < 0.35
    assert not (missing & replies)[:, :, 0].any(), "a reply keeps its first codebook"
    for where in (replies, ~replies):
        kept = where & spoken & ~missing
        assert 0.05 < (fed != batch.codes)[kept].float().mean() < 0.15


def test_every_word_of_the_domain_is_a_token(tokenizer):
    for text in (*domain.vocabulary(), *ASR_TEMPLATES, *TTS_TEMPLATES["en"]):
        assert len(tokenizer.encode(text)) == 1, text
    assert tokenizer.decode(tokenizer.encode("Seven forty two")).strip() == "seven forty two"
    assert tokenizer.decode(tokenizer.encode("Naïve 7!")).strip() == "naïve 7!"
    assert len(tokenizer.encode(f": seven({INSTRUCTIONS['slow']})")) <= 6
    tokenizer.check_vocab(lm.lm_config().vocab_size)
    assert tokenizer.trained_words == set(domain.vocabulary())
