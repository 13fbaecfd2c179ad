"""What crosses on the wire: a visitor interrupts what the server has ended, or not yet begun."""

import json
import re

import numpy as np
import pytest
from visits import RATE, plain

QUESTION = "what is three plus four"
LONG = "where do you live"


class Slow:
    """A network between a page and its server: from the first event of a kind on, nothing comes
    until it is let through."""

    def __init__(self, page, kind=None):
        self.kind, self.waiting, self.sent, self.got = kind, [], [], []
        page.route_web_socket(re.compile("/v1/realtime"), self._opened)

    def _opened(self, route):
        self._page, server = route, route.connect_to_server()
        route.on_message(lambda message: self._sends(server, message))
        server.on_message(self._comes)

    def _sends(self, server, message):
        self.sent.append(json.loads(message))
        server.send(message)

    def _comes(self, message):
        if self.waiting or json.loads(message)["type"] == self.kind:
            self.waiting.append(message)
        else:
            self._through(message)

    def _through(self, message):
        self.got.append(json.loads(message))
        self._page.send(message)

    def tell(self, event):
        """What the server did not say."""
        self._through(json.dumps(event))

    def holds(self, kind):
        return any(json.loads(message)["type"] == kind for message in self.waiting)

    def let_through(self):
        self.kind, waiting = None, self.waiting
        self.waiting = []
        for message in waiting:
            self._through(message)

    def codes(self):
        """Of errors that the page was told."""
        return [each["error"]["code"] for each in self.got if each["type"] == "error"]


@pytest.fixture
def slow(visit, nano):
    """Opens the page behind a network that holds back what comes from this event on."""

    def opened(kind=None):
        page = visit(nano, granted=False)
        page.until_state("idle")
        return page, Slow(page.page, kind)

    return opened


def kinds(events):
    return [each["type"] for each in events]


def notice(page):
    shown = page.page.locator("#talk-notice")
    return shown.inner_text() if shown.is_visible() else ""


def test_an_interrupted_reply_that_had_ended_is_no_news(slow):
    page, network = slow("response.output_audio.done")
    page.types(LONG)
    page.until(lambda: page.loudness() > 0.02, "sound")
    page.until(lambda: network.holds("response.done"), "its end, on its way")
    page.page.keyboard.press("Escape")
    page.until(lambda: network.holds("conversation.item.truncated"), "interruption")
    network.let_through()
    page.until_state("listening")
    assert network.codes() == ["response_cancel_not_active"]
    assert notice(page) == ""
    page.types(QUESTION)
    page.until(lambda: "seven" in page.turns("model"), "the next answer")
    assert notice(page) == ""
    # What was not about an interruption is told.
    network.tell({"type": "error", "error": {"code": "x", "message": "Broken", "event_id": None}})
    page.until(lambda: notice(page) == "Broken", "notice")


def test_who_asks_again_before_the_answer_has_begun_gets_the_second(slow):
    page, network = slow("response.created")
    page.types(LONG)
    page.until(lambda: network.waiting, "the first answer, on its way")
    page.types(QUESTION)
    page.until(lambda: kinds(network.sent).count("response.create") == 2, "the second question")
    page.until(lambda: sum('"response.created"' in each for each in network.waiting) == 2, "both")
    network.let_through()
    page.until(lambda: "seven" in page.turns("model"), "the second answer")
    page.until_state("listening")
    assert "conversation_already_has_active_response" not in network.codes()
    assert notice(page) == ""
    # Of the first nothing was heard, or shown.
    assert page.turns("model") == ["seven"]


def test_escape_before_the_answer_has_begun_ends_it(slow):
    page, network = slow("response.created")
    page.types(LONG)
    page.until(lambda: network.waiting, "the answer, on its way")
    page.page.keyboard.press("Escape")
    page.until_state("listening")
    page.until(lambda: "response.cancel" in kinds(network.sent), "cancellation")
    page.until(lambda: network.holds("response.done"), "its end")
    network.let_through()
    page.page.wait_for_timeout(300)
    assert page.state() == "listening"
    assert page.turns("model") == []
    assert not len(page.heard()[0])
    assert notice(page) == ""
    # The next one is wanted.
    page.types(QUESTION)
    page.until(lambda: "seven" in page.turns("model"), "answer")
    page.until(lambda: page.loudness() > 0.05, "sound")


LATE = """() => {
  if (document.querySelector("#talk").dataset.state !== "speaking") return false;
  const end = performance.now() + 3000;
  while (performance.now() < end);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  return true;
}"""
"""Escape, after the page had no time for anything while the reply was played to its end."""


def test_a_reply_that_ended_as_it_was_interrupted_was_heard_to_its_end(slow):
    page, network = slow()
    for turn in range(1, 6):
        page.types(LONG)
        page.until(lambda n=turn: kinds(network.got).count("response.done") == n, "the whole reply")
        if page.page.evaluate(LATE):
            break
    else:
        pytest.fail("no reply was played when it had come")
    page.until(lambda: "conversation.item.truncated" in kinds(network.got), "truncation")
    page.until_state("listening")
    (cut,) = [each for each in network.sent if each["type"] == "conversation.item.truncate"]
    item = cut["item_id"]
    deltas = [
        e["delta"]
        for e in network.got
        if e["type"] == "response.output_audio.delta" and e["item_id"] == item
    ]
    came = sum(len(each) * 3 / 4 / 2 for each in deltas) / RATE
    assert np.isclose(cut["audio_end_ms"], 1000 * came, atol=5)
    shown = page.page.locator(f'#transcript .turn[data-id="{item}"]')
    page.until(lambda: shown.get_attribute("data-cut") == "false", "end of the turn")
    assert "interrupted" not in plain(shown.inner_text())
    assert notice(page) == ""
