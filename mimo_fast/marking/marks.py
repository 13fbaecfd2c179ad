"""How speech that is written tells that a model spoke it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from torch import Tensor

from mimo_fast.audio.writing import write_sealed
from mimo_fast.marking.provenance import Signer
from mimo_fast.marking.watermark import MarkStream, check_watermark, watermark


@dataclass(frozen=True)
class Marks:
    """Marks of the files that a model writes, see `MimoAudio.marks`.

    Args:
        watermark: whether samples carry one.
        signer: signs each file, None for none.

    Raises:
        MarkingError: the package that marks are made with is absent.
    """

    watermark: bool = True
    signer: Signer | None = None

    def __post_init__(self) -> None:
        if self.watermark:
            check_watermark()

    def stream(self, rate: int) -> MarkStream:
        """Marks speech of a reply that comes in parts."""
        return MarkStream(rate)

    def seal(self, target: str | os.PathLike[str] | BinaryIO, wav: Tensor, rate: int) -> None:
        """`save_wav` of samples [n] that carry their watermark already.

        Raises:
            AudioError, MarkingError: as `write`.
        """
        write_sealed(target, wav, rate, self.signer.sign if self.signer else None)

    def write(self, target: str | os.PathLike[str] | BinaryIO, wav: Tensor, rate: int) -> None:
        """`save_wav` of samples [n] with these marks.

        Raises:
            AudioError: as `save_wav`.
            MarkingError: the format holds no provenance, or the file cannot be signed.
        """
        # What it cannot take is refused in the words of `save_wav`.
        if self.watermark and wav.ndim == 1 and wav.is_floating_point() and wav.isfinite().all():
            wav = watermark(wav, rate)
        self.seal(target, wav, rate)
