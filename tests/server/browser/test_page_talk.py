"""A talk with nano through the page: heard, answered aloud, interrupted, muted, typed, kept."""

import base64
import json
import re

import numpy as np
import soundfile
from visits import RATE, pause, pieces, plain, recording, said, share

QUESTION = "what is three plus four"
LONG = "where do you live"
ANSWERS = {QUESTION: "seven", LONG: "i live in the city near the river"}

SILENCE = pause(0.1)
"""What the microphone hears of somebody whose words are handed to the page."""

TRIES = 8
"""Turns in which what takes a moment of a reply must be done once: a busy machine is late."""


def begin(visit, nano, microphone, samples=SILENCE, **options):
    microphone.plays(samples)
    page = visit(nano, **options)
    page.until_state("idle")
    page.page.locator("#talk-button").click()
    page.until(lambda: page.got("session.created"), "session")
    return page


def answered(page, text):
    page.until(lambda: text in page.turns("model")[-1:], f"answer {text}")


def cuts(page):
    """Replies that were cut while they were heard."""
    return [each for each in page.sent("conversation.item.truncate") if each["audio_end_ms"]]


def test_a_question_is_heard_and_answered_aloud(visit, nano, microphone, transcribed, download):
    page = begin(visit, nano, microphone, said(QUESTION))
    page.until(lambda: QUESTION in " ".join(page.turns("you")), "question")
    answered(page, "seven")
    page.until(lambda: page.got("response.done"), "end of the reply")
    page.until_state("listening")
    reply = page.reply()
    assert transcribed(reply, RATE) == "seven"
    assert share(reply, RATE, *page.heard()) > 0.5
    states = page.states()
    order = ["connecting", "listening", "hearing", "thinking", "speaking", "listening"]
    found = iter(states)
    assert all(each in found for each in order), states
    (asked,) = page.microphones()
    wanted = ("echoCancellation", "noiseSuppression", "autoGainControl")
    assert all(asked["audio"][name] is True for name in wanted)
    # One number for the last turn, and the same as median.
    last, median = (page.text(f"#latency-{name}") for name in ("last", "median"))
    assert re.search(r"\d", last)
    assert re.findall(r"[\d.,]+", last) == re.findall(r"[\d.,]+", median)
    page.page.locator("#talk-end").click()
    page.until_state("idle")
    both_sides_are_saved(page, download, transcribed)
    events_are_saved_without_audio(page, download)


def both_sides_are_saved(page, download, transcribed):
    samples, rate = soundfile.read(download(page, "#audio-save"), dtype="float32")
    assert samples.shape[1] == 2
    assert transcribed(samples[:, 0], rate) == QUESTION
    # The reply is in it as it came, sample for sample, but for pauses where sound had run out.
    places, missing = pieces(page.reply(), np.ascontiguousarray(samples[:, 1]))
    assert len(places) > 20
    assert len(set(places)) <= 5
    assert missing <= 5
    # The answer comes after the question, by its place in the recording.
    you, model = (np.flatnonzero(np.abs(side) > 0.02) for side in samples.T)
    assert you[-1] < model[0]


def events_are_saved_without_audio(page, download):
    page.page.locator("#details-toggle").click()
    file = download(page, "#events-save")
    events = json.loads(file.read_text())["events"]
    kinds = [each["event"]["type"] for each in events]
    assert {"session.created", "session.update", "response.done"} <= set(kinds)
    audio = [each["event"].get("audio") or each["event"].get("delta") or "" for each in events]
    assert max(len(each) for each in audio if isinstance(each, str)) < 100


def test_whoever_speaks_interrupts_and_the_server_learns_what_was_heard(visit, nano, microphone):
    page = begin(visit, nano, microphone)
    for _ in range(TRIES):
        before = page.states().count("speaking")
        page.speaks(LONG)
        page.until(lambda n=before: cuts(page) or page.states().count("speaking") > n, "sound")
        if cuts(page):
            break
    truncated = cuts(page)[0]
    item = truncated["item_id"]

    def confirmed():
        return [e for e in page.got("conversation.item.truncated") if e["item_id"] == item]

    (confirmed,) = page.until(confirmed, "truncated")
    assert confirmed["audio_end_ms"] == truncated["audio_end_ms"]
    deltas = [e for e in page.got("response.output_audio.delta") if e["item_id"] == item]
    came = sum(len(e["delta"]) * 3 / 4 / 2 for e in deltas) / RATE
    assert 0 < truncated["audio_end_ms"] / 1000 <= came
    # What was not heard of it is shown as such.
    cut = page.page.locator(f'#transcript .turn[data-id="{item}"]')
    page.until(lambda: "interrupted" in plain(cut.inner_text()), "note of the interruption")


def test_escape_interrupts(visit, nano):
    page = visit(nano, granted=False)
    page.until_state("idle")
    heard = page.page.locator('#transcript .turn[data-who="model"] .heard')
    for turn in range(1, TRIES + 1):
        page.types(LONG)
        page.until(lambda n=turn: heard.count() == n and heard.last.inner_text(), "words")
        page.page.keyboard.press("Escape")
        page.until(lambda n=turn: len(page.sent("conversation.item.truncate")) == n, "cut")
        cut = page.sent("conversation.item.truncate")[-1]
        page.until_state("listening")
        # The rest of it, which takes more than two seconds, was still to be heard.
        if 0 < cut["audio_end_ms"] < 1800:
            break
    else:
        raise AssertionError("no reply was interrupted while some of it was still to be heard")
    # What sounded until then; after that nothing is played on, nor what the server sends still.
    page.heard()
    page.page.wait_for_timeout(500)
    assert not len(page.heard()[0])
    assert len(page.sent("conversation.item.truncate")) == turn
    # No news: the server may have ended the reply before.
    assert not page.page.locator("#talk-notice").is_visible()


def test_mute_is_silence_and_the_end_lets_the_microphone_go(visit, nano, microphone):
    page = begin(visit, nano, microphone, np.concatenate([pause(0.3), *[recording(LONG)] * 40]))
    page.until(lambda: page.got("input_audio_buffer.speech_started"), "speech")
    page.page.locator("#talk-mute").click()
    assert page.page.locator("#talk-mute").get_attribute("aria-pressed") == "true"
    # Whatever the microphone hears now is not sent; silence is, so that the turn ends.
    before = len(page.sent("input_audio_buffer.append"))
    page.until(lambda: len(page.sent("input_audio_buffer.append")) > before + 40, "silence")
    appended = [base64.b64decode(e["audio"]) for e in page.sent("input_audio_buffer.append")]
    assert np.frombuffer(b"".join(appended[:before]), "<i2").any()
    assert not np.frombuffer(b"".join(appended[before + 8 :]), "<i2").any()
    page.until(lambda: page.got("input_audio_buffer.speech_stopped"), "end of the turn")
    assert page.holds_microphone()
    page.page.locator("#talk-end").click()
    page.until_state("idle")
    assert not page.holds_microphone()


def test_typing_needs_no_microphone(visit, nano, transcribed):
    page = visit(nano, granted=False)
    page.types(QUESTION)
    answered(page, "seven")
    page.until(lambda: page.got("response.done"), "end of the reply")
    page.until_state("listening", "idle")
    reply = page.reply()
    assert transcribed(reply, RATE) == "seven"
    assert share(reply, RATE, *page.heard()) > 0.5
    assert page.microphones() == []


def test_two_pages_talk_at_once(visit, nano, microphone):
    pages = {words: begin(visit, nano, microphone) for words in (QUESTION, LONG)}
    for words, page in pages.items():
        page.speaks(words)
    for words, page in pages.items():
        answered(page, ANSWERS[words])
        page.until(lambda page=page, words=words: words in page.turns("you"), words)


def test_a_talk_can_be_begun_again(visit, nano, microphone):
    page = begin(visit, nano, microphone)
    page.speaks(QUESTION)
    answered(page, "seven")
    page.page.locator("#talk-end").click()
    page.until_state("idle")
    microphone.plays(said(LONG))
    page.page.locator("#talk-button").click()
    answered(page, ANSWERS[LONG])
    assert len(page.sockets) == 2
    assert sum(each["live"] for each in page.microphones()) == 1


def test_turns_by_hand_are_held(visit, nano, microphone):
    microphone.plays(np.concatenate([recording(QUESTION)] * 40))
    by_hand = json.dumps(json.dumps({"turns": "hand"}))
    page = visit(nano, script=f"localStorage.setItem('mimo-fast', {by_hand});")
    page.until_state("idle")
    button = page.page.locator("#talk-button")
    button.click()
    page.until_state("listening")
    # Nothing is sent until the button is held.
    page.page.wait_for_timeout(500)
    assert not page.sent("input_audio_buffer.append")
    box = button.bounding_box()
    page.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.page.mouse.down()
    page.until_state("hearing")
    page.until(lambda: len(page.sent("input_audio_buffer.append")) > 50, "a second of sound")
    page.page.mouse.up()
    page.until(lambda: page.got("response.done"), "reply")
    page.until(lambda: page.turns("model"), "answer")
    assert page.sent("input_audio_buffer.commit")
    sent = len(page.sent("input_audio_buffer.append"))
    page.page.wait_for_timeout(300)
    assert len(page.sent("input_audio_buffer.append")) == sent
