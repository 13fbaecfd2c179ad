"""`MimoAudio.transcribe`: words of nano in recordings of any length, the same however they come."""

import threading
from contextlib import closing
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mimo_fast
from mimo_fast import AudioError, ClosedError, MimoAudio, PromptError
from mimo_fast.audio.segments import Piece, pieces_of
from mimo_fast.audio.writing import save_wav
from mimo_fast.runtime.transcription import cutting_of, longest_piece, start_piece
from mimo_fast.text.transcript import TranscriptSegment

RATE = 24_000
WORDS = Path(__file__).parents[1] / "words"
NAMES = ("thank_you", "six_five_zero", "what_is_your_name", "come_here_on_monday")


def silence(seconds: float) -> Tensor:
    return torch.zeros(round(seconds * RATE))


def said(name: str) -> Tensor:
    return mimo_fast.load_audio(WORDS / f"{name}.flac", RATE)


@pytest.fixture(scope="module")
def nano() -> MimoAudio:
    return mimo_fast.load(max_batch=3)


@pytest.fixture(scope="module")
def talk() -> Tensor:
    parts = [silence(1)]
    for name in NAMES:
        parts += [said(name), silence(1.5)]
    return torch.cat(parts)


TEXT = " ".join(NAMES).replace("_", " ")


def test_words_and_times(nano, talk):
    found = nano.transcribe(talk, seed=1)
    assert found.text == TEXT
    assert [segment.text for segment in found.segments] == [n.replace("_", " ") for n in NAMES]
    assert found.duration == pytest.approx(len(talk) / RATE)
    starts = [segment.start for segment in found.segments]
    assert starts == sorted(starts)
    assert all(segment.finish_reason == "stop" for segment in found.segments)


@pytest.mark.parametrize("gain", [1e-2, 3e-3])
def test_level_and_silence_cost_hardly_a_word(nano, talk, gain):
    found = nano.transcribe(gain * torch.cat((silence(5), talk)), seed=1).text.split()
    same = SequenceMatcher(None, found, TEXT.split()).get_matching_blocks()
    assert sum(block.size for block in same) >= len(TEXT.split()) - 1
    assert len(found) <= len(TEXT.split()) + 1


def test_every_source_says_the_same(nano, talk, tmp_path):
    want = nano.transcribe(talk, seed=1)
    save_wav(tmp_path / "a.wav", talk, RATE)
    assert nano.transcribe(tmp_path / "a.wav", seed=1).text == want.text
    assert nano.transcribe((tmp_path / "a.wav").read_bytes(), seed=1).text == want.text
    assert nano.transcribe(talk.numpy(), seed=1) == want
    assert nano.transcribe(iter(talk.split(1000)), seed=1) == want


def test_neighbours_change_nothing(talk):
    found = [mimo_fast.load(max_batch=n).transcribe(talk, seed=5) for n in (1, 4)]
    assert found[0] == found[1]


def test_segments_come_before_the_recording_ends(nano, talk):
    given = 0

    def blocks():
        nonlocal given
        for block in talk.split(2400):
            given += len(block)
            yield block

    stream = nano.transcript(blocks(), seed=1, waits=0.5)
    first = next(stream)
    assert first.text == "thank you"
    assert given < len(talk) / 2
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    # Its rows are free again.
    assert nano.transcribe(talk, seed=1).text == TEXT


def noisy(wav: Tensor, decibels: float) -> Tensor:
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(3))
    level = wav[wav.abs() > 0.05 * wav.abs().max()].square().mean().sqrt()
    return wav + level * 10 ** (-decibels / 20) * noise


@pytest.fixture(scope="module")
def pieces(nano, talk) -> list[Piece]:
    found = [*pieces_of(iter([noisy(talk, 8)]), RATE, cutting_of(nano.pipeline))]
    assert any(piece.again for piece in found)
    return found


class TestNoisyPieces:
    """They are heard several times, and what the model is surest of is kept."""

    def alone(self, nano, piece: Piece, wav: Tensor) -> TranscriptSegment:
        work = start_piece(nano.pipeline, replace(piece, wav=wav, again=()), seed=1)
        while not work.step():
            pass
        return work.segment

    def test_the_surest_is_kept(self, nano, talk, pieces):
        found = nano.transcribe(noisy(talk, 8), seed=1).segments
        assert len(found) == len(pieces)
        for segment, piece in zip(found, pieces, strict=True):
            each = [self.alone(nano, piece, wav) for wav in (piece.wav, *piece.again)]
            assert segment == max(each, key=lambda one: one.confidence)

    def test_its_words_are_there_when_they_are_certain(self, nano, pieces):
        piece = next(each for each in pieces if each.again)
        work = start_piece(nano.pipeline, piece, seed=1)
        while not work.step():
            assert work.words == []
        assert "".join(work.words).strip() == work.segment.text != ""
        assert work.kept.reply.ended

    def test_a_checkpoint_that_does_not_tell_hears_once(self, pieces):
        nano = mimo_fast.load()
        nano.lm.config = replace(nano.lm.config, confidence=())
        piece = next(each for each in pieces if each.again)
        work = start_piece(nano.pipeline, piece, seed=1)
        while not work.step():
            assert work.words or not work.kept.reply.taken
        assert work.segment.confidence is None
        assert work.segment.text == self.alone(nano, piece, piece.wav).text

    def test_neighbours_change_nothing(self, talk):
        wav = noisy(talk, 8)
        found = [mimo_fast.load(max_batch=n).transcribe(wav, seed=5) for n in (1, 4)]
        assert found[0] == found[1]

    def test_what_is_left_is_free_again(self, nano, talk, pieces):
        stream = nano.transcript(noisy(talk, 8), seed=1)
        next(stream)
        stream.close()
        assert nano.transcribe(talk, seed=1).text == TEXT


def test_a_piece_has_a_limit(nano, talk):
    found = nano.transcribe(talk, seed=1, max_new_tokens=1)
    assert all(segment.finish_reason == "length" for segment in found.segments)


def test_nobody_speaks(nano):
    found = nano.transcribe(silence(3))
    assert (found.text, found.segments) == ("", ())
    assert found.duration == 3


def test_errors(nano, tmp_path):
    with pytest.raises(AudioError, match="holds no samples"):
        nano.transcribe(torch.zeros(0))
    (tmp_path / "a.wav").write_bytes(b"none")
    with pytest.raises(AudioError, match="cannot decode"):
        nano.transcribe(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="write it to a file"):
        nano.transcribe(torch.zeros(1).expand(2**40))
    with pytest.raises(ValueError, match="max_new_tokens"):
        nano.transcribe(silence(1), max_new_tokens=0)
    closed = mimo_fast.load()
    stream = closed.transcript(torch.cat([said(NAMES[0]), silence(3)]))
    closed.close()
    with pytest.raises(ClosedError):
        next(stream)


def test_pieces_fit_the_context(nano):
    assert longest_piece(nano.pipeline) == 8
    small = mimo_fast.load(max_seq_len=40)
    assert longest_piece(small.pipeline) == pytest.approx(40 * 0.16 / 2)


def test_one_pass_is_refused_before_it_is_encoded(nano, monkeypatch):
    def encode(*_: object) -> None:
        raise AssertionError("it was encoded")

    small = mimo_fast.load(max_seq_len=100)
    for name in ("encode", "encode_measured"):
        monkeypatch.setattr(small.codec, name, encode)
    with pytest.raises(PromptError, match=r"context is 100 groups \(16\.0 s\)"):
        small.asr_sft(silence(60))
    with pytest.raises(AssertionError, match="it was encoded"):
        small.asr_sft(silence(3))


def test_pieces_that_start_at_once_are_encoded_at_once(talk, monkeypatch):
    model, counts = mimo_fast.load(max_batch=4), list[int]()
    encode = model.codec.encode_measured_together

    def counted(waves, n_q):
        counts.append(len(waves))
        return encode(waves, n_q)

    monkeypatch.setattr(model.codec, "encode_measured_together", counted)
    found = model.transcribe(talk, seed=5)
    assert counts[0] == min(4, len(found.segments)) > 1
    assert found == mimo_fast.load(max_batch=1).transcribe(talk, seed=5)


def test_a_listener_does_not_wait_for_recordings_of_batches(nano, talk):
    piece = talk[: 3 * RATE]
    with nano.pipeline._gathering._turn:
        # Recordings of a batch are being encoded.
        assert nano.asr_sft(piece, seed=1)
        with closing(nano.stream("asr", piece, seed=1)) as chunks:
            next(chunks)
        waits = threading.Thread(target=lambda: nano.transcribe(piece, seed=1), daemon=True)
        waits.start()
        waits.join(0.2)
        assert waits.is_alive()
    waits.join(60)
    assert not waits.is_alive()


def test_a_piece_that_cannot_be_encoded_ends_only_its_recording(nano, talk, monkeypatch):
    speech = nano.pipeline.speeches([talk[:RATE], talk[: 2 * RATE]])
    for each, wav in zip(speech, (talk[:RATE], talk[: 2 * RATE]), strict=True):
        alone = nano.pipeline.speech_later(wav, prepared=True)
        assert torch.equal(each.codes, alone.codes)
        assert torch.equal(each.loss, alone.loss)
    with pytest.raises(AudioError, match="NaN"):
        nano.pipeline.speeches([talk[:RATE], torch.full((RATE,), torch.nan)])
    with pytest.raises(PromptError, match="context"):
        nano.pipeline.speeches([talk[:RATE], silence(10_000)])
