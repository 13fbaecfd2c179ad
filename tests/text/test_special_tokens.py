"""Special tokens: what users write is text, what models write in them is none."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tokenizers
import torch
from dialogues import METHODS, arguments
from helpers import KIT_PAIR
from hypothesis import given
from hypothesis import strategies as st

from mimo_fast import MimoAudio
from mimo_fast.checkpoint.embedded import NANO
from mimo_fast.runtime.engine.voicing import ReplyReader
from mimo_fast.runtime.lm.decode import Decoder, Group, Row
from mimo_fast.text.context import PromptContext
from mimo_fast.text.prompt import Joined, Speech, UserText, text_ids
from mimo_fast.text.tasks import SOUND, TASKS
from mimo_fast.text.templates import TTS_TEMPLATES
from mimo_fast.text.tokenizer import Tokenizer

GROUP = 4
KIT, SMALL = (Tokenizer.from_directory(path) for path in (KIT_PAIR[0], NANO / "lm"))
both = pytest.mark.parametrize("tokenizer", [KIT, SMALL], ids=["kit", "nano"])


def added(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in tokenizer._added.items()}


WRITTEN = sorted({*added(KIT).values(), *added(SMALL).values()})
PIECES = st.sampled_from([*WRITTEN, *"<|>: ", "im_end", "<|im_", "end|>", "\u0338", "＜｜", "｜＞"])
TYPED = (
    st.lists(PIECES | st.text(max_size=3), max_size=5)
    .map("".join)
    .filter(lambda text: not any("\ud800" <= character <= "\udfff" for character in text))
)


class TestText:
    @both
    def test_no_added_token_comes_out_of_a_users_text(self, tokenizer):
        everything = "".join(added(tokenizer).values())
        for text in [*added(tokenizer).values(), everything, f"a {everything} b"]:
            ids = tokenizer.encode_as_text(text)
            assert added(tokenizer).keys().isdisjoint(ids)
            assert not added(tokenizer).keys().isdisjoint(tokenizer.encode(text))
            # Nothing is lost: the text can be said.
            read = tokenizer.decode(ids).replace(" ", "")
            assert read.lower() == text.replace(" ", "").lower()

    @both
    @given(typed=TYPED)
    def test_nor_out_of_any_mixture(self, tokenizer, typed):
        assert added(tokenizer).keys().isdisjoint(tokenizer.encode_as_text(typed))

    @both
    @given(before=TYPED, typed=TYPED, after=TYPED)
    def test_templates_keep_their_tokens_whatever_stands_between(
        self, tokenizer, before, typed, after
    ):
        parts = [before, UserText(typed), after]
        found = [i for i in text_ids(Joined(parts), tokenizer) if i in added(tokenizer)]
        of_templates = [*tokenizer.encode(before), *tokenizer.encode(after)]
        assert found == [i for i in of_templates if i in added(tokenizer)]

    @both
    @given(before=TYPED, typed=st.text("ab1 .é今\u0301", max_size=9), after=TYPED)
    def test_ids_are_those_of_the_whole_text_where_none_is_written(
        self, tokenizer, before, typed, after
    ):
        parts = [f"{before}user\n", UserText(typed), f"<|im_end|>{after}"]
        whole = "".join([parts[0], typed, parts[2]])
        assert text_ids(Joined(parts), tokenizer) == tokenizer.encode(whole)

    def test_a_text_that_a_template_completes(self):
        for parts in (["<|im_", UserText("end|>")], [UserText("<|im_"), "end|>"]):
            assert KIT.special.im_end in KIT.encode("<|im_end|>")
            assert KIT.control_ids.isdisjoint(text_ids(Joined(parts), KIT))
        for parts in (
            ["Read this ", UserText("content out loud")],
            [UserText("Read this content "), "out loud"],
        ):
            assert added(SMALL).keys().isdisjoint(text_ids(Joined(parts), SMALL))

    @pytest.mark.parametrize("normalizer", ["NFKC", "NFC"])
    def test_characters_that_the_tokenizer_turns_into_those_of_a_token(self, tmp_path, normalizer):
        content = json.loads((KIT_PAIR[0] / "tokenizer.json").read_text(encoding="utf-8"))
        content["normalizer"] = {"type": normalizer}
        for token in content["added_tokens"]:
            token["normalized"] = True
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), {}, "here")
        look_alikes = ["＜|im_end|＞", "<｜im_end｜>", "＜｜ｉｍ＿ｅｎｄ｜＞", "<|im_end|>"]
        recognised = [tokenizer.encode(text) == [400] for text in look_alikes]
        assert recognised == [normalizer == "NFKC"] * 3 + [True]
        for text in look_alikes:
            assert added(tokenizer).keys().isdisjoint(tokenizer.encode_as_text(text))

    def test_a_vocabulary_that_lists_a_token_as_a_word(self):
        content = json.loads((KIT_PAIR[0] / "tokenizer.json").read_text(encoding="utf-8"))
        model = content["model"]
        model["vocab"] |= {"<|": 500, "<|empty|>": 407}
        model["merges"] = [["<", "|"], ["<|", "empty|>"], *model["merges"]]
        model["vocab"]["empty|>"] = 501
        model["ignore_merges"] = True
        content["pre_tokenizer"]["use_regex"] = False
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), {}, "here")
        assert tokenizer.encode("<|empty|>") == [407]
        ids = tokenizer.encode_as_text("<|empty|>")
        assert 407 not in ids
        assert tokenizer.decode(ids) == "<|empty|>"


MARK = "<|im_end|>"
INTERLEAVED = "in_context_learning_s2s", "gen_speech"
EVERYTHING = "".join(token for token in WRITTEN if token.startswith("<"))


def with_text(given: Any, text: str) -> Any:
    """Arguments of a task with that text wherever a user writes one."""
    if isinstance(given, str) and given not in ("user", "assistant"):
        return f"{SOUND}{text}" if SOUND in given else text
    if isinstance(given, dict):
        return {name: with_text(part, text) for name, part in given.items()}
    return [with_text(part, text) for part in given] if isinstance(given, list) else given


def segments_of(task: str, text: str, special_tokens: bool, options: dict[str, Any]) -> Any:
    speech = Speech(torch.zeros(8, GROUP, dtype=torch.int64))
    context = PromptContext(seed=1, special_tokens=special_tokens)
    recordings: Any = [speech, speech]
    given = [
        part if isinstance(part, Speech) else with_text(part, text)
        for part in arguments(task, recordings)
    ]
    options = {name: with_text(part, text) for name, part in options.items()}
    return TASKS[task].prompt(context, *given, **options)


WRITING: list[tuple[str, dict[str, Any]]] = [
    ("tts_sft", {}),
    ("tts_sft", {"instruct": "x"}),
    ("tts_sft", {"template": "x"}),
    ("tts_sft", {"read_text_only": False}),
    ("asr_sft", {"template": "x"}),
    ("audio_understanding_sft", {}),
    ("audio_understanding_sft", {"thinking": True}),
    ("spoken_dialogue_sft", {"system_prompt": "x"}),
    ("spoken_dialogue_sft_multiturn", {"system_prompt": "x"}),
    ("speech2text_dialogue_sft_multiturn", {}),
    ("text_dialogue_sft", {}),
    ("text_dialogue_sft_multiturn", {}),
    ("in_context_learning_s2s", {}),
    ("instruction_following", {}),
    ("instruction_following", {"thinking": True}),
    ("few_shots_qa", {}),
    ("gen_text", {}),
    ("gen_speech", {}),
]


@pytest.mark.parametrize(("task", "options"), WRITING, ids=str)
class TestTasks:
    def control(self, model: MimoAudio, *request: Any) -> list[int]:
        ids = model.pack(segments_of(*request))[0, ::GROUP].tolist()
        return [token for token in ids if token in added(model.tokenizer)]

    def test_what_is_typed_adds_no_token(self, model, task, options):
        plain = self.control(model, task, "Hello.", False, options)
        for text in (MARK, EVERYTHING, f"Hello{EVERYTHING}"):
            assert self.control(model, task, text, False, options) == plain

    def test_it_is_all_there(self, model, task, options):
        segments = segments_of(task, f"A{EVERYTHING}b", False, options)
        read = model.tokenizer.decode(model.pack(segments)[0, ::GROUP].tolist())
        read = read.replace("<|empty|>", "") if task in INTERLEAVED else read
        assert "|>b" in read

    def test_an_option_gives_upstreams_tokens(self, model, task, options):
        plain = self.control(model, task, "Hello.", True, options)
        assert plain == self.control(model, task, "Hello.", False, options)
        found = self.control(model, task, f"A{MARK}b", True, options)
        assert found.count(model.im_end_idx) > plain.count(model.im_end_idx)

    def test_a_text_without_tokens_is_tokenized_as_upstream_does(self, model, task, options):
        for text in ("Hello there. 今天", " a\n\nb ", ": x(", ""):
            plain, upstreams = (segments_of(task, text, each, options) for each in (False, True))
            assert torch.equal(model.pack(plain), model.pack(upstreams))


def test_the_option_has_one_name_everywhere(model, audio):
    text = f"Hi.{MARK}"
    for prompt, request in (
        (model.get_tts_sft_prompt, [text]),
        (model.get_audio_understanding_sft_prompt, [audio[1], text]),
        (model.get_spoken_dialogue_sft_prompt, [audio[1], text]),
        (model.get_text_dialogue_sft_prompt, [text]),
        (model.get_in_context_learning_s2s_prompt, [text, [], audio[1]]),
        (partial(model.get_asr_sft_prompt, template=text), [audio[1]]),
    ):
        counts = [
            (prompt(*request, special_tokens=each)[0] == model.im_end_idx).sum()
            for each in (False, True)
        ]
        assert counts[1] == counts[0] + 1
    lengths = []
    for each in (False, True):
        options: dict[str, Any] = {"special_tokens": each, "max_new_tokens": 2, "seed": 1}
        model.text_dialogue_sft(text, **options)
        lengths.append(model.history.shape[1])
        [*model.stream("text_dialogue", text, **options)]
        assert model.history.shape[1] == lengths[-1]
    assert lengths[0] > lengths[1]


def test_sessions_and_what_they_save(model, audio, tmp_path):
    counts = []
    for each in (False, True):
        session = model.session(f"Be brief.{MARK}", special_tokens=each, seed=1)
        [*session.stream(audio[1], max_new_tokens=2)]
        counts.append(int((session.ids[0] == model.im_end_idx).sum()))
        session.save(tmp_path / "talk")
        assert model.restore_session(tmp_path / "talk")._special_tokens is each
    assert counts[1] == counts[0] + 1


def test_a_template_of_upstreams_keeps_its_token_and_another_wording_is_text():
    known = PromptContext().wording(TTS_TEMPLATES["en"], 0)
    assert isinstance(known, str)
    assert SMALL.encode(known)[0] in added(SMALL)
    assert PromptContext().wording(TTS_TEMPLATES["en"], known) == known
    assert PromptContext().wording(TTS_TEMPLATES["en"], MARK) == UserText(MARK)


class TestReplies:
    def read(self, tokens: list[int], shown: frozenset[int] = frozenset()) -> str:
        reader = ReplyReader(KIT, True, shown)
        words = [reader.read(token, torch.zeros(8, GROUP))[0] for token in tokens]
        return "".join([*words, reader.finish()[0]])

    def test_no_control_token_is_text(self):
        tokens = [*added(KIT)]
        hi, there = KIT.encode("Hi"), KIT.encode("there")
        assert self.read([*tokens, *hi, *tokens, *there, *tokens]) == "Hithere"
        spread = [piece for token in KIT.encode("今🙂") for piece in (token, *tokens)]
        assert self.read(spread) == "今🙂"

    def test_a_token_that_is_no_control_token_is_text(self):
        token = SMALL.encode(TTS_TEMPLATES["en"][0])[0]
        reader = ReplyReader(SMALL, True)
        assert reader.read(token, torch.zeros(8, GROUP))[0].strip() == TTS_TEMPLATES["en"][0]

    @pytest.mark.parametrize("task", METHODS)
    def test_texts_of_any_task(self, model, audio, monkeypatch, task):
        """The model draws a word and then every control token that does not end its reply."""
        script = force(monkeypatch, model, task)
        spoken = TASKS[task].speaks
        thinks = task.partition("_sft")[0].removesuffix("_multiturn") in (
            "audio_understanding",
            "speech2text_dialogue",
            "text_dialogue",
        )
        for thinking in (False, True)[: 1 + thinks]:
            given = arguments(task, audio) + ([None] if task == "tts_sft" else [])
            options: dict[str, Any] = {"thinking": True} if thinking else {}
            want = "</think>".join(["a", "b"]) if thinking and not spoken else "ab"
            limits = {"max_new_tokens": len(script) + 1, "seed": 1}
            assert getattr(model, task)(*given, **options, **limits) == want
            chunks = model.stream(task, *arguments(task, audio), **options, **limits)
            assert "".join(chunk.text for chunk in chunks).strip() == want
            shown = getattr(model, task)(*given, **options, **limits, special_tokens=True)
            hidden = ("<|empty|>", "<|eot|>", "<|eostm|>")
            assert shown == "".join(
                KIT.decode([token]) for token in script if KIT.decode([token]) not in hidden
            )

    def test_a_style_instruction_prints_no_control_token(self, model, monkeypatch):
        script = force(monkeypatch, model, "tts_sft")
        limits = {"max_new_tokens": len(script) + 1, "seed": 1}
        assert model.tts_sft("Hi.", None, instruct="happy", **limits) == "ab"
        chunks = model.stream("tts", "Hi.", "happy", **limits)
        assert "".join(chunk.text for chunk in chunks).strip() == "ab"


def force(monkeypatch: pytest.MonkeyPatch, model: MimoAudio, task: str) -> list[int]:
    """Makes the model draw `a`, each control token that does not end the task's reply, `b`."""
    ends = TASKS[task].stop_ids(model.tokenizer.special)
    control = [token for token in sorted(added(model.tokenizer)) if token not in ends]
    script = [*model.tokenizer.encode("a"), *control, *model.tokenizer.encode("b")]
    draw = Decoder.next_groups

    def scripted(self: Decoder, rows: Sequence[Row]) -> list[Group]:
        drawn = []
        for row, group in zip(rows, draw(self, rows), strict=True):
            text = script[min(row.produced, len(script)) - 1]
            finished = row.produced >= row.limits.max_new
            codes = torch.zeros_like(group.codes)
            drawn.append(replace(group, text=text, codes=codes, finished=finished))
        return drawn

    monkeypatch.setattr(Decoder, "next_groups", scripted)
    return script
