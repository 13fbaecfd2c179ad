"""Signed provenance: read back as signed, a change noticed, notes kept as hashes alone."""

import hashlib

import pytest
import soundfile
import torch
from chains import credentials, self_signed

from mimo_fast.audio.writing import write_sealed
from mimo_fast.errors import AudioError, MarkingError
from mimo_fast.marking.detection import evidence_of
from mimo_fast.marking.provenance import Credentials, Origin, Signer, read_provenance

RATE = 24000
NOTE = "Anna said yes on the phone, for the announcements"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return credentials(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def signer(pair):
    return Signer(pair, Origin("nano", "1.2.3", (NOTE, f" {NOTE}\n", "another note")))


def tone(seconds=1.0):
    return torch.sin(torch.arange(int(seconds * RATE)) * 0.1) / 2


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac"])
def test_a_signed_file_states_its_origin(tmp_path, signer, suffix):
    file, plain = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_sealed(file, tone(), RATE, signer.sign)
    write_sealed(plain, tone(), RATE)
    assert read_provenance(plain) is None
    told = read_provenance(file)
    assert told.intact
    assert told.generated
    assert not told.problems
    assert (told.program, told.model, told.signer) == ("mimo-fast 1.2.3", "nano", "Signer")
    notes = {hashlib.sha256(note.encode()).hexdigest() for note in (NOTE, "another note")}
    assert set(told.consents) == notes
    assert b"Anna" not in file.read_bytes()
    # What is heard is what is heard without a signature.
    assert (soundfile.read(file)[0] == soundfile.read(plain)[0]).all()


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac"])
def test_a_changed_file_is_told(tmp_path, signer, suffix):
    file = tmp_path / f"a.{suffix}"
    write_sealed(file, tone(), RATE, signer.sign)
    data = bytearray(file.read_bytes())
    where = len(data) // 2 if suffix == "wav" else len(data) - 40
    data[where] ^= 1
    file.write_bytes(data)
    told = read_provenance(file)
    assert not told.intact
    assert "assertion.dataHash.mismatch" in told.problems
    assert told.model == "nano"


def test_a_changed_recording_is_no_evidence(tmp_path, signer):
    file = tmp_path / "a.wav"
    write_sealed(file, tone(), RATE, signer.sign)
    assert evidence_of(file).marked
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert not evidence_of(file).marked


@pytest.mark.parametrize("kind", ["p384", "rsa", "ed25519"])
def test_other_keys_sign(tmp_path, kind):
    signer = Signer(credentials(tmp_path, kind), Origin("m", "1"))
    write_sealed(tmp_path / "a.wav", tone(), RATE, signer.sign)
    assert read_provenance(tmp_path / "a.wav").intact


def test_what_cannot_be_signed_is_said(tmp_path, pair, signer):
    origin = Origin("m", "1")
    with pytest.raises(MarkingError, match=r"OGG files hold no provenance: use \.wav"):
        write_sealed(tmp_path / "a.ogg", tone(), RATE, signer.sign)
    assert not (tmp_path / "a.ogg").exists()
    with pytest.raises(MarkingError, match=r"cannot read .*none\.pem: No such file"):
        Signer(Credentials(tmp_path / "none.pem", pair.key), origin)
    with pytest.raises(MarkingError, match="no private key in PEM"):
        Signer(Credentials(pair.certificate, pair.certificate), origin)
    # Before there is speech: the key of another certificate, or a key as one.
    (tmp_path / "other").mkdir()
    other = credentials(tmp_path / "other")
    for wrong in (Credentials(pair.certificate, other.key), Credentials(pair.key, pair.key)):
        with pytest.raises(MarkingError, match="cannot sign with"):
            Signer(wrong, origin)
    with pytest.raises(AudioError, match="cannot read"):
        read_provenance(tmp_path / "none.wav")


@pytest.mark.parametrize("authority", [True, False])
def test_a_certificate_that_signs_itself_is_refused(tmp_path, authority):
    with pytest.raises(MarkingError) as refused:
        Signer(self_signed(tmp_path, authority=authority), Origin("m", "1"))
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / 'chain.pem'} signs itself, and C2PA asks for a chain: ")
    assert "issued" in said
    assert "\n" not in said


def test_the_package_that_is_missing_is_named(monkeypatch, pair):
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(MarkingError, match=r"c2pa-python: pip install 'mimo-fast\[mark\]'"):
        Signer(pair, Origin("m", "1"))
