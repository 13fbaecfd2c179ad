"""Signed provenance in audio files (C2PA 2), by c2pa-python with the user's own certificate.

What is stated: that the file was made by a trained algorithm, by which program and model, and the
SHA-256 of the consent notes of the recordings that it was made from, never the notes. Nothing goes
over the network unless a timestamp authority is named.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mimo_fast.audio.paths import name_of, reason_of, soundfile_library
from mimo_fast.audio.writing import wav_file
from mimo_fast.errors import AudioError, MarkingError

INSTALL = "pip install 'mimo-fast[mark]'"

MIME = {"WAV": "audio/wav", "WAVEX": "audio/wav", "FLAC": "audio/flac", "MP3": "audio/mpeg"}
"""libsndfile's formats that C2PA has a place in, not Ogg."""

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media made by a model."""

ACTIONS = "c2pa.actions"

CONSENT = "com.mimo-fast.consent"
"""Label of the assertion that holds hashes of consent notes."""

CREDENTIAL = "signingCredential."
"""Findings on who has signed begin so: they depend on whom the reader trusts."""

INVALID = "Invalid"

RATE_TRIED = 24_000
"""Sample rate of the silence that a certificate is tried on."""


@dataclass(frozen=True)
class Credentials:
    """What files are signed with.

    Args:
        certificate: PEM file: the signer's certificate, then those that issued it. C2PA asks for
            one with the key usages of a signature, from an authority that is not itself.
        key: PEM file of its private key, without a passphrase: EC, Ed25519 or RSA.
        timestamps: address of a timestamp authority (RFC 3161), which is asked for every file.
    """

    certificate: Path
    key: Path
    timestamps: str | None = None


@dataclass(frozen=True)
class Origin:
    """What a file states of where it comes from.

    Args:
        model: name of the model that spoke.
        version: of mimo-fast.
        consents: notes on the recordings that it was made from, of which the hashes are stated.
    """

    model: str
    version: str
    consents: tuple[str, ...] = ()


class Signer:
    """Signs encoded audio.

    Args:
        credentials: files of certificate and key, read and tried once.
        origin: what is signed of every file.

    Raises:
        MarkingError: the package c2pa is absent, a file cannot be read, the certificate signs
            itself, or C2PA does not take it.
    """

    def __init__(self, credentials: Credentials, origin: Origin) -> None:
        self._library = _library()
        certificate, key = (_pem(path) for path in (credentials.certificate, credentials.key))
        _check_issued(certificate, credentials.certificate)
        parts = _algorithm(key, credentials.key), certificate, key
        self._manifest = json.dumps(_manifest(origin))
        self._names = f"{credentials.certificate} and {credentials.key}"
        self._parts: tuple[Any, ...] = (*parts, None)
        silence = torch.zeros(1, dtype=torch.float32, device="cpu")
        # Before there is speech that could not be signed; for that no authority is asked.
        self.sign(wav_file(silence, RATE_TRIED), "WAV")
        self._parts = (*parts, credentials.timestamps)

    def sign(self, data: bytes, form: str) -> bytes:
        """An encoded file with its provenance.

        Args:
            form: libsndfile's name of its format.

        Raises:
            MarkingError: the format has no place for it, or it cannot be signed.
        """
        check_signable(form)
        library, signed = self._library, io.BytesIO()
        try:
            with (
                library.Signer.from_info(library.C2paSignerInfo(*self._parts)) as signer,
                library.Builder(self._manifest) as builder,
            ):
                builder.sign(signer, MIME[form], io.BytesIO(data), signed)
        except library.C2paError as error:
            raise MarkingError(f"cannot sign with {self._names}: {_line(error)}") from error
        return signed.getvalue()


def check_signable(form: str) -> None:
    """Raises MarkingError for a format, by libsndfile's name, that holds no provenance."""
    if form not in MIME:
        fix = "use .wav, .flac or .mp3, or sign nothing"
        raise MarkingError(f"{form} files hold no provenance: {fix}")


@dataclass(frozen=True)
class Provenance:
    """What a file states of its origin.

    Attributes:
        intact: whether file and statement are as they were signed.
        signer: name in the certificate; anybody can make one, so `trusted` is another question
            that only a list of authorities answers.
        program: what made the file, with its version.
        generated: whether it states that a model made it.
        model: its name.
        consents: SHA-256 of consent notes.
        problems: codes of C2PA for what is not as it was signed.
    """

    intact: bool
    signer: str | None
    program: str | None
    generated: bool
    model: str | None
    consents: tuple[str, ...]
    problems: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        return asdict(self)


def read_provenance(path: str | os.PathLike[str]) -> Provenance | None:
    """What an audio file states, or None where it states nothing.

    Raises:
        AudioError: it is no audio file.
        MarkingError: the package c2pa is absent, or what is there cannot be read.
    """
    library, form = _library(), _format(path)
    if form not in MIME:
        return None
    try:
        with open(path, "rb") as file, library.Reader(MIME[form], file) as reader:
            active = reader.get_active_manifest() or {}
            results = reader.get_validation_results() or {}
            state = reader.get_validation_state()
    except library.C2paError as error:
        if type(error).__name__.endswith("ManifestNotFound"):
            return None
        raise MarkingError(f"the provenance cannot be read: {_line(error)}") from error
    failures = (results.get("activeManifest") or {}).get("failure", ())
    codes = [str(each.get("code")) for each in failures]
    problems = tuple(code for code in codes if not code.startswith(CREDENTIAL))
    created, notes = _created(active), dict(_assertion(active, CONSENT))
    programs = active.get("claim_generator_info") or [{}]
    named = [str(programs[0][key]) for key in ("name", "version") if programs[0].get(key)]
    return Provenance(
        intact=state != INVALID and not problems,
        signer=(active.get("signature_info") or {}).get("common_name"),
        program=" ".join(named) or None,
        generated=created.get("digitalSourceType") == GENERATED,
        model=(created.get("parameters") or {}).get("model"),
        consents=tuple(map(str, notes.get("sha256", ()))),
        problems=problems,
    )


def _assertion(manifest: Mapping[str, Any], label: str) -> Mapping[str, Any]:
    """The content of a manifest's first assertion whose label begins so; empty without one."""
    for each in manifest.get("assertions", ()):
        if str(each.get("label")).startswith(label):
            return each.get("data") or {}
    return {}


def _created(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The action by which the file came to be; empty where none is stated."""
    for action in _assertion(manifest, ACTIONS).get("actions", ()):
        if action.get("action") == "c2pa.created":
            return action
    return {}


def digest(note: str) -> str:
    """SHA-256 of a consent note, without the spaces around it, in hexadecimal."""
    return hashlib.sha256(note.strip().encode()).hexdigest()


def _manifest(origin: Origin) -> dict[str, Any]:
    program = {"name": "mimo-fast", "version": origin.version}
    created = {
        "action": "c2pa.created",
        "digitalSourceType": GENERATED,
        "softwareAgent": program,
        "parameters": {"model": origin.model},
    }
    assertions: list[dict[str, Any]] = [{"label": ACTIONS, "data": {"actions": [created]}}]
    if origin.consents:
        hashes = {"sha256": sorted({digest(note) for note in origin.consents})}
        assertions.append({"label": CONSENT, "data": hashes})
    return {"claim_generator_info": [program], "assertions": assertions}


def _library() -> Any:
    try:
        return import_module("c2pa")
    except (ImportError, OSError) as error:  # OSError: its library does not fit this machine
        raise MarkingError(f"provenance needs the package c2pa-python: {INSTALL}") from error


def _format(path: str | os.PathLike[str]) -> str:
    library = soundfile_library()
    try:
        return str(library.info(os.fsencode(path)).format)
    except (library.LibsndfileError, TypeError, OSError) as error:
        raise AudioError(f"cannot read {name_of(path)}: {reason_of(error)}") from error


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MarkingError(f"cannot read {path}: {error.strerror}") from error


def _check_issued(certificate: bytes, path: Path) -> None:
    """Raises MarkingError for a certificate that signs itself, which C2PA's library takes or not,
    in its own words, depending on what else it says. What is no certificate is left to it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.x509 import load_pem_x509_certificates

    try:
        own = load_pem_x509_certificates(certificate)[0]
        own.verify_directly_issued_by(own)
    except (ValueError, TypeError, InvalidSignature):
        return
    fix = "name one that an authority issued, bought or your own, then the authority's, in one file"
    raise MarkingError(
        f"{path} signs itself, and C2PA asks for a chain: {fix} "
        "(docs/responsible-use.md has the commands)"
    )


def _algorithm(key: bytes, path: Path) -> bytes:
    """C2PA's name of the signature that a private key makes.

    Raises:
        MarkingError: it is no private key in PEM, has a passphrase, or is of another kind.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        problem = "is no private key in PEM without a passphrase"
        raise MarkingError(f"{path} {problem}: name the key of the certificate") from error
    if isinstance(found, ec.EllipticCurvePrivateKey):
        sizes = {256: b"es256", 384: b"es384", 521: b"es512"}
        if found.curve.key_size in sizes:
            return sizes[found.curve.key_size]
    if isinstance(found, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    if isinstance(found, rsa.RSAPrivateKey):
        return b"ps256"
    raise MarkingError(f"{path} is a kind of key that C2PA does not take: use EC P-256")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
