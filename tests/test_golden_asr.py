"""MiMo-V2.5-ASR gives upstream's codes, prompts, tokens and texts, and refuses all other tasks."""

import json
from pathlib import Path

import pytest
import torch
from helpers import AUDIO, KIT, copy_tree, fault, write_pair
from torch.profiler import ProfilerActivity, profile

import mimo_fast
from mimo_fast.architectures import MIMO_AUDIO, MIMO_V2_5_ASR
from mimo_fast.audio.files import load_audio
from mimo_fast.audio.segments import Piece, parts_of
from mimo_fast.checkpoint.files import open_weights
from mimo_fast.cli.main import main
from mimo_fast.config import LMConfig, read_json
from mimo_fast.errors import CheckpointError, PromptError
from mimo_fast.runtime.transcription import start_piece
from mimo_fast.testing.asr_parity import ASR_STAGES, FILE, AsrGolden
from mimo_fast.testing.parity import verify
from mimo_fast.text.tasks import TASKS, asr_templates
from mimo_fast.text.templates import ASR_TEMPLATES

ASR = KIT / "asr"
CODEC = KIT / "checkpoint" / "codec"
RATE = 24000


@pytest.fixture(scope="module")
def asr_model() -> mimo_fast.MimoAudio:
    return mimo_fast.load(ASR / "lm", CODEC, device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=[None, "torch"], ids=["native", "torch"])
def results(request, asr_model):
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setenv("MIMO_FAST_KERNELS", request.param)
            asr_model = mimo_fast.load(ASR / "lm", CODEC, device="cpu", dtype="float32")
        golden = AsrGolden(ASR, CODEC)
        found = {result.stage: result for result in verify(asr_model, golden)}
    assert golden.compared == golden.tensors.keys()
    return found


@pytest.mark.parametrize("stage", ASR_STAGES)
def test_stage_equals_upstream(results, stage):
    result = results[stage]
    assert result.ok, f"{result.worst}: {result.error:.3g} > {result.bound:g} {result.unit}"


def test_as_many_as_the_kit_states_are_compared(results):
    meta = json.loads((ASR / "golden.json").read_text(encoding="utf-8"))
    lists = {name: len(meta[name]) for name in ("groups", "prompts", "generated", "postprocess")}
    counts = {stage: result.compared for stage, result in results.items()}
    assert counts["codes"] == 2 * lists["groups"] == 14
    assert counts["prompts"] == lists["prompts"] == 6
    assert counts["generate"] == 2 * lists["generated"] == 8
    assert counts["transcripts"] == lists["generated"] + lists["postprocess"] == 10


TAMPERED = [
    ("codes.t31", (7, 779), "codes"),
    ("codes.tiny", (0, 0), "codes"),
    ("prompt.zh", (0, -4), "prompts"),
    ("embeds_sum.en", (3,), "embeddings"),
    ("text_logits.auto", (447,), "text logits"),
    ("generate.zh_t31", (8, 79), "generate"),
]


@pytest.mark.parametrize(("tensor", "index", "stage"), TAMPERED)
def test_altered_truth_fails(asr_model, monkeypatch, tensor, index, stage):
    golden = AsrGolden(ASR, CODEC)
    golden.tensors[tensor][index] += 1
    monkeypatch.setattr(AsrGolden, "stages", {stage: ASR_STAGES[stage]})
    (result,) = verify(asr_model, golden)
    assert not result.ok
    assert result.worst == tensor


@pytest.mark.parametrize("entry", ["returned", "postprocess"])
def test_an_altered_text_fails(asr_model, monkeypatch, entry):
    golden = AsrGolden(ASR, CODEC)
    if entry == "returned":
        golden.meta["generated"]["en"]["returned"] += "."
    else:
        golden.meta["postprocess"][0][1] += "."
    monkeypatch.setattr(AsrGolden, "stages", {"transcripts": ASR_STAGES["transcripts"]})
    assert not next(verify(asr_model, golden)).ok


def test_verify_takes_the_kit(capsys):
    given = ["--checkpoint", ASR, "--golden", ASR, "--codec", CODEC, "--device", "cpu"]
    assert main(["verify", *map(str, given)]) == 0
    assert "all 25 golden tensors within bounds" in capsys.readouterr().err


def test_kits_that_do_not_belong_are_refused(tmp_path):
    nano = Path(mimo_fast.__file__).parent / "assets" / "nano" / "codec"
    line = fault(lambda: AsrGolden(ASR, nano))
    assert "is not the codec" in line
    (tmp_path / "golden.json").write_text((ASR / "golden.json").read_text(encoding="utf-8"))
    assert "cannot be read" in fault(lambda: AsrGolden(tmp_path, CODEC))
    (tmp_path / FILE).write_bytes((ASR / FILE).read_bytes())
    assert "audio/en_m_24k.wav" in fault(lambda: AsrGolden(tmp_path, CODEC), CheckpointError)


def wave(samples: int) -> torch.Tensor:
    wav = load_audio(AUDIO, RATE)
    return wav.repeat(-(-samples // len(wav)))[:samples]


def test_a_reply_is_upstreams(asr_model):
    """Greedy text, where no code that upstream draws comes before it."""
    meta = json.loads((ASR / "golden.json").read_text(encoding="utf-8"))
    for name in ("en_tiny", "zh_t31"):
        asked = meta["prompts"][name]
        request = wave(meta["lengths"][asked["audio"]]), asked["audio_tag"], asked["template"]
        how = {"max_new_tokens": 19, "special_tokens": True}
        chunks = list(asr_model.stream("asr", *request, **how))
        words = "".join(chunk.text for chunk in chunks).strip()
        assert meta["generated"][name]["returned"].startswith(words.rstrip("�"))
        assert len(words) > 10


def test_a_batch_of_recordings_has_the_codes_of_each_alone(asr_model):
    waves = [wave(n) for n in (500, 31 * RATE, 960, 59607, 60 * RATE + 12)]
    together = asr_model.pipeline.speeches(waves)
    for wav, speech in zip(waves, together, strict=True):
        assert torch.equal(speech.codes, asr_model.speech(wav).codes)


def upstreams_parts(samples: int, size: int, least: int) -> list[tuple[int, int]]:
    """Bounds of the parts by upstream's loop."""
    start, found = 0, []
    while start < samples:
        end = min(start + size, samples)
        if 0 < samples - end < least:
            end = samples
        found.append((start, end))
        start = end
    return found


@pytest.mark.parametrize("size", [1000, 2880])
def test_parts_are_upstreams(size):
    for samples in [
        *range(1, 2 * size, 37),
        *(k * size + d for k in (1, 2, 3) for d in range(970)),
    ]:
        wav = torch.arange(samples, dtype=torch.float32) + 1
        parts = parts_of(wav, size, 960)
        want = [wav[start:end] for start, end in upstreams_parts(samples, size, 960)]
        assert [len(part) for part in parts] == [max(len(part), 960) for part in want]
        for part, wanted in zip(parts, want, strict=True):
            assert torch.equal(part[: len(wanted)], wanted)
            assert not part[len(wanted) :].any()


def test_mimo_audio_is_encoded_whole(model):
    """Its own front end is as it was: 60 s segments of one spectrogram."""
    assert model.speech(wave(75 * RATE)).codes.shape[1] == 1876


def test_tags_are_no_text_however_they_come(asr_model):
    prompt = asr_model.get_asr_sft_prompt(wave(960), template=0)
    text = "<chinese> a<b <eng<english>lish> <chine<english"
    want = text.replace("<chinese>", "").replace("<english>", "")
    tokenizer = asr_model.tokenizer
    for size in (1, 2, 3, 7, 100):
        reader, parts = asr_model.pipeline.reader(prompt, speaks=False), []
        for start in range(0, len(text), size):
            for token in tokenizer.encode(text[start : start + size]):
                parts.append(reader.read(token, prompt[1:, :4])[0])
        parts.append(reader.finish()[0])
        assert "".join(parts) == want


def test_the_language_is_the_prompts_tag(asr_model, monkeypatch):
    asked, packed = [], asr_model.pipeline.packed
    monkeypatch.setattr(
        type(asr_model.pipeline),
        "packed",
        lambda self, segments, task=None: asked.append(list(segments)) or packed(segments, task),
    )
    wav = load_audio(KIT.parent / "words" / "yes_please_i_need_coffee.flac", RATE)
    for language, tag in (("en", "<english>"), ("Chinese", "<chinese>"), ("zh-CN", "<chinese>")):
        found = asr_model.transcribe(wav, language=language, max_new_tokens=4)
        assert len(found.segments) == 1
        *_, words, _, _, end = asked[-1]
        assert end == f"<think>\n\n</think>\n{tag}"
        assert words in asr_templates(MIMO_V2_5_ASR, tag)
        assert words.isascii() == (tag == "<english>")
    asr_model.transcribe(wav, max_new_tokens=4)
    assert asked[-1][-1] == "<think>\n\n</think>\n"
    piece = Piece(0.0, 1.0, wav)
    start_piece(asr_model.pipeline, piece, seed=1, language="english").close()
    assert asked[-1][-1].endswith("<english>")


def test_templates_of_a_tag_are_upstreams_pools():
    pools = json.loads((ASR / "golden.json").read_text(encoding="utf-8"))["template_pools"]
    for tag in ("<chinese>", "<english>"):
        assert [*asr_templates(MIMO_V2_5_ASR, tag)] == pools[tag]
    both = [*pools["<chinese>"], *pools["<english>"]]
    assert [*asr_templates(MIMO_V2_5_ASR, "")] == both == [*ASR_TEMPLATES]


def test_languages_that_there_are_not(asr_model, model, capsys):
    wav = wave(4000)
    unknown = fault(lambda: asr_model.transcribe(wav, language="klingon"), PromptError)
    assert "'klingon'" in unknown
    assert "zh (chinese) and en (english)" in unknown
    untagged = fault(lambda: model.transcribe(wav, language="en"), PromptError)
    assert untagged == "MiMo-Audio has no language tags: leave the language out"
    for wrong in ("<klingon>", "english", 3):
        with pytest.raises((PromptError, TypeError)):
            asr_model.asr_sft(wav, wrong)
    assert "no tags" in fault(lambda: model.asr_sft(wav, "<english>"), PromptError)
    for lm, language, line in (
        (ASR / "lm", "klingon", unknown),
        (KIT / "checkpoint/lm", "en", untagged),
    ):
        pair = ["--model", str(lm), "--codec", str(CODEC), "--device", "cpu"]
        assert main(["asr", str(AUDIO), *pair, "--language", language]) == 1
        assert line in capsys.readouterr().err


def test_the_command_line_transcribes_in_a_language(asr_model, capsys):
    pair = ["--model", str(ASR / "lm"), "--codec", str(CODEC), "--device", "cpu"]
    how = [*pair, "--seed", "1", "--max-tokens", "6", "--language", "en", "--dtype", "float32"]
    wav, limits = load_audio(AUDIO, RATE), {"seed": 1, "max_new_tokens": 6}
    assert main(["asr", str(AUDIO), "--whole", "--no-prepare", *how]) == 0
    said = capsys.readouterr().out.rstrip("\n")
    assert said == asr_model.asr_sft(wav, "<english>", **limits)
    assert said != asr_model.asr_sft(wav, "<chinese>", **limits)
    assert main(["asr", str(AUDIO), *how]) == 0
    found = asr_model.transcribe(wav, language="en", **limits)
    assert capsys.readouterr().out.rstrip("\n") == found.text != ""


def test_other_tasks_are_refused_in_a_line(asr_model, tmp_path, capsys):
    for name in TASKS:
        assert asr_model.lm.config.is_trained(name) == (name == "asr_sft")
        if name != "asr_sft":
            line = fault(lambda name=name: MIMO_V2_5_ASR.check_task(name), PromptError)
            want = f"MiMo-V2.5-ASR does asr_sft alone, not {name}: load MiMo-Audio for it"
            assert line == want
        MIMO_AUDIO.check_task(name)
    wav, messages = wave(4000), [{"role": "user", "content": "a"}]
    for call in (
        lambda: asr_model.stream("tts", "Hello."),
        lambda: asr_model.stream("speech_continuation", wav),
        lambda: asr_model.tts_sft("Hello.", None),
        lambda: asr_model.audio_understanding_sft(wav, "What?"),
        lambda: asr_model.spoken_dialogue_sft(wav),
        lambda: asr_model.spoken_dialogue_sft_multiturn([{"role": "user", "content": wav}]),
        lambda: asr_model.speech2text_dialogue_sft(wav),
        lambda: asr_model.speech2text_dialogue_sft_multiturn([{"role": "user", "content": wav}]),
        lambda: asr_model.text_dialogue_sft("Hello."),
        lambda: asr_model.text_dialogue_sft_multiturn(messages),
        lambda: asr_model.in_context_learning_s2s("x", [], wav),
        lambda: asr_model.get_tts_sft_prompt("Hello."),
        asr_model.session,
    ):
        assert fault(call, PromptError).startswith("MiMo-V2.5-ASR does asr_sft alone, not ")
    pair = ["--model", str(ASR / "lm"), "--codec", str(CODEC), "--device", "cpu"]
    for command in (["tts", "Hello."], ["chat", str(AUDIO)], ["chat", "--text", "Hello."]):
        output = [] if "--text" in command else ["-o", str(tmp_path / "said.wav")]
        assert main([*command, *output, *pair]) == 1
        assert "MiMo-V2.5-ASR does asr_sft alone" in capsys.readouterr().err


def test_the_configs_dtype_counts(asr_model, tmp_path):
    raw = read_json(ASR / "lm" / "config.json")
    config = LMConfig.from_dict(raw)
    assert (config.dtype, config.architecture) == ("bfloat16", MIMO_V2_5_ASR)
    assert open_weights(ASR / "lm").dtype("model.norm.weight") == torch.float32
    loaded = mimo_fast.load(ASR / "lm", CODEC, device="cpu")
    assert loaded.lm.dtype == loaded.setup.dtype == torch.bfloat16
    assert asr_model.lm.dtype == torch.float32
    # What is copied is counted, and what stays in the file is not.
    assert loaded.setup.converted
    assert not asr_model.setup.converted
    assert asr_model.setup.bytes()["weights"] == 0
    assert loaded.setup.bytes()["weights"] == 2 * open_weights(ASR / "lm").parameters
    for stated, want in ((None, "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")):
        copy_tree(ASR / "lm", tmp_path / str(stated))
        path = tmp_path / str(stated) / "config.json"
        path.write_text(json.dumps({**raw, "dtype": stated}), encoding="utf-8")
        found = mimo_fast.load(path.parent, CODEC, device="cpu").lm.dtype
        assert found == getattr(torch, want)


def test_float32_is_loaded_in_the_configs_dtype_without_a_second_copy(tmp_path):
    """All that is ever allocated at once is the weights in bfloat16, and a tensor in progress."""
    sizes = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 6, "head_dim": 64}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024}
    changes = sizes | {"architectures": ["MiMoV2ASRForCausalLM"], "dtype": "bfloat16"}
    lm, codec = write_pair(tmp_path, changes, {})
    weights = open_weights(lm)
    shapes = [weights.shape(name) for name in weights.names()]
    largest = 2 * max(torch.Size(shape).numel() for shape in shapes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loaded = mimo_fast.load(lm, codec, device="cpu", max_seq_len=64)
    assert loaded.lm.dtype == torch.bfloat16
    mapped = [path.stat().st_size for path in (lm, codec) for path in path.glob("*.safetensors")]
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if abs(event.nbytes()) in mapped:
            # A file's mapping, whose pages are the system's to evict.
            continue
        held += event.nbytes()
        peak = max(peak, held)
    copied = weights.nbytes // 2
    assert weights.nbytes > 60 * 2**20
    assert copied <= peak < copied + largest + 4 * 2**20
