"""`Converter`: the task's own reply, and examples that are encoded and prefilled once."""

import json
import shutil
from contextlib import closing
from dataclasses import replace

import pytest
import soundfile
import torch
from conversions import ANSWER, ASKED, WORDS, answered, encoded, write_answers

import mimo_fast
from mimo_fast import AudioError, ConfigError, MimoAudio, PromptError
from mimo_fast.runtime.conversion import groups_of, instruction_of, longest_reply
from mimo_fast.runtime.examples import read_recording, read_set
from mimo_fast.runtime.known_speech import KnownSpeech
from mimo_fast.text.prompt import Speech
from mimo_fast.text.templates import CONVERSIONS


@pytest.fixture(scope="module")
def nano() -> MimoAudio:
    return mimo_fast.load(max_batch=3)


@pytest.fixture(scope="module")
def examples(nano, tmp_path_factory):
    return answered(nano, tmp_path_factory.mktemp("answers"))


@pytest.fixture
def fresh(monkeypatch, nano):
    """Nano, of which neither engine nor recordings remember anything."""
    monkeypatch.setattr(nano.pipeline, "known_speech", KnownSpeech())
    nano.engine.steps.prefixes.clear()
    return nano


def read(stream):
    with closing(stream) as chunks:
        taken = [*chunks]
    return "".join(chunk.text for chunk in taken), torch.cat([chunk.audio for chunk in taken])


def test_it_is_the_task_on_recordings_whose_level_is_set(fresh, examples):
    converter = fresh.converter(examples, "answer")
    text, wav = read(converter.stream(ASKED, seed=3))
    shown = [
        {
            "input_audio": read_recording(before),
            "output_audio": read_recording(after),
            "output_transcription": words,
        }
        for before, after, words in examples
    ]
    request = "Answer the question", shown, read_recording(ASKED)
    longest = max(len(each) for each in (request[2], *(one["output_audio"] for one in shown)))
    limit = longest_reply(longest)
    task = fresh.stream("in_context_learning_s2s", *request, seed=3, max_new_tokens=limit)
    expected_text, expected = read(task)
    assert text.strip() == expected_text.strip() == ANSWER
    assert torch.equal(wav, expected)


def test_a_second_recording_is_all_that_is_encoded_and_prefilled(fresh, examples, monkeypatch):
    sequences, begin = [], fresh.pipeline.sequence

    def noted(*given):
        sequences.append(begin(*given))
        return sequences[-1]

    monkeypatch.setattr(fresh.pipeline, "sequence", noted)
    with encoded(fresh.codec) as first:
        read(fresh.converter(examples, "answer").stream(ASKED, seed=1))
    assert len(first) == 5
    recording = WORDS / "where_do_you_live.flac"
    with encoded(fresh.codec) as second:
        # Another converter, whose examples are read from their files again.
        _, wav = read(fresh.converter(examples, "answer").stream(recording, seed=2))
    assert second == [len(read_recording(recording))]
    one, other = sequences
    assert one.prefix_groups == other.prefix_groups > 40
    # Patches between two tokens, a line's end, and the token that begins speech.
    assert one.prefilled == one.prefix_groups + groups_of(len(read_recording(ASKED))) + 4
    assert other.prefilled == groups_of(second[0]) + 4
    # What was computed before has the bits of what is computed now.
    fresh.engine.steps.prefixes.clear()
    assert torch.equal(read(fresh.converter(examples, "answer").stream(recording, seed=2))[1], wav)


def test_other_examples_or_another_instruction_share_nothing_wrong(fresh, examples):
    alone = {}
    turned = examples[::-1]
    cases = [(examples, "answer"), (examples[:1], "answer"), (examples, None), (turned, "voice")]
    for number, (given, instruction) in enumerate(cases):
        fresh.engine.steps.prefixes.clear()
        alone[number] = read(fresh.converter(given, instruction).stream(ASKED, seed=5))
    for number, (given, instruction) in enumerate(cases):
        text, wav = read(fresh.converter(given, instruction).stream(ASKED, seed=5))
        assert text == alone[number][0]
        assert torch.equal(wav, alone[number][1])


def test_several_at_once_are_what_each_is_alone(fresh, examples):
    recordings = [ASKED, WORDS / "where_do_you_live.flac", WORDS / "what_is_your_name.flac"]
    found = {}
    options = {"examples": examples, "instruction": "answer", "seed": 4}
    for result in mimo_fast.batch(fresh, "convert", recordings, progress=False, **options):
        assert result.error is None
        found[result.index] = result
    for i, recording in enumerate(recordings):
        given = {"instruction": "answer", "seed": 4 + i}
        alone = mimo_fast.convert(fresh, recording, examples, **given)
        assert found[i].text == alone.text
        assert torch.equal(found[i].audio, alone.audio)


def test_missing_words_are_heard_once(fresh, examples):
    pairs = [example[:2] for example in examples]
    with encoded(fresh.codec) as heard:
        assert fresh.converter(pairs).words == ["seven", "saturday"]
        known = len(heard)
        assert fresh.converter(pairs).words == ["seven", "saturday"]
    assert len(heard) == known


def test_words_that_nobody_can_hear_are_asked_for(nano, examples, monkeypatch):
    deaf = replace(nano.lm.config, trained_tasks=("in_context_learning_s2s",))
    monkeypatch.setattr(nano.lm, "config", deaf)
    with pytest.raises(PromptError, match=r"example 2 has no words.*give the words"):
        nano.converter([examples[0], examples[1][:2]])


def test_what_the_context_cannot_hold_is_refused_before_it_is_encoded(fresh):
    noise = 0.1 * torch.randn(29 * 24_000, generator=torch.Generator().manual_seed(0))
    with encoded(fresh.codec) as found, pytest.raises(PromptError, match="fewer or shorter"):
        mimo_fast.convert(fresh, ASKED, [(noise, noise, "noise")] * 6)
    assert not found


def test_a_conversion_is_written(nano, examples, tmp_path):
    output = tmp_path / "a.flac"
    found = mimo_fast.convert(nano, ASKED, examples, instruction="answer", output=output, seed=1)
    assert found.text == ANSWER
    assert found.finish_reason == "stop"
    assert soundfile.info(output).frames == len(found.audio)
    with pytest.raises(AudioError, match="nothing was said"):
        mimo_fast.convert(
            nano, ASKED, examples, output=tmp_path / "b.wav", seed=1, max_new_tokens=1
        )
    assert not (tmp_path / "b.wav").exists()


def test_upstream_s_mappings_and_ours_are_the_same_examples(nano, examples):
    keys = ("input_audio", "output_audio", "output_transcription"), ("before", "after", "words")
    given = [[dict(zip(names, each, strict=True)) for each in examples] for names in keys]
    found = [read(nano.converter(each, "answer").stream(ASKED, seed=1))[0] for each in given]
    assert {each.strip() for each in found} == {ANSWER}


def test_instructions_by_name(nano, model):
    assert instruction_of(nano.lm.config) == "Say it again in your own voice"
    assert instruction_of(nano.lm.config, "answer") == "Answer the question"
    # A checkpoint that states nothing has upstream's.
    config = model.lm.config
    assert instruction_of(config) == CONVERSIONS["voice"]
    assert instruction_of(config, "denoise") == CONVERSIONS["denoise"]
    assert instruction_of(config, " Sing it. ") == "Sing it."
    with pytest.raises(PromptError, match="empty"):
        instruction_of(config, " ")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda given: [], "needs an example"),
        (lambda given: given * 9, "at most 16 examples are supported, not 18"),
        (lambda given: [given[0][:1]], "example 1 must be two recordings"),
        (lambda given: [given[0], (*given[1], "more")], "example 2 must be two recordings"),
        (lambda given: [given[0], (*given[1][:2], " ")], "example 2: the words .* must be a text"),
        (lambda given: [given[0], "two"], "example 2 must be .* not a str"),
        (lambda given: [{"before": given[0][0]}], "example 1 must have before, after, words"),
        (lambda given: [given[0], (given[1][0], torch.zeros(9), "x")], "example 2: .* is silent"),
        (lambda given: [(torch.ones(721_000), given[0][1], "x")], "example 1: .* is 30.0 s long"),
    ],
)
def test_what_is_wrong_with_examples_is_named(nano, examples, change, problem):
    with pytest.raises((AudioError, PromptError), match=problem) as found:
        nano.converter(change(examples))
    assert "\n" not in str(found.value)


@pytest.fixture(scope="module")
def folder(nano, tmp_path_factory):
    return write_answers(nano, tmp_path_factory.mktemp("sets") / "answers")


def test_a_set_is_what_it_was_made_of(nano, examples, folder):
    found = read_set(folder)
    assert found.instruction == "answer"
    assert found.consent.startswith("Synthesized")
    for each, (before, after, words) in zip(found.examples, examples, strict=True):
        assert each.words == words
        assert torch.equal(each.before, read_recording(before))
        assert torch.equal(each.after, read_recording(after))
    assert mimo_fast.convert(nano, ASKED, folder, seed=1).text == ANSWER


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda told: told.pop("consent"), "'consent' must say in 3 to 2000 characters who"),
        (lambda told: told.update(consent=" \n "), "'consent' must say"),
        (lambda told: told.update(consent=["Anna"]), "'consent' must say"),
        (lambda told: told.update(note="x"), "no key 'note'"),
        (lambda told: told.update(instruction=""), "'instruction' must be a text"),
        (lambda told: told.update(examples=[]), "a list of 1 to 16"),
        (lambda told: told.update(examples=told["examples"] * 9), "a list of 1 to 16"),
        (lambda told: told["examples"][1].pop("words"), "example 2: 'words' must be"),
        (lambda told: told["examples"][1].update(words=""), "example 2: 'words' must be"),
        (lambda told: told["examples"][0].pop("after"), "example 1: 'after' must name"),
        (lambda told: told["examples"][0].update(after="../a.wav"), "example 1: 'after' must name"),
        (lambda told: told["examples"][0].update(after="/a.wav"), "example 1: 'after' must name"),
        (lambda told: told["examples"][0].update(after=".."), "example 1: .*"),
        (lambda told: told["examples"][0].update(after="none.wav"), "example 1: cannot read"),
        (lambda told: told["examples"][0].update(words_=""), "example 1: there is no key"),
        (lambda told: told.update(examples=[3]), "example 1 must be an object"),
    ],
)
def test_what_is_wrong_with_a_set_is_named(folder, tmp_path, change, problem):
    copy = shutil.copytree(folder, tmp_path / "copy")
    told = json.loads((copy / "set.json").read_text())
    change(told)
    (copy / "set.json").write_text(json.dumps(told))
    with pytest.raises((AudioError, ConfigError), match=problem) as found:
        read_set(copy)
    assert "copy" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_folder_without_a_set_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no examples.*set\.json"):
        read_set(tmp_path)


def test_what_is_known_is_bounded(monkeypatch):
    monkeypatch.setattr("mimo_fast.runtime.known_speech.MOST", 3)
    known, waves = KnownSpeech(), [torch.full((4,), float(i)) for i in range(5)]
    asked = []

    def encode(given):
        asked.append([int(wav[0]) for wav in given])
        return [Speech(wav[None].long()) for wav in given]

    assert [int(each.codes[0, 0]) for each in known.speeches(waves[:3], encode)] == [0, 1, 2]
    # More than are remembered at once, one of them twice.
    found = known.speeches([waves[3], waves[4], waves[3], waves[0]], encode)
    assert [int(each.codes[0, 0]) for each in found] == [3, 4, 3, 0]
    known.speeches([waves[1], waves[0]], encode)
    assert asked == [[0, 1, 2], [3, 4], [1]]
