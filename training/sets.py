"""The domain's held-out sentences as public evaluation sets, for `mimo-fast eval`.

    LibriSpeech/test-clean/1/1/  the unheard voice, in LibriSpeech's form
    seedtts/en/text.txt          sentences to be said, in MiMo-Audio-Eval's form of Seed-TTS-Eval
    big_bench_audio/             the dialogue's questions in the unheard voice, and their answers

Speech is made as the data of the training is, and nothing is trained. So `mimo-fast eval` gives the
figures of nano's card, see docs/evaluation.md.
"""

import io
from pathlib import Path

from tqdm import tqdm

from mimo_fast.audio.paths import write_whole
from mimo_fast.audio.writing import save_wav
from mimo_fast.errors import MimoFastError

from . import domain
from .data import UNHEARD_VOICE, Sizes, as_samples, item
from .synthesis import INSTALL, RATE, Manner, has_flite, synthesize

READER = "1-1"
"""Speaker and chapter of the unheard voice."""


def write_sets(target: Path, count: int, seed: int = 0) -> None:
    """Writes at most `count` items of each set.

    Args:
        seed: of the run of a training whose held-out sentences they are.

    Raises:
        MimoFastError: flite, whose voices these are, is not installed.
    """
    if not has_flite():
        raise MimoFastError(f"the sets' voices are flite's: {INSTALL['flite']}")
    sizes = Sizes()
    _write_recordings(target / "LibriSpeech" / "test-clean", min(count, sizes.unheard), seed)
    texts = [item("unsaid", i, seed).text for i in range(min(count, sizes.unsaid))]
    _write_lines(target / "seedtts" / "en" / "text.txt", texts)
    _write_questions(target / "big_bench_audio" / "data", count)


def _write_recordings(target: Path, count: int, seed: int) -> None:
    folder, lines = target.joinpath(*READER.split("-")), list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc="speech", unit="utterance"):
        wanted, name = item("unheard", i, seed), f"{READER}-{i:04}"
        wav = as_samples(synthesize(domain.spoken(wanted.text), wanted.manner).wav)
        save_wav(folder / f"{name}.flac", wav / 2**15, RATE)
        lines.append(f"{name} {wanted.text.upper()}")
    _write_lines(folder / f"{READER}.trans.txt", lines)


def _write_questions(target: Path, count: int) -> None:
    """Questions in the columns of Big Bench Audio."""
    import pyarrow
    from pyarrow import parquet

    rows = list[dict[str, object]]()
    for i, (question, answer) in enumerate([*domain.dialogue().items()][:count]):
        spoken = io.BytesIO()
        save_wav(spoken, synthesize(domain.spoken(question), Manner(UNHEARD_VOICE)).wav, RATE)
        audio = {"bytes": spoken.getvalue(), "path": f"question_{i}.wav"}
        rows.append({"category": "dialogue", "official_answer": answer, "id": i, "audio": audio})
    target.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), target / "train-00000-of-00001.parquet")


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
