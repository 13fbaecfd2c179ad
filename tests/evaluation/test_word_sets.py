"""Readers of LibriSpeech, AISHELL-1, Seed-TTS-Eval and InstructTTSEval, on files in their forms."""

import pyarrow
import pytest
import soundfile
import torch
from pyarrow import parquet

from mimo_fast import MimoFastError
from mimo_fast.evaluation.items import Answer, Options, Tools
from mimo_fast.evaluation.run import Asked, read_items
from mimo_fast.evaluation.sets import SETS
from mimo_fast.evaluation.sets.words import Follows, VoiceLikeness, _verdict


def audio(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, torch.zeros(800).numpy(), 16_000)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def items(name, data, split=None, limit=None, **options):
    chosen = SETS[name]
    return read_items(Asked(chosen, split or chosen.splits[0], Options(**options)), data, limit)


def librispeech_as_evaluated(root):
    folder = root / "librispeech" / "test_clean"
    text(folder / "manifest.txt", "61-70968-0000\tHE BEGAN A CONFUSED COMPLAINT", "61-1\tAND  YES")
    for name in ("61-70968-0000", "61-1"):
        audio(folder / "wav" / f"{name}.wav")
    return folder


def librispeech(root):
    folder = root / "LibriSpeech" / "test-clean" / "61" / "70968"
    text(folder / "61-70968.trans.txt", "61-70968-0000 HE BEGAN", "61-70968-0001 AND YES")
    for i in range(2):
        audio(folder / f"61-70968-000{i}.flac")
    return root / "LibriSpeech" / "test-clean"


def test_librispeech_as_evaluated(tmp_path):
    folder = librispeech_as_evaluated(tmp_path)
    for data in (tmp_path, tmp_path / "librispeech", folder):
        found = items("librispeech", data)
        assert [each.id for each in found] == ["61-70968-0000", "61-1"]
        assert found[1].arguments == {"input": folder / "wav" / "61-1.wav"}
        assert found[1].truth == {"text": "AND  YES", "language": "en"}


def test_librispeech_in_its_own_form(tmp_path):
    folder = librispeech(tmp_path)
    for data in (tmp_path, tmp_path / "LibriSpeech", folder):
        found = items("librispeech", data)
        assert [each.id for each in found] == ["61-70968-0000", "61-70968-0001"]
        assert found[0].arguments["input"].name == "61-70968-0000.flac"
        assert found[0].truth["text"] == "HE BEGAN"
    assert len(items("librispeech", tmp_path, limit=1)) == 1


def test_aishell(tmp_path):
    root = tmp_path / "data_aishell"
    line = "BAC009S0764W0121 甚至 出现 交易 几乎 停滞"
    text(root / "transcript" / "aishell_transcript_v0.8.txt", line, "BAC009S0002W0122 而 对")
    audio(root / "wav" / "test" / "S0764" / "BAC009S0764W0121.wav")
    audio(root / "wav" / "train" / "S0002" / "BAC009S0002W0122.wav")
    for data in (tmp_path, root):
        (found,) = items("aishell1", data)
        assert found.id == "BAC009S0764W0121"
        assert found.truth == {"text": "甚至 出现 交易 几乎 停滞", "language": "zh"}
    audio(root / "wav" / "test" / "S0764" / "other.wav")
    with pytest.raises(MimoFastError, match=r"has no line of .*other\.wav"):
        items("aishell1", tmp_path)
    text(tmp_path / "aishell1" / "test" / "manifest.txt", "A\t甚至")
    audio(tmp_path / "aishell1" / "test" / "wav" / "A.wav")
    assert items("aishell1", tmp_path)[0].truth["text"] == "甚至"


def test_seed_tts_as_evaluated(tmp_path):
    text(tmp_path / "seedtts" / "zh_hardcase" / "text.txt", "黑化肥发灰", "四是四")
    found = items("seedtts", tmp_path, "zh_hardcase", mode="plain")
    assert [each.id for each in found] == ["0", "1"]
    assert found[1].arguments == {"input": "四是四"}
    assert found[1].truth == {"text": "四是四", "language": "zh"}
    with pytest.raises(MimoFastError, match="holds no prompts of Seed-TTS-Eval zh_hardcase"):
        items("seedtts", tmp_path, "zh_hardcase", mode="voice")


def test_seed_tts_in_its_own_form(tmp_path):
    root = tmp_path / "seedtts_testset"
    line = "common_voice_en_1-common_voice_en_2|We asked.|prompt-wavs/common_voice_en_1.wav|Get it."
    text(root / "en" / "meta.lst", line, f"b{line[1:]}|wavs/1.wav")
    audio(root / "en" / "prompt-wavs" / "common_voice_en_1.wav")
    for data in (tmp_path, root):
        found = items("seedtts", data, "en", mode="plain")
        assert [each.arguments for each in found] == [{"input": "Get it."}] * 2
    voiced = items("seedtts", tmp_path, "en", mode="voice")[0]
    voice = root / "en" / "prompt-wavs" / "common_voice_en_1.wav"
    assert voiced.arguments == {
        "input": "Get it.",
        "read_text_only": False,
        "prompt_speech": voice,
    }
    assert voiced.truth["voice"] == voice
    text(root / "zh" / "hardcase.lst", "1|提示|prompt-wavs/1.wav|四是四")
    assert items("seedtts", tmp_path, "zh_hardcase", mode="plain")[0].truth["language"] == "zh"
    text(root / "en" / "meta.lst", "a|b|c")
    with pytest.raises(MimoFastError, match=r"meta\.lst:1 has 3 fields instead of 4 or 5"):
        items("seedtts", tmp_path, "en", mode="plain")


ROWS = [{"id": 7, "text": "Well!", "APS": "high pitch", "DSD": "cheerful", "RP": "a clown"}]


def instruct_tts(root, rows=ROWS):
    path = root / "data" / "en-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_instruct_tts(tmp_path):
    instruct_tts(tmp_path / "InstructTTSEval")
    for data in (tmp_path, tmp_path / "InstructTTSEval"):
        found = items("instruct_tts", data)
        assert [each.id for each in found] == ["7.aps", "7.dsd", "7.rp"]
        assert found[1].arguments == {"input": "Well!", "instruct": "cheerful"}
        assert [each.groups["instruction"] for each in found] == ["APS", "DSD", "RP"]
        assert "judge" not in found[0].truth


def test_instructions_are_judged_as_the_set_says(tmp_path):
    instruct_tts(tmp_path)
    text(tmp_path / "eval_prompt.txt", "Listen:", "<此处插入待评测的语音风格描述>", "JSON.")
    found, asked = items("instruct_tts", tmp_path), []
    said = ['```json\n{"一致性": true}\n```', 'No: {"理由": "flat", "一致性": false}', "no idea"]

    def judge(messages, audio=()):
        asked.append((messages[0]["content"], *audio))
        return said[len(asked) - 1]

    follows, tools = Follows(), Tools(judge=judge)
    answers = [Answer(each, audio=tmp_path / f"{each.id}.wav") for each in found]
    results = [(each, follows.find(each, tools)) for each in answers]
    assert asked[0] == ("Listen:\nhigh pitch\nJSON.", tmp_path / "7.aps.wav")
    assert [each["follows"] for _, each in results] == [True, False, None]
    figures = follows.figures(results)
    assert [each.value for each in figures.values()] == [100, 0, None]
    assert figures["follows the instruction, RP"].note.startswith("without 1")
    results[2] = (answers[2], {"follows": True, "said": ""})
    overall = follows.figures(results)["follows the instruction, overall"]
    assert overall.value == pytest.approx(200 / 3)
    assert follows.find(Answer(found[0]), tools)["follows"] is False


@pytest.mark.parametrize(
    ("said", "verdict"),
    [('{"一致性": true}', True), ('{"一致性": "true"}', None), ("{一致性}", None), ("", None)],
)
def test_verdicts(said, verdict):
    assert _verdict(said) is verdict


def test_likeness_is_the_cosine(tmp_path):
    instruct_tts(tmp_path)
    item = items("instruct_tts", tmp_path)[0]
    voices = {"a": [3.0, 4.0], "b": [4.0, 3.0]}
    tools = Tools(speaker=lambda audio: voices[audio.stem])
    likeness = VoiceLikeness()
    item.truth["voice"] = tmp_path / "b.wav"
    answers = [Answer(item, audio=tmp_path / "a.wav"), Answer(item)]
    found = [(each, likeness.find(each, tools)) for each in answers]
    assert found[0][1]["cosine"] == pytest.approx(24 / 25)
    figure = likeness.figures(found)["SIM"]
    assert (figure.value, figure.count) == (pytest.approx(0.96), 1)
    assert "1 answers that said nothing" in figure.note


def emptied(root):
    librispeech(root)
    for file in root.rglob("*.flac"):
        file.write_bytes(b"")


def lost(root):
    folder = librispeech_as_evaluated(root)
    (folder / "wav" / "61-1.wav").unlink()


def unreadable(root):
    (librispeech_as_evaluated(root) / "manifest.txt").write_bytes(b"1\t\xff\n")


def nameless(root):
    text(librispeech_as_evaluated(root) / "manifest.txt", "no tab here")


def doubled(root):
    folder = librispeech_as_evaluated(root)
    text(folder / "manifest.txt", "61-1\tA", "61-1\tB")


def silent(root):
    text(librispeech_as_evaluated(root) / "manifest.txt", "")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"holds no LibriSpeech test_clean: looked for .*openslr\.org/12"),
        (emptied, r"is empty \(and 1 more\): LibriSpeech is incomplete"),
        (lost, r"61-1\.wav.*LibriSpeech is incomplete"),
        (unreadable, r"cannot read .*manifest\.txt: it is no UTF-8"),
        (nameless, r"manifest\.txt:1 is no id and text"),
        (doubled, "two items '61-1'"),
        (silent, "holds no items"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(MimoFastError, match=message) as raised:
        items("librispeech", tmp_path)
    assert "\n" not in str(raised.value)


def test_a_parquet_file_that_is_wrong(tmp_path):
    path = instruct_tts(tmp_path, [{"id": 1, "text": "a"}])
    with pytest.raises(MimoFastError, match=r"parquet has no column APS, DSD, RP .*CaasiHUANG"):
        items("instruct_tts", tmp_path)
    path.write_bytes(b"no parquet")
    with pytest.raises(MimoFastError, match=r"cannot read .*parquet: ArrowInvalid"):
        items("instruct_tts", tmp_path)
