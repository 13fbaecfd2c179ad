"""What stands between a visitor and a talk is named, with what to do; and is over when it is."""

import re
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from lines import Line
from visits import pause, said
from websockets.sync.client import connect

from benchmarks.chromium import ELSEWHERE, chromium

QUESTION = "what is three plus four"

BUSY = """navigator.mediaDevices.getUserMedia = () => Promise.reject(
  new DOMException("Could not start audio source", "NotReadableError"))"""
"""No program holds the microphone of a test; this is what a browser says where one does."""


@pytest.fixture(scope="module")
def bare(playwright):
    """A browser without a microphone."""
    with chromium(playwright, None, "--disable-audio-input") as found:
        yield found


def tap(page):
    page.page.locator("#talk-button").click()


def problem(page, code):
    page.until(lambda: page.reason() == code, f"problem {code}")
    page.until_state("error")
    # In words beside the button, too.
    assert len(page.text("#talk-status")) > 3
    return page.text("#talk-problem")


def types(page):
    """Without a microphone there is an answer, too."""
    page.types(QUESTION)
    page.until(lambda: "seven" in page.turns("model"), "answer in writing")
    page.until(lambda: page.loudness() > 0.05, "sound")


def works(page):
    tap(page)
    page.until_state("listening", "hearing", "thinking", "speaking")
    page.until(lambda: "seven" in page.turns("model"), "answer")


@contextmanager
def taken(url):
    """A session that holds the server's one place."""
    with connect(f"ws{url.removeprefix('http')}/v1/realtime?model=nano") as socket:
        socket.recv()
        yield


def test_permission_denied(visit, nano, microphone):
    page = visit(nano, granted=False)
    tap(page)
    assert "allow" in problem(page, "denied").lower()
    types(page)
    page.page.locator("#talk-end").click()
    # Allowed in the meantime, the next tap begins.
    page.context.grant_permissions(["microphone"])
    microphone.plays(pause(0.1))
    tap(page)
    page.until_state("listening", "hearing")
    assert page.holds_microphone()


def test_no_microphone(visit, nano, bare):
    page = visit(nano, chrome=bare)
    tap(page)
    assert "no microphone" in problem(page, "no-microphone").lower()


def test_the_microphone_is_held_by_another_program(visit, nano):
    page = visit(nano, script=BUSY)
    tap(page)
    assert "another program" in problem(page, "busy").lower()


def test_an_address_to_which_browsers_give_no_microphone(visit, nano):
    page = visit(nano.url.replace("127.0.0.1", ELSEWHERE))
    tap(page)
    reason = problem(page, "insecure")
    port = urlsplit(nano.url).port
    assert f"ssh -N -L {port}:127.0.0.1:{port} {ELSEWHERE}" in reason
    assert "--ssl-certfile" in reason
    types(page)


def test_a_server_that_is_away(visit, nano, microphone):
    microphone.plays(said(QUESTION))
    line = Line(nano.url)
    page = visit(line)
    page.until_state("idle")
    page.guard.allow("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "WebSocket connection")
    line.cut()
    # Before anything was loaded that a talk needs, and again.
    for _ in range(2):
        tap(page)
        problem(page, "away")
        assert not page.holds_microphone()
    line.mend()
    works(page)
    line.cut()
    problem(page, "lost")
    assert not page.holds_microphone()
    assert "seven" in page.turns("model")


def test_a_server_that_stops(visit, serve, microphone):
    microphone.plays(pause(0.1))
    server = serve()
    page = visit(server)
    tap(page)
    page.until_state("listening")
    server.stop()
    problem(page, "stopping")


def test_a_full_server_is_waited_for_without_the_microphone(visit, serve, microphone):
    microphone.plays(said(QUESTION))
    server = serve(max_sessions=1)
    page = visit(server)
    # A refused handshake is logged by the browser itself.
    page.guard.allow("WebSocket connection", "429")
    with taken(server.url):
        tap(page)
        page.until_state("queued")
        assert not page.holds_microphone()
        assert re.search(r"full|queue|wait|place", page.text("#talk-status").lower())
        page.page.locator("#talk-end").click()
        page.until_state("idle")
        tap(page)
        page.until_state("queued")
    page.until_state("listening", "hearing", "thinking", "speaking")
    assert page.holds_microphone()
    page.until(lambda: "seven" in page.turns("model"), "answer")


def test_the_key_is_asked_for_and_kept_out_of_addresses(visit, serve, microphone):
    key = "correct-horse"
    microphone.plays(said(QUESTION))
    server = serve(api_key=key)
    page = visit(server)
    # The refusal by which the page learns that there is a key.
    page.guard.allow("401")
    addresses = []
    page.context.on("request", lambda request: addresses.append(request.url))
    dialog = page.page.locator("#key-dialog")
    page.until(dialog.is_visible, "dialog")
    give(page, "wrong")
    page.until(lambda: page.page.locator("#key-problem").is_visible(), "that it was wrong")
    give(page, key)
    page.until(lambda: not dialog.is_visible(), "acceptance")
    works(page)
    assert addresses
    assert all(key not in address for address in (*addresses, *page.sockets))
    # It is kept for this tab.
    page.page.reload()
    page.until_state("idle")
    tap(page)
    page.until_state("listening", "hearing")
    assert not dialog.is_visible()
    assert page.page.evaluate("() => localStorage.getItem('mimo-fast-key')") is None


def give(page, key):
    page.page.locator("#key-input").fill(key)
    page.page.keyboard.press("Enter")


def test_without_the_key_the_talk_says_so(visit, serve):
    page = visit(serve(api_key="correct-horse"))
    page.guard.allow("401")
    page.until(page.page.locator("#key-dialog").is_visible, "dialog")
    page.page.locator("#key-cancel").click()
    tap(page)
    page.until(page.page.locator("#key-dialog").is_visible, "dialog")
    page.page.keyboard.press("Escape")
    problem(page, "key")
    assert not page.holds_microphone()
