"""Upstream's views: values are upstream's own (truth.json), transformers', or this project's.

truth.json holds what upstream's code gave on a CPU in float32, for the kit's codec and tokenizer.
"""

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import AUDIO, KIT_PAIR, refuses
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import mimo_fast
from mimo_fast import ClosedError, MimoAudio, MiMoStopper, PromptError, load_audio
from mimo_fast.audio.mel import log_mel
from mimo_fast.upstream import (
    InputSegment,
    StreamingCache,
    StreamingConfig,
    StreamingInputSegment,
)
from mimo_fast.upstream.device import DeviceName

TRUTH = json.loads((Path(__file__).parent / "truth.json").read_text(encoding="utf-8"))
EMPTY = [64, 64, 16, 16, 16, 16, 16, 16]


@pytest.fixture
def mel(golden: Any) -> Tensor:
    return golden.get("codec:mel.0").float()[:120]


@pytest.fixture
def codec(model: MimoAudio) -> Any:
    return model.mimo_audio_tokenizer


@pytest.fixture
def codes(codec: Any, mel: Tensor) -> Tensor:
    return codec.encoder.encode(mel, [120], return_codes_only=True)[0][:8]


class TestCodec:
    @pytest.mark.parametrize("rows", TRUTH["codes"])
    def test_rows_of_several_lengths(self, codec, model, mel, rows):
        """Upstream pads them to the longest, which shows in the shorter ones' last codes."""
        want, lengths = TRUTH["codes"][rows], torch.tensor([*map(int, rows.split("-"))])
        got, frames = codec.encoder.encode(mel, lengths, return_codes_only=True)
        assert got[:8].tolist() == want["codes"]
        assert frames.tolist() == want["lengths"]
        assert torch.equal(model.encode_batch(mel, lengths), got)

    def test_padding_shows(self):
        """Otherwise the rows above would be equal to rows alone, and test little."""
        codes = TRUTH["codes"]
        assert codes["60-59-1"]["codes"] != codes["61-59"]["codes"]

    def test_groups_are_padded_apart(self, codec, model, mel):
        lengths = torch.tensor([40, 39, 41])
        apart = model.encode_batch(mel, lengths, max_length=79)
        rows = mel.split([79, 41])
        encoded = [
            codec.encoder.encode(part, given, return_codes_only=True)[0]
            for part, given in zip(rows, ([40, 39], [41]), strict=True)
        ]
        assert torch.equal(apart, torch.cat(encoded, dim=1))

    def test_one_row_is_our_codecs(self, codec, model, mel):
        states, packed, lengths, codes = codec.encode(mel, [120])
        assert torch.equal(codes, model.codec.quantize(model.codec.encode_mel(mel)))
        assert torch.equal(packed, model.codec.dequantize(codes))
        assert torch.equal(states, packed[None])
        assert lengths.tolist() == [30]
        states, packed, _, codes = codec.encode(mel, [120], use_quantizer=False)
        assert codes is None
        assert torch.equal(packed, model.codec.encode_mel(mel))
        assert codec.encoder.encode(mel, [120], n_q=3, return_codes_only=True)[0].shape == (3, 30)

    def test_states_of_rows_are_padded_with_zeros(self, codec, mel):
        states, packed, *_ = codec.encode(mel, [40, 80])
        assert states.shape == (2, 20, 64)
        assert torch.equal(torch.cat([states[0, :10], states[1]]), packed)
        assert not states[0, 10:].any()

    @pytest.mark.parametrize("lens", [None, [], [120, 1], [119], [0, 120], [121, -1]])
    def test_lengths_that_are_not_the_features(self, codec, mel, lens):
        refuses("120 frames of features, but lengths", codec.encoder.encode, mel, lens)

    @pytest.mark.parametrize("name", TRUTH["streams"])
    def test_a_stream_in_upstreams_windows(self, codec, codes, name):
        right, left, step = map(int, name.split("-"))
        cache, settings = StreamingCache(), StreamingConfig(left_overlap=left, right_overlap=right)
        for start, want in zip(range(0, 30, step), TRUTH["streams"][name], strict=True):
            part = codes[:, start : start + step]
            (heard,), kept = codec.streaming_decode(
                part, [part.shape[1]], cache, settings, last_chunk=start + step >= 30
            )
            assert kept is cache
            samples, processed, window, every = want
            assert cache.processed_lengths == [processed]
            assert len(cache.hidden_states[0]) == window
            if samples is None:
                assert heard is None
            else:
                assert heard.shape == (1, samples)
                torch.testing.assert_close(
                    heard[0, ::977], torch.tensor(every), atol=2e-5, rtol=1e-4
                )

    def test_streams_beside_each_other_are_streams_alone(self, codec, codes):
        other = codes.flip(1)
        settings = StreamingConfig(left_overlap=15, right_overlap=4)
        together, caches = StreamingCache(), [StreamingCache(), StreamingCache()]
        for sizes in ((7, 9), (12, 3), (11, 18)):
            taken = [0 if c.hidden_states is None else c.taken for c in caches]  # type: ignore[attr-defined]
            parts = [
                row[:, at : at + n] for row, at, n in zip((codes, other), taken, sizes, strict=True)
            ]
            both, together = codec.streaming_decode(
                torch.cat(parts, dim=1), torch.tensor(sizes), together, settings
            )
            for i, part in enumerate(parts):
                (alone,), _ = codec.streaming_decode(part, [sizes[i]], caches[i], settings)
                caches[i].taken = taken[i] + sizes[i]  # type: ignore[attr-defined]
                assert (alone is None) == (both[i] is None)
                assert alone is None or torch.equal(alone, both[i])

    def test_two_callers_share_no_cache(self, codec, codes):
        (first,), cache = codec.streaming_decode(codes[:, :8], [8], last_chunk=True)
        (second,), other = codec.streaming_decode(codes[:, :8], [8], last_chunk=True)
        assert torch.equal(first, second)
        assert cache is not other

    def test_decoding_is_our_codecs_in_another_shape(self, codec, model, codes):
        assert torch.equal(codec.decode(codes), model.codec.decode(codes)[None, None])
        refuses("codes hold an index outside its codebook", codec.decode, codes + 64)

    def test_its_config_is_the_checkpoints(self, codec):
        raw = json.loads((KIT_PAIR[1] / "config.json").read_text())
        stated = codec.config.to_dict()
        shared = stated.keys() & raw.keys()
        assert len(shared) > 30
        for key in shared - {"fmax"}:
            assert stated[key] == raw[key], key
        assert stated["fmax"] == (raw.get("fmax") or raw["sampling_rate"] / 2)
        assert codec.sampling_rate == 24000
        assert codec.downsample_rate == 960
        assert codec.get_output_length(100) == codec.encoder.get_output_length(100) == 50
        assert codec.get_output_length(torch.tensor([1, 2, 99])).tolist() == [1, 1, 50]


class TestLanguageModel:
    def test_its_config_is_the_checkpoints(self, model):
        raw = json.loads((KIT_PAIR[0] / "config.json").read_text())
        config = model.model.config
        shared = config.to_dict().keys() & raw.keys()
        assert len(shared) > 20
        assert {key: config.to_dict()[key] for key in shared} == {key: raw[key] for key in shared}
        assert model.delay_pattern == config.delay_pattern == raw["delay_pattern"]
        assert config.parsed_delay_pattern() == model.model.delay_pattern
        assert config.parsed_speech_empty_ids() == model.model.speech_empty_ids == EMPTY
        assert config.parsed_speech_vocab_sizes() == [size + 1 for size in EMPTY]

    def test_its_arguments_are_ids_of_the_tokenizer(self, model):
        given = model.model.args.to_dict()
        assert given.pop("model_name_or_path") == model.path
        ids = model.tokenizer.convert_tokens_to_ids
        assert given == {
            f"{name}_idx": ids(f"<|{name}|>")
            for name in ("sosp", "eosp", "sostm", "eostm", "eot", "empty")
        }

    def test_parameters_are_the_checkpoints(self, model):
        stored = load_file(KIT_PAIR[0] / "model.safetensors")
        held = dict(model.model.named_parameters())
        assert held.keys() == stored.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in stored.items())
        assert next(model.model.parameters()).device.type == "cpu"
        stored = load_file(KIT_PAIR[1] / "model.safetensors")
        held = dict(model.mimo_audio_tokenizer.named_parameters())
        assert held.keys() <= stored.keys()
        assert all(torch.equal(held[name], stored[name]) for name in held)
        encoder = dict(model.mimo_audio_tokenizer.encoder.named_parameters())
        assert {f"encoder.{name}" for name in encoder} == {n for n in held if n[:8] == "encoder."}

    def test_generate_is_ours_with_upstreams_arguments(self, model):
        prompt = model.get_text_dialogue_sft_prompt("hi")
        flat, groups = prompt.T.reshape(1, -1), prompt.shape[1] // 4
        stopper = MiMoStopper(4, 8, [400], max_length=groups + 3)
        got = model.model.generate(flat, {"max_length": 8192}, stopping_criteria=[stopper])
        want = mimo_fast.generate(model, prompt, max_new_tokens=3)
        assert got.dtype == torch.int64
        assert torch.equal(got, want.long().T.reshape(1, -1))
        by_name = model.model.generate(input_ids=flat, max_new_tokens=3)
        assert torch.equal(by_name, got)
        assert torch.equal(mimo_fast.generate(model.model, prompt, max_new_tokens=3), want)

    def test_it_stays_what_it_is(self, model):
        view = model.model
        assert view is model.model
        assert copy.copy(model).model is view
        for same in (view.eval(), view.to("cpu"), view.to(torch.device("cpu")), view.float()):
            assert same is view
        assert view.train(False) is view.requires_grad_(False) is view
        assert view.to(device="cpu", dtype=torch.float32) is view
        assert not view.training
        for change in (view.train, view.half, view.bfloat16, view.cuda, view.requires_grad_):
            refuses("load", change)
        refuses("load it with dtype='float64'", view.to, torch.float64)
        refuses("load it with device='cuda:1'", view.to, "cuda:1")
        refuses("load it with device='cuda:1'", view.to, 1)

    def test_another_model_has_another_view(self, model):
        own = copy.copy(model)
        own.lm = copy.copy(model.lm)
        view = own.model
        assert view is not model.model
        assert view is own.model
        assert own.model.lm is own.lm
        assert model.model.lm is model.lm

    def test_after_close(self):
        own = mimo_fast.load(*KIT_PAIR, device="cpu")
        view, codec = own.model, own.mimo_audio_tokenizer
        own.close()
        for call in (
            lambda: view.device,
            lambda: list(view.parameters()),
            lambda: view.generate(torch.zeros(1, 36, dtype=torch.int64)),
            lambda: codec.dtype,
            lambda: codec.decode(torch.zeros(8, 4, dtype=torch.int64)),
        ):
            with pytest.raises(ClosedError):
                call()

    def test_a_limit_in_generate_kwargs(self, model):
        own = copy.copy(model)
        own.generate_kwargs = own.generate_kwargs | {"max_length": 40}
        prompt = own.get_text_dialogue_sft_prompt("hi")
        own.forward(prompt, task_name="text_chat", seed=1)
        assert own.history.shape[1] == 40 * 36
        own.forward(prompt, task_name="text_chat", add_history=True, seed=1)
        # As upstream, which looks at the length after the first group.
        assert own.history.shape[1] == (40 + prompt.shape[1] // 4 + 1) * 36
        own.forward(prompt, task_name="text_chat", max_new_tokens=2, seed=1)
        assert own.history.shape[1] == (prompt.shape[1] // 4 + 2) * 36


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(KIT_PAIR[0])


TEXTS = ["", "hi", "Hello there, 你好!", "a<|im_end|>b <|empty|>", "  two  spaces\n", "🙂é"]


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_calls_are_transformers(self, model, theirs, text):
        ours = model.tokenizer
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] == ours.encode(text)
        assert ours(text).input_ids == ours(text, add_special_tokens=False)["input_ids"]
        assert ours(text)["attention_mask"] == theirs(text)["attention_mask"]
        assert ours.tokenize(text) == theirs.tokenize(text)
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
        if ids:
            named: dict[str, Any] = {
                "return_tensors": "pt",
                "truncation": True,
                "max_length": 3,
                "padding": False,
            }
            got, want = (each(text, **named)["input_ids"] for each in (ours, theirs))
            assert got.dtype == want.dtype == torch.int64
            assert torch.equal(got, want)

    def test_batches(self, model, theirs):
        ours, texts = model.tokenizer, TEXTS[1:]
        assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
        got, want = (
            each(texts, padding=True, padding_side="right", return_tensors="pt")
            for each in (ours, theirs)
        )
        assert torch.equal(got["input_ids"], want["input_ids"])
        assert torch.equal(got["attention_mask"], want["attention_mask"])
        assert torch.equal(got.to("cpu").input_ids, got.input_ids)
        assert ours(texts, padding="max_length", max_length=90, return_tensors="pt")[
            "input_ids"
        ].shape == (len(texts), 90)
        refuses("only with padding=True", ours, texts, return_tensors="pt")
        refuses("return_tensors must be 'pt' or None, not 'tf'", ours, "a", return_tensors="tf")
        with pytest.raises(AttributeError):
            _ = got.pixels

    def test_names_and_ids(self, model, theirs):
        ours = model.tokenizer
        # Upstream's class adds those that the checkpoint lacks.
        theirs = copy.deepcopy(theirs)
        vocabulary = ours.get_vocab()
        assert vocabulary.items() >= theirs.get_vocab().items()
        assert len(ours) == len(vocabulary)
        assert ours.vocab_size == theirs.vocab_size
        names = ["<|sosp|>", "a", "<|im_end|>"]
        for each in names:
            assert ours.convert_tokens_to_ids(each) == theirs.convert_tokens_to_ids(each)
        ids = ours.convert_tokens_to_ids(names)
        assert ids == theirs.convert_tokens_to_ids(names)
        # transformers 5 has an unk_token of its own for this checkpoint, upstream's 4.49 has none.
        assert ours.convert_tokens_to_ids(["no token of it", "a"]) == [None, ids[1]]
        assert ours.unk_token_id is None
        assert ours.convert_ids_to_tokens(ids) == names
        assert ours.convert_ids_to_tokens(ids[0]) == names[0]
        assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["a"]
        for name in ("eos_token", "pad_token", "bos_token_id"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.eos_token_id == theirs.eos_token_id == model.tokenizer.special.eos
        assert ours.pad_token_id == theirs.pad_token_id == model.padding_idx
        assert set(ours.all_special_tokens) >= set(theirs.all_special_tokens)
        assert ours.convert_ids_to_tokens(ours.all_special_ids) == ours.all_special_tokens
        assert ours.get_added_vocab().items() >= theirs.get_added_vocab().items()

    def test_ids_of_every_kind_are_decoded(self, model):
        ours = model.tokenizer
        ids = ours.encode("hello")
        for given in (ids, torch.tensor(ids), torch.tensor(ids).int(), np.array(ids), tuple(ids)):
            assert ours.decode(given) == "hello"
        assert ours.decode([torch.tensor(i) for i in ids]) == "hello"
        first = ours.decode(ids[:1])
        assert ours.decode(ids[0]) == ours.decode(torch.tensor(ids[0])) == first
        assert ours.batch_decode(torch.tensor([ids, ids])) == ["hello", "hello"]

    def test_it_is_the_models_own(self, model):
        assert model.tokenizer is model.pipeline.tokenizer
        own = copy.copy(model)
        plain = mimo_fast.text.tokenizer.Tokenizer.from_directory(KIT_PAIR[0])
        own.tokenizer = plain
        assert own.tokenizer("hi")["input_ids"] == plain.encode("hi")
        assert model.tokenizer is not own.tokenizer


class TestSegments:
    @pytest.mark.parametrize("name", TRUTH["segments"])
    @pytest.mark.parametrize("by", ["ours", "transformers'"])
    def test_ids_are_upstreams(self, model, theirs, name, by):
        tokenizer = model.tokenizer if by == "ours" else theirs
        text, groups = name.split("|")
        audio = torch.arange(int(groups) * 32) * 7 % 16
        fill: dict[str, Any] = {"speech_zeroemb_idx": EMPTY, "text_zeroemb_idx": 407}
        segments = {
            "text": InputSegment(text, **fill),
            "audio": InputSegment(audio=audio, **fill),
            "open": InputSegment(audio=audio, add_sosp_eosp=False, **fill),
            "one": InputSegment(audio=audio, speech_zeroemb_idx=9, text_zeroemb_idx=407),
            "reply": StreamingInputSegment(text, audio=audio, **fill),
            "ids": InputSegment(tokenized_text=torch.arange(5).int(), **fill),
        }
        wanted = TRUTH["segments"][name]
        assert segments.keys() == wanted.keys()
        for kind, segment in segments.items():
            ids = segment.to_input_id(tokenizer, 4, 8)
            assert ids.tolist() == wanted[kind]["ids"], kind
            assert str(ids.dtype) == wanted[kind]["dtype"], kind

    def test_a_prompt_by_hand_is_the_methods(self, model):
        """As third-party code builds prompts, with `preprocess_input` and `get_input_ids`."""
        speech = load_audio(AUDIO, 24000)[:24000]
        fill: dict[str, Any] = {
            "speech_zeroemb_idx": model.speech_zeroemb_idx,
            "text_zeroemb_idx": model.empty_token,
        }
        audio, text = (model.preprocess_input(each) for each in (speech, "What is said?"))
        prompt = [
            InputSegment(text="<|im_start|>user\n", **fill),
            InputSegment(audio=audio, **fill),
            InputSegment(text=text, **fill),
            InputSegment(text="<|im_end|>\n", **fill),
            InputSegment(text="<|im_start|>assistant\n", **fill),
            InputSegment(text="<think>\n\n</think>\n", **fill),
        ]
        want = model.get_audio_understanding_sft_prompt(speech, "What is said?")
        got = model.get_input_ids(prompt)
        assert torch.equal(got, want)
        ours = ["<|im_start|>user\n", model.speech(speech), *prompt[2:]]
        assert torch.equal(model.get_input_ids(ours), want)

    def test_what_is_no_segment(self, model):
        refuses("needs text", InputSegment, None, kind=PromptError)
        refuses("needs text", StreamingInputSegment, None, kind=PromptError)
        odd = InputSegment(audio=torch.zeros(33, dtype=torch.int64))
        place, kind = (model.tokenizer, 4, 8), PromptError
        refuses("33 codes are no whole groups of 8 x 4$", odd.to_input_id, *place, kind=kind)
        refuses("needs the codes", StreamingInputSegment("a").to_input_id, *place, kind=kind)


class TestFeatures:
    def test_wav2mel_is_our_log_mel(self, model):
        speech = load_audio(AUDIO, 24000)[:50001]
        want = log_mel(speech, model.codec.config).T
        assert torch.equal(model.wav2mel(speech), want)
        magnitudes = model.mel_transform(torch.stack([speech, speech / 2])[:, None])
        assert magnitudes.shape == (2, 1, *want.shape)
        assert torch.equal(magnitudes[0, 0].clip(min=1e-7).log(), want)
        torch.testing.assert_close(magnitudes[1], magnitudes[0] / 2)
        assert model.mel_transform.to("cpu") is model.mel_transform

    def test_short_audio(self, model):
        short = torch.ones(3)
        assert torch.equal(model.wav2mel(short), log_mel(short, model.codec.config).T)

    def test_by_parts_it_is_preprocess_input(self, model):
        """What public code does by hand to have codes."""
        wav = load_audio(AUDIO, 24000)
        mel = model.wav2mel(wav).transpose(0, 1)
        codes = model.encode_batch(input_features=mel, input_lens=torch.tensor([len(mel)]))
        codes = codes.transpose(0, 1).detach().cpu()[:, : model.audio_channels]
        short = -len(codes) % model.group_size
        codes = torch.cat([codes, codes[-1:].repeat(short, 1)])
        assert torch.equal(codes.reshape(-1), model.preprocess_input(str(AUDIO)))

    @pytest.mark.parametrize("most", [1, 5, 9, 100])
    def test_groups_hold_as_many_rows_as_fit(self, model, most):
        lengths = torch.tensor([4, 1, 1, 9, 2, 3, 0, 12])
        features = torch.arange(32)[:, None]
        parts, sizes = model.group_by_length(features, lengths, most)
        assert torch.equal(torch.cat(parts), features)
        assert torch.equal(torch.cat(sizes), lengths)
        assert [len(part) for part in parts] == [int(size.sum()) for size in sizes]
        for size in sizes:
            assert int(size.sum()) <= most or int((size > 0).sum()) == 1
        for one, other in itertools.pairwise(sizes):
            assert int(one.sum()) + int(other[0]) > most

    def test_lengths_of_other_features(self, model):
        given = torch.zeros(3, 2), torch.tensor([1, 1]), 9
        refuses(r"3 frames of features, but lengths \[1, 1\]", model.group_by_length, *given)


class TestDevice:
    def test_it_is_a_string_and_a_device(self, model):
        device = model.device
        assert isinstance(device, str)
        assert device == "cpu"
        assert "cpu" == device  # noqa: SIM300, either side may ask
        assert device == torch.device("cpu")
        assert torch.device("cpu") == device
        assert device != "cuda"
        assert device != torch.device("cuda")
        assert (device.type, device.index) == ("cpu", None)
        assert f"{device}" == "cpu"
        assert torch.zeros(1, device=device).to(device).device == device
        assert torch.device(device) == torch.device("cpu")
        assert {device: 1}["cpu"] == 1

    def test_a_gpu_by_both_of_its_names(self):
        device = DeviceName("cuda", torch.device("cuda", 0))
        assert device == "cuda"
        assert device == torch.device("cuda")
        assert device == torch.device("cuda:0")
        assert device != torch.device("cuda:1")
        assert (device.type, device.index) == ("cuda", 0)
        for twin in (copy.deepcopy(device), pickle.loads(pickle.dumps(device))):
            assert twin == device
            assert twin.index == 0

    def test_it_is_what_was_asked_for(self):
        with mimo_fast.load(*KIT_PAIR, device=torch.device("cpu")) as own:
            assert own.device == "cpu"
