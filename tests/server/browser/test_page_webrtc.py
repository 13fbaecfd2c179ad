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
    page.types("where do you live")
    page.until(lambda: ANSWER in page.turns("model"), "answer")
    page.until_state("listening")
    # Interrupted; the server may have ended the reply before.
    page.types("where do you live")
    page.until(lambda: page.states().count("speaking") == 2, "second answer")
    page.page.keyboard.press("Escape")
    page.until_state("listening")
    turn = page.page.locator('#transcript .turn[data-who="model"]').last
    page.until(lambda: turn.get_attribute("data-cut") == "true", "interruption")
    page.page.wait_for_timeout(300)
    assert not page.page.locator("#talk-notice").is_visible()
    assert not page.sockets
