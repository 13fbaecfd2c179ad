"""OpenAI's own SDK for browsers against this server: WebRTC with a client secret.

Its bundle runs in Chromium as npm has it; nothing of it is changed but the address of the server.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from visits import LIMIT, PACKAGES, pause, plain, said

BUNDLE = PACKAGES / "node_modules/@openai/agents-realtime/dist/bundle/openai-realtime-agents.umd.js"
PAGE = "<!doctype html><link rel=icon href=data:,><script src='/agents.js'></script><audio></audio>"

CONNECT = """
async ({secret, url}) => {
  const {RealtimeAgent, RealtimeSession, OpenAIRealtimeWebRTC} = window.OpenAIAgentsRealtime;
  const audioElement = document.querySelector("audio");
  const transport = new OpenAIRealtimeWebRTC({baseUrl: url, audioElement});
  const agent = new RealtimeAgent({name: "nano", instructions: "Be brief."});
  const session = new RealtimeSession(agent, {transport, model: "nano"});
  Object.assign(window, {session, seen: [], errors: []});
  session.on("transport_event", (event) => seen.push(event));
  session.on("error", (error) => errors.push(JSON.stringify(error)));
  await session.connect({apiKey: secret});
  return {status: transport.status, call: transport.callId};
}
"""

SPEAK = """
async () => {
  // The file of the microphone is played from its start when it is opened, by one at a time.
  const [sender] = session.transport.connectionState.peerConnection.getSenders();
  sender.track.stop();
  const stream = await navigator.mediaDevices.getUserMedia({audio: true});
  await sender.replaceTrack(stream.getAudioTracks()[0]);
}
"""

LOUDEST = """
async () => {
  const context = new AudioContext();
  const source = context.createMediaStreamSource(document.querySelector("audio").srcObject);
  const meter = new AnalyserNode(context, {fftSize: 2048});
  source.connect(meter);
  const block = new Float32Array(2048);
  window.loudest = 0;
  setInterval(() => {
    meter.getFloatTimeDomainData(block);
    window.loudest = Math.max(window.loudest, ...block.map(Math.abs));
  }, 30);
}
"""


def client_secret(url: str) -> str:
    body = json.dumps({"session": {"type": "realtime", "model": "nano"}}).encode()
    asked = urllib.request.Request(f"{url}/v1/realtime/client_secrets", body)
    asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked) as answer:
        found: str = json.load(answer)["value"]
    return found


def events(visit: Any, kind: str) -> list[dict[str, Any]]:
    return visit.page.evaluate("kind => seen.filter((event) => event.type === kind)", kind)


def until(visit: Any, found: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not found():
        if time.monotonic() > end:
            seen = visit.page.evaluate("seen.map((event) => event.type)")
            raise AssertionError(f"no {what}; {seen}; {visit.page.evaluate('errors')}")
        visit.page.wait_for_timeout(50)


def test_the_agents_sdk_talks_and_hears(visit, nano, microphone):
    microphone.plays(pause(0.1))
    blank = visit(nano, "health")
    blank.guard.allow("favicon.ico")
    page = blank.page
    page.route("**/agents.html", lambda route: route.fulfill(body=PAGE, content_type="text/html"))
    page.route("**/agents.js", lambda route: route.fulfill(path=BUNDLE))
    page.goto(f"{nano.url}/agents.html")
    secret = client_secret(nano.url)
    url = f"{nano.url}/v1/realtime/calls"
    connected = page.evaluate(CONNECT, {"secret": secret, "url": url})
    assert connected["status"] == "connected"
    assert connected["call"].startswith("rtc_")
    page.evaluate(LOUDEST)
    (updated, *_) = events(blank, "session.updated")
    assert updated["session"]["instructions"] == "Be brief."
    # However long a busy machine took to connect.
    microphone.plays(said("what is three plus four", 0.5, 1.5))
    page.evaluate(SPEAK)
    until(blank, lambda: events(blank, "output_audio_buffer.stopped"), "end of the answer")
    (done, *_) = events(blank, "response.output_audio_transcript.done")
    assert plain(done["transcript"]) == "seven"
    assert page.evaluate("loudest") > 0.05
    assert page.evaluate("errors") == []
    # A typed turn, interrupted by the SDK's own means.
    page.evaluate("session.sendMessage('where do you live')")
    until(blank, lambda: len(events(blank, "output_audio_buffer.started")) == 2, "second answer")
    page.evaluate("session.interrupt()")
    until(blank, lambda: events(blank, "output_audio_buffer.cleared"), "interruption")
    page.evaluate("session.close()")
    assert page.evaluate("errors") == []
