"""Writing audio: exact samples, every format, and nothing half done."""

import errno
import io
import os
import re
import stat

import numpy as np
import pytest
import soundfile
import torch
from helpers import refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import noise

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.paths import check_target
from mimo_fast.audio.writing import pcm16, save_wav, wav_header
from mimo_fast.errors import AudioError


def test_written_bytes_equal_soundfile(tmp_path):
    edges = torch.tensor([1.0, -1.0, 1.5, -7.0, 1e30, -1e-12, 2.0**-17])
    wav = torch.cat([torch.from_numpy(noise(70_000)), edges])
    save_wav(tmp_path / "ours.wav", wav, 24000)
    soundfile.write(tmp_path / "theirs.wav", wav.numpy(), 24000)
    assert (tmp_path / "ours.wav").read_bytes() == (tmp_path / "theirs.wav").read_bytes()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50))
def test_written_samples_are_clipped_and_nearest(values):
    file = io.BytesIO()
    save_wav(file, torch.tensor(values, dtype=torch.float32), 24000)
    samples, rate = soundfile.read(io.BytesIO(file.getvalue()), dtype="float64")
    assert rate == 24000
    expected = np.clip(np.array(values), -1, 32767 / 32768)
    assert np.all(np.abs(samples - expected) <= 1 / 32768)


def test_round_trip(tmp_path):
    half = torch.from_numpy(noise(5000)).to(torch.bfloat16).requires_grad_()
    save_wav(str(tmp_path / "a.wav"), half, 16000)
    wav = load_audio(tmp_path / "a.wav", 16000)
    save_wav(tmp_path / "b.wav", wav, 16000)
    assert torch.equal(load_audio(tmp_path / "b.wav", 16000), wav)


def test_writing_to_an_object_that_cannot_seek():
    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    pipe = Pipe()
    save_wav(pipe, torch.zeros(100), 24000)  # type: ignore[arg-type]
    assert len(load_audio(pipe.data, 24000)) == 100


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(error, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "out.wav"
    path.write_text("old")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises((AudioError, KeyboardInterrupt)) as caught:
        save_wav(path, torch.zeros(10), 24000)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert [file.name for file in tmp_path.iterdir()] == ["out.wav"]
    assert path.read_text() == "old"


def test_targets_that_cannot_be_written(tmp_path):
    missing = tmp_path / "no" / "a.wav"
    message = re.escape(f"cannot write {missing}: there is no folder {missing.parent}")
    refuses(message, save_wav, missing, torch.zeros(10), 24000, kind=AudioError)
    refuses("not a regular file", save_wav, tmp_path, torch.zeros(10), 24000, kind=AudioError)
    refuses("not a regular file", save_wav, "/dev/null", torch.zeros(10), 24000, kind=AudioError)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(AudioError, match="cannot write"):
        save_wav(io.BufferedReader(io.BytesIO()), torch.zeros(10), 24000)  # type: ignore[arg-type]


def test_a_link_is_written_through_and_permissions_are_the_usual(tmp_path):
    target, link, plain = tmp_path / "real" / "a.wav", tmp_path / "link.wav", tmp_path / "plain"
    target.parent.mkdir()
    link.symlink_to(target)
    save_wav(link, torch.zeros(10), 24000)
    assert link.is_symlink()
    assert len(load_audio(target, 24000)) == 10
    plain.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("wav", [torch.zeros(1, 10), torch.zeros(10).short(), torch.tensor(0.0)])
def test_waveforms_of_another_layout_are_refused(wav):
    refuses(r"float samples \[n\]", save_wav, io.BytesIO(), wav, 24000, kind=AudioError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_waveforms_with_nan_are_refused(bad, tmp_path):
    with pytest.raises(AudioError, match="NaN or infinite"):
        save_wav(tmp_path / "a.wav", torch.tensor([0.0, bad]), 24000)
    assert list(tmp_path.iterdir()) == []


def test_writing_at_an_impossible_rate_is_refused():
    refuses("sample rate", save_wav, io.BytesIO(), torch.zeros(10), 0, kind=AudioError)


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        ("wav", ("WAV", "PCM_16")),
        ("flac", ("FLAC", "PCM_16")),
        ("ogg", ("OGG", "VORBIS")),
        ("opus", ("OGG", "OPUS")),
        ("mp3", ("MP3", "MPEG_LAYER_III")),
        ("FLAC", ("FLAC", "PCM_16")),
    ],
)
def test_the_suffix_chooses_the_format(tmp_path, suffix, form):
    path = tmp_path / f"a.{suffix}"
    save_wav(path, torch.from_numpy(noise(200_000)), 24000)
    info = soundfile.info(path)
    assert ((info.format, info.subtype), info.samplerate) == (form, 24000)
    assert len(load_audio(path, 24000)) == pytest.approx(200_000, abs=4000)


@pytest.mark.parametrize("name", ["a.m4a", "a.txt", "a", "a.", ".wav", "a.wav.bak"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    with pytest.raises(AudioError, match=r"use one of the suffixes \.wav, \.flac"):
        save_wav(tmp_path / name, torch.zeros(10), 24000)
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_a_format_cannot_hold(tmp_path):
    with pytest.raises(AudioError, match=r"a\.opus at 22050 Hz: .*; use \.wav or \.flac"):
        save_wav(tmp_path / "a.opus", torch.zeros(10), 22050)
    assert list(tmp_path.iterdir()) == []


# Files that are there


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("old")
    path.chmod(0o640)
    save_wav(path, torch.zeros(10), 24000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(load_audio(path, 24000)) == 10
    assert list(tmp_path.iterdir()) == [path]


def test_other_names_of_a_file_stay_its_names(tmp_path):
    path, other = tmp_path / "a.wav", tmp_path / "b.wav"
    path.write_bytes(b"old" * 1000)
    other.hardlink_to(path)
    save_wav(path, torch.zeros(10), 24000)
    assert path.samefile(other)
    assert len(load_audio(other, 24000)) == 10
    assert other.stat().st_size == 44 + 20, "nothing of the longer file is left"
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_full_disk_leaves_a_file_with_other_names_as_it_was(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.wav"
    path.write_text("old")
    (tmp_path / "b.wav").hardlink_to(path)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(AudioError, match="No space left"):
        save_wav(path, torch.zeros(10), 24000)
    assert path.read_text() == "old"


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM])
def test_a_name_that_cannot_change_hands_is_written_in_place(tmp_path, monkeypatch, code):
    def busy(*_: object) -> None:
        raise OSError(code, "a mount point, or a sticky folder")

    path = tmp_path / "a.wav"
    path.write_bytes(b"old" * 1000)
    inode = path.stat().st_ino
    monkeypatch.setattr("os.replace", busy)
    save_wav(path, torch.zeros(10), 24000)
    assert path.stat().st_ino == inode
    assert len(load_audio(path, 24000)) == 10
    assert list(tmp_path.iterdir()) == [path]


def test_attributes_are_kept(tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("old")
    try:
        os.setxattr(path, "user.origin", b"microphone")
    except OSError:
        pytest.skip("this file system has no attributes")
    save_wav(path, torch.zeros(10), 24000)
    assert os.getxattr(path, "user.origin") == b"microphone"
    assert len(load_audio(path, 24000)) == 10


def test_targets_are_checked_without_a_change(tmp_path):
    path, link, loop, fifo = (tmp_path / f"{name}.wav" for name in ("old", "link", "loop", "fifo"))
    path.write_text("old")
    before = path.stat()
    check_target(path)
    check_target(tmp_path / "new.wav")
    link.symlink_to(tmp_path / "new.wav")
    check_target(link)
    link.unlink()
    link.symlink_to(tmp_path / "none" / "new.wav")
    loop.symlink_to(loop)
    os.mkfifo(fifo)
    for bad, reason in (
        (link, f"there is no folder {tmp_path / 'none'}"),
        (loop, "Too many levels of symbolic links"),
        (fifo, "not a regular file"),
        (path / "a.wav", "Not a directory"),
        (tmp_path / ("x" * 260 + ".wav"), "File name too long"),
        ("/proc/a.wav", "."),
        ("a\0b.wav", "null"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(AudioError, match=reason):
            check_target(bad)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "fifo.wav",
        "link.wav",
        "loop.wav",
        "old.wav",
    ]


def test_names_of_any_bytes(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.wav")
    try:
        open(path, "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    name = os.fsdecode(path)
    save_wav(name, torch.full((100,), 0.5), 24000)
    assert load_audio(name, 24000).tolist() == [0.5] * 100


def test_a_stream_of_unknown_length(tmp_path):
    wav = torch.from_numpy(noise(70_000))
    save_wav(whole := io.BytesIO(), wav, 24000)
    data = wav_header(24000) + b"".join(pcm16(part) for part in wav.split(999))
    assert torch.equal(load_audio(data, 24000), load_audio(whole.getvalue(), 24000))


def test_more_than_a_wav_can_count_is_refused_before_anything_is_allocated(tmp_path):
    endless = torch.zeros(1).expand(2**40)
    with pytest.raises(AudioError, match="12726 hours are more than a WAV file holds"):
        save_wav(tmp_path / "a.wav", endless, 24000)
    assert not any(tmp_path.iterdir())
