"""The small pair in the package, and which pair is used where names are missing."""

from pathlib import Path

from mimo_fast.config import PathLike
from mimo_fast.errors import CheckpointError

ASSETS = Path(__file__).parents[1] / "assets"
NAME = "nano"
NANO = ASSETS / NAME
"""Folder of `lm` and `codec`."""

CARD = NANO / "README.md"
"""What the embedded model was trained for."""

QUESTION = ASSETS / "question.wav"
"""A question that the embedded model can answer, in a voice that it was not trained on."""

SENTENCE = "tomorrow is tuesday december twenty five"
"""A sentence that it can say: trained on its words, not on the sentence."""

PUBLISHED_MODEL = "XiaomiMiMo/MiMo-Audio-7B-Instruct"
PUBLISHED_BASE = "XiaomiMiMo/MiMo-Audio-7B-Base"
PUBLISHED_CODEC = "XiaomiMiMo/MiMo-Audio-Tokenizer"


def resolve_pair(
    lm: PathLike | None, codec: PathLike | None, published: str = PUBLISHED_MODEL
) -> tuple[PathLike, PathLike]:
    """The language model and codec to use, either of which may be None.

    With neither given it is the embedded pair. One alone is combined with the published other,
    which is `published` for a codec. "nano" names the embedded one, and given alone means both,
    unless a folder of that name exists here.

    Raises:
        CheckpointError: the embedded pair is meant and this installation lacks it.
    """
    if all(map(_is_name, (source for source in (lm, codec) if source is not None))):
        return _part("lm"), _part("codec")
    lm = published if lm is None else lm
    codec = PUBLISHED_CODEC if codec is None else codec
    return _part("lm") if _is_name(lm) else lm, _part("codec") if _is_name(codec) else codec


def _is_name(source: PathLike) -> bool:
    return source == NAME and not Path(NAME).is_dir()


def _part(name: str) -> Path:
    if not (NANO / name).is_dir():
        raise CheckpointError(
            f"this installation lacks {NANO / name}: install mimo-fast again, or name another pair"
        )
    return NANO / name
