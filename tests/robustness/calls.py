"""Every public function and method, with arguments that are right."""

import asyncio
import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pairs import GROUPS, KIT, SECOND, Bystander, answer, check_speech

Arguments = dict[str, Any]
Calls = dict[str, tuple[Callable[..., Any], Arguments]]


def calls(bystander: Bystander, folder: Path) -> Calls:
    """Name -> function and arguments that are right, all of them fresh."""
    import mimo_fast
    from mimo_fast.runtime.codec.together import Push
    from mimo_fast.runtime.session import Exchange
    from mimo_fast.text.prompt import Speech
    from mimo_fast.upstream import InputSegment

    model = bystander.model
    codec = model.codec
    ids = model.get_tts_sft_prompt("hello", seed=1).long()
    codes = torch.zeros(8, 8, dtype=torch.int64)
    mel, upstream_codec = torch.zeros(41, codec.config.n_mels), model.mimo_audio_tokenizer
    speech, output = SECOND, str(folder / "out.wav")
    limits: Arguments = {"max_new_tokens": 3, "min_new_tokens": 1, "seed": 1, "adapter": None}
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    texts = [user | {"content": "a"}, assistant | {"content": "b"}, user | {"content": "c"}]
    heard = [user | {"content": speech}, assistant | {"content": "b"}, user | {"content": speech}]
    reply = assistant | {"content": {"text": "b", "audio": speech}}
    spoken = [user | {"content": speech}, reply, user | {"content": speech}]
    example = {"input_audio": speech, "output_audio": speech, "output_transcription": "hello"}
    by_example: Arguments = {"instruction": "say", "prompt_examples": [example], "audio": speech}
    dialogue: Arguments = {"system_prompt": "Be brief.", "prompt_speech": speech}
    kit: Arguments = {"lm": str(KIT / "lm"), "codec": str(KIT / "codec")}
    options: Arguments = {
        "device": "cpu",
        "dtype": "float32",
        "quantization": None,
        "max_batch": 1,
        "max_seq_len": GROUPS,
        "kv_cache": None,
        "adapters": {"a": str(KIT.parent / "adapters" / "qkvo")},
        "merge_adapters": None,
        "codec_rope": "exact",
        "offload": [],
        "local_files_only": True,
        "revision": None,
    }
    raw = {name: _json(KIT / name / "config.json") for name in ("lm", "codec")}

    def streamed(**arguments: Any) -> list[Any]:
        return [*model.stream(**arguments)]

    def streamed_async(**arguments: Any) -> list[Any]:
        return asyncio.run(_collected(model.astream(**arguments)))

    def transcribed(**arguments: Any) -> list[Any]:
        return [*model.transcript(**arguments)]

    def batched(**arguments: Any) -> list[Any]:
        return [(each.text, each.error) for each in mimo_fast.batch(**arguments)]

    triple = [(speech, speech, "hello")]
    converting: Arguments = {"seed": 1, "max_new_tokens": 3}

    def converted(
        examples: Any = triple, instruction: Any = "say", adapter: Any = None, **arguments: Any
    ) -> list[Any]:
        return [*model.converter(examples, instruction, adapter).stream(**arguments)]

    transcribing = {"template": 0, "seed": 1, "max_new_tokens": 3, "language": None}
    transcribing |= {"adapter": None}

    def said(**arguments: Any) -> list[Any]:
        return [*model.session(seed=1).stream(**arguments)]

    def said_async(**arguments: Any) -> list[Any]:
        return asyncio.run(_collected(model.session(seed=1).astream(**arguments)))

    def restarted(codes: Any, reply: Any, exchanges: Any) -> list[Any]:
        session = model.session(seed=1)
        given = Exchange(Speech(codes), reply) if exchanges is None else exchanges
        session.restart([given] if isinstance(given, Exchange) else given)
        return [*session.stream(speech, max_new_tokens=2)]

    def first_turn(**arguments: Any) -> list[Any]:
        return [*model.session(**arguments).stream(speech, max_new_tokens=3)]

    def interrupted(**arguments: Any) -> None:
        session = model.session(seed=1)
        stream = session.stream(speech, max_new_tokens=6, min_new_tokens=6)
        next(stream)
        session.interrupt(**arguments)
        check_speech([*session.stream(speech, max_new_tokens=3)])

    def saved(**arguments: Any) -> None:
        session = model.session(seed=1)
        [*session.stream(speech, max_new_tokens=3)]
        session.save(**arguments)

    def decoded(prompt: Any = ids, conversation: Any = "new", **arguments: Any) -> list[Any]:
        sequence = model.conversation(1) if isinstance(conversation, str) else conversation
        if isinstance(conversation, str):
            sequence.add(ids)
        return [*model.decode(sequence, **arguments)]

    def conversation(**arguments: Any) -> None:
        sequence = model.conversation(**arguments)
        sequence.add(ids)
        [*model.decode(sequence, "tts", frozenset(), 3)]

    def incremental(codes: Any, lookahead: Any, moments: Any, weight: Any, last: Any = None) -> Any:
        stream = codec.stream(lookahead, moments, weight)
        return torch.cat([stream.push(codes), stream.finish(last)])

    def sampled(**arguments: Any) -> Any:
        sampler = mimo_fast.MiMoSampler(**arguments)
        given = {"global_sampler": sampler, "local_sampler": sampler}
        return mimo_fast.generate(model, ids, seed=1, max_new_tokens=2, **given)

    def stopped(**arguments: Any) -> Any:
        stopper = mimo_fast.MiMoStopper(**arguments)
        return mimo_fast.generate(model, ids, None, [stopper], seed=1, max_new_tokens=3)

    def loaded(**arguments: Any) -> None:
        answer(mimo_fast.load(**arguments))

    def constructed(lm: Any = None, codec: Any = None, **arguments: Any) -> None:
        answer(mimo_fast.MimoAudio(lm, codec, **arguments))

    def limited(**arguments: Any) -> Any:
        return mimo_fast.load_audio(speech, 24000, limits=mimo_fast.DecodeLimits(**arguments))

    def cleared(history: Any) -> None:
        model.history = history

    def accelerated(tensors: Any, config: Any, empty_idx: Any, inputs: Any, **rest: Any) -> Any:
        upstream = SimpleNamespace(config=config, args=SimpleNamespace(empty_idx=empty_idx))
        upstream.state_dict = lambda: tensors
        return mimo_fast.accelerate(upstream).generate(inputs, **rest)

    config: Arguments = {"max_new_tokens": 3, "do_sample": True, "temperature": 1.0, "top_k": 5}
    config |= {"top_p": 0.9, "max_length": 64, "min_new_tokens": 0, "pad_token_id": 0}
    everything: Arguments = {
        "generation_config": config,
        "stopping_criteria": [mimo_fast.MiMoStopper(4, 8, [1, 2], 60, 1)],
        "streamer": SimpleNamespace(put=lambda ids: None, end=lambda: None),
        "global_sampler": mimo_fast.MiMoSampler(True, 0.9, 5, 0.9),
        "local_sampler": mimo_fast.MiMoSampler(True, 0.9, 5, 0.9),
    }
    return {
        "load": (loaded, kit | options),
        "MimoAudio": (constructed, kit | options),
        "load_audio": (
            mimo_fast.load_audio,
            {"source": speech, "sample_rate": 24000, "source_rate": 16000, "limits": _limits()},
        ),
        "prepare_speech": (
            mimo_fast.prepare_speech,
            {"audio": speech, "sample_rate": 24000},
        ),
        "save_wav": (mimo_fast.save_wav, {"target": output, "wav": speech, "sample_rate": 24000}),
        "generate": (
            mimo_fast.generate,
            {"model": model, "input_ids": ids, **everything, "seed": 1, "adapter": None},
        ),
        "accelerate": (mimo_fast.accelerate, {"model": SimpleNamespace(model=1)}),
        "accelerate upstream": (
            accelerated,
            {
                "tensors": _tensors(),
                "config": {**raw["lm"], "max_position_embeddings": GROUPS},
                "empty_idx": model.empty_token,
                "inputs": ids,
                "generation_config": config,
                "seed": 1,
            },
        ),
        "LMConfig": (mimo_fast.LMConfig.from_dict, {"raw": raw["lm"], "source": "x"}),
        "DecodeLimits": (limited, {"seconds": 60.0, "bytes": 10**6}),
        "LMConfig.is_trained": (model.lm.config.is_trained, {"task": "tts_sft", "option": None}),
        "LMConfig.calibration": (model.lm.config.calibration, {"task": "asr"}),
        "LMConfig.longest_reply": (
            model.lm.config.longest_reply,
            {"task": "asr", "groups_heard": 10},
        ),
        "LMConfig.from_dict": (mimo_fast.LMConfig.from_dict, {"raw": raw["lm"]}),
        "CodecConfig": (mimo_fast.CodecConfig.from_dict, {"raw": raw["codec"], "source": "x"}),
        "CodecConfig.from_dict": (mimo_fast.CodecConfig.from_dict, {"raw": raw["codec"]}),
        "MiMoSampler": (
            sampled,
            {"do_sample": True, "temperature": 0.9, "top_k": 5, "top_p": 0.9},
        ),
        "MiMoStopper": (
            stopped,
            {
                "group_size": 4,
                "audio_channels": 8,
                "stop_tokens": [1, 2],
                "max_length": 60,
                "min_length": 1,
            },
        ),
        "MimoAudio.history": (cleared, {"history": None}),
        "MimoAudio.history restored": (cleared, {"history": ids.T.reshape(1, -1)}),
        "MimoAudio.wav2mel": (model.wav2mel, {"wav": speech}),
        "MimoAudio.resample_audio_if_needed": (
            model.resample_audio_if_needed,
            {"wav_tensor": speech, "original_sr": 16000},
        ),
        "MimoAudio.group_by_length": (
            model.group_by_length,
            {"features": mel, "lengths": torch.tensor([20, 21]), "max_length": 30},
        ),
        "MimoAudio.encode_batch": (
            model.encode_batch,
            {"input_features": mel, "input_lens": torch.tensor([20, 21]), "max_length": 30},
        ),
        "MimoAudio.get_input_ids": (
            model.get_input_ids,
            {"prompt": ["hello", model.speech(speech), InputSegment("a", speech_zeroemb_idx=16)]},
        ),
        "upstream's generate": (
            model.model.generate,
            {"inputs": ids, "generation_config": config, "seed": 1, "adapter": None},
        ),
        "upstream's encode": (
            upstream_codec.encoder.encode,
            {"input_features": mel, "input_lens": [20, 21], "return_codes_only": True, "n_q": 8},
        ),
        "upstream's decode": (upstream_codec.decode, {"codes": codes}),
        "upstream's streaming_decode": (
            upstream_codec.streaming_decode,
            {"codes_chunks": codes, "chunk_input_lengths": [3, 5], "last_chunk": True},
        ),
        "MimoAudio.warmup": (model.warmup, {"progress": False}),
        "MimoAudio.get_task_sampler": (model.get_task_sampler, {"task_name": "tts"}),
        "MimoAudio.save_wav": (model.save_wav, {"path": output, "wav": speech}),
        "MimoAudio.preprocess_input": (model.preprocess_input, {"input": speech}),
        "MimoAudio.speech": (model.speech, {"audio": speech, "closed": True}),
        "MimoAudio.pack": (model.pack, {"segments": ["hello", model.speech(speech), "a"]}),
        "MimoAudio.session": (
            first_turn,
            {"system_prompt": "Be brief.", "voice": speech, "seed": 1, "adapter": None},
        ),
        "MimoAudio.restore_session": (model.restore_session, {"path": output}),
        "MimoAudio.conversation": (conversation, {"seed": 1, "adapter": None}),
        "MimoAudio.decode": (
            decoded,
            {
                "conversation": "new",
                "task_name": "tts",
                "stop_ids": frozenset([1]),
                "max_new_tokens": 3,
                "min_new_tokens": 1,
            },
        ),
        "MimoAudio.forward": (
            model.forward,
            {
                "input_ids": ids,
                "return_audio": True,
                "output_audio_path": output,
                "stopping_criteria": [mimo_fast.MiMoStopper(4, 8, [1])],
                "add_history": False,
                "task_name": "tts",
                **limits,
            },
        ),
        "MimoAudio.stream": (
            streamed,
            {"task": "tts", "input": "hello", "lookahead": "elastic", **limits},
        ),
        "MimoAudio.stream asr": (streamed, {"task": "asr", "input": speech, **limits}),
        "MimoAudio.stream dialogue": (
            streamed,
            {"task": "spoken_dialogue", "input_speech": speech, **dialogue, **limits},
        ),
        "MimoAudio.transcribe": (model.transcribe, {"audio": speech, **transcribing}),
        "MimoAudio.transcript": (transcribed, {"audio": speech, "waits": 1.0, **transcribing}),
        "batch": (
            batched,
            {
                "model": model,
                "task": "tts",
                "requests": ["hello", {"input": "hello"}],
                "folder": str(folder / "batch"),
                "suffix": ".wav",
                "names": ["first", "second"],
                "progress": False,
                "seed": 1,
                "max_new_tokens": 3,
            },
        ),
        "convert": (
            mimo_fast.convert,
            {
                "model": model,
                "audio": speech,
                "examples": triple,
                "instruction": "voice",
                "output": output,
                "adapter": None,
                **converting,
            },
        ),
        "MimoAudio.converter": (
            converted,
            {
                "audio": speech,
                "examples": triple,
                "instruction": "say",
                "adapter": None,
                **converting,
            },
        ),
        "Converter.stream": (
            converted,
            {"audio": speech, "lookahead": "elastic", "priority": "batch", **converting},
        ),
        "MimoAudio.astream": (streamed_async, {"task": "tts", "input": "hello", **limits}),
        "MimoAudio.asr_sft": (model.asr_sft, {"audio": speech, "audio_tag": "", **limits}),
        "MimoAudio.tts_sft": (
            model.tts_sft,
            {
                "text": "hello",
                "output_path": output,
                "instruct": "fast",
                "read_text_only": True,
                "prompt_speech": speech,
                **limits,
            },
        ),
        "MimoAudio.audio_understanding_sft": (
            model.audio_understanding_sft,
            {"input_speech": speech, "input_text": "what?", "thinking": False, **limits},
        ),
        "MimoAudio.spoken_dialogue_sft": (
            model.spoken_dialogue_sft,
            {"input_speech": speech, "output_audio_path": output, "add_history": True}
            | dialogue
            | limits,
        ),
        "MimoAudio.spoken_dialogue_sft_multiturn": (
            model.spoken_dialogue_sft_multiturn,
            {"message_list": spoken, "output_audio_path": output, **dialogue, **limits},
        ),
        "MimoAudio.speech2text_dialogue_sft": (
            model.speech2text_dialogue_sft,
            {"input_speech": speech, "thinking": True, "add_history": True, **limits},
        ),
        "MimoAudio.speech2text_dialogue_sft_multiturn": (
            model.speech2text_dialogue_sft_multiturn,
            {"message_list": heard, "thinking": True, **limits},
        ),
        "MimoAudio.text_dialogue_sft": (
            model.text_dialogue_sft,
            {"input_text": "hello", "thinking": True, "add_history": True, **limits},
        ),
        "MimoAudio.text_dialogue_sft_multiturn": (
            model.text_dialogue_sft_multiturn,
            {"message_list": texts, "thinking": True, **limits},
        ),
        "MimoAudio.in_context_learning_s2s": (
            model.in_context_learning_s2s,
            {**by_example, "output_audio_path": output, **limits},
        ),
        "MimoAudio.speech_continuation": (
            model.speech_continuation,
            {"audio": speech, "output_audio_path": output, **limits},
        ),
        "MimoAudio.get_asr_sft_prompt": (
            model.get_asr_sft_prompt,
            {"input": speech, "audio_tag": "", "template": 0, "seed": 1},
        ),
        "MimoAudio.get_tts_sft_prompt": (
            model.get_tts_sft_prompt,
            {
                "input": "hello",
                "instruct": "fast",
                "read_text_only": False,
                "prompt_speech": speech,
                "template": 0,
                "seed": 1,
            },
        ),
        "MimoAudio.get_audio_understanding_sft_prompt": (
            model.get_audio_understanding_sft_prompt,
            {"input_speech": speech, "input_text": "what?", "thinking": True},
        ),
        "MimoAudio.get_spoken_dialogue_sft_prompt": (
            model.get_spoken_dialogue_sft_prompt,
            {"input_speech": speech, **dialogue, "add_history": False},
        ),
        "MimoAudio.get_spoken_dialogue_sft_multiturn_prompt": (
            model.get_spoken_dialogue_sft_multiturn_prompt,
            {"message_list": spoken, **dialogue},
        ),
        "MimoAudio.get_s2t_dialogue_sft_prompt": (
            model.get_s2t_dialogue_sft_prompt,
            {"input_speech": speech, "thinking": True},
        ),
        "MimoAudio.get_s2t_dialogue_sft_multiturn_prompt": (
            model.get_s2t_dialogue_sft_multiturn_prompt,
            {"message_list": heard, "thinking": True},
        ),
        "MimoAudio.get_text_dialogue_sft_prompt": (
            model.get_text_dialogue_sft_prompt,
            {"input_text": "hello", "thinking": True},
        ),
        "MimoAudio.get_text_dialogue_sft_multiturn_prompt": (
            model.get_text_dialogue_sft_multiturn_prompt,
            {"message_list": texts, "thinking": True},
        ),
        "MimoAudio.get_in_context_learning_s2s_prompt": (
            model.get_in_context_learning_s2s_prompt,
            by_example,
        ),
        "MimoAudio.get_speech_continuation_prompt": (
            model.get_speech_continuation_prompt,
            {"audio": speech},
        ),
        "Session.stream": (
            said,
            {"audio": speech, "max_new_tokens": 3, "min_new_tokens": 1, "lookahead": "exact"},
        ),
        "Session.astream": (said_async, {"audio": speech, "max_new_tokens": 3}),
        "Session.interrupt": (interrupted, {"played_ms": 100.0}),
        "Session.restart": (restarted, {"codes": codes, "reply": ids[:, :8], "exchanges": None}),
        "Session.save": (saved, {"path": output}),
        "Session.restore": (
            mimo_fast.Session.restore,
            {"pipeline": model.pipeline, "path": output},
        ),
        "Codec.encode": (codec.encode, {"wav": speech, "n_q": 8}),
        "Codec.decode": (codec.decode, {"codes": codes}),
        "Codec.moments": (codec.moments, {"codes": codes}),
        "Codec.check_codes": (codec.check_codes, {"codes": codes}),
        "Codec.stream": (
            incremental,
            {"codes": codes, "lookahead": 2, "moments": None, "weight": 50.0, "last": codes},
        ),
        "Codec.stream elastic": (
            incremental,
            {
                "codes": codes,
                "lookahead": "elastic",
                "moments": codec.moments(codes),
                "weight": 50.0,
                "last": codes,
            },
        ),
        "Codec.advance": (codec.advance, {"pushes": [Push(codec.stream(), codes)]}),
        "Codec.calibrate": (copy.copy(codec).calibrate, {"recordings": [codes]}),
    }


def inner_calls(bystander: Bystander) -> Calls:
    """The functions over the weights, likewise."""
    from mimo_fast.runtime.codec.network import MelRow
    from mimo_fast.runtime.lm.model import PlacedIds

    model = bystander.model
    codec, lm = model.codec, model.lm
    ids = model.get_tts_sft_prompt("hello", seed=1).long()
    codes = torch.zeros(8, 8, dtype=torch.int64)
    slots, settings = torch.tensor([0]), _settings(1)

    @torch.no_grad()
    def state() -> Any:
        made = lm.new_state([1, 2], 64)
        lm.prefill(ids.cpu(), made, 0)
        return made

    return {
        "Codec.quantize": (codec.quantize, {"hidden": torch.zeros(4, codec.config.dim), "n_q": 8}),
        "Codec.encode_packed": (
            codec.encode_packed,
            {"mel": torch.zeros(41, codec.config.n_mels), "lengths": [20, 21]},
        ),
        "Codec.encode_mel": (codec.encode_mel, {"mel": torch.zeros(40, codec.config.n_mels)}),
        "Codec.convolved": (
            codec.convolved,
            {"mel": torch.zeros(40, codec.config.n_mels), "padded": False},
        ),
        "Codec.dequantize": (codec.dequantize, {"codes": codes}),
        "Codec.decode_hidden": (codec.decode_hidden, {"hidden": torch.zeros(4, codec.config.dim)}),
        "Codec.warmup": (codec.warmup, {"streams": 1, "progress": False}),
        "Codec.warm_up_encoder": (codec.warm_up_encoder, {"n_q": 8, "progress": False}),
        "Codec.encode_later": (codec.encode_later, {"wav": torch.zeros(4000), "n_q": 8}),
        "Codec.encode_measured": (codec.encode_measured, {"wav": torch.zeros(4000), "n_q": 8}),
        "Codec.encode_together": (
            codec.encode_together,
            {"waves": [torch.zeros(4000), torch.zeros(9)], "n_q": 8},
        ),
        "Codec.encode_measured_together": (
            codec.encode_measured_together,
            {"waves": [torch.zeros(4000), torch.zeros(9)], "n_q": 8},
        ),
        "Codec.encoder_output": (codec.encoder_output, {"wav": torch.zeros(4000)}),
        "Codec.log_mel": (codec.log_mel, {"wav": torch.zeros(4000)}),
        "Codec.mel_rows": (
            codec.mel_rows,
            {"mel": torch.zeros(41, codec.config.n_mels), "lengths": [20, 21]},
        ),
        "Codec.encode_rows": (
            codec.encode_rows,
            {"rows": [MelRow(torch.zeros(20, codec.config.n_mels), False, False)]},
        ),
        "Codec.quantize_measured": (
            codec.quantize_measured,
            {"hidden": torch.zeros(4, codec.config.dim), "n_q": 8},
        ),
        "Codec.check_waveform": (codec.check_waveform, {"wav": torch.zeros(4000), "n_q": 8}),
        "LM.threads": (lm.threads, {}),
        "LM.persistent_of": (lm.persistent_of, {"state": state()}),
        "LM.gave_up": (lm.gave_up, {}),
        "LM.place_of": (lm.place_of, {"adapter": None}),
        "LM.variant": (lm.variant, {"place": 0}),
        "LM.new_state": (lm.new_state, {"seeds": [1], "capacity": 16, "quantized_cache": True}),
        "LM.embed": (
            lm.embed,
            {"text": ids[0, ::4], "codes": ids[1:].unflatten(1, (-1, 4)).transpose(0, 1)},
        ),
        "LM.encode_patches": (lm.encode_patches, {"codes": torch.zeros(2, 8, 4).long()}),
        "LM.prefill": (lm.prefill, {"ids": ids.cpu(), "state": state(), "slot": 0, "start": 0}),
        "LM.prefill_together": (
            lm.prefill_together,
            {"parts": [PlacedIds(ids.cpu(), 0), PlacedIds(ids.cpu(), 1)], "state": state()},
        ),
        "LM.prefills_alike": (lm.prefills_alike, {"state": state()}),
        "LM.hidden_chunks": (
            lambda **given: [*lm.hidden_chunks(**given)],
            {"ids": ids.cpu(), "state": state(), "slot": 0, "start": 0},
        ),
        "LM.prefill_padded": (
            lm.prefill_padded,
            {
                "ids": ids.unflatten(1, (-1, 4)).clamp(min=0),
                "place": torch.tensor([0, 0, 2]),
                "state": state(),
            },
        ),
        "LM.prefill_packed": (
            lm.prefill_packed,
            {
                "ids": ids.unflatten(1, (-1, 4)).clamp(min=0).expand(2, -1, -1, -1),
                "places": torch.tensor([[0, 0, 2], [1, 0, 1]]),
                "state": state(),
            },
        ),
        "LM.stage": (
            lm.stage,
            {"state": state(), "slot": 0, "text": 1, "codes": torch.zeros(8, 4).long()},
        ),
        "LM.step": (lm.step, {"state": state(), "slots": slots}),
        "LM.step_text": (
            lm.step_text,
            {"state": state(), "slots": slots, "settings": settings, "banned": None},
        ),
        "LM.text_logits": (lm.text_logits, {"hidden": state().hidden[:1]}),
        "LM.local_hidden": (lm.local_hidden, {"hidden": state().hidden[:1]}),
        "LM.sample_text": (
            lm.sample_text,
            {
                "state": state(),
                "slots": slots,
                "settings": settings,
                "banned": None,
                "logits": None,
            },
        ),
        "LM.sample_patch": (
            lm.sample_patch,
            {"state": state(), "slots": slots, "settings": settings},
        ),
        "LM.decode_patch": (
            lm.decode_patch,
            {
                "local": lm.local_hidden(state().hidden[:1]),
                "state": state(),
                "slots": slots,
                "settings": settings,
            },
        ),
    }


async def _collected(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _limits() -> Any:
    from mimo_fast.audio.files import DecodeLimits

    return DecodeLimits()


def _settings(rows: int) -> Any:
    from mimo_fast.sampling import MiMoSampler, sampler_tensors

    return sampler_tensors([MiMoSampler(True, 0.9, 5, 0.9)] * rows)


def _tensors() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(KIT / "lm" / "model.safetensors")
