"""The small pair inside the package, and which pair is meant where one or both have no name."""

from pathlib import Path

from mimo_fast.config import PathLike
from mimo_fast.errors import CheckpointError

ASSETS = Path(__file__).parents[1] / "assets"
NAME = "nano"
NANO = ASSETS / NAME
"""Folder of `lm` and `codec`."""

CARD = NANO / "README.md"
"""What the embedded model knows."""

QUESTION = ASSETS / "question.wav"
"""A question that the embedded model can answer, in a voice that it was not trained on."""

SENTENCE = "tomorrow is tuesday december twenty five"
"""What it can say: it was not trained on the sentence, but on its words."""

PUBLISHED_MODEL = "XiaomiMiMo/MiMo-Audio-7B-Instruct"
PUBLISHED_BASE = "XiaomiMiMo/MiMo-Audio-7B-Base"
PUBLISHED_CODEC = "XiaomiMiMo/MiMo-Audio-Tokenizer"


def resolve_pair(
    lm: PathLike | None, codec: PathLike | None, published: str = PUBLISHED_MODEL
) -> tuple[PathLike, PathLike]:
    """The language model and the codec that are meant, either of which may be None.

    Neither given, it is the embedded pair; one alone goes with the published other, for a codec
    `published`. "nano" is the embedded one, and alone means both, unless there is a folder of that
    name here.

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
