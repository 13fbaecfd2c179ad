"""Voices by name: nothing that a client says becomes a path."""

import io
import uuid

import numpy as np
import pytest
import soundfile

from mimo_fast.errors import ConfigError
from mimo_fast.server.errors import ApiError
from mimo_fast.server.voices import ALIASES, Voices

PATH = "/v1/audio/voices"


def recording(seconds=2.0, rate=16000):
    tone = 0.3 * np.sin(np.arange(int(seconds * rate)) / 20)
    out = io.BytesIO()
    soundfile.write(out, tone, rate, format="WAV")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name in ("anna.wav", "Bob_2.flac", "marin.wav"):
        soundfile.write(tmp_path / name, np.zeros(16000), 16000)
    (tmp_path / "anna.txt").write_text("Anna consented on 2026-11-01.")
    (tmp_path / "notes.md").write_text("no voice")
    (tmp_path / "folder.wav").mkdir()
    return tmp_path


def form(**fields):
    """A multipart form and its content type."""
    boundary = uuid.uuid4().hex
    body = b""
    for name, value in fields.items():
        file = '; filename="../../x.wav"' if isinstance(value, bytes) else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        data = value if isinstance(value, bytes) else value.encode()
        body += head.encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def test_recordings_are_found_by_their_names(folder):
    voices = Voices(folder)
    assert voices.find("anna").path == folder / "anna.wav"
    assert voices.find("anna").consent
    assert not voices.find("Bob_2").consent
    assert voices.find("folder") is None
    assert voices.find("notes") is None


@pytest.mark.parametrize(
    "name",
    [
        "../anna",
        "/etc/passwd",
        "anna.wav",
        "ANNA",
        "anna\0",
        "anna\r\nX: 1",
        "",
        None,
        5,
        {},
        "a" * 10**6,
    ],
)
def test_no_other_name_is_found(folder, name):
    assert Voices(folder).find(name) is None


def test_names_of_stock_clients_are_the_default_voice(folder):
    assert all(Voices().find(name).path is None for name in ALIASES)
    assert len(ALIASES) == 13
    voices = Voices(folder)
    # One that has a recording is that.
    assert voices.find("marin").path == folder / "marin.wav"
    assert voices.find("alloy").path is None
    soundfile.write(folder / "default.wav", np.zeros(16000), 16000)
    voices = Voices(folder)
    assert voices.find("alloy").path == voices.find("default").path == folder / "default.wav"


def test_files_that_cannot_be_asked_for_are_named(folder):
    soundfile.write(folder / "anna.flac", np.zeros(16000), 16000)
    with pytest.raises(ConfigError, match=r"anna\.flac.*one name"):
        Voices(folder)
    (folder / "anna.flac").rename(folder / "an na.flac")
    with pytest.raises(ConfigError, match=r"an na\.flac cannot be asked for"):
        Voices(folder)


def test_the_list(serve, folder):
    found = serve(voices=folder).get(PATH).json
    names = [voice["id"] for voice in found["data"]]
    assert names[:4] == ["default", "Bob_2", "anna", "marin"]
    assert set(ALIASES) < set(names)
    assert len(names) == len(set(names))
    assert str(folder) not in str(found)
    # The key under which Open WebUI looks.
    assert found["voices"] == found["data"]


def test_uploads_are_off_unless_allowed(serve, folder):
    server = serve(voices=folder)
    body, kind = form(name="eve", consent="Eve says so.", audio_sample=recording())
    answer = server.ask("POST", PATH, body, {"Content-Type": kind})
    assert answer.status == 403
    assert "--allow-voice-upload" in answer.error["message"]
    assert not (folder / "eve.wav").exists()


def test_an_uploaded_voice_is_kept(serve, folder):
    server = serve(voices=folder, allow_voice_upload=True)
    body, kind = form(name="eve", consent="Eve says so.", audio_sample=recording())
    answer = server.ask("POST", PATH, body, {"Content-Type": kind})
    assert answer.status == 201
    assert answer.json["id"] == "eve"
    assert answer.json["consent"]
    assert soundfile.info(folder / "eve.wav").samplerate == 24000
    assert (folder / "eve.txt").read_text() == "Eve says so.\n"
    assert Voices(folder).find("eve").consent
    assert not (folder.parent / "x.wav").exists()
    again = server.ask("POST", PATH, body, {"Content-Type": kind})
    assert again.status == 409


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"name": "../eve"}, 400, "name"),
        ({"name": "alloy"}, 409, "name"),
        ({"name": "ANNA"}, 409, "name"),
        ({"consent": " "}, 400, "consent"),
        ({"consent": "x" * 5000}, 400, "consent"),
        ({"audio_sample": "not a file"}, 400, "audio_sample"),
        ({"audio_sample": b"not audio"}, 400, None),
        ({"audio_sample": recording(0.5)}, 400, "audio_sample"),
        ({"audio_sample": recording(40)}, 400, None),
        ({"name": None}, 400, "name"),
        ({"consent": None}, 400, "consent"),
    ],
)
def test_what_is_wrong_with_an_upload_is_said(serve, folder, change, status, param):
    before = sorted(folder.iterdir())
    server = serve(voices=folder, allow_voice_upload=True)
    fields = {"name": "eve", "consent": "Eve says so.", "audio_sample": recording()} | change
    body, kind = form(**{name: value for name, value in fields.items() if value is not None})
    answer = server.ask("POST", PATH, body, {"Content-Type": kind})
    assert answer.status == status
    assert answer.error["param"] == param
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"--x\r\n", "multipart/form-data"),
        (
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nabc',
            "multipart/form-data; boundary=b",
        ),
        (b"{}", "application/json"),
        (b"\xff" * 100, "multipart/form-data; boundary=b"),
    ],
)
def test_a_form_that_is_none_is_refused(serve, folder, body, kind):
    server = serve(voices=folder, allow_voice_upload=True)
    answer = server.ask("POST", PATH, body, {"Content-Type": kind})
    assert answer.status == 400
    assert answer.error


def test_a_folder_holds_so_many(folder, monkeypatch):
    monkeypatch.setattr("mimo_fast.server.voices.MOST", 4)
    voices = Voices(folder)
    voices.add("eve", recording(), "Eve says so.")
    with pytest.raises(ApiError, match="4 voices already"):
        voices.add("fay", recording(), "Fay says so.")
    soundfile.write(folder / "gus.wav", np.zeros(16000), 16000)
    with pytest.raises(ConfigError, match="more than 4"):
        Voices(folder)
