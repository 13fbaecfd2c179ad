"""Sets that are measured in words: LibriSpeech, AISHELL-1, Seed-TTS-Eval, InstructTTSEval.

Each is read in MiMo-Audio-Eval's form (`slm_eval/datasets`) and in its own. `data` is
MiMo-Audio-Eval's `data/`, the folder that the set's archive unpacks into, or the set itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.items import (
    Answer,
    EvaluationSet,
    Figure,
    Found,
    Item,
    Measure,
    Options,
    Tools,
)
from mimo_fast.evaluation.published import AISHELL1, INSTRUCT_TTS, LIBRISPEECH, SEED_TTS
from mimo_fast.evaluation.rates import Words, evaluation_package

KINDS = ("APS", "DSD", "RP")
"""InstructTTSEval's instructions: acoustic parameters, descriptive style, role play."""

JUDGE_PROMPT = "eval_prompt.txt"
"""InstructTTSEval's own prompt for its judge, from `eval/` of its repository."""

JUDGE_PLACE, JUDGE_FIELD = "<此处插入待评测的语音风格描述>", "一致性"
"""Where the prompt takes an instruction, and the field of the judge's JSON that says yes or no."""


def _lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Lines of a text and their numbers, without those that are empty.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8"
        raise EvaluationError(f"cannot read {path}: {why} ({source})") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _pairs(path: Path, source: str, blank: str | None) -> Iterator[tuple[str, str]]:
    """Id and text of each line, with `blank` between them, None for any white space."""
    for number, line in _lines(path, source):
        parts = line.strip().split(blank, maxsplit=1)
        if len(parts) != 2:
            raise EvaluationError(f"{path}:{number} is no id and text ({source})")
        yield parts[0], parts[1].strip()


def _first(places: Sequence[Path]) -> Path | None:
    return next((place for place in places if place.exists()), None)


def _manifest(data: Path, name: str, split: str, language: str, source: str) -> list[Item] | None:
    """MiMo-Audio-Eval's form: manifest.txt with id, tab and text, and wav/ID.wav."""
    folder = _first(
        [each for each in (data / name / split, data / split, data) if _has_manifest(each)]
    )
    if folder is None:
        return None
    pairs = _pairs(folder / "manifest.txt", source, "\t")
    return [_heard(key, folder / "wav" / f"{key}.wav", text, language) for key, text in pairs]


def _has_manifest(folder: Path) -> bool:
    return (folder / "manifest.txt").is_file()


def _heard(key: str, audio: Path, text: str, language: str) -> Item:
    return Item(key, {"input": audio}, {"text": text, "language": language})


def _nothing(data: Path, title: str, forms: Sequence[str], source: str) -> EvaluationError:
    return EvaluationError(
        f"{data} holds no {title}: looked for {' and '.join(forms)} (from {source})"
    )


LIBRISPEECH_FORMS = (
    "librispeech/SPLIT/manifest.txt with wav/ID.wav",
    "LibriSpeech/test-clean/SPEAKER/CHAPTER/*.trans.txt with *.flac",
)
LIBRISPEECH_SOURCE = "https://www.openslr.org/12"


def read_librispeech(data: Path, split: str, _options: Options) -> list[Item]:
    """Recordings and what is said in them, in order of their ids in LibriSpeech's own form."""
    if (found := _manifest(data, "librispeech", split, "en", LIBRISPEECH_SOURCE)) is not None:
        return found
    own = split.replace("_", "-")
    places = (data / "LibriSpeech" / own, data / own, data)
    folders = (sorted(each.glob("*/*/*.trans.txt")) for each in places)
    transcripts = next(filter(None, folders), [])
    if not transcripts:
        raise _nothing(data, f"LibriSpeech {split}", LIBRISPEECH_FORMS, LIBRISPEECH_SOURCE)
    return [
        _heard(key, transcript.parent / f"{key}.flac", text, "en")
        for transcript in transcripts
        for key, text in _pairs(transcript, LIBRISPEECH_SOURCE, None)
    ]


AISHELL_FORMS = (
    "aishell1/test/manifest.txt with wav/ID.wav",
    "data_aishell/wav/test/S*/ID.wav with transcript/aishell_transcript_v0.8.txt",
)
AISHELL_SOURCE = "https://www.openslr.org/33"


def read_aishell1(data: Path, split: str, _options: Options) -> list[Item]:
    """Recordings and what is said in them; every recording of the split has a transcript."""
    if (found := _manifest(data, "aishell1", split, "zh", AISHELL_SOURCE)) is not None:
        return found
    name = Path("transcript", "aishell_transcript_v0.8.txt")
    folder = _first([each for each in (data / "data_aishell", data) if (each / name).is_file()])
    waves = [] if folder is None else sorted((folder / "wav" / split).glob("*/*.wav"))
    if folder is None or not waves:
        raise _nothing(data, f"AISHELL-1 {split}", AISHELL_FORMS, AISHELL_SOURCE)
    texts = dict(_pairs(folder / name, AISHELL_SOURCE, None))
    for wav in waves:
        if wav.stem not in texts:
            raise EvaluationError(f"{folder / name} has no line of {wav} ({AISHELL_SOURCE})")
    return [_heard(wav.stem, wav, texts[wav.stem], "zh") for wav in waves]


def _words(language_of: Callable[[str], str], heard: bool) -> Callable[..., Sequence[Measure]]:
    def measures(split: str, options: Options) -> Sequence[Measure]:
        return (Words(language_of(split), heard, options.normaliser),)

    return measures


SEED_TTS_FORMS = (
    "seedtts/SPLIT/text.txt",
    "seedtts_testset/en/meta.lst, zh/meta.lst, zh/hardcase.lst with prompt-wavs/",
)
SEED_TTS_SOURCE = "https://github.com/BytedanceSpeech/seed-tts-eval"
SEED_TTS_LISTS = {"en": "en/meta.lst", "zh": "zh/meta.lst", "zh_hardcase": "zh/hardcase.lst"}


def read_seed_tts(data: Path, split: str, options: Options) -> list[Item]:
    """Texts to be said: as they are or, in the mode "voice", in the voice of their prompts.

    MiMo-Audio-Eval has the texts alone, a line each, whose ids are their places from 0. In the
    set's own form a line is ID|TEXT OF PROMPT|PROMPT|TEXT, and may end in |RECORDING.
    """
    voiced, language = options.mode == "voice", split.partition("_")[0]
    places = [data / "seedtts" / split / "text.txt", data / split / "text.txt", data / "text.txt"]
    path = _first(places)
    if path is not None and not voiced:
        return [
            Item(str(number - 1), {"input": line}, {"text": line, "language": language})
            for number, line in _lines(path, SEED_TTS_SOURCE)
        ]
    name = SEED_TTS_LISTS[split]
    own = _first([data / "seedtts_testset" / name, data / name, data / Path(name).name])
    if own is None:
        needs = "prompts of " if voiced else ""
        raise _nothing(data, f"{needs}Seed-TTS-Eval {split}", SEED_TTS_FORMS, SEED_TTS_SOURCE)
    items = list[Item]()
    for number, line in _lines(own, SEED_TTS_SOURCE):
        fields = line.strip().split("|")
        if len(fields) not in (4, 5):
            raise EvaluationError(
                f"{own}:{number} has {len(fields)} fields instead of 4 or 5 ({SEED_TTS_SOURCE})"
            )
        key, _, prompt, text = fields[:4]
        arguments: dict[str, Any] = {"input": text}
        truth: dict[str, Any] = {"text": text, "language": language}
        if voiced:
            voice = own.parent / prompt
            # A voice goes with a text that is not only read, as upstream has it.
            arguments |= {"read_text_only": False, "prompt_speech": voice}
            truth["voice"] = voice
        items.append(Item(key, arguments, truth))
    return items


def measures_of_seed_tts(split: str, options: Options) -> Sequence[Measure]:
    """Words as they are heard and, in the mode "voice", the likeness of voices."""
    words = Words(split.partition("_")[0], heard=True, normaliser=options.normaliser)
    return (words, VoiceLikeness()) if options.mode == "voice" else (words,)


@dataclass(frozen=True)
class VoiceLikeness:
    """The cosine of two embeddings: of the reply, and of the recording in the truth "voice"."""

    name: str = "likeness of voices"
    needs: frozenset[str] = frozenset({"speaker"})

    def find(self, answer: Answer, tools: Tools) -> Found:
        """{"cosine"}; None where nothing was said."""
        if answer.audio is None:
            return {"cosine": None}
        assert tools.speaker is not None
        pair = [tools.speaker(each) for each in (answer.audio, answer.item.truth["voice"])]
        said, voice = ([float(value) for value in each] for each in pair)
        product = sum(a * b for a, b in zip(said, voice, strict=True))
        return {"cosine": product / (_norm(said) * _norm(voice))}

    def figures(self, found: Sequence[tuple[Answer, Found]]) -> Mapping[str, Figure]:
        """The mean of those that said something."""
        values = [each["cosine"] for _, each in found if each["cosine"] is not None]
        mean = sum(values) / len(values) if values else None
        silent = len(found) - len(values)
        note = f"without {silent} answers that said nothing" if silent else ""
        return {"SIM": Figure(mean, "", len(values), "higher", note)}


def _norm(values: Sequence[float]) -> float:
    return sum(value * value for value in values) ** 0.5


INSTRUCT_FORMS = ("InstructTTSEval/data/SPLIT-*.parquet", f"{JUDGE_PROMPT} beside it, for a judge")
INSTRUCT_SOURCE = "https://huggingface.co/datasets/CaasiHUANG/InstructTTSEval"
INSTRUCT_JUDGE = "https://github.com/KexinHUANG19/InstructTTSEval"


def read_instruct_tts(data: Path, split: str, _options: Options) -> list[Item]:
    """Texts with three instructions each, which are three items: ID.aps, ID.dsd and ID.rp."""
    places = (data / "InstructTTSEval", data)
    files = next(
        (found for each in places if (found := sorted(each.rglob(f"{split}-*.parquet")))), []
    )
    if not files:
        raise _nothing(data, f"InstructTTSEval {split}", INSTRUCT_FORMS[:1], INSTRUCT_SOURCE)
    prompts = [each / JUDGE_PROMPT for each in (*places, *(each / "eval" for each in places))]
    prompt, truth = _first(prompts), {"language": split}
    if prompt is not None:
        truth["judge"] = "\n".join(line for _, line in _lines(prompt, INSTRUCT_JUDGE))
    items = list[Item]()
    for file in files:
        for row in _rows(file, ("id", "text", *KINDS), INSTRUCT_SOURCE):
            for kind in KINDS:
                known = truth | {"text": row["text"], "instruction": row[kind]}
                arguments = {"input": row["text"], "instruct": row[kind]}
                key = f"{row['id']}.{kind.lower()}"
                items.append(Item(key, arguments, known, {"instruction": kind}))
    return items


def _rows(file: Path, columns: Sequence[str], source: str) -> list[dict[str, str]]:
    """Rows of a parquet file, some of its columns, as text."""
    package = evaluation_package("pyarrow.parquet")
    try:
        table = package.ParquetFile(file)
        lost = [name for name in columns if name not in table.schema_arrow.names]
        rows = [] if lost else table.read(columns=[*columns]).to_pylist()
    except Exception as error:
        # Arrow has many kinds of errors; what is no parquet has another each time.
        raise EvaluationError(f"cannot read {file}: {type(error).__name__} ({source})") from error
    if lost:
        raise EvaluationError(f"{file} has no column {', '.join(lost)} ({source})")
    return [{name: str(row[name]) for name in columns} for row in rows]


@dataclass(frozen=True)
class Follows:
    """Whether a judge hears that speech follows its instruction, asked as InstructTTSEval asks.

    Its `eval/gemini_eval.py` counts yes among the answers that say yes or no.
    """

    name: str = "instructions"
    needs: frozenset[str] = frozenset({"judge"})

    def find(self, answer: Answer, tools: Tools) -> Found:
        """{"follows": bool or None, "said"}; speech that is not there follows nothing."""
        if answer.audio is None:
            return {"follows": False, "said": ""}
        if "judge" not in answer.item.truth:
            raise EvaluationError(
                f"the judge's prompt is missing: put eval/{JUDGE_PROMPT} of {INSTRUCT_JUDGE} "
                "into the set's folder"
            )
        assert tools.judge is not None
        prompt = answer.item.truth["judge"].replace(JUDGE_PLACE, answer.item.truth["instruction"])
        said = tools.judge([{"role": "user", "content": prompt}], [answer.audio])
        return {"follows": _verdict(said), "said": said}

    def figures(self, found: Sequence[tuple[Answer, Found]]) -> Mapping[str, Figure]:
        """Percent of yes, of each kind of instruction, and their mean."""
        figures, shares = dict[str, Figure](), list[float]()
        for kind in KINDS:
            own = [each for answer, each in found if answer.item.groups["instruction"] == kind]
            votes = [bool(each["follows"]) for each in own if each["follows"] is not None]
            lost = len(own) - len(votes)
            note = f"without {lost} that the judge said neither of" if lost else ""
            share = 100 * sum(votes) / len(votes) if votes else None
            if own:
                name = f"follows the instruction, {kind}"
                figures[name] = Figure(share, "%", len(votes), "higher", note)
            shares += [] if share is None else [share]
        if len(shares) == len(KINDS):
            mean = sum(shares) / len(shares)
            name = "follows the instruction, overall"
            figures[name] = Figure(
                mean, "%", sum(each.count for each in figures.values()), "higher"
            )
        return figures


def _verdict(said: str) -> bool | None:
    """What the field of the JSON in a judge's answer says; None without one."""
    for found in re.findall(r"\{[^{}]*\}", said):
        try:
            value = json.loads(found).get(JUDGE_FIELD)
        except ValueError:
            continue
        if isinstance(value, bool):
            return value
    return None


WORD_SETS = (
    EvaluationSet(
        name="librispeech",
        title="LibriSpeech",
        splits=("test_clean", "test_other"),
        task=lambda _: "asr_sft",
        read=read_librispeech,
        measures=_words(lambda _: "en", heard=False),
        published=LIBRISPEECH,
        forms=LIBRISPEECH_FORMS,
        source=LIBRISPEECH_SOURCE,
    ),
    EvaluationSet(
        name="aishell1",
        title="AISHELL-1",
        splits=("test",),
        task=lambda _: "asr_sft",
        read=read_aishell1,
        measures=_words(lambda _: "zh", heard=False),
        published=AISHELL1,
        forms=AISHELL_FORMS,
        source=AISHELL_SOURCE,
    ),
    EvaluationSet(
        name="seedtts",
        title="Seed-TTS-Eval",
        splits=("en", "zh", "zh_hardcase"),
        task=lambda _: "tts_sft",
        read=read_seed_tts,
        measures=measures_of_seed_tts,
        published=SEED_TTS,
        modes=("plain", "voice"),
        forms=SEED_TTS_FORMS,
        source=SEED_TTS_SOURCE,
    ),
    EvaluationSet(
        name="instruct_tts",
        title="InstructTTSEval",
        splits=("en", "zh"),
        task=lambda _: "tts_sft",
        read=read_instruct_tts,
        measures=lambda split, options: (
            Words(split, heard=True, normaliser=options.normaliser),
            Follows(),
        ),
        published=INSTRUCT_TTS,
        forms=INSTRUCT_FORMS,
        source=INSTRUCT_SOURCE,
    ),
)
