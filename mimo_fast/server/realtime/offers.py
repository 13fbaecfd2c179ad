"""What a caller offers, in SDP: one track of audio in Opus and one data channel."""

from __future__ import annotations

import re

from aiortc import RTCRtpSender
from aiortc.sdp import SessionDescription

from mimo_fast.server.checks import refusal
from mimo_fast.server.errors import ApiError

CHANNEL = "oai-events"
"""Label of the data channel whose messages are the dialect's events."""

OPUS = [
    codec
    for codec in RTCRtpSender.getCapabilities("audio").codecs
    if codec.mimeType.lower() == "audio/opus"
]

MOST_CANDIDATES = 32

CANDIDATE = re.compile(r"a=candidate:(?:\S+ ){4}(\S+) ")


def check_offer(offer: str) -> None:
    """Raises ApiError where an offer is none, or of something else than a call."""
    try:
        found = SessionDescription.parse(offer)
    except Exception:
        # Its parser states no errors.
        raise _wrong("the offer is no session description (SDP)") from None
    kinds = sorted(media.kind for media in found.media)
    if kinds != ["application", "audio"]:
        offered = ", ".join(kinds)[:80] or "nothing"
        problem = f"offer one track of audio and the data channel '{CHANNEL}', not {offered}"
        raise _wrong(problem)
    for media in found.media:
        named = media.ice is not None and media.ice.usernameFragment
        if media.dtls is None or not media.dtls.fingerprints or not named:
            raise _wrong(f"the offer's section for {media.kind} has no fingerprint or no ice-ufrag")
        codecs = [codec.mimeType.lower() for codec in media.rtp.codecs]
        if media.kind == "audio" and "audio/opus" not in codecs:
            raise _wrong("the offer's audio has no Opus")


def without_local_names(offer: str) -> str:
    """An offer without names that only multicast DNS resolves, and without too many addresses.

    Browsers hide a page's addresses behind such names. Asking the network for them is not needed:
    the browser knows this machine's addresses from the answer, and is known by its first packet.
    For the same reason the end of its addresses is not the end of waiting.
    """
    kept, candidates = list[str](), 0
    for line in offer.splitlines():
        if line.startswith("a=end-of-candidates"):
            continue
        if line.startswith("a=candidate:"):
            candidates += 1
            found = CANDIDATE.match(line)
            local = found is None or found[1].lower().endswith(".local")
            if local or candidates > MOST_CANDIDATES:
                continue
        kept.append(line)
    return "\r\n".join(kept) + "\r\n"


def _wrong(problem: str) -> ApiError:
    return refusal(problem, "sdp", "invalid_sdp")
