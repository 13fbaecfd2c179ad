"""Marks of what a model writes: all of it with them, not a bit of it without."""

import copy
import io

import pytest
import torch
from chains import credentials
from conversions import ASKED, answered

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.errors import AudioError
from mimo_fast.marking.marks import Marks
from mimo_fast.marking.provenance import Origin, Signer, read_provenance
from mimo_fast.marking.watermark import find_watermark

RATE = 24000
TEXT = "seven forty two"


@pytest.fixture(scope="module")
def plain():
    with mimo_fast.load() as model:
        yield model


@pytest.fixture(scope="module")
def marking():
    with mimo_fast.load() as model:
        model.marks = Marks()
        yield model


def confidence(source):
    return find_watermark(load_audio(source, RATE), RATE).confidence


def test_off_changes_no_sample(plain, tmp_path):
    assert plain.marks is None
    wav = torch.cat([chunk.audio for chunk in plain.stream("tts", TEXT, seed=0)])
    plain.save_wav(tmp_path / "a.wav", wav)
    mimo_fast.save_wav(tmp_path / "b.wav", wav, RATE)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_every_way_to_a_file_is_marked(plain, marking, tmp_path):
    wav = torch.cat([chunk.audio for chunk in plain.stream("tts", TEXT, seed=0)])
    plain.save_wav(tmp_path / "plain.wav", wav)
    marking.save_wav(tmp_path / "a.wav", wav)
    file = io.BytesIO()
    marking.save_wav(file, wav)
    assert file.getvalue() == (tmp_path / "a.wav").read_bytes()
    marking.tts_sft(TEXT, tmp_path / "upstream.wav", seed=0)
    results = list(mimo_fast.batch(marking, "tts", [TEXT], tmp_path / "batch", progress=False))
    files = [tmp_path / "a.wav", tmp_path / "upstream.wav", results[0].file]
    assert confidence(tmp_path / "plain.wav") < 0.1
    for each in files:
        assert confidence(each) > 0.98
    assert len(load_audio(files[0], RATE)) == len(wav)


def test_conversions_are_marked(marking, tmp_path):
    examples, output = answered(marking, tmp_path), tmp_path / "a.wav"
    mimo_fast.convert(marking, ASKED, examples, instruction="answer", seed=1, output=output)
    assert confidence(output) > 0.95


def test_copies_of_a_model_mark_too(marking):
    assert copy.copy(marking).marks is marking.marks


def test_a_signature_without_a_watermark(plain, tmp_path):
    wav = torch.sin(torch.arange(RATE) * 0.1) / 2
    signer = Signer(credentials(tmp_path), Origin("nano", "1"))
    Marks(watermark=False, signer=signer).write(tmp_path / "a.wav", wav, RATE)
    plain.save_wav(tmp_path / "b.wav", wav)
    assert read_provenance(tmp_path / "a.wav").intact
    assert torch.equal(load_audio(tmp_path / "a.wav", RATE), load_audio(tmp_path / "b.wav", RATE))


def test_what_is_no_waveform_is_refused_as_without_marks(tmp_path):
    silence = torch.zeros(9)
    for wrong in (silence.expand(2, 9), silence.short(), silence / 0):
        with pytest.raises(AudioError) as plain:
            mimo_fast.save_wav(tmp_path / "a.wav", wrong, RATE)
        with pytest.raises(AudioError) as marked:
            Marks().write(tmp_path / "a.wav", wrong, RATE)
        assert str(plain.value) == str(marked.value)
        assert not (tmp_path / "a.wav").exists()
