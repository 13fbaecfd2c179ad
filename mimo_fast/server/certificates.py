"""A certificate that a server makes for itself: https for phones and other machines of a network.

Browsers give a page the microphone over https and on localhost only.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_fast.errors import ConfigError, MimoFastError
from mimo_fast.server.settings import Settings

if TYPE_CHECKING:
    from cryptography import x509

LOCAL = "localhost", "127.0.0.1", "::1"

VALID = timedelta(days=397)
"""Longer ones are refused by some browsers."""

RENEWED = timedelta(days=30)
"""Time left at which another one is made."""

ELSEWHERE = "192.0.2.1", "2001:db8::1"
"""Addresses of documentation: what this machine would send to them from is its own address. Nothing
is sent."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key.

    Attributes:
        file: Both, in PEM, readable by the user alone.
        public: The certificate alone, for devices that are to trust it.
        fingerprint: SHA-256 of the certificate, as browsers show it.
    """

    file: Path
    public: Path
    fingerprint: str


def own_names(settings: Settings) -> frozenset[str]:
    """Names and addresses by which a server may be reached."""
    host = socket.gethostname()
    found = {*LOCAL, host, *settings.allowed_hosts}
    if "." not in host:
        # By multicast DNS, as phones find it.
        found.add(f"{host}.local")
    listened = settings.host.strip("[]")
    if listened not in ("0.0.0.0", "::"):
        found.add(listened)
    with suppress(OSError):
        found |= {str(each[4][0]).partition("%")[0] for each in socket.getaddrinfo(host, None)}
    for family, address in zip((socket.AF_INET, socket.AF_INET6), ELSEWHERE, strict=True):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            found.add(str(probe.getsockname()[0]).partition("%")[0])
    return frozenset(name.lower() for name in found if _is_named(name))


def default_folder() -> Path:
    """Where it is kept: `~/.config/mimo-fast`, or as XDG_CONFIG_HOME says."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "mimo-fast"


def self_signed(names: Collection[str], folder: Path | None = None) -> Pair:
    """The certificate of these names: the one that is kept, or a new one where that lacks a name,
    ends soon or cannot be read.

    Args:
        folder: None for `default_folder()`.

    Raises:
        MimoFastError: it cannot be kept.
        ConfigError: a package is missing.
    """
    folder = default_folder() if folder is None else folder
    file, public = folder / "self-signed.pem", folder / "self-signed.crt"
    try:
        kept = _kept(file, names)
        if kept is None or file.stat().st_mode & 0o077:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = _made(names)
            kept = made.partition(b"-----BEGIN PRIVATE")[0]
            # Key and certificate in one file, so that two servers never mix theirs.
            _write(file, made, 0o600)
        if not public.is_file() or public.read_bytes() != kept:
            _write(public, kept, 0o644)
    except OSError as error:
        raise MimoFastError(
            f"--self-signed keeps its certificate in {folder}: {error.strerror or error}; make "
            "that possible, or set XDG_CONFIG_HOME to another folder"
        ) from error
    return Pair(file, public, _fingerprint(kept))


def _is_named(name: str) -> bool:
    """Whether a certificate can name it."""
    return bool(name) and name.isascii() and "*" not in name and "/" not in name and " " not in name


def _kept(file: Path, names: Collection[str]) -> bytes | None:
    """The certificate of a file in PEM, if it is still good for these names."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--self-signed needs the package {error.name}: pip install 'mimo-fast[server]', or "
            "give --ssl-certfile and --ssl-keyfile"
        ) from error
    try:
        data = file.read_bytes()
        certificate = x509.load_pem_x509_certificate(data)
        key = serialization.load_pem_private_key(data, None)
        named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (FileNotFoundError, ValueError, TypeError, x509.ExtensionNotFound):
        return None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        return None
    known = {*named.get_values_for_type(x509.DNSName)}
    known |= {str(each) for each in named.get_values_for_type(x509.IPAddress)}
    if not {_plain(name) for name in names} <= known:
        return None
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc - RENEWED:
        return None
    return certificate.public_bytes(serialization.Encoding.PEM)


def _made(names: Collection[str]) -> bytes:
    """A new certificate and its key, in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    title = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mimo-fast, self-signed")])
    # A constraint binds only the kinds of names that it has: these are there in any case.
    named = [_general(name) for name in sorted({*names, *LOCAL})]
    # A phone that is told to trust it takes it as an authority: for these names, and for no other.
    only = [_alone(each) for each in named]
    usage = dict.fromkeys(("content_commitment", "data_encipherment", "key_agreement"), False)
    usage |= dict.fromkeys(("crl_sign", "encipher_only", "decipher_only"), False)
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(title)
        .issuer_name(title)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks differ.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now - timedelta(days=1) + VALID)
        .add_extension(x509.SubjectAlternativeName(named), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.NameConstraints(only, None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True, key_encipherment=True, key_cert_sign=True, **usage
            ),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return certificate.public_bytes(form[0]) + key.private_bytes(*form, plain)


def _general(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _alone(name: x509.GeneralName) -> x509.GeneralName:
    """A name as a constraint: an address is a network of one."""
    from cryptography import x509

    return x509.IPAddress(ip_network(name.value)) if isinstance(name, x509.IPAddress) else name


def _plain(name: str) -> str:
    try:
        return str(ip_address(name))
    except ValueError:
        return name


def _fingerprint(certificate: bytes) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    digest = x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256())
    return digest.hex(":").upper()


def _write(file: Path, data: bytes, mode: int) -> None:
    """Writes a file in one step; nobody reads it before it has its mode."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as made:
            os.fchmod(made.fileno(), mode)
            made.write(data)
            made.flush()
            os.fsync(made.fileno())
        os.replace(name, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
