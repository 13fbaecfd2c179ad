"""The simulated player, by cases worked out by hand: 1000 samples a second, so that 100 samples
play for 0.1 s."""

import pytest

from mimo_fast.bench.player import play

RATE = 1000


def test_a_reply_that_keeps_ahead_is_never_silent():
    heard = play([(0.5, 200), (0.6, 200), (0.9, 100)], RATE)
    assert heard.first_audio == 0.5
    assert heard.duration == pytest.approx(0.5)
    assert heard.underruns == ()
    assert heard.worst_underrun == heard.stalled == 0
    assert heard.continuous


def test_each_silence_lasts_from_running_dry_to_the_next_chunk():
    # Dry at 0.2, silent to 0.5; then 0.1 s to 0.6, silent to 0.65; then 0.4 s to 1.05, in time for
    # the last.
    heard = play([(0.1, 100), (0.5, 100), (0.65, 400), (1.0, 100)], RATE)
    assert heard.underruns == pytest.approx((0.3, 0.05))
    assert heard.worst_underrun == pytest.approx(0.3)
    assert heard.stalled == pytest.approx(0.35)
    assert not heard.continuous


def test_what_came_early_covers_a_late_chunk():
    assert play([(0.0, 1000), (0.9, 100), (1.05, 100)], RATE).underruns == ()
    assert play([(0.0, 1000), (0.9, 100), (1.2, 100)], RATE).underruns == pytest.approx((0.1,))


def test_chunks_without_audio_change_nothing():
    words = [(0.05, 0), (0.1, 100), (0.15, 0), (0.4, 100), (0.45, 0)]
    assert play(words, RATE) == play([(0.1, 100), (0.4, 100)], RATE)


def test_no_audio_at_all():
    heard = play([(0.1, 0)], RATE)
    assert (heard.first_audio, heard.duration, heard.underruns) == (None, 0, ())
