"""MiMo-Audio-Eval's runtime: its segments, wordings and samplers, against upstream's own steps."""

import copy

import pytest
import torch
from evaluations import WORDS

from mimo_fast import load_audio
from mimo_fast.batches import batch
from mimo_fast.evaluation.as_evaluated import AsEvaluated, wording
from mimo_fast.evaluation.items import Item
from mimo_fast.runtime.codec.network import DECODE_SEGMENT, ENCODE_SEGMENT
from mimo_fast.sampling import task_samplers

RATE = 24_000
SAY = "Please convert this text to speech."
QUESTION = WORDS / "what_is_three_plus_four.flac"


@pytest.fixture
def evaluated(nano):
    """The segments of the codec are set back."""
    yield AsEvaluated(copy.copy(nano))
    nano.codec.encode_segment, nano.codec.decode_segment = ENCODE_SEGMENT, DECODE_SEGMENT


def test_segments_are_half_as_long(evaluated):
    codec = evaluated.codec
    assert (codec.encode_segment, codec.decode_segment) == (3000, 750)
    assert codec.config.sample_rate * 30 == 3000 * codec.config.hop


def test_the_codec_takes_segments_of_any_length(nano, evaluated):
    """Shorter ones, which need no minutes of speech."""
    wav, codec = load_audio(QUESTION, RATE), nano.codec
    whole = codec.encode(wav, nano.audio_channels)
    codec.encode_segment, codec.decode_segment = 100, 25
    mel = codec.log_mel(wav)
    sizes = [100] * (len(mel) // 100) + [len(mel) % 100]
    codes = codec.quantize(torch.cat(codec.encode_packed(mel, sizes)), nano.audio_channels)
    assert torch.equal(codec.encode(wav, nano.audio_channels), codes)
    assert torch.equal(codec.encode_together([wav], nano.audio_channels)[0], codes)
    assert torch.equal(evaluated.speech(wav).codes[:, : codes.shape[1]], codes)
    assert not torch.equal(codes, whole)
    said = codec.decode(codes)
    codec.decode_segment = DECODE_SEGMENT
    parts = [codec.decode(part) for part in codes.split(25, dim=1)]
    assert torch.equal(said, torch.cat(parts))


def test_speech_is_decoded_at_once(nano, evaluated, tmp_path):
    chunks = [*evaluated.stream("tts", "the dog is big", seed=3)]
    said = torch.cat([chunk.audio for chunk in chunks])
    sampled = copy.copy(nano)
    sampled.task_sampler_configs = task_samplers()
    text = sampled.tts_sft("the dog is big", tmp_path / "a.wav", seed=3)
    assert "".join(chunk.text for chunk in chunks).strip() == text
    assert (load_audio(tmp_path / "a.wav", RATE) - said).abs().max() <= 2**-15
    assert chunks[-1].finish_reason == "stop"


def test_samplers_are_upstreams(evaluated, nano):
    chosen = evaluated.get_task_sampler("spoken_dialogue")
    assert [chosen[part].temperature for part in ("global", "local")] == [0.3, 0.7]
    assert [chosen[part].top_p for part in ("global", "local")] == [0.95, 0.95]
    assert nano.get_task_sampler("spoken_dialogue")["global"].temperature != 0.3
    # nano states that it is greedy there.
    assert evaluated.get_task_sampler("tts") == task_samplers()["tts"]
    assert not nano.get_task_sampler("tts")["global"].do_sample


def prompts(model, monkeypatch, task, *arguments, **options):
    """Segments of the prompts that a stream packs."""
    packed = []
    pack = model.pipeline.packed

    def noted(segments, sampler=None):
        packed.append([*segments])
        return pack(packed[-1], sampler)

    monkeypatch.setattr(type(model.pipeline), "packed", lambda self, *given: noted(*given))
    [*model.stream(task, *arguments, seed=1, max_new_tokens=2, **options)]
    return packed[0]


def test_a_dialogue_has_an_empty_system_turn(evaluated, nano, monkeypatch):
    found = prompts(evaluated, monkeypatch, "spoken_dialogue", QUESTION)
    assert found[:3] == ["<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n"]
    voiced = prompts(
        evaluated, monkeypatch, "spoken_dialogue", QUESTION, prompt_speech=WORDS / "thank_you.flac"
    )
    assert voiced[:2] == ["<|im_start|>system\n", "Your voice should be:"]
    assert voiced.count("<|im_start|>system\n") == 1
    written = prompts(evaluated, monkeypatch, "speech2text_dialogue", QUESTION)
    assert written[0] == "<|im_start|>user\n"


@pytest.mark.parametrize(
    ("task", "arguments", "language", "expected"),
    [
        ("asr_sft", {"input": QUESTION}, "en", "Transcribe the following voice message."),
        ("asr_sft", {"input": QUESTION}, "zh", "请将这段语音转换为文字."),
        ("tts_sft", {"input": "hello"}, "en", SAY),
        ("tts_sft", {"input": "hello", "instruct": "slow"}, "en", SAY),
        ("tts_sft", {"input": "你好 hello"}, "zh", "请将这段文字转换为语音："),
        ("tts_sft", {"input": "hello", "read_text_only": False}, "en", None),
        ("spoken_dialogue_sft", {"input_speech": QUESTION}, "en", None),
    ],
)
def test_wordings(task, arguments, language, expected):
    found = wording(task, Item("1", arguments, {"language": language}))
    assert found == ({} if expected is None else {"template": expected})


def test_texts_are_asked_with_the_wording(evaluated, nano, monkeypatch):
    (turn, rest) = prompts(evaluated, monkeypatch, "tts", "seven", template=SAY)
    ids = nano.tokenizer.encode(f"<|im_start|>user\n{SAY}: Seven<|im_end|>\n")
    packed = nano.pack([turn])
    assert packed[0, :: nano.group_size].tolist() == list(ids)
    assert rest == "<|im_start|>assistant\n<|sostm|>"


def test_a_batch_of_it(evaluated, tmp_path):
    texts = ["seven", "thank you"]
    found = sorted(batch(evaluated, "tts", texts, tmp_path, seed=1), key=lambda each: each.index)
    for i, (result, text) in enumerate(zip(found, texts, strict=True)):
        chunks = [*evaluated.stream("tts", text, seed=1 + i)]
        alone = torch.cat([chunk.audio for chunk in chunks])
        assert (load_audio(result.file, RATE) - alone).abs().max() <= 2**-15
