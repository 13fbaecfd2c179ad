"""Answers and findings: each once, whatever ended the process; what differs is refused."""

import json
from dataclasses import replace

import pytest
import torch
from evaluations import HEARD, Counting, deaf

from mimo_fast import MimoFastError, load_audio
from mimo_fast.batches import RECORD, read_lines
from mimo_fast.evaluation.items import EvaluationSet, Figure, Item, Options, Tools
from mimo_fast.evaluation.rates import mean_rate
from mimo_fast.evaluation.run import FINDINGS, Asked, evaluate, names_of, read_items
from mimo_fast.evaluation.sets import SETS

TEXTS = [each.replace("_", " ") for each in HEARD]


@pytest.fixture
def heard(monkeypatch):
    """What the recogniser was given."""
    monkeypatch.setattr(Counting, "heard", found := [])
    return found


def asked_of(name, **how):
    options = Options(mode="plain" if SETS[name].modes else None)
    return Asked(SETS[name], SETS[name].splits[0], options, **how)


def run(nano, asked, data, folder, tools=None, **how):
    items = read_items(asked, data, how.pop("limit", None))
    return evaluate(nano, asked, items, tools or Tools(), folder, progress=False, **how)


def listening(names="Counting"):
    return Tools(recogniser=Counting(), names={"recogniser": names})


def value(evaluation, name, measure=0):
    measured = evaluation.measured[measure]
    return measured.measure.figures(measured.found)[name]


def test_recordings_are_transcribed(nano, data, tmp_path):
    asked = asked_of("librispeech")
    found = run(nano, asked, data, tmp_path)
    alone = [nano.asr_sft(answer.item.arguments["input"], seed=0) for answer in found.answers]
    # One wording for all: transcriptions draw nothing else.
    assert [answer.text for answer in found.answers] == alone == TEXTS
    assert value(found, mean_rate("en")).value == 0
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, FINDINGS, "evaluation.json"}


def test_texts_are_said_and_heard(nano, data, tmp_path, heard):
    found = run(nano, asked_of("seedtts", seed=5), data, tmp_path, listening())
    for i, answer in enumerate(found.answers):
        chunks = [*nano.stream("tts", TEXTS[i], seed=5 + i)]
        alone = torch.cat([chunk.audio for chunk in chunks])
        assert answer.audio == tmp_path / f"{i}.wav"
        assert answer.seconds == pytest.approx(len(alone) / 24_000, abs=1e-3)
        assert (load_audio(answer.audio, 24_000) - alone).abs().max() <= 2**-15
    assert heard == [f"{i}.wav en" for i in range(4)]
    assert value(found, "WER, corpus").value == 0


def test_nothing_is_done_twice(nano, data, tmp_path, heard, monkeypatch):
    asked = asked_of("seedtts")
    run(nano, asked, data, tmp_path, listening(), limit=2)
    assert len(heard) == 2
    first = (tmp_path / "0.wav").stat().st_mtime_ns
    found = run(nano, asked, data, tmp_path, listening())
    assert heard == [f"{i}.wav en" for i in range(4)]
    assert (tmp_path / "0.wav").stat().st_mtime_ns == first
    assert len(found.measured[0].found) == 4
    # Another recogniser listens anew, and nothing is said again.
    monkeypatch.setattr(nano, "stream", None)
    run(nano, asked, data, tmp_path, listening("another"))
    assert len(heard) == 8
    run(nano, asked, data, tmp_path, listening())
    assert len(heard) == 8


def test_what_is_lost_is_done_again(nano, data, tmp_path, heard):
    asked = asked_of("seedtts")
    run(nano, asked, data, tmp_path, listening())
    (tmp_path / "1.wav").unlink()
    lines = (tmp_path / FINDINGS).read_bytes().splitlines(keepends=True)
    # Its process ended within a line.
    (tmp_path / FINDINGS).write_bytes(b"".join(lines[:3]) + lines[3][:20])
    heard.clear()
    found = run(nano, asked, data, tmp_path, listening())
    # What is said again is the same.
    assert heard == ["3.wav en"]
    assert len(found.measured[0].found) == 4
    assert len(read_lines(tmp_path / FINDINGS)) == 4


def test_another_evaluation_is_refused(nano, data, tmp_path):
    asked = asked_of("librispeech")
    run(nano, asked, data, tmp_path, limit=1)
    for other, what in (
        (replace(asked, seed=1), "seed 0 instead of 1"),
        (replace(asked, format="int4"), "format None instead of int4"),
        (replace(asked, max_new_tokens=9), "max_new_tokens"),
        (replace(asked, as_evaluated=True), "as_evaluated"),
        (replace(asked, options=Options(shots=5)), "options"),
        (asked_of("seedtts"), "set librispeech instead of seedtts"),
    ):
        with pytest.raises(MimoFastError, match=f"another evaluation .*{what}") as raised:
            run(nano, other, data, tmp_path, limit=1)
        assert "\n" not in str(raised.value)
    found = run(nano, replace(asked, seed=1), data, tmp_path, limit=1, overwrite=True)
    assert found.about["seed"] == 1
    assert len(read_lines(tmp_path / RECORD)) == 1
    assert json.loads((tmp_path / "evaluation.json").read_text())["seed"] == 1


def test_results_of_a_batch_are_not_an_evaluations(nano, data, tmp_path):
    (tmp_path / RECORD).write_text('{"index": 0}\n')
    with pytest.raises(MimoFastError, match="results of something else"):
        run(nano, asked_of("librispeech"), data, tmp_path)


def test_an_answer_that_fails_is_wrong(nano, data, tmp_path):
    """The others are answered; its words are all missed."""
    asked = asked_of("librispeech")
    items = read_items(asked, data)
    broken = tmp_path / "broken.flac"
    broken.write_bytes(b"no audio")
    items[1] = replace(items[1], arguments={"input": broken})
    found = evaluate(nano, asked, items, Tools(), tmp_path / "out", progress=False)
    assert [answer.error is None for answer in found.answers] == [True, False, True, True]
    assert "broken.flac" in found.answers[1].error
    assert value(found, mean_rate("en")).value == pytest.approx(25)


def test_a_tool_that_fails_again_and_again_ends_it(nano, data, tmp_path):
    tools = Tools(recogniser=deaf, names={"recogniser": "deaf"})
    with pytest.raises(MimoFastError, match="words heard: RuntimeError: no ears") as raised:
        run(nano, asked_of("seedtts"), data, tmp_path, tools)
    assert "\n" not in str(raised.value)
    assert not read_lines(tmp_path / FINDINGS)


def test_a_tool_that_fails_once_is_asked_again(nano, data, tmp_path, heard):
    class Moody(Counting):
        def __call__(self, audio, language):
            if audio.stem == "1" and len(heard) == 1:
                heard.append("failed")
                raise ValueError("not now")
            return super().__call__(audio, language)

    tools = Tools(recogniser=Moody(), names={"recogniser": "moody"})
    found = run(nano, asked_of("seedtts"), data, tmp_path, tools).measured[0]
    assert (len(found.found), found.failed) == (3, ["ValueError: not now"])
    found = run(nano, asked_of("seedtts"), data, tmp_path, tools).measured[0]
    assert (len(found.found), found.failed) == (4, [])
    assert heard[-1] == "1.wav en"


def test_several_at_once(nano, data, tmp_path):
    """A judge that is a server's; findings are those of their answers, in any order."""

    class Judge:
        at_once = 4

        def __call__(self, messages, audio=()):
            return messages[0]["content"].upper()

    class Judged:
        name, needs = "judged", frozenset({"judge"})

        def find(self, answer, tools):
            return {"said": tools.judge([{"role": "user", "content": answer.text}])}

        def figures(self, found):
            return {"n": Figure(float(len(found)), "", len(found), "higher")}

    own = replace(SETS["librispeech"], measures=lambda *_: (Judged(),))
    tools = Tools(judge=Judge(), names={"judge": "a judge"})
    found = run(nano, Asked(own, "test_clean", Options()), data, tmp_path, tools)
    assert [each["said"] for _, each in found.measured[0].found] == [t.upper() for t in TEXTS]


def test_names_are_ids_that_are_file_names():
    def names(*ids):
        return names_of([Item(each, {}) for each in ids])

    assert names("61-70968-0000", "7.aps") == ["61-70968-0000", "7.aps"]
    assert names("a/b", "c") is None
    assert names("A", "a") is None
    assert names("..", "a") is None
    assert names("x" * 200) is None


def test_ids_that_are_no_file_names(nano, tmp_path, heard):
    rows = [Item("../up", {"input": "seven"}, {"text": "seven", "language": "en"})]
    own = EvaluationSet("own", "Own", ("all",), lambda _: "tts_sft", lambda *_: rows, lambda *_: ())
    asked = Asked(own, "all", Options())
    found = evaluate(nano, asked, read_items(asked, tmp_path), Tools(), tmp_path, progress=False)
    assert found.answers[0].audio == tmp_path / "0000.wav"
