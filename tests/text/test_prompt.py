"""Prompts: packing of any segments, templates, audio input and malformed requests."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import fault
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast import AudioError, MimoAudio, PromptError, load_audio
from mimo_fast.text import prompt, tasks
from mimo_fast.text.context import PromptContext, choose_template
from mimo_fast.text.prompt import Speech, SpokenReply
from mimo_fast.text.templates import ASR_TEMPLATES, TTS_TEMPLATES

GROUP, FRAME = 4, 960

any_segments = settings(max_examples=60)
# A written special token, such as <|empty|>, is a token and not text.
texts = st.text(max_size=24).filter(lambda text: "<|" not in text)
patch_counts = st.integers(0, 13)


def codes_of(model: MimoAudio, patches: int) -> Tensor:
    """Codes [C, patches G] that are never the empty ones."""
    random = torch.Generator().manual_seed(patches)
    empty = model.lm.config.empty_codes
    frames = (patches * GROUP,)
    return torch.stack([torch.randint(size, frames, generator=random) for size in empty])


def tokens(ids: Tensor) -> list[int]:
    """A prompt's text channel."""
    return ids[0, ::GROUP].tolist()


def text_of(model: MimoAudio, ids: Tensor) -> str:
    return model.tokenizer.decode(tokens(ids))


def refused(call: Callable[[], object]) -> str:
    return fault(call, PromptError)


class TestPack:
    @any_segments
    @given(st.lists(texts | patch_counts | st.tuples(texts, patch_counts), min_size=1, max_size=6))
    def test_each_group_is_one_token_and_its_codes(self, model, drawn):
        def segment(item: Any) -> prompt.Segment:
            if isinstance(item, str):
                return item
            if isinstance(item, tuple):
                return SpokenReply(item[0], codes_of(model, item[1]))
            return Speech(codes_of(model, item), closed=bool(item % 2))

        segments = list(map(segment, drawn))
        ids = model.pack(segments)
        assert (ids.dtype, ids.shape[0], ids.shape[1] % GROUP) == (torch.int64, 9, 0)
        groups = ids.unflatten(1, (-1, GROUP))
        assert (groups[0, :, 1:] == -100).all()
        text, codes = groups[0, :, 0], groups[1:]
        speech = text == model.empty_token
        assert (codes[:, ~speech] == torch.tensor(model.lm.config.empty_codes)[:, None, None]).all()
        packed = [part.codes for part in segments if not isinstance(part, str)]
        packed.append(codes_of(model, 0))
        assert torch.equal(codes[:, speech].flatten(1), torch.cat(packed, dim=1))

        def written(segment: prompt.Segment) -> list[int]:
            encode = model.tokenizer.encode
            if isinstance(segment, str):
                return encode(segment)
            if isinstance(segment, SpokenReply):
                return [model.sostm_idx, *encode(segment.text), model.eot_idx, model.eostm_idx]
            return [model.sosp_idx, *([model.eosp_idx] if segment.closed else [])]

        assert text[~speech].tolist() == [token for part in segments for token in written(part)]

    @any_segments
    @given(text=st.text(alphabet="ab你🙂 ", max_size=14), patches=st.integers(0, 23))
    @example(text="", patches=0)
    @example(text="", patches=12)
    @example(text="abababababababab", patches=0)
    def test_a_reply_alternates_five_tokens_and_five_patches(self, model, text, patches):
        sequence = tokens(model.pack([SpokenReply(text, codes_of(model, patches))]))
        assert (sequence[0], sequence[-1]) == (model.sostm_idx, model.eostm_idx)
        words = model.tokenizer.encode(text)
        inner = sequence[1:-1]
        assert [token for token in inner if token != model.empty_token] == [*words, model.eot_idx]
        spoken = [i for i, token in enumerate(inner) if token == model.empty_token]
        assert len(spoken) == patches
        for patch, position in enumerate(spoken):
            before = [token for token in inner[:position] if token in words]
            assert len(before) == min(len(words), 5 * (patch // 5 + 1))
        end = inner.index(model.eot_idx)
        assert not words or inner[end - 1] == words[-1]
        assert words or end == 0

    def test_a_reply_whose_words_have_places(self, model):
        words = model.tokenizer.encode("abab ab")
        places = [0, *[2] * (len(words) - 1)]
        sequence = tokens(model.pack([SpokenReply("abab ab", codes_of(model, 3), places)]))
        empty = model.empty_token
        inner = [words[0], empty, empty, *words[1:], model.eot_idx, empty]
        assert sequence == [model.sostm_idx, *inner, model.eostm_idx]

    def test_a_reply_without_words_is_its_patches(self, model):
        sequence = tokens(model.pack([SpokenReply("", codes_of(model, 2), [])]))
        empty = model.empty_token
        assert sequence == [model.sostm_idx, model.eot_idx, empty, empty, model.eostm_idx]

    def test_nothing_packs_to_nothing(self, model):
        assert model.pack([]).shape == (9, 0)

    @pytest.mark.parametrize("shape", [(7, 8), (8, 6), (9, 8), (64,), (1, 8, 4)])
    @pytest.mark.parametrize(
        "segment", [Speech, lambda codes: SpokenReply("x", codes)], ids=["speech", "reply"]
    )
    def test_codes_of_a_wrong_shape(self, model, shape, segment):
        message = refused(lambda: model.pack([segment(torch.zeros(shape, dtype=torch.int64))]))
        assert f"codes must be [8, a multiple of 4], not {list(shape)}" in message


class TestTemplates:
    def test_by_text_by_index_by_seed(self):
        assert choose_template(ASR_TEMPLATES, "My own", None) == "My own"
        assert choose_template(ASR_TEMPLATES, 3, 1) == ASR_TEMPLATES[3]
        drawn = [choose_template(ASR_TEMPLATES, None, seed) for seed in range(200)]
        assert drawn == [choose_template(ASR_TEMPLATES, None, seed) for seed in range(200)]
        assert set(drawn) == set(ASR_TEMPLATES)
        assert {choose_template(ASR_TEMPLATES, None, None) for _ in range(400)} > {drawn[0]}

    def test_transcription_asks_with_each_of_them(self, model):
        prompts = (model.get_asr_sft_prompt(torch.zeros(FRAME), seed=seed) for seed in range(200))
        asked = {text_of(model, ids) for ids in prompts}
        for words in ASR_TEMPLATES:
            assert any(f"<|eosp|>{words}<|im_end|>" in text for text in asked)
        assert len(asked) == len(ASR_TEMPLATES) == 22

    @pytest.mark.parametrize(
        ("text", "language"), [("Hello.", "en"), ("说 hello", "zh"), ("¿Qué?", "en"), ("", "en")]
    )
    def test_speech_is_asked_for_in_the_language_of_the_text(self, model, text, language):
        asked = {text_of(model, model.get_tts_sft_prompt(text, seed=seed)) for seed in range(100)}
        want = {
            f"<|im_start|>user\n{words}: {text}<|im_end|>\n<|im_start|>assistant\n<|sostm|>"
            for words in TTS_TEMPLATES[language]
        }
        assert asked == want

    def test_one_sentence_of_style_and_text_needs_no_template(self, model):
        style = partial(model.get_tts_sft_prompt, "Whisper: hi", read_text_only=False)
        first, second = style(seed=0), style(seed=1)
        assert torch.equal(first, second)
        assert "user\nWhisper: hi<|im_end|>" in text_of(model, first)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("THE FOX", "The fox"),
        ("the fox. it runs", "The fox. it runs"),
        ("The fox", "The fox"),
        ("the Fox", "the Fox"),
        ("123", "123"),
        ("", ""),
        ("今天ok", "今天ok"),
        ("ok今天", "Ok今天"),
        ("ÉTÉ", "Été"),
    ],
)
def test_text_in_one_case_is_capitalized(model, text, want):
    assert tasks.capitalize(text) == model.preprocess_input(text) == want
    assert f": {want}<|im_end|>" in text_of(model, model.get_tts_sft_prompt(text))


class TestAudioInput:
    def test_every_form_gives_the_same_codes(self, model, audio):
        wav = load_audio(audio[1], 24000)
        forms: list[Any] = [audio[1], str(audio[1]), audio[1].read_bytes(), wav, wav.numpy()]
        flat = [model.preprocess_input(form) for form in forms]
        assert all(torch.equal(codes, flat[0]) for codes in flat)
        assert torch.equal(flat[0].view(-1, 8).T, model.speech(audio[1]).codes)

    def test_a_name_without_a_file_is_text(self, model, tmp_path):
        assert model.preprocess_input("missing.wav") == "Missing.wav"
        with pytest.raises(AudioError, match=r"missing\.wav"):
            model.preprocess_input(tmp_path / "missing.wav")

    @pytest.mark.parametrize("frames", range(1, 10))
    def test_leftover_frames_are_padded_with_the_last(self, model, frames):
        wav = torch.sin(torch.arange(frames * FRAME) * 0.05 * torch.linspace(1, 3, frames * FRAME))
        codes = model.codec.encode(wav, 8)
        left, padded = codes.shape[1] % GROUP, model.speech(wav).codes
        assert torch.equal(padded[:, : codes.shape[1]], codes)
        assert padded.shape[1] == codes.shape[1] + (-codes.shape[1]) % GROUP
        assert (padded[:, codes.shape[1] :] == codes[:, -1:]).all()
        whole = codes.shape[1] - left
        if whole:
            assert torch.equal(model.speech(wav, closed=False).codes, codes[:, :whole])
        else:
            assert "shorter than one patch" in refused(lambda: model.speech(wav, closed=False))

    def test_speech_to_be_continued_stays_open(self, model, audio):
        text = tokens(model.get_speech_continuation_prompt(audio[1]))
        patches = model.codec.encode(load_audio(audio[1], 24000)).shape[1] // GROUP
        assert text == [model.sosp_idx] + [model.empty_token] * patches


class TestDialogues:
    def test_an_empty_system_prompt_is_none(self, model, audio):
        plain = model.get_spoken_dialogue_sft_prompt(audio[1])
        assert torch.equal(model.get_spoken_dialogue_sft_prompt(audio[1], system_prompt=""), plain)
        message = [{"role": "user", "content": audio[1]}]
        assert torch.equal(
            model.get_spoken_dialogue_sft_multiturn_prompt(message, system_prompt=""), plain
        )
        assert "user\n<|sosp|>" in text_of(model, plain)

    def test_one_message_is_the_single_turn(self, model, audio):
        voice: dict[str, Any] = {"system_prompt": "Be brief.", "prompt_speech": audio[0]}
        for task, content, options in (
            ("spoken_dialogue", audio[1], voice),
            ("s2t_dialogue", audio[1], {}),
            ("text_dialogue", "Hi", {}),
        ):
            message = {"role": "user", "content": content}
            many = getattr(model, f"get_{task}_sft_multiturn_prompt")([message], **options)
            one = getattr(model, f"get_{task}_sft_prompt")(content, **options)
            assert torch.equal(many, one)

    def test_thinking_is_opened_or_skipped(self, model):
        for thinking, end in ((True, "<think>\n"), (False, "<think>\n\n</think>\n")):
            text = text_of(model, model.get_text_dialogue_sft_prompt("Hi", thinking))
            assert text.endswith(f"assistant\n{end}")

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "system", "content": "x"},
            {"content": "x"},
            {"role": "user"},
            {"role": None, "content": "x"},
            {},
        ],
    )
    @pytest.mark.parametrize("task", ["spoken_dialogue", "s2t_dialogue", "text_dialogue"])
    def test_a_message_needs_role_and_content(self, model, task, message):
        prompt_of = getattr(model, f"get_{task}_sft_multiturn_prompt")
        error = refused(lambda: prompt_of([message]))
        assert error.startswith("a message needs a role ('user' or 'assistant') and content, not ")
        for other in ("hi", None):
            with pytest.raises(TypeError, match="message_list must be a Sequence of Mapping"):
                prompt_of([message, other])

    @pytest.mark.parametrize("content", ["Sure.", {"text": "Sure."}, None])
    def test_a_spoken_reply_needs_text_and_audio(self, model, content):
        message = {"role": "assistant", "content": content}
        error = refused(lambda: model.get_spoken_dialogue_sft_multiturn_prompt([message]))
        assert "assistant's message needs content {'text': ..., 'audio': ...}" in error

    @pytest.mark.parametrize("content", [{"text": "Sure."}, None, 3])
    @pytest.mark.parametrize("task", ["s2t_dialogue", "text_dialogue"])
    def test_a_written_reply_needs_text(self, model, task, content):
        prompt_of = getattr(model, f"get_{task}_sft_multiturn_prompt")
        message = {"role": "assistant", "content": content}
        assert "content" in refused(lambda: prompt_of([message]))


class TestExamples:
    def test_as_many_as_the_report_uses(self, model):
        speech = Speech(codes_of(model, 1))
        example = {"input_audio": speech, "output_audio": speech, "output_transcription": "x"}

        def prompt_of(count: int) -> tasks.Segments:
            return tasks.in_context_learning_s2s(
                PromptContext(), "Do it.", [example] * count, speech
            )

        ids = model.pack(prompt_of(16))
        assert (ids[0] == model.sosp_idx).sum() == 17
        assert "at most 16 examples are supported, not 17" in refused(lambda: prompt_of(17))

    def test_an_incomplete_one_is_named(self, model, audio):
        whole = dict.fromkeys(("input_audio", "output_audio"), audio[1])
        whole["output_transcription"] = "x"
        for missing in whole:
            example = {name: part for name, part in whole.items() if name != missing}
            with pytest.raises(PromptError, match=missing):
                model.get_in_context_learning_s2s_prompt("Do it.", [example], audio[1])
