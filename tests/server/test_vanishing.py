"""A client that is killed at any moment leaves nothing behind: its place is free again."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from servers import until

SESSION = """
import base64, json, sys, time
from websockets.sync.client import connect
client = connect(f"ws://127.0.0.1:{sys.argv[1]}/v1/realtime?model=nano")
def send(kind, **fields):
    client.send(json.dumps({"type": kind, **fields}))
def wait(kind):
    while (event := json.loads(client.recv()))["type"] != kind:
        assert event["type"] != "error", event
def reach():
    print("here", flush=True)
sound = base64.b64encode(open(sys.argv[2], "rb").read()[44:]).decode()
wait("session.created")
"""

SAY = """
question = {"type": "input_text", "text": "what is three plus four"}
item = {"type": "message", "role": "user", "content": [question]}
send("conversation.item.create", item=item)
send("response.create")
"""

REQUEST = """
import json, socket, sys, time
def reach():
    print("here", flush=True)
def ask(body, length=None):
    client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    lines = ["POST /v1/audio/speech HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {length or len(body)}", "", ""]
    client.sendall("\\r\\n".join(lines).encode() + body)
    return client
fields = {"model": "nano", "voice": "alloy", "response_format": "pcm"}
long = json.dumps(fields | {"input": "one two three four five. " * 40}).encode()
"""

TEXTS = SESSION.replace("/v1/realtime?model=nano", "/v1/audio/speech/stream")

MOMENTS = {
    "connected": SESSION + "reach()",
    "speaking to it": SESSION + 'send("input_audio_buffer.append", audio=sound)\nreach()',
    "in the middle of a message": SESSION
    + 'client.socket.sendall(bytes([0x81, 0xFE, 0xFF, 0xFF, 1, 2, 3, 4]) + b"x" * 9)\nreach()',
    "waiting for a reply": SESSION + SAY + "reach()",
    "at the first sound": SESSION + SAY + 'wait("response.output_audio.delta")\nreach()',
    "while it speaks": SESSION
    + SAY
    + 'wait("response.output_audio.delta")\ntime.sleep(0.2)\nreach()',
    "without having read": SESSION + SAY + "time.sleep(0.5)\nreach()",
    "half a request": REQUEST + 'ask(b"{", 5000)\nreach()',
    "waiting for speech": REQUEST + "client = ask(long)\nreach()",
    "hearing speech": REQUEST + "client = ask(long)\nclient.recv(5000)\nreach()",
    "a stream of texts": TEXTS.replace('wait("session.created")', "")
    + 'send("input.text", text="one two three four. five six")\nclient.recv()\nreach()',
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_everything_is_free_again(serve, kit, moment):
    server = serve()
    state, worker = server.app.state, server.app.state.service.worker
    script = textwrap.dedent(MOMENTS[moment]) + "\ntime.sleep(60)"
    recording = kit / "audio" / "en_m_24k.wav"
    client = subprocess.Popen(
        [sys.executable, "-c", script, str(server.port), str(recording)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert client.stdout.readline() == b"here\n", client.stderr.read().decode()
        if moment != "half a request":
            until(lambda: state.sessions.taken + state.requests.taken == 1)
        os.kill(client.pid, signal.SIGKILL)
        until(lambda: not (state.sessions.taken or state.requests.taken or worker.streams))
    finally:
        client.kill()
        client.communicate()
    until(lambda: not state.live and not server.server.server_state.connections)
