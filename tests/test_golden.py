"""Every stage is within the numeric contract, and the check notices altered truth or weights."""

from pathlib import Path

import pytest
import torch
from helpers import KIT, altered_checkpoint, refuses, snr_db
from safetensors import safe_open
from torch.testing import assert_close

import mimo_fast
from mimo_fast.errors import CheckpointError
from mimo_fast.generation import generate
from mimo_fast.testing import parity as verification
from mimo_fast.testing.parity import STAGES, Golden, Result, verify

CONTRACT = {
    "resample": (1e-5, "max abs"),
    "log-mel": (1e-4, "max abs"),
    "codec encoder": (1e-3, "of max"),
    "codes": (0, "differ"),
    "packed codes": (0, "differ"),
    "dequantize": (1e-3, "of max"),
    "codec decoder": (-80, "dB noise"),
    "codec stream": (0.5, "dB lost"),
    "decoded once": (20, "dB lost"),
    "prompts": (0, "differ"),
    "embeddings": (1e-3, "of max"),
    "text logits": (1e-3, "of max"),
    "local hidden": (1e-3, "of max"),
    "patch decoder": (0, "differ"),
    "sampler": (0, "differ"),
    "generate": (0, "differ"),
}


def run_stage(model, golden: Golden, stage: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr(verification, "STAGES", {stage: STAGES[stage]})
    (result,) = verify(model, golden)
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_stage_equals_upstream(model, golden, stage, monkeypatch):
    result = run_stage(model, golden, stage, monkeypatch)
    assert result.compared > 0, f"{stage}: the kit has nothing to compare"
    assert result.ok, f"{result.worst}: {result.error:.3g} > {result.bound:g} {result.unit}"


def test_bounds_are_the_contract():
    assert {stage: (bound, unit) for stage, (_, bound, unit) in STAGES.items()} == CONTRACT


def test_every_golden_tensor_is_compared(model, kit):
    golden = Golden(kit)
    assert [result.stage for result in verify(model, golden)] == list(STAGES)
    on_disk = set()
    for file in ("codec", "prompts", "model"):
        with safe_open(kit / "golden" / f"{file}.safetensors", framework="pt") as tensors:
            on_disk |= {f"{file}:{name}" for name in tensors.keys()}  # noqa: SIM118, safe_open cannot be iterated
    assert golden.compared == on_disk


def test_waveforms_sample_by_sample(model, golden):
    """80 dB over a whole waveform could hide a click."""
    for name in ("wav_dec8", "wav_decall"):
        for i in range(3):
            want = golden.get(f"codec:{name}.{i}")
            codes = golden.get(f"codec:codes.{i}")[: 8 if name == "wav_dec8" else None]
            got = model.codec.decode(codes)
            assert_close(got, want, rtol=0, atol=float(1e-4 * want.abs().max()))
            assert snr_db(got, want) >= 80


def test_generated_groups_repeat_upstreams_layout(model, golden):
    for name in golden.named("model:generate"):
        prompt = golden.get(f"prompts:{name}").long()
        want = golden.get(f"model:generate.{name}").long()
        ids = generate(model, prompt, max_new_tokens=24)
        assert torch.equal(ids[:, : prompt.shape[1]], prompt)
        assert torch.equal(ids[:, prompt.shape[1] :], want)


class PerturbedGolden(Golden):
    """The kit with one element of one tensor changed."""

    def __init__(self, kit: Path, name: str, index: tuple[int, ...], add: float) -> None:
        super().__init__(kit)
        changed = self.tensors[name].clone()
        changed[index] += add
        assert not torch.equal(changed, self.tensors[name])
        self.tensors[name] = changed


@pytest.fixture(scope="module")
def readers(model, kit) -> dict[str, set[str]]:
    """Stage -> golden tensors that it reads; what it does not read cannot change its result."""
    reads = {}
    for stage, (compare, _, _) in STAGES.items():
        golden = Golden(kit)
        list(compare(model, golden))
        reads[stage] = golden.compared
    return reads


STREAMED = {"codec stream", "decoded once"}
PROMPTED = {"prompts", "embeddings", "text logits", "local hidden", "generate"}
TAMPERED: list[tuple[str, tuple[int, ...], float, set[str]]] = [
    ("codec:wav24k.1", (1000,), 1e-4, {"resample"}),
    ("codec:mel.0", (100, 60), 3.0, {"log-mel", "codec encoder"}),
    ("codec:enc_hidden.1", (20, 5), 3.0, {"codec encoder", "codes"}),
    ("codec:codes.2", (3, 30), 1, {"codes", "dequantize", "codec decoder"}),
    ("codec:codes.0", (11, 0), -1, {"codes", "codec decoder"}),
    ("codec:packed.0", (511,), 1, {"packed codes"}),
    ("codec:rvq_sum8.0", (62, 63), 0.05, {"dequantize"}),
    ("codec:wav_dec8.1", (40000,), 0.02, {"codec decoder"}),
    ("codec:wav_decall.2", (1,), 0.02, {"codec decoder"}),
    ("codec:stream_codes", (0, 100), 1, {"codec decoder", "codec stream"}),
    ("codec:stream_oneshot", (174719,), 0.02, {"codec decoder"}),
    ("codec:stream_wav.4", (100000,), torch.nan, STREAMED),
    ("codec:stream_wav.25", (0,), torch.nan, STREAMED),
    ("codec:stream_lens.4", (45,), 1, STREAMED),
    ("codec:stream_lens.25", (0,), 960, STREAMED),
    ("prompts:understand", (0, 0), 1, {"prompts"}),
    ("prompts:icl_s2s", (8, 563), -1, {"prompts"}),
    ("prompts:text", (0, 112), 1, PROMPTED),
    ("model:embeds.text", (28, 63), 0.1, {"embeddings"}),
    ("model:text_logits.asr", (447,), 0.1, {"text logits"}),
    ("model:local_hidden.tts_instruct_clone", (0,), 0.1, {"local hidden"}),
    ("model:local_in", (3, 7), 5.0, {"patch decoder"}),
    ("model:local_greedy", (15, 3, 7), 1, {"patch decoder"}),
    ("model:sampler_logits.129", (1, 64), 30.0, {"sampler"}),
    ("model:sampler_kept.1025.1", (0, 0), 1, {"sampler"}),
    ("model:sampler_kept.8192.6", (2, 8191), 1, {"sampler"}),
    ("model:generate.tts_en", (0, 0), 1, {"generate"}),
    ("model:generate.asr", (8, 95), 1, {"generate"}),
]


@pytest.mark.parametrize(
    ("tensor", "index", "add", "expected"), TAMPERED, ids=[row[0] for row in TAMPERED]
)
def test_altered_truth_fails(model, kit, readers, monkeypatch, tensor, index, add, expected):
    golden = PerturbedGolden(kit, tensor, index, add)
    affected = [stage for stage, reads in readers.items() if tensor in reads]
    failing = {stage for stage in affected if not run_stage(model, golden, stage, monkeypatch).ok}
    assert failing == expected


def test_a_stream_must_be_as_close_to_one_shot_as_upstreams(model, kit, monkeypatch):
    """Fails if upstream lost 0.7 dB less, or if our stream did not look ahead."""
    golden = Golden(kit)
    oneshot = golden.tensors["codec:stream_oneshot"]
    noise = golden.tensors["codec:stream_wav.25"] - oneshot
    golden.tensors["codec:stream_wav.25"] = oneshot + noise * 10 ** (-0.7 / 20)
    result = run_stage(model, golden, "codec stream", monkeypatch)
    assert not result.ok
    assert result.worst == "stream_wav.25"
    assert 0.5 < result.error < 1
    stream = model.codec.stream
    monkeypatch.setattr(model.codec, "stream", lambda _, again: stream(0, again=again))
    assert not run_stage(model, Golden(kit), "codec stream", monkeypatch).ok


def test_a_tensor_of_every_kind_was_tampered_with(golden):
    def kind(name: str) -> str:
        return name if name.startswith("prompts") else name.split(".")[0]

    tampered = {kind(tensor) for tensor, *_ in TAMPERED}
    assert {kind(name) for name in golden.tensors if not name.startswith("prompts")} <= tampered


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_truth_that_is_not_finite_fails(model, kit, monkeypatch, value):
    tensors = {"codec:rvq_sum8.0": "dequantize", "codec:wav_dec8.0": "codec decoder"}
    for tensor, stage in tensors.items():
        golden = PerturbedGolden(kit, tensor, (0,), value)
        assert not run_stage(model, golden, stage, monkeypatch).ok


EXCUSED = [(0, 9e-5), (2, 2e-4), (2, 5e-3)]
FAULTY = [(0, 2e-4), (1, 2e-4), (2, 2e-2), (1, torch.nan), (2, torch.nan), (0, torch.inf)]


@pytest.mark.parametrize(("band", "error"), EXCUSED + FAULTY)
def test_only_quiet_bands_are_excused_by_rounding(band, error):
    """Bands at the frame's peak, a tenth of it, and 1e-4 of it, where the floor is 1e-2."""
    want = torch.tensor([[1.0, 0.1, 1e-4]]).log()
    got = want.clone()
    got[0, band] += error
    passes = verification._log_error(got, want) <= CONTRACT["log-mel"][0]
    assert passes == ((band, error) in EXCUSED)


def test_truth_of_another_shape_fails(model, kit, monkeypatch):
    cuts = {
        "codec:wav24k.1": "resample",
        "codec:enc_hidden.0": "codec encoder",
        "codec:rvq_sum8.2": "dequantize",
        "codec:wav_dec8.0": "codec decoder",
        "prompts:asr": "prompts",
        "model:embeds.asr": "embeddings",
    }
    for tensor, stage in cuts.items():
        golden = Golden(kit)
        golden.tensors[tensor] = golden.tensors[tensor][:-1]
        assert not run_stage(model, golden, stage, monkeypatch).ok, tensor


ALTERED_WEIGHTS: list[tuple[str, str, tuple[int, ...], float, str]] = [
    ("codec", "encoder.conv1.weight", (3, 60, 1), 0.3, "codec encoder"),
    ("codec", "encoder.conv2.bias", (5,), 0.3, "codec encoder"),
    ("codec", "encoder.layers.1.self_attn.v_proj.weight", (0, 0), 0.5, "codec encoder"),
    ("codec", "encoder.layers.2.fc1.bias", (9,), 1.0, "codec encoder"),
    ("codec", "encoder.layer_norm.weight", (9,), 0.1, "codec encoder"),
    ("codec", "encoder.down_sample_layer.0.weight", (0, 3, 1), 0.3, "codec encoder"),
    ("codec", "encoder.down_sample_norm.bias", (0,), 0.1, "codec encoder"),
    ("codec", "decoder.dconv1.conv.weight", (0, 0, 0), 0.3, "codec decoder"),
    ("codec", "decoder.dconv1.norm.bias", (0,), 0.1, "codec decoder"),
    ("codec", "decoder.layers.0.self_attn.q_proj.weight", (0, 0), 3.0, "codec decoder"),
    ("codec", "decoder.dconv2.conv.weight", (0, 64, 2), 0.3, "codec decoder"),
    ("codec", "decoder.vocoder.embeddings.weight", (0, 0), 0.3, "codec decoder"),
    ("codec", "decoder.vocoder.layers.1.final_layer_norm.bias", (0,), 0.3, "codec decoder"),
    ("codec", "decoder.vocoder.head.out.weight", (481 + 40, 3), 0.3, "codec decoder"),
    ("codec", "decoder.vocoder.head.out.bias", (40,), 0.1, "codec decoder"),
    ("codec", "decoder.vocoder.head.istft.window", (480,), 0.1, "codec decoder"),
    ("lm", "model.embed_tokens.weight", (402, 0), 0.1, "embeddings"),
    ("lm", "model.layers.0.self_attn.q_proj.bias", (1,), 3.0, "text logits"),
    ("lm", "model.layers.1.self_attn.k_proj.weight", (1, 1), 3.0, "text logits"),
    ("lm", "model.layers.1.mlp.gate_proj.weight", (0, 0), 1.0, "text logits"),
    ("lm", "model.norm.weight", (0,), 0.1, "local hidden"),
    ("lm", "lm_head.weight", (447, 0), 0.3, "text logits"),
    ("lm", "speech_embeddings.0.weight", (-2, 0), 1.0, "embeddings"),
    ("lm", "input_local_transformer.layers.1.mlp.down_proj.weight", (0, 0), 0.3, "embeddings"),
    ("lm", "speech_group_downcast.weight", (0, 0), 0.3, "embeddings"),
    ("lm", "hidden_states_downcast.weight", (0, 0), 0.3, "local hidden"),
    ("lm", "speech_embeddings_to_local.weight", (0, 0), 3.0, "patch decoder"),
    ("lm", "local_transformer.layers.0.self_attn.v_proj.weight", (0, 0), 3.0, "patch decoder"),
    ("lm", "local_transformer_lm_heads.5.weight", (3, 0), 3.0, "patch decoder"),
]


@pytest.mark.parametrize(("part", "tensor", "index", "add", "stage"), ALTERED_WEIGHTS, ids=str)
def test_altered_weight_fails(golden, tmp_path, monkeypatch, part, tensor, index, add, stage):
    if tensor == "speech_embeddings.0.weight":
        # A code that a prompt uses.
        index = (int(golden.tensors["codec:codes.0"][0, 0]), index[1])
    altered = mimo_fast.load(*altered_checkpoint(tmp_path, part, tensor, index, add), device="cpu")
    assert not run_stage(altered, golden, stage, monkeypatch).ok


@pytest.mark.parametrize("codebook", [0, 1, 7, 11])
def test_altered_codebook_row_fails(golden, tmp_path, monkeypatch, codebook):
    row = int(golden.tensors["codec:codes.0"][codebook, 10])
    tensor = f"encoder.quantizer.vq.layers.{codebook}._codebook.embed"
    pair = altered_checkpoint(tmp_path, "codec", tensor, (row, 4), 3.0)
    altered = mimo_fast.load(*pair, device="cpu")
    # The eight codebooks that the language model speaks are dequantized on their own.
    for stage in ("codes", "codec decoder", *(["dequantize"] if codebook < 8 else [])):
        assert not run_stage(altered, golden, stage, monkeypatch).ok, stage


@pytest.mark.parametrize("missing", ["golden.json", "model.safetensors", "audio"])
def test_kit_with_a_part_missing_is_refused(kit, tmp_path, missing):
    for source in kit.glob("golden/*"):
        if source.name != missing:
            (tmp_path / source.name).symlink_to(source)
    if missing != "audio":
        (tmp_path / "audio").symlink_to(kit / "audio")
    with pytest.raises(CheckpointError) as caught:
        Golden(tmp_path)
    assert "\n" not in str(caught.value)


def test_golden_folder_itself_or_its_parent(kit):
    assert Golden(kit).tensors.keys() == Golden(kit / "golden").tensors.keys()


def test_kit_that_is_not_json_is_refused(kit, tmp_path):
    (tmp_path / "golden.json").write_text("{")
    (tmp_path / "audio").symlink_to(KIT / "audio")
    refuses("cannot be read", Golden, tmp_path, kind=CheckpointError)
