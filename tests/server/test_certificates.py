"""`--self-signed`: what is made, how long it is kept, and that nobody else reads its key."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mimo_fast.cli import serve as command
from mimo_fast.errors import MimoFastError
from mimo_fast.server import certificates
from mimo_fast.server.certificates import default_folder, own_names, self_signed
from mimo_fast.server.settings import Settings

NAMES = frozenset({"localhost", "127.0.0.1", "::1", "voice.local", "fd00::17"})


def mode(file: Path) -> int:
    return file.stat().st_mode & 0o777


def test_the_key_is_the_users_alone(tmp_path):
    folder = tmp_path / "new" / "mimo-fast"
    os.umask(before := os.umask(0))
    pair = self_signed(NAMES, folder)
    assert os.umask(before) == before
    assert (mode(folder), mode(pair.file), mode(pair.public)) == (0o700, 0o600, 0o644)
    assert b"PRIVATE KEY" in pair.file.read_bytes()
    assert b"PRIVATE KEY" not in pair.public.read_bytes()
    assert sorted(each.name for each in folder.iterdir()) == ["self-signed.crt", "self-signed.pem"]
    assert re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", pair.fingerprint)


def test_it_is_kept_while_it_is_good(tmp_path, monkeypatch):
    first = self_signed(NAMES, tmp_path)
    assert self_signed(NAMES - {"voice.local"}, tmp_path) == first
    # An address has more than one spelling.
    assert self_signed({"FD00:0:0::17".lower()}, tmp_path) == first
    named = self_signed(NAMES | {"192.0.2.9"}, tmp_path)
    assert named.fingerprint != first.fingerprint
    for damage in (b"", named.public.read_bytes(), b"\xff nonsense"):
        named.file.write_bytes(damage)
        again = self_signed(NAMES, tmp_path)
        assert again.fingerprint != named.fingerprint
        named = again
    # The key of another certificate.
    other = self_signed(NAMES, tmp_path / "other").file.read_bytes()
    key = b"-----BEGIN PRIVATE" + other.partition(b"-----BEGIN PRIVATE")[2]
    named.file.write_bytes(named.public.read_bytes() + key)
    assert self_signed(NAMES, tmp_path).fingerprint != named.fingerprint
    # A key that others could read.
    named = self_signed(NAMES, tmp_path)
    named.file.chmod(0o644)
    assert self_signed(NAMES, tmp_path).fingerprint != named.fingerprint
    assert mode(named.file) == 0o600
    # The public one is put back.
    named.public.unlink()
    assert self_signed(NAMES, tmp_path).public.is_file()


def test_it_is_renewed_a_month_before_it_ends(tmp_path, monkeypatch):
    first = self_signed(NAMES, tmp_path)
    ends = x509.load_pem_x509_certificate(first.public.read_bytes()).not_valid_after_utc
    assert timedelta(days=390) < ends - datetime.now(UTC) < timedelta(days=398)
    passed = timedelta()

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + passed

    monkeypatch.setattr(certificates, "datetime", Later)
    passed = ends - timedelta(days=31) - datetime.now(UTC)
    assert self_signed(NAMES, tmp_path) == first
    passed += timedelta(days=2)
    assert self_signed(NAMES, tmp_path).fingerprint != first.fingerprint


def test_a_browser_that_trusts_it_takes_it_for_its_names(serve, tmp_path):
    pair = self_signed(NAMES, tmp_path)
    server = serve(ssl_certfile=pair.file, ssl_keyfile=pair.file)
    trusting = ssl.create_default_context(cafile=pair.public)
    for name in ("127.0.0.1", "localhost"):
        url = f"https://{name}:{server.port}/health"
        with urllib.request.urlopen(url, context=trusting) as health:
            assert health.status == 200
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"{server.url}/health")


def test_whoever_trusts_it_trusts_it_for_its_names_alone(serve, tmp_path):
    """A stolen key makes no certificate for other sites."""
    pair = self_signed({"127.0.0.1"}, tmp_path)
    data = pair.file.read_bytes()
    authority = x509.load_pem_x509_certificate(data)
    stolen = serialization.load_pem_private_key(data, None)
    files = list[Path]()
    for name in ("127.0.0.1", "bank.example"):
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        forged = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(
                x509.SubjectAlternativeName([certificates._general(name)]), critical=False
            )
            .sign(stolen, hashes.SHA256())
        )
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        files.append(tmp_path / f"{name}.pem")
        plain = key.private_bytes(*form, serialization.NoEncryption())
        files[-1].write_bytes(forged.public_bytes(form[0]) + plain)
    trusting = ssl.create_default_context(cafile=pair.public)
    trusting.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    own, other = (serve(ssl_certfile=file, ssl_keyfile=file) for file in files)
    with urllib.request.urlopen(f"{own.url}/health", context=trusting) as health:
        assert health.status == 200
    with (
        socket.create_connection(("127.0.0.1", other.port)) as connected,
        pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"),
    ):
        trusting.wrap_socket(connected, server_hostname="bank.example")


def test_names_are_those_of_the_machine_and_of_the_options(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Box")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(0, 0, 0, "", ("fe80::1%eth0", 0))])
    found = own_names(Settings(host="::1", allowed_hosts=("voice.example", "*")))
    assert {"localhost", "127.0.0.1", "::1", "box", "box.local", "voice.example"} <= found
    assert "fe80::1" in found
    assert "*" not in found
    everywhere = own_names(Settings(host="0.0.0.0", api_key="k"))
    assert "0.0.0.0" not in everywhere
    assert "192.0.2.17" in own_names(Settings(host="192.0.2.17", api_key="k"))


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "mimo-fast"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".config" / "mimo-fast"
    (tmp_path / "file").touch()
    with pytest.raises(MimoFastError, match="XDG_CONFIG_HOME to another folder"):
        self_signed(NAMES, tmp_path / "file" / "folder")


def announced(capsys: Any, settings: Settings, url: str) -> str:
    command._announce(url, "nano", settings)
    return capsys.readouterr().err


def test_a_server_on_a_network_without_https_says_what_is_missing(capsys, tmp_path):
    shown = announced(capsys, Settings(host="0.0.0.0", api_key="k"), "http://127.0.0.1:8000")
    assert "no microphone" in shown
    assert "--self-signed" in shown
    assert "ssh -N -L 8000:127.0.0.1:8000 THIS-MACHINE" in shown
    shown = announced(capsys, Settings(host="192.0.2.7", api_key="k"), "http://192.0.2.7:9000")
    assert "ssh -N -L 9000:192.0.2.7:9000 THIS-MACHINE" in shown
    assert "no microphone" not in announced(capsys, Settings(), "http://127.0.0.1:8000")
    pair = self_signed(NAMES, tmp_path)
    files = {"ssl_certfile": pair.file, "ssl_keyfile": pair.file}
    secure = Settings(host="0.0.0.0", api_key="k", **files)
    shown = announced(capsys, secure, "https://127.0.0.1:8000")
    assert "no microphone" not in shown
    assert "curl -k https://" in shown


@pytest.mark.slow
def test_one_option_serves_https(tmp_path):
    options = ["serve", "--port", "0", "--self-signed"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mimo_fast", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    try:
        lines = list[str]()
        for line in process.stderr:
            lines.append(line)
            if line.startswith("hear it:"):
                break
        said = "".join(lines)
        url = re.search(r"listening on (https://127\.0\.0\.1:\d+) ", said)
        assert url is not None, said
        public = tmp_path / "mimo-fast" / "self-signed.crt"
        assert str(public) in said
        assert self_signed({"127.0.0.1"}, public.parent).fingerprint in said
        trusting = ssl.create_default_context(cafile=public)
        with urllib.request.urlopen(f"{url[1]}/health", context=trusting) as health:
            assert health.status == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
