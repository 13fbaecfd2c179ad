"""What a file tells of having been made by a model: its watermark, its signed provenance."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mimo_fast.audio.files import DecodeLimits, audio_blocks
from mimo_fast.marking.network import RATE
from mimo_fast.marking.provenance import Provenance, read_provenance
from mimo_fast.marking.watermark import Found, find_watermark_in

LONGEST = DecodeLimits(seconds=24 * 3600.0, bytes=2**34)
"""Of a file that is searched."""


@dataclass(frozen=True)
class Evidence:
    """What a file tells.

    Attributes:
        watermark: what its samples tell.
        provenance: what it states, None where it states nothing.
    """

    watermark: Found
    provenance: Provenance | None

    @property
    def marked(self) -> bool:
        """Whether it carries a watermark, or states with a signature that holds that it was made
        by a model."""
        told = self.provenance
        return self.watermark.marked or (told is not None and told.intact and told.generated)


def evidence_of(path: str | os.PathLike[str]) -> Evidence:
    """Searches a recording of any length in blocks, and reads its provenance.

    Raises:
        AudioError: it cannot be read or decoded.
        MarkingError: a package that is needed is absent, or its provenance cannot be read.
    """
    watermark = find_watermark_in(audio_blocks(path, RATE, limits=LONGEST))
    return Evidence(watermark, read_provenance(path))
