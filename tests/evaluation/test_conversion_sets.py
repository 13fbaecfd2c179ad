"""Speech to speech by example: ESD's table of conversions, lists of pairs, and what is measured."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from published_files import esd, happy_to_sad, tone, written

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.items import Answer, Item, Options, Tools
from mimo_fast.evaluation.sets import SETS
from mimo_fast.evaluation.sets.conversion import WordsByLanguage, language_of

SPEAKERS = Path("ESD", "proc", "EmotionSpeechDataset")


def items(name: str, folder: Path, split: str | None = None, **options) -> list[Item]:
    chosen = SETS[name]
    assert chosen.task(Options(**options)) == "in_context_learning_s2s"
    return list(chosen.read(folder, split or chosen.splits[0], Options(**options)))


def test_esd(tmp_path):
    first, second = items("esd", esd(tmp_path))
    speakers = tmp_path / SPEAKERS

    def recording(name: str) -> Path:
        return speakers / name[:4] / "Happy" / f"{name}.wav"

    assert first.id == "0003_000000_0015_000000"
    assert first.arguments == {
        "instruction": None,
        "prompt_examples": [
            {
                "input_audio": recording(f"0003_00000{i}"),
                "output_audio": recording(f"0015_00000{i}"),
                "output_transcription": text,
            }
            for i, text in enumerate(("The fox runs.", "A dog sleeps."))
        ],
        "audio": recording("0003_000000"),
    }
    assert first.truth == {
        "text": "The fox runs.",
        "language": "en",
        "voice": recording("0015_000001"),
    }
    assert second.truth["text"] == "狐狸在跑。"
    assert second.groups == {"language": "zh"}
    assert [each.arguments for each in items("esd", tmp_path / "ESD")] == [
        first.arguments,
        second.arguments,
    ]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The fox.", "en"),
        ("狐狸在跑。", "zh"),
        ("狐狸 fox", "en"),
        ("狐狸在跑 fox", "zh"),
        ("狐狸在跑 foxy", "en"),
        ("?!", "en"),
        ("", "en"),
    ],
)
def test_a_text_is_chinese_where_most_letters_are(text, language):
    assert language_of(text) == language


def test_pairs(tmp_path):
    folder = happy_to_sad(tmp_path / "data", 6)
    found = items("general_s2s", folder, "ex01_happy2sad", shots=3)
    assert [each.id for each in found] == [f"happy_{i}_sad_{i}" for i in range(6)]
    random.seed(42)
    numbers, recordings = list(range(6)), folder / "expresso" / "wav"
    for i, item in enumerate(found):
        drawn = random.sample(numbers[:i] + numbers[i + 1 :], 3)
        assert item.arguments["instruction"] is None
        assert item.arguments["audio"] == recordings / f"happy_{i}.wav"
        assert item.arguments["prompt_examples"] == [
            {
                "input_audio": recordings / f"happy_{number}.wav",
                "output_audio": recordings / f"sad_{number}.wav",
                "output_transcription": f"Sentence {number}.",
            }
            for number in drawn
        ]
        voice = recordings / f"sad_{drawn[-1]}.wav"
        assert item.truth == {"text": f"Sentence {i}.", "language": "en", "voice": voice}


def test_fewer_pairs_than_shots_are_all_examples(tmp_path):
    found = items("general_s2s", happy_to_sad(tmp_path / "data", 3), "ex01_happy2sad", shots=16)
    assert [len(each.arguments["prompt_examples"]) for each in found] == [2, 2, 2]


def test_every_split_has_its_list_and_its_language(tmp_path):
    for split in SETS["general_s2s"].splits:
        with pytest.raises(EvaluationError, match=f"has no .*{split}.scp"):
            items("general_s2s", tmp_path, split, shots=1)
    assert len(SETS["general_s2s"].splits) == 6
    folder = happy_to_sad(tmp_path / "data", 2)
    pairs = (folder / "expresso" / "ex01_happy2sad.scp").read_text()
    written(folder / "speed_conversion" / "ZH001SpeedConversion_speed1.0to0.5.scp", pairs)
    found = items("general_s2s", folder, "ZH001SpeedConversion_speed1.0to0.5", shots=1)
    assert found[0].truth["language"] == "zh"


def answer(language: str, text: str, audio: Path | None) -> Answer:
    return Answer(Item("1", {}, {"language": language, "text": text}), "", audio)


def test_words_are_counted_by_language(tmp_path):
    heard = {"en": "the fox rests", "zh": "狐狸在跑"}
    tools = Tools(recogniser=lambda _, language: heard[language])
    measure = WordsByLanguage()
    wav = tmp_path / "1.wav"
    answers = [
        answer("en", "The fox runs.", wav),
        answer("en", "A dog sleeps there now.", None),
        answer("zh", "狐狸在跑。", wav),
    ]
    found = [(each, measure.find(each, tools)) for each in answers]
    figures = measure.figures(found)
    assert figures["WER, mean of utterances"].value == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert figures["WER, corpus"].value == pytest.approx(100 * 6 / 8)
    assert figures["CER, mean of utterances"].value == 0.0
    assert figures["CER, mean of utterances"].count == 1
    assert set(measure.figures(found[2:])) == {"CER, mean of utterances", "CER, corpus"}


def test_measures_need_an_encoder_of_voices_and_a_recogniser():
    for name in ("esd", "general_s2s"):
        measures = SETS[name].measures("test", Options(shots=16))
        assert [set(each.needs) for each in measures] == [{"speaker"}, {"recogniser"}]


def test_voices_are_compared_with_the_last_examples_target(tmp_path):
    item = items("esd", esd(tmp_path))[0]
    wav = tone(tmp_path / "reply.wav")
    embeddings = {wav: [3.0, 4.0], item.truth["voice"]: [4.0, 3.0]}
    likeness = SETS["esd"].measures("test", Options())[0]
    found = likeness.find(Answer(item, "", wav), Tools(speaker=lambda audio: embeddings[audio]))
    (figure,) = likeness.figures([(Answer(item, "", wav), found)]).values()
    assert figure.value == pytest.approx(24 / 25)


def esd_with(folder: Path, change) -> None:
    table = esd(folder) / "ESD" / "VoiceConversion.tsv"
    table.write_text(change(table.read_text(encoding="utf-8")), encoding="utf-8")


SPOILED = {
    "no table": ("esd", lambda f: f, "has no ESD/VoiceConversion.tsv"),
    "no rows": ("esd", lambda f: esd_with(f, lambda t: t.split("\n")[0]), "has no rows"),
    "a column less": (
        "esd",
        lambda f: esd_with(f, lambda t: t.replace("prompt", "prompts")),
        "row 1 has no prompt",
    ),
    "no pairs": (
        "esd",
        lambda f: esd_with(f, lambda t: t.replace("#", "+")),
        "row 1 has no pairs of recordings",
    ),
    "a recording less": (
        "esd",
        lambda f: (esd(f) / SPEAKERS / "0015" / "Happy" / "0015_000001.wav").unlink(),
        "the recording .*0015_000001.wav is missing",
    ),
    "a transcript less": (
        "esd",
        lambda f: written(esd(f) / SPEAKERS / "0015" / "0015.txt", "0015_000000\tA\tHappy\n"),
        "0015.txt has no text of 0015_000001",
    ),
    "no transcripts": (
        "esd",
        lambda f: (esd(f) / SPEAKERS / "0015" / "0015.txt").unlink(),
        "cannot read .*0015.txt: No such file",
    ),
    "an empty list": (
        "general_s2s",
        lambda f: written(f / "expresso" / "ex01_happy2sad.scp", "\n"),
        "ex01_happy2sad.scp has no pairs",
    ),
    "no pair": (
        "general_s2s",
        lambda f: written(f / "ex01_happy2sad.scp", "\na.wav\n"),
        "ex01_happy2sad.scp, line 2 is no pair",
    ),
    "a pair of recordings less": (
        "general_s2s",
        lambda f: written(f / "ex01_happy2sad.scp", "a.wav|b.wav\n"),
        "line 1: the recording a.wav is missing",
    ),
    "one pair": ("general_s2s", lambda f: happy_to_sad(f, 1), "has one pair alone"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_wrong_is_one_line_with_its_source(tmp_path, case):
    name, make, problem = SPOILED[case]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    options = {"shots": 2} if name == "general_s2s" else {}
    with pytest.raises(EvaluationError, match=problem) as caught:
        items(name, tmp_path / "data", **options)
    assert SETS[name].source in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_that_are_missing_say_what_writes_them(tmp_path):
    folder = happy_to_sad(tmp_path / "data")
    path = folder / "expresso" / "wav" / "sad_1.txt"
    path.unlink()
    with pytest.raises(EvaluationError, match=r"sad_1.txt is missing, with what sad_1.wav says"):
        items("general_s2s", folder, shots=1)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("esd", {"shots": 16}, "rows have their own examples, takes no examples"),
        ("general_s2s", {}, "is asked by example: give shots, 16 as the report"),
        ("general_s2s", {"shots": 1, "thinking": True}, "asked without thoughts"),
    ],
)
def test_options_that_they_do_not_take(tmp_path, name, options, problem):
    with pytest.raises(EvaluationError, match=problem):
        items(name, happy_to_sad(esd(tmp_path / "data")), **options)


def test_a_folder_may_be_the_working_one(tmp_path, monkeypatch):
    """Paths of the tables start above it."""
    folder = happy_to_sad(esd(tmp_path / "data"))
    whole = [items("esd", folder), items("general_s2s", folder, shots=1)]
    monkeypatch.chdir(folder / "ESD")
    assert items("esd", Path()) == whole[0]
    monkeypatch.chdir(folder / "expresso")
    assert items("general_s2s", Path(), shots=1) == whole[1]
