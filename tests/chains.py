"""Certificates that sign provenance, issued by an authority of their own or by themselves."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mimo_fast.marking.provenance import Credentials

USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
PURPOSE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])


def name(text: str) -> x509.Name:
    parts = ((NameOID.COMMON_NAME, text), (NameOID.ORGANIZATION_NAME, "Tests"))
    return x509.Name([x509.NameAttribute(*part) for part in parts])


def uses(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in allowed for use in USES})


def new_key(kind: str):
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048)
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP384R1() if kind == "p384" else ec.SECP256R1())


def self_signed(folder: Path, *, authority: bool) -> Credentials:
    """Files of a certificate that signs itself, as an authority's or as a signer's, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    allowed = ("digital_signature", "key_cert_sign") if authority else ("digital_signature",)
    certificate = (
        _certificate("Signer", "Signer", key.public_key(), 3)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(uses(*allowed), critical=True)
        .add_extension(PURPOSE, critical=True)
        .add_extension(own, critical=False)
        .sign(key, hashes.SHA256())
    )
    return _written(folder, [certificate], key)


def credentials(folder: Path, kind: str = "p256") -> Credentials:
    """Files of a chain and of the key of its first certificate."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), new_key(kind)
    root = (
        _certificate("Authority", "Authority", authority.public_key(), 1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(uses("key_cert_sign", "crl_sign"), critical=True)
        .sign(authority, hashes.SHA256())
    )
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    leaf = (
        _certificate("Signer", "Authority", key.public_key(), 2)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(uses("digital_signature"), critical=True)
        .add_extension(PURPOSE, critical=True)
        .add_extension(issued_by, critical=False)
        .sign(authority, hashes.SHA256())
    )
    return _written(folder, [leaf, root], key)


def _written(folder: Path, certificates: Sequence[x509.Certificate], key) -> Credentials:
    pem = serialization.Encoding.PEM
    chain, private = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(each.public_bytes(pem) for each in certificates))
    form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, form, secret))
    return Credentials(chain, private)


def _certificate(subject: str, issuer: str, key, number: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key)
        .serial_number(number)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
