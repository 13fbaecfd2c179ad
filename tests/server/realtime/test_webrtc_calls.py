"""WebRTC calls with aiortc as the caller, over this machine's own addresses."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiortc.codecs.opus
import numpy as np
import openai
import pytest
import torch
from aioice import ice
from callers import SDP, Caller, caller
from servers import Running, until
from speech import RATE, pcm, question, silence, turn
from test_openai import event_models

import mimo_fast
from mimo_fast.server.realtime import peer as peers
from mimo_fast.server.realtime.speaker import Speaker

SEA = "what color is the sea"


@pytest.fixture
def whole(monkeypatch: Any) -> None:
    """Replies are played once they are complete: a busy machine makes them slower than that."""
    follow = Speaker._next

    def patient(speaker: Speaker) -> bytes:
        waiting = speaker._replies
        if waiting and not waiting[0].response.ended:
            return speaker._silence
        return follow(speaker)

    monkeypatch.setattr(Speaker, "_next", patient)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await work

    asyncio.run(bounded())


@pytest.fixture(scope="module")
def words() -> Iterator[Callable[[np.ndarray], str]]:
    """What another pair, which no server has, hears in what a caller heard."""
    with mimo_fast.load() as ear:

        def transcribe(heard: np.ndarray) -> str:
            wav = torch.from_numpy(heard)
            (loud,) = torch.nonzero(wav.abs() > 0.01, as_tuple=True)
            assert len(loud), "nothing but silence was heard"
            first, last = int(loud[0]) - RATE // 5, int(loud[-1]) + RATE // 5
            return ear.transcribe(wav[max(0, first) : last]).text

        yield transcribe


def ask(call: Caller, text: str) -> None:
    content = [{"type": "input_text", "text": text}]
    item = {"type": "message", "role": "user", "content": content}
    call.send("conversation.item.create", item=item)
    call.send("response.create")


async def heard_out(call: Caller, count: int = 1) -> None:
    """Waits until a reply was played and its last packets were heard."""
    await call.until("output_audio_buffer.stopped", count)
    await asyncio.sleep(0.3)


def places_are_free(server: Running) -> None:
    until(lambda: not server.app.state.sessions.taken)
    assert not server.app.state.calls
    assert not server.app.state.live


@pytest.mark.usefixtures("whole")
def test_a_spoken_question_is_answered_aloud(server: Running, words: Any) -> None:
    async def talk() -> None:
        async with caller(server) as call:
            call.microphone.say(turn(200, 700))
            await heard_out(call)
            assert words(call.waveform()) == "seven"
            done = call.all("response.output_audio_transcript.done")
            assert [event["transcript"] for event in done] == ["seven"]
            order = [event["type"] for event in call.events]
            # Audio is on the track alone.
            assert "response.output_audio.delta" not in order
            first, last = "output_audio_buffer.started", "output_audio_buffer.stopped"
            assert order.index("response.created") < order.index(first)
            assert order.index("response.done") < order.index(last)
            for event in call.events:
                event_models()[event["type"]].model_validate(event, strict=True)
        places_are_free(server)

    run(talk())


def test_opus_is_coded_beside_the_event_loop(server: Running, monkeypatch: Any) -> None:
    threads = set[str]()

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            threads.add(threading.current_thread().name)
            return function(*arguments, **named)

        return noted

    for kind, method in (("OpusDecoder", "decode"), ("OpusEncoder", "encode")):
        of = getattr(aiortc.codecs.opus, kind)
        monkeypatch.setattr(of, method, noting(getattr(of, method)))

    async def talk() -> None:
        async with caller(server) as call:
            while len(call.heard) < 10:
                await asyncio.sleep(0.02)

    run(talk())
    assert len(threads) >= 2
    assert not threads & {server.thread.name, threading.current_thread().name}


def test_speech_interrupts_what_is_being_played(server: Running) -> None:
    async def talk() -> None:
        async with caller(server) as call:
            ask(call, SEA)
            await call.until("output_audio_buffer.started")
            call.microphone.say(pcm(torch.cat((question()[: RATE // 2], silence(100)))))
            cut = await call.until("conversation.item.truncated")
            (cleared,) = call.all("output_audio_buffer.cleared")
            (created,) = call.all("response.created")
            assert cleared["response_id"] == created["response"]["id"]
            call.send("conversation.item.retrieve", item_id=cut["item_id"])
            item = (await call.until("conversation.item.retrieved"))["item"]
            # What was played is a part of "the sea is blue".
            kept = item["content"][0]["transcript"]
            assert len(kept) < len("the sea is blue")
            assert "the sea is blue".startswith(kept)
            await asyncio.sleep(0.3)
            sounds = call.waveform()
            (loud,) = np.nonzero(np.abs(sounds) > 0.02)
            assert len(loud)
            # 200 ms: frames of the receiver's buffer, and the first that is not loud.
            assert loud[-1] - loud[0] <= (cut["audio_end_ms"] + 200) * RATE / 1000
            assert not call.all("output_audio_buffer.stopped")
        places_are_free(server)

    run(talk())


def test_a_caller_clears_what_is_played(server: Running) -> None:
    async def talk() -> None:
        async with caller(server) as call:
            ask(call, SEA)
            await call.until("output_audio_buffer.started")
            call.send("output_audio_buffer.clear")
            await call.until("output_audio_buffer.cleared")
            cut = await call.until("conversation.item.truncated")
            assert 0 < cut["audio_end_ms"] < 1000
            await call.until("response.done")
            # The conversation goes on.
            ask(call, "what is three plus four")
            await heard_out(call)
            said = call.all("response.output_audio_transcript.done")
            assert said[-1]["transcript"] == "seven"
            call.send("input_audio_buffer.append", audio="")
            error = (await call.until("error"))["error"]
            assert "output_audio_buffer.clear" in error["message"]

    run(talk())


@pytest.mark.slow
@pytest.mark.usefixtures("whole")
def test_two_calls_at_once_hear_their_own_answers(server: Running, words: Any) -> None:
    answers = {SEA: "the sea is blue", "what is three plus four": "seven"}

    async def one(text: str) -> None:
        async with caller(server) as call:
            ask(call, text)
            await heard_out(call)
            assert words(call.waveform()) == answers[text]

    async def both() -> None:
        await asyncio.gather(*map(one, answers))

    run(both())
    places_are_free(server)


def test_the_openai_sdk_calls_and_hangs_up(server: Running) -> None:
    session = {
        "type": "realtime",
        "model": "nano",
        "output_modalities": ["text"],
        "audio": {"input": {"turn_detection": None}},
    }

    async def talk() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        call = Caller(server)
        offer = await call.offer()
        raw = await client.realtime.calls.with_raw_response.create(sdp=offer, session=session)
        assert raw.status_code == 201
        assert raw.headers["content-type"] == "application/sdp"
        path, _, id = raw.headers["location"].rpartition("/")
        assert path == "/v1/realtime/calls"
        description = aiortc.RTCSessionDescription(raw.text, "answer")
        await call.peer.setRemoteDescription(description)
        created = (await call.until("session.created"))["session"]
        assert created["output_modalities"] == ["text"]
        assert created["audio"]["input"]["turn_detection"] is None
        assert server.app.state.sessions.taken == 1
        await client.realtime.calls.hangup(id)
        await call.closed()
        # Whoever has hung up finds the place free.
        assert server.app.state.sessions.taken == 0
        with pytest.raises(openai.NotFoundError, match="there is no such call"):
            await client.realtime.calls.hangup(id)
        await call.leave()
        await client.close()

    run(talk())


def offered(**changes: Any) -> bytes:
    """An offer of aiortc's, changed."""

    async def make() -> str:
        peer = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        for kind in changes.get("kinds", ["audio"]):
            peer.addTransceiver(kind)
        if changes.get("channel", True):
            peer.createDataChannel("oai-events")
        await peer.setLocalDescription(await peer.createOffer())
        found: str = peer.localDescription.sdp
        await peer.close()
        return found

    return asyncio.run(make()).replace(*changes.get("replaced", ("", ""))).encode()


@pytest.mark.parametrize(
    ("offer", "problem"),
    [
        (b"", "not nothing"),
        (b"v=0\r\nm=audio\r\n", "no session description"),
        (b"\xff", "UTF-8"),
        ({"kinds": ["audio", "video"]}, "not application, audio, video"),
        ({"kinds": ["audio", "audio"]}, "not application, audio, audio"),
        ({"channel": False}, "not audio"),
        ({"kinds": []}, "not application"),
        ({"replaced": ("opus/48000", "speex/48000")}, "no Opus"),
        ({"replaced": ("a=fingerprint", "a=footprint")}, "no fingerprint"),
        ({"replaced": ("a=ice-ufrag", "a=ice-none")}, "no ice-ufrag"),
    ],
)
def test_wrong_offers_are_refused(server: Running, offer: Any, problem: str) -> None:
    body = offer if isinstance(offer, bytes) else offered(**offer)
    answer = server.ask("POST", "/v1/realtime/calls", body, SDP)
    assert answer.status == 400
    assert problem in answer.error["message"]
    assert (answer.error["code"], answer.error["param"]) == ("invalid_sdp", "sdp")
    assert server.app.state.sessions.taken == 0


def form(**parts: str) -> tuple[bytes, dict[str, str]]:
    fields = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'
        for name, text in parts.items()
    ]
    body = "".join([*fields, "--x--\r\n"]).encode()
    return body, {"Content-Type": "multipart/form-data; boundary=x"}


def test_wrong_requests_are_refused(server: Running) -> None:
    def refused(body: Any, headers: dict[str, str], path: str = "/v1/realtime/calls") -> Any:
        answer = server.ask("POST", path, body, headers)
        assert server.app.state.sessions.taken == 0
        return answer.status, answer.error["code"], answer.error["param"]

    offer = offered()
    assert refused({}, {}) == (415, "unsupported_type", None)
    assert refused(bytes(2**16 + 1), SDP) == (413, "request_too_large", "sdp")
    assert refused(*form(session="{}")) == (400, "missing_required_parameter", "sdp")
    assert refused(*form(sdp=offer.decode(), session="[")) == (400, "invalid_json", None)
    session = json.dumps({"type": "realtime", "audio": {"output": {"speed": 2}}})
    wrong = refused(*form(sdp=offer.decode(), session=session))
    assert wrong == (400, "invalid_value", "session.audio.output.speed")
    other = refused(offer, SDP, "/v1/realtime/calls?model=other")
    assert other == (404, "model_not_found", "model")


def test_a_full_server_says_so(serve: Any) -> None:
    server = serve(max_sessions=1, queue_seconds=0)

    async def talk() -> None:
        async with caller(server) as call:
            other = Caller(server)
            answer = await other.call()
            assert answer.status == 429
            assert "places for sessions" in answer.error["message"]
            assert answer.headers["Retry-After"]
            path = f"{call.location}/hangup"
            assert (await asyncio.to_thread(server.ask, "POST", path)).status == 200
            await call.closed()
            answer = await other.call()
            assert answer.status == 201
            await other.until("session.created")
            await other.leave()

    run(talk())
    places_are_free(server)


def test_a_call_that_never_connects_frees_its_place(server: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(peers, "CONNECT", 0.2)
    answer = server.ask("POST", "/v1/realtime/calls", offered(), SDP)
    assert answer.status == 201
    places_are_free(server)


def test_a_caller_that_vanishes_frees_its_place(server: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(ice, "CONSENT_INTERVAL", 0.2)
    monkeypatch.setattr(ice, "CONSENT_FAILURES", 2)

    async def talk() -> None:
        async with caller(server) as call:
            # Without a word: no packet leaves or arrives any more.
            transport = call.peer.sctp.transport.transport
            for protocol in transport._connection._protocols:
                protocol.transport.abort()
            await asyncio.to_thread(places_are_free, server)

    run(talk())


def test_a_server_that_stops_ends_calls(serve: Any) -> None:
    server = serve()

    async def talk() -> None:
        async with caller(server) as call:
            stopping = asyncio.create_task(asyncio.to_thread(server.stop))
            await call.closed()
            await stopping
            assert not server.app.state.calls

    run(talk())


def test_a_flood_of_events_ends_a_call(server: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(peers, "MOST_EVENTS", 8)

    async def talk() -> None:
        async with caller(server) as call:
            for _ in range(200):
                call.send("session.update", session={"type": "realtime"})
            await call.closed()
        places_are_free(server)

    run(talk())


def test_other_channels_are_closed(server: Running) -> None:
    async def talk() -> None:
        async with caller(server) as call:
            others = [call.peer.createDataChannel(f"other-{i}") for i in range(2)]
            while any(each.readyState != "closed" for each in others):
                await asyncio.sleep(0.02)
            assert call.channel.readyState == "open"
            others = [call.peer.createDataChannel(f"more-{i}") for i in range(peers.MOST_CHANNELS)]
            await call.closed()

    run(talk())


def test_a_missing_package_is_named(server: Running, monkeypatch: Any) -> None:
    for name in ("peer", "speaker", "offers"):
        monkeypatch.delitem(sys.modules, f"mimo_fast.server.realtime.{name}")
    monkeypatch.setitem(sys.modules, "aiortc", None)
    answer = server.ask("POST", "/v1/realtime/calls", b"v=0\r\n", SDP)
    assert answer.status == 501
    assert answer.error["code"] == "webrtc_not_installed"
    assert "pip install 'mimo-fast[webrtc]'" in answer.error["message"]
    # What does not need it goes on.
    assert server.get("/health").status == 200


def test_ice_servers_are_those_of_the_settings(serve: Any, monkeypatch: Any) -> None:
    used = list[Any]()
    connection = peers.RTCPeerConnection

    def noting(configuration: Any) -> Any:
        used.append(configuration.iceServers)
        return connection(aiortc.RTCConfiguration(iceServers=[]))

    monkeypatch.setattr(peers, "RTCPeerConnection", noting)
    turn = {"urls": ["turn:turn.example:3478"], "username": "u", "credential": "p"}
    stun = {"urls": ["stun:stun.example"]}
    for servers in ((), (stun, turn)):
        server = serve(ice_servers=servers)
        assert server.ask("POST", "/v1/realtime/calls", offered(), SDP).status == 201
    nothing, both = used
    # An empty list, not None, for which aiortc asks a public server.
    assert nothing == []
    assert [each.urls for each in both] == [stun["urls"], turn["urls"]]
    assert (both[1].username, both[1].credential) == ("u", "p")


@pytest.mark.slow
def test_a_turn_by_hand(server: Running) -> None:
    async def talk() -> None:
        async with caller(server) as call:
            session = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
            call.send("session.update", session=session)
            await call.until("session.updated")
            call.send("input_audio_buffer.clear")
            await call.until("input_audio_buffer.cleared")
            call.microphone.say(turn(100, 100))
            await asyncio.sleep(len(turn(100, 100)) / 2 / RATE + 0.3)
            call.send("input_audio_buffer.commit")
            call.send("response.create")
            done = await call.until("response.output_audio_transcript.done")
            assert done["transcript"] == "seven"
            assert not call.all("input_audio_buffer.speech_started")

    run(talk())
