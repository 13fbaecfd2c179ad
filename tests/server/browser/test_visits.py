"""The tests' own eyes and ears: what a visit may not do is seen, what a page plays is heard."""

import functools
import http.server
import threading

import numpy as np
import pytest
from visits import pieces, recording, said, share, wav

from benchmarks.chromium import ELSEWHERE

HTML = """<!doctype html><html lang="en"><title>A page</title>
<main><h1>A page</h1><div id="talk" data-state="idle"></div><button id="go">Go</button></main>
<script src="/script.js" type="module"></script></html>"""

SEA = "what color is the sea"

ECHO = """document.getElementById("go").onclick = async () => {
  const raw = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: raw });
  const context = new AudioContext();
  await context.resume();
  context.createMediaStreamSource(stream).connect(context.destination);
  document.getElementById("talk").dataset.state = "listening";
};"""


class Site(http.server.SimpleHTTPRequestHandler):
    """A page under a strict policy."""

    def end_headers(self):
        self.send_header("Content-Security-Policy", "default-src 'none'; script-src 'self'")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(HTML)
    (tmp_path / "script.js").write_text(ECHO)
    (tmp_path / "favicon.ico").write_bytes(b"")
    handler = functools.partial(Site, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_reaches_an_output_is_heard(visit, site, microphone):
    samples = said("what is three plus four", after=0.3)
    microphone.plays(samples)
    page = visit(site)
    page.page.locator("#go").click()
    page.until_state("listening")
    page.until(lambda: page.loudness() > 0.1, "sound")
    page.page.wait_for_timeout(1000 * len(samples) / 24000)
    assert share(samples.astype(np.float32) / 32768, 24000, *page.heard()) > 0.5
    assert not len(page.heard()[0])


FORBIDDEN = {
    "fetch('http://other.test/x').catch(() => 0)": "CSP: connect-src http://other.test/x",
    "console.error('wrong')": "console: wrong",
    "setTimeout(() => { throw Error('thrown') })": "an exception: thrown",
    "document.body.append(Object.assign(document.createElement('script'), {text: '1'}))": (
        "CSP: script-src-elem inline"
    ),
    "fetch('/nothing').catch(() => 0)": "CSP: connect-src",
    # The page is gone after that.
    "location.href = 'http://other.test/x'": "a request to http://other.test/x",
}
"""What a page may not do, and how a visit notes it."""


def test_what_a_visit_may_not_do_is_noted(visit, site):
    page = visit(site)
    for script, problem in FORBIDDEN.items():
        page.guard.problems.clear()
        page.page.evaluate(f"() => {{ {script} }}")
        page.until(lambda wanted=problem: any(wanted in x for x in page.guard.found()), problem)
    page.guard.allow("")


def test_a_name_that_is_not_localhost_has_no_microphone(visit, site):
    page = visit(site.replace("127.0.0.1", ELSEWHERE))
    assert page.page.evaluate("() => [isSecureContext, !navigator.mediaDevices]") == [False, True]


def test_what_is_hard_to_use_is_found(visit, site):
    page = visit(site)
    assert page.axe() == []
    page.page.evaluate("() => document.querySelector('#go').replaceChildren()")
    assert [each.partition(":")[0] for each in page.axe()] == ["button-name"]


def test_recordings_are_sent_as_files(transcribed):
    samples = said("where is my room").astype(np.float32) / 32768
    assert len(wav(samples)) == 44 + 2 * len(samples)
    assert transcribed(samples, 24000) == "where is my room"


def test_a_reply_is_found_in_what_was_heard_and_another_is_not():
    sea, room = (recording(each).astype(np.float32) / 32768 for each in ("thank you", SEA))
    paused = np.concatenate([0.3 * sea[:9000], np.zeros(700, np.float32), 0.3 * sea[9000:]])
    assert share(sea, 24000, paused, 24000) > 0.6
    assert share(sea, 24000, room, 24000) < 0.2
    assert share(room, 24000, sea, 24000) < 0.2


def test_samples_are_found_where_they_are():
    sea = recording(SEA).astype(np.float32) / 32768
    whole = np.concatenate([np.zeros(100, np.float32), sea])
    places, missing = pieces(sea, whole)
    assert (set(places), missing) == ({100}, 0)
    # Every 40 ms at a place of its own, a few samples over the one before.
    parts = [whole[at : at + 957] for at in range(0, len(whole), 960)]
    places, missing = pieces(sea, np.concatenate(parts))
    assert len(set(places)) > 5
    assert missing > 5
