"""The page over WebRTC: `Settings`, connection."""

import json

from visits import pause

SETTINGS = json.dumps(json.dumps({"connection": "webrtc"}))
ANSWER = "i live in the city near the river"


def test_the_page_talks_over_webrtc(visit, nano, microphone):
    microphone.plays(pause(0.3))
    page = visit(nano, script=f"localStorage.setItem('mimo-fast', {SETTINGS});")
    page.until_state("idle")
    page.page.locator("#talk-button").click()
    page.until_state("listening")
    assert not page.sockets
    page.page.locator("#talk-input").fill("where do you live")
    page.page.locator("#talk-input").press("Enter")
    page.until(lambda: ANSWER in page.turns("model"), "answer")
    page.until_state("listening")
    assert not page.sockets
