"""The baselines: upstream's own golden tokens from transformers' modules, and no speed for a wrong
one."""

import json
from shlex import split

import pytest
import torch

from benchmarks import baselines as run
from benchmarks.__main__ import main
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.synthetic import random_lm
from mimo_fast.bench.target import Target

pytest.importorskip("transformers", minversion="5")

from benchmarks.baselines import agreement
from benchmarks.harness import Refused
from benchmarks.upstream import Upstream, qwen2_model

CPU = torch.device("cpu")
TINY = split("baselines --preset tiny --dtype float32 --baseline eager --patches 12 --words 2")


@pytest.fixture(scope="module")
def loaded(kit) -> Target:
    return Target.load(kit / "checkpoint" / "lm", kit / "checkpoint" / "codec", None, None, CPU)


@pytest.fixture
def quick(monkeypatch):
    """The machine is not measured, and threads stay as they are."""
    monkeypatch.setattr(run, "ceiling", lambda device: Ceiling(1e9, 1e9, {"float32": 1e9}))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.mark.parametrize("name", ["asr", "text", "dialogue_multiturn"])
def test_its_greedy_tokens_are_upstreams(loaded, golden, name):
    ids, want = golden.get(f"prompts:{name}").long(), golden.get(f"model:generate.{name}")
    groups = Upstream(loaded.lm, 512).generate(ids, 24)
    got = torch.cat(
        [torch.cat((codes.new_full((1, 4), token), codes)) for token, codes in groups], dim=1
    )
    assert torch.equal(got, want[:, -24 * 4 :])


def test_it_agrees_with_ours_in_every_choice(loaded, golden):
    ids = golden.get("prompts:tts_en").long()
    found = agreement(loaded.sized(1, 200), Upstream(loaded.lm, 200), ids, 12)
    # At least the codes of twelve patches, and twelve text tokens.
    assert found.equal == found.choices >= 12 * 32 + 12
    assert found.worst_gap == 0


def test_weights_are_shared(loaded):
    baseline, lm = Upstream(loaded.lm, 64), loaded.lm
    ours = {
        tensor.untyped_storage().data_ptr()
        for layer in lm.backbone.layers
        for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)
        for tensor in weight.blocks
    }
    theirs = {
        p.untyped_storage().data_ptr()
        for name, p in baseline.backbone.layers.named_parameters()
        if name.endswith("proj.weight")
    }
    assert theirs == ours
    assert baseline.text_head is lm.text_head.blocks[0]
    assert baseline.backbone.embed_tokens.weight.data_ptr() == lm.text_embeddings.data_ptr()


@pytest.mark.parametrize(
    ("stack", "name"),
    [
        ("backbone", "layers.1.mlp.down_proj"),
        ("patch_decoder", "layers.0.self_attn.v_proj"),
        ("patch_encoder", "layers.0.mlp.up_proj"),
    ],
)
def test_a_corrupted_weight_is_refused(loaded, golden, stack, name):
    baseline = Upstream(loaded.lm, 200)
    module = getattr(baseline, stack).get_submodule(name)
    # A copy: ours stay as they are.
    noise = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
    module.weight = torch.nn.Parameter(module.weight + noise, requires_grad=False)
    with pytest.raises(Refused, match="greedy choices differ from ours"):
        agreement(loaded.sized(1, 200), baseline, golden.get("prompts:asr").long(), 12)


def test_nan_is_refused(loaded):
    baseline = Upstream(loaded.lm, 64)
    baseline.text_head = torch.full_like(baseline.text_head, torch.nan)
    with pytest.raises(Refused):
        agreement(loaded.sized(1, 64), baseline, loaded.filler(8), 2)


def test_quantized_weights_are_no_baseline(loaded):
    lm = random_lm(loaded.lm.config, "int8", torch.float32)
    with pytest.raises(TypeError, match="dense weights"):
        Upstream(lm, 64)
    with pytest.raises(TypeError, match="dense weights"):
        qwen2_model(lm.config.backbone, lm.backbone)


def test_the_command_prints_ours_and_its_own_row(quick, capsys, tmp_path):
    assert main([*TINY, "-o", str(tmp_path / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "eager, tiny, float32: all" in out
    assert [line.split("  ")[0] for line in out.splitlines()[-2:]] == ["ours", "transformers eager"]
    ours, theirs = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    for row in (ours, theirs):
        assert (row["kind"], row["audio_groups"], row["text_groups"]) == ("baseline", 12, 2)
        assert row["audio_seconds"] == pytest.approx(12 * 0.16)
        assert row["random_weights"] is True
    assert theirs["agreement"]["equal"] == theirs["agreement"]["choices"]
    # All of its audio comes at the end; ours with the eleventh patch.
    assert theirs["audio_ttfp"]["p50"] > 0.9 * theirs["e2el"]["p50"]


def test_a_wrong_baseline_has_no_row(quick, capsys, tmp_path, monkeypatch):
    def wrong(name, target, longest):
        baseline = Upstream(target.lm, longest)
        baseline.backbone.norm.weight = torch.nn.Parameter(
            baseline.backbone.norm.weight.flip(0) * torch.arange(64)
        )
        return baseline

    monkeypatch.setattr(run, "baseline", wrong)
    assert main([*TINY, "-o", str(tmp_path / "rows.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "REFUSED eager: Refused:" in out
    assert "transformers eager" not in out
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["provider"] == "ours"


def test_what_cannot_run_is_skipped_by_name(quick, capsys, monkeypatch):
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert run.missing("eager") is None
    assert run.missing("compiled") == "torch.compile needs a C++ compiler"
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert main(TINY) == 0
    out = capsys.readouterr().out
    assert "skipped eager: transformers is not installed" in out
    assert "ours" in out


def test_model_and_codec_go_together(quick, capsys, kit):
    assert main([*TINY, "--model", str(kit / "checkpoint" / "lm")]) == 2
    assert capsys.readouterr().err == "error: --model and --codec go together\n"
