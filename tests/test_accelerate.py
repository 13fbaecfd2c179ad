"""`accelerate`: an object of upstream's form keeps identity and weights, and generates alike."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import kit_config, refuses
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, StoppingCriteriaList

from mimo_fast import (
    CheckpointError,
    ConfigError,
    MiMoSampler,
    MiMoStopper,
    accelerate,
    generate,
    generation,
)
from mimo_fast.generation import flatten_ids, unflatten_ids
from mimo_fast.runtime.lm.transformer import TransformerWeights

GROUP = 4
EMPTY = 407
SAMPLED = MiMoSampler(do_sample=True, temperature=0.9, top_p=0.95)


class Causal:
    """Has what `accelerate` asks of upstream's MiMoAudioForCausalLM, and no more."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        self.config = config
        self.args = SimpleNamespace(empty_idx=EMPTY)
        self.tensors = dict(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


@pytest.fixture(scope="module")
def tensors(kit: Path) -> dict[str, Tensor]:
    return load_file(kit / "checkpoint/lm" / "model.safetensors")


@pytest.fixture
def causal(tensors: dict[str, Tensor]) -> Any:
    return Causal(tensors, SimpleNamespace(**kit_config("lm")))


@pytest.mark.parametrize("name", ["asr", "text", "tts_en", "dialogue_multiturn"])
def test_greedy_generation_is_upstreams(causal, golden, name):
    prompt, want = golden.get(f"prompts:{name}").long(), golden.get(f"model:generate.{name}").long()
    accelerate(causal)
    groups = prompt.shape[1] // GROUP + want.shape[1] // GROUP
    config = GenerationConfig(max_length=groups, eos_token_id=400, pad_token_id=401)
    samplers = {"global_sampler": MiMoSampler(), "local_sampler": MiMoSampler()}
    ids = causal.generate(flatten_ids(prompt)[None], config, **samplers)
    assert torch.equal(unflatten_ids(ids[0], 8), torch.cat((prompt, want), dim=1))


def test_upstreams_call_equals_ours(causal, model, golden):
    prompt = golden.get("prompts:tts_en").long()
    samplers: dict[str, Any] = {"global_sampler": SAMPLED, "local_sampler": SAMPLED}
    free = generate(model, prompt, max_new_tokens=30, seed=3, **samplers)
    text = free[0, prompt.shape[1] :: GROUP].tolist()
    stop = next(token for token in text[5:] if token != EMPTY)
    end = prompt.shape[1] + (text.index(stop) + 1) * GROUP
    stopper = MiMoStopper(stop_tokens=[stop], group_size=GROUP, audio_channels=8)
    accelerate(causal)
    samplers["seed"] = 3
    config, criteria = GenerationConfig(max_length=8192), StoppingCriteriaList([stopper])
    flat = flatten_ids(prompt)[None]
    ids = causal.generate(flat, config, stopping_criteria=criteria, **samplers)
    assert torch.equal(unflatten_ids(ids[0], 8), free[:, :end])
    samplers["max_new_tokens"] = 30
    warmed = causal.generate(inputs=prompt, warmup_run=True, synced_gpus=False, **samplers)
    by_name = causal.generate(input_ids=prompt, **samplers)
    for got in (warmed, by_name, generate(causal, prompt, **samplers)):
        assert torch.equal(got, free)


@pytest.mark.parametrize("depth", [0, 1], ids=["the language model", "what wraps it"])
def test_the_object_stays_the_same(causal, golden, depth):
    given = SimpleNamespace(model=causal) if depth else causal
    assert accelerate(given) is given
    prompt = golden.get("prompts:text").long()
    through_causal = causal.generate(prompt, max_new_tokens=4)
    through_given = generate(given, prompt, max_new_tokens=4)
    assert torch.equal(through_causal, through_given)
    assert accelerate(given) is given
    assert torch.equal(causal.generate(prompt, max_new_tokens=4), through_given)


def test_a_module_may_be_accelerated(tensors, golden):
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(leaf, torch.nn.Parameter(tensor))
    module.__dict__["config"] = SimpleNamespace(**kit_config("lm"))
    module.__dict__["args"] = SimpleNamespace(empty_idx=EMPTY)
    names = set(module.state_dict())
    prompt = golden.get("prompts:text").long()
    ids = accelerate(module).generate(prompt, max_new_tokens=4)
    assert not ids.requires_grad
    want = golden.get("model:generate.text").long()[:, : 4 * GROUP]
    assert torch.equal(ids[:, prompt.shape[1] :], want)
    assert set(module.state_dict()) == names


def stored(weights: TransformerWeights) -> Iterator[Tensor]:
    """Every tensor of a transformer."""
    yield weights.norm
    for layer in weights.layers:
        yield from (layer.attention_norm, layer.ffn_norm)
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
            yield from (tensor for tensor in (*matrix.blocks, *matrix.biases) if tensor is not None)


def test_weights_are_shared(causal):
    lm = accelerate(causal).generate.lm
    originals = {tensor.data_ptr() for tensor in causal.tensors.values()}
    held = [lm.text_embeddings]
    for part in (lm.backbone, lm.patch_encoder, lm.patch_decoder):
        held += stored(part)
    for matrix in (lm.text_head, lm.patch_to_backbone, lm.backbone_to_patch):
        held += matrix.blocks
    shared = {tensor.data_ptr() for tensor in held}
    assert shared <= originals
    # Code tables and heads alone are joined anew: one a channel each, and the projection of the
    # tables.
    assert len(originals) - len(shared) == 8 + 8 + 1


class TransformersConfig(PretrainedConfig):
    """Attributes and a to_dict() that leaves defaults out, as upstream's config class has."""

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        for name, value in keys.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}


@pytest.mark.parametrize("form", [dict, TransformersConfig], ids=["mapping", "transformers"])
def test_forms_of_config(tensors, golden, form):
    causal: Any = accelerate(Causal(tensors, form(**kit_config("lm"))))
    prompt = golden.get("prompts:text").long()
    ids = causal.generate(prompt, max_new_tokens=24)
    assert torch.equal(ids[:, prompt.shape[1] :], golden.get("model:generate.text").long())


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "lacking"),
        [
            (None, "config, args, state_dict"),
            (torch.nn.Linear(1, 1), "config, args, state_dict"),
            (SimpleNamespace(model=None), "config, args, state_dict"),
            (SimpleNamespace(model=SimpleNamespace(config=1)), "args, state_dict"),
            (SimpleNamespace(args=1, config=2), "state_dict"),
        ],
    )
    def test_another_object(self, given, lacking):
        name = type(given).__name__
        message = f"^a {name} is not an upstream MiMo-Audio model, it lacks {lacking}; "
        refuses(message, accelerate, given, kind=TypeError)

    def test_our_own_model(self, model):
        with pytest.raises(TypeError, match="a MimoAudio is not an upstream MiMo-Audio model"):
            accelerate(model)

    def test_missing_and_misshapen_tensors(self, causal):
        del causal.tensors["model.norm.weight"]
        causal.tensors["lm_head.weight"] = causal.tensors["lm_head.weight"][1:]
        with pytest.raises(CheckpointError) as caught:
            accelerate(causal)
        assert str(caught.value).startswith("2 tensors are missing or misshapen, such as ")
        named = set(str(caught.value).replace(",", "").split())
        assert {"model.norm.weight", "lm_head.weight"} <= named
        assert not hasattr(causal, "generate")

    def test_a_config_that_lacks_a_key(self, causal):
        del causal.config.group_size
        refuses(r"config of Causal\b.*\bgroup_size\b", accelerate, causal, kind=ConfigError)


def test_lengths_may_come_as_keywords(causal, model):
    flat = flatten_ids(model.get_text_dialogue_sft_prompt("Hi."))[None]
    accelerate(causal)
    groups = flat.shape[1] // 36
    assert causal.generate(flat, max_length=groups + 3).shape[1] == flat.shape[1] + 3 * 36
    config = {"max_length": 8192, "pad_token_id": 401}
    ids = causal.generate(flat, config, max_new_tokens=2, seed=1)
    assert ids.shape[1] == flat.shape[1] + 2 * 36


def test_keywords_that_upstream_would_take_and_nothing_reads_warn(causal, golden, monkeypatch):
    monkeypatch.setattr(generation, "_warned", set())
    accelerate(causal)
    prompt = golden.get("prompts:text").long()
    named = {"max_length": prompt.shape[1] // GROUP + 2, "use_cache": True}
    with pytest.warns(UserWarning, match="'max_new_token': did you mean 'max_new_tokens'"):
        causal.generate(prompt, max_new_token=3, **named)
