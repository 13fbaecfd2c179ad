"""Turns are found while audio comes, however it is divided."""

import pytest
import torch
from speech import RATE, pcm, question, silence

from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.hearing import Change, Detection, Hearing
from mimo_fast.server.realtime.sound import FORMATS, Encoder

ONSET = 500
END = ONSET + len(question()) * 1000 // RATE
"""Milliseconds at which the question begins and ends in `audio`, with its own quiet edges."""


def audio(after: int = 1000) -> bytes:
    return pcm(torch.cat((silence(ONSET), question(), silence(after))))


def heard(hearing: Hearing, data: bytes, size: int):
    return [mark for at in range(0, len(data), size) for mark in hearing.push(data[at : at + size])]


def changes(marks):
    return [mark.change for mark in marks]


TURN = [Change.BEGAN, Change.PAUSED, Change.ENDED]


def test_one_utterance_is_one_turn():
    marks = heard(Hearing(RATE, 60), audio(), 960)
    assert changes(marks) == TURN
    began, paused, ended = marks
    assert ONSET - 350 <= began.at_ms <= ONSET + 100
    assert END - 300 <= paused.at_ms <= END + 300
    assert 300 <= ended.at_ms - paused.at_ms <= 400
    assert began.speech is None
    # What is answered early is what is answered.
    assert torch.equal(paused.speech, ended.speech)
    assert 0.7 < len(ended.speech) / len(question()) < 1.3
    assert ended.seconds == pytest.approx((ended.at_ms - began.at_ms) / 1000, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 999, 4800, 10**7])
def test_parts_make_no_difference(size):
    if size == 2:
        data = audio(600)[: RATE * 2]
        whole, parts = (heard(Hearing(RATE, 60), data, each) for each in (960, 22))
    else:
        whole, parts = (heard(Hearing(RATE, 60), audio(), each) for each in (960, size))
    assert [(mark.change, mark.at_ms) for mark in whole] == [
        (mark.change, mark.at_ms) for mark in parts
    ]
    for one, other in zip(whole, parts, strict=True):
        assert (one.speech is None) == (other.speech is None)
        if one.speech is not None:
            torch.testing.assert_close(one.speech, other.speech)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.003, 0.03, 1.0])
def test_any_level_is_heard_alike(level):
    wav = torch.cat((silence(ONSET), question() * level, silence(1000)))
    marks = heard(Hearing(RATE, 60), pcm(wav), 960)
    assert changes(marks) == TURN
    loudness = float(marks[-1].speech.square().mean().sqrt())
    assert 0.02 < loudness < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audio/pcmu", "audio/pcma"])
def test_telephones(name):
    hearing = Hearing(RATE, 60)
    hearing.set_format(FORMATS[name])
    wav = torch.cat((silence(ONSET), question(), silence(1000)))
    data = Encoder(FORMATS[name], RATE).push(wav, ended=True)
    marks = heard(hearing, data, 160)
    assert changes(marks) == TURN
    assert ONSET - 350 <= marks[0].at_ms <= ONSET + 150


@pytest.mark.slow
def test_going_on_after_a_pause():
    wav = torch.cat((silence(300), question(), silence(330), question(), silence(900)))
    hearing = Hearing(RATE, 60)
    hearing.set_detection(Detection(silence_ms=800))
    marks = heard(hearing, pcm(wav), 960)
    assert changes(marks) == [
        Change.BEGAN,
        Change.PAUSED,
        Change.WENT_ON,
        Change.PAUSED,
        Change.ENDED,
    ]
    assert len(marks[-1].speech) > 1.8 * len(marks[1].speech)


def test_silence_and_clicks_are_no_speech():
    generator = torch.Generator().manual_seed(1)
    hiss = 0.001 * torch.randn(RATE * 3, generator=generator)
    hiss[30_000:30_200] = 0.8
    hearing = Hearing(RATE, 60)
    assert heard(hearing, pcm(torch.cat((silence(3000), hiss))), 960) == []
    assert hearing.ms == 6000
    # Nothing is kept of it but what may precede a turn.
    assert len(hearing._kept) < RATE


@pytest.mark.slow
def test_times_count_all_audio():
    hearing = Hearing(RATE, 60)
    heard(hearing, pcm(silence(3000)), 960)
    first = heard(hearing, audio(), 960)
    second = heard(hearing, audio(), 960)
    assert first[0].at_ms - 3000 == pytest.approx(
        heard(Hearing(RATE, 60), audio(), 960)[0].at_ms, abs=40
    )
    assert second[0].at_ms - first[0].at_ms == pytest.approx(len(audio()) / 48, abs=40)


@pytest.mark.slow
def test_a_turn_has_a_longest():
    wav = torch.cat([question()] * 4)
    marks = heard(Hearing(RATE, 2.0), pcm(wav), 960)
    ended = [mark for mark in marks if mark.change is Change.ENDED]
    assert len(ended) >= 2
    assert all(mark.seconds < 2.5 for mark in ended)


class TestByHand:
    def by_hand(self, longest: float = 60) -> Hearing:
        hearing = Hearing(RATE, longest)
        hearing.set_detection(None)
        return hearing

    def test_all_that_came(self):
        hearing = self.by_hand()
        assert heard(hearing, audio(), 960) == []
        mark = hearing.commit()
        assert mark.seconds == pytest.approx(len(audio()) / 48000)
        assert len(mark.speech) == len(audio()) // 2

    def test_nothing_to_commit(self):
        hearing = self.by_hand()
        for data in (b"", pcm(silence(99))):
            hearing.push(data)
            with pytest.raises(ApiError, match="too small") as caught:
                hearing.commit()
            assert caught.value.code == "input_audio_buffer_commit_empty"
        hearing.push(audio())
        hearing.clear()
        with pytest.raises(ApiError):
            hearing.commit()

    def test_a_longest(self):
        hearing = self.by_hand(1.0)
        hearing.push(pcm(silence(900)))
        with pytest.raises(ApiError, match="1 s at most"):
            hearing.push(pcm(silence(200)))
        assert hearing.commit().seconds == pytest.approx(0.9)

    @pytest.mark.slow
    def test_commit_in_the_middle_of_a_turn(self):
        hearing = Hearing(RATE, 60)
        began = heard(hearing, audio(0), 960)[0]
        assert hearing.speaking
        mark = hearing.commit()
        assert mark.seconds == pytest.approx((mark.at_ms - began.at_ms) / 1000, abs=0.01)
        assert not hearing.speaking

    def test_commit_between_turns_has_none_of_the_turn_before(self):
        hearing = Hearing(RATE, 60)
        # The turn is over, and what may precede the next one reaches back into it.
        hearing.set_detection(Detection(silence_ms=100))
        marks = heard(hearing, audio(300), 960)
        assert changes(marks)[-1] is Change.ENDED
        mark = hearing.commit()
        assert mark.seconds == pytest.approx((mark.at_ms - marks[-1].at_ms) / 1000, abs=0.002)
        assert not mark.voiced

    def test_commit_of_speech_that_has_just_begun(self):
        hearing = Hearing(RATE, 60)
        hearing.push(audio()[: (ONSET + 240) * RATE // 1000 * 2])
        assert hearing.commit().voiced


@pytest.mark.slow
def test_the_threshold_and_the_silence_count():
    deaf = Hearing(RATE, 60)
    deaf.set_detection(Detection(threshold=1.0))
    assert heard(deaf, audio(), 960) == []
    patient = Hearing(RATE, 60)
    patient.set_detection(Detection(silence_ms=2000))
    assert changes(heard(patient, audio(), 960)) == TURN[:2]
    assert changes(heard(patient, pcm(silence(1500)), 960)) == TURN[2:]
