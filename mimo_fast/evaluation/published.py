"""Published scores of MiMo-Audio-7B-Instruct in sets of words, by set; figures are `rates.py`'s.

Source: MiMo-Audio Technical Report (MiMo-Audio-Technical-Report.pdf of XiaomiMiMo/MiMo-Audio), its
table 9 in section 4.3. It calls all of them WER. By MiMo-Audio-Eval's code they are means of
utterances; of AISHELL-1 and Chinese texts, of characters; of spoken texts, as Whisper large-v3 and
Paraformer hear them. README.md of the repository has no figures. Not published: LibriSpeech
test-other, words of InstructTTSEval, likeness of voices in Seed-TTS-Eval. Scores of the other sets
are in their modules, made by `accuracy`.
"""

from __future__ import annotations

from mimo_fast.evaluation.items import Options, Published
from mimo_fast.evaluation.rates import mean_rate

MODEL, BASE = "MiMo-Audio-7B-Instruct", "MiMo-Audio-7B-Base"
TABLE = "technical report, table 9"


def accuracy(model: str, value: float, table: int, options: Options) -> Published:
    """An accuracy in percent of a table of the technical report."""
    return Published(model, "accuracy", value, f"technical report, table {table}", options=options)


PLAIN = Options(mode="plain")
"""Texts without a voice, as MiMo-Audio-Eval asks Seed-TTS-Eval."""

LIBRISPEECH = (Published(MODEL, mean_rate("en"), 3.76, TABLE, "test_clean"),)

AISHELL1 = (Published(MODEL, mean_rate("zh"), 1.78, TABLE, "test"),)

SEED_TTS = (
    Published(MODEL, mean_rate("en"), 5.37, TABLE, "en", PLAIN),
    Published(MODEL, mean_rate("zh"), 1.96, TABLE, "zh", PLAIN),
    Published(MODEL, mean_rate("zh"), 14.14, TABLE, "zh_hardcase", PLAIN),
)

INSTRUCT_TTS = tuple(
    Published(MODEL, f"follows the instruction, {kind}", value, f"{TABLE}, by Gemini", split)
    for split, values in {
        "en": {"APS": 80.60, "DSD": 77.63, "RP": 59.54, "overall": 72.59},
        "zh": {"APS": 75.74, "DSD": 74.3, "RP": 61.54, "overall": 70.52},
    }.items()
    for kind, value in values.items()
)
