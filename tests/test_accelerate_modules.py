"""`accelerate` on torch modules: compiled, copied, trained, pickled, with other heads or dtypes."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import kit_config, refuses
from safetensors.torch import load_file
from test_accelerate import EMPTY
from torch import Tensor, nn

from benchmarks.upstream import Upstream as TransformersModel
from mimo_fast import LM, CheckpointError, accelerate, generate
from mimo_fast.generation import flatten_ids
from mimo_fast.quantization import WeightSource

FOUR: dict[str, Any] = {"max_new_tokens": 4}


class Part(nn.Module):
    """A module that only has parameters and parts."""


class Upstream(nn.Module):
    """Has the parameters of upstream's MiMoAudioForCausalLM by their names, and a `generate`."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, Part())
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_parameter(leaf, nn.Parameter(tensor.clone()))
        head = nn.Linear(*reversed(tensors["lm_head.weight"].shape), bias=False)
        head.weight = self.lm_head.weight
        self.lm_head = head
        self.config = SimpleNamespace(**config)
        self.args = SimpleNamespace(empty_idx=EMPTY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids + 1

    def generate(self, *_: Any, **__: Any) -> str:
        return "upstream's"


@pytest.fixture(scope="module")
def tensors(kit: Path) -> dict[str, Tensor]:
    return load_file(kit / "checkpoint/lm" / "model.safetensors")


@pytest.fixture
def module(tensors: dict[str, Tensor]) -> Any:
    return Upstream(tensors, kit_config("lm"))


@pytest.fixture(scope="module")
def prompt(golden: Any) -> Tensor:
    """It ends in speech, so that the tables and heads of codes matter to the text after it too."""
    return golden.get("prompts:tts_en").long()


@pytest.fixture(scope="module")
def want(golden: Any) -> Tensor:
    return golden.get("model:generate.tts_en").long()[:, :16]


def new(ids: Tensor, prompt: Tensor) -> Tensor:
    return ids[:, prompt.shape[1] :]


def expected(module: Any, prompt: Tensor) -> Tensor:
    """What a model that is accelerated anew says with the same weights."""
    state = {name.replace("_orig_mod.", ""): t for name, t in module.state_dict().items()}
    fresh = Upstream({name: t for name, t in state.items() if name != "lm_head.bias"}, {})
    fresh.config = module.config
    if "lm_head.bias" in state:
        fresh.lm_head.bias = nn.Parameter(state["lm_head.bias"])
    return accelerate(fresh).generate(prompt, **FOUR)


class Wrapped(nn.Module):
    """As torch.compile wraps a module, without the seconds that importing its compiler takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name: str) -> Any:
        inner = super().__getattr__("_orig_mod")
        return inner if name == "_orig_mod" else getattr(inner, name)


@pytest.fixture(params=[Wrapped, pytest.param(torch.compile, marks=pytest.mark.slow)])
def wrap(request: pytest.FixtureRequest) -> Any:
    return request.param


class TestCompiled:
    def test_the_whole_model(self, module, prompt, want, wrap):
        compiled = wrap(module)
        assert accelerate(compiled) is compiled
        for generates in (compiled, module):
            assert torch.equal(new(generates.generate(prompt, **FOUR), prompt), want)
        assert torch.equal(generate(compiled, prompt, **FOUR), module.generate(prompt, **FOUR))
        assert compiled.state_dict().keys() == {f"_orig_mod.{n}" for n in module.state_dict()}

    def test_a_wrapper_of_a_compiled_model(self, module, prompt, want, wrap):
        wrapper = SimpleNamespace(model=wrap(module))
        assert accelerate(wrapper) is wrapper
        assert torch.equal(new(generate(wrapper, prompt, **FOUR), prompt), want)

    def test_a_data_parallel_wrapper(self, module, prompt, want):
        """It has no `generate` of its own: users call that of the model inside."""
        wrapper = nn.DataParallel(module)
        assert accelerate(wrapper) is wrapper
        assert torch.equal(new(wrapper.module.generate(prompt, **FOUR), prompt), want)

    def test_its_parts(self, module, prompt, want, wrap):
        for name in ("model", "local_transformer", "lm_head"):
            setattr(module, name, wrap(getattr(module, name)))
        accelerate(module)
        assert torch.equal(new(module.generate(prompt, **FOUR), prompt), want)

    def test_compiled_afterwards(self, module, prompt, want, wrap):
        compiled = wrap(accelerate(module))
        assert torch.equal(new(compiled.generate(prompt, **FOUR), prompt), want)

    @pytest.mark.slow
    def test_compiled_in_place(self, module, prompt, want):
        accelerate(module).compile()
        assert torch.equal(new(module.generate(prompt, **FOUR), prompt), want)


CHANGES: dict[str, Callable[[Any], None]] = {
    "in place": lambda m: m.model.embed_tokens.weight.mul_(1.5),
    "in place, of a layer": lambda m: m.model.layers._modules["1"].mlp.up_proj.weight.mul_(-2),
    "in place, of a code table": lambda m: m.speech_embeddings._modules["3"].weight.mul_(-3),
    "by .data, of a code table": lambda m: m.speech_embeddings._modules["0"].weight.data.mul_(-3),
    "by .data, of a code head": lambda m: m.local_transformer_lm_heads._modules[
        "0"
    ].weight.data.neg_(),
    "in place, of the projection": lambda m: m.speech_embeddings_to_local.weight.data.mul_(-3),
    "another parameter": lambda m: m.model.norm.register_parameter(
        "weight", nn.Parameter(m.model.norm.weight.flip(0))
    ),
    "another .data": lambda m: setattr(
        m.hidden_states_downcast.weight, "data", m.hidden_states_downcast.weight.flip(0).clone()
    ),
    "load_state_dict": lambda m: m.load_state_dict(
        {name: t.flip(0) if "norm" in name else t for name, t in m.state_dict().items()}
    ),
    "assigned": lambda m: m.load_state_dict(
        {name: t.flip(0) if "heads" in name else t for name, t in m.state_dict().items()},
        assign=True,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_that_change_are_looked_at_again(module, prompt, change):
    accelerate(module)
    before = module.generate(prompt, **FOUR)
    CHANGES[change](module)
    after = module.generate(prompt, **FOUR)
    assert torch.equal(after, expected(module, prompt))
    assert not torch.equal(after, before)


def test_a_training_step_is_noticed(module, prompt):
    accelerate(module)
    before = module.generate(prompt, **FOUR)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    after = module.generate(prompt, **FOUR)
    assert torch.equal(after, expected(module, prompt))
    assert not torch.equal(after, before)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_weights_that_stay_make_no_second_model(module, prompt):
    lm = accelerate(module).generate.lm
    module.generate(prompt, **FOUR)
    assert module.generate.lm is lm
    module.model.norm.weight.data.mul_(1.1)
    assert module.generate.lm is lm, "shared memory needs no second one"
    module.speech_embeddings._modules["0"].weight.data.mul_(1.1)
    assert module.generate.lm is not lm


def test_a_cast_is_followed_and_bfloat16_is_not_changed(module, prompt):
    accelerate(module)
    module.bfloat16()
    given = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ids = module.generate(flatten_ids(prompt)[None], max_length=prompt.shape[1] // 4 + 4)
    assert ids.dtype == torch.int64
    assert module.generate.lm.dtype == torch.bfloat16
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, given[name]), name


class TestHeads:
    def test_another_linear_layer(self, module, prompt):
        accelerate(module)
        before = module.generate(prompt, **FOUR)
        rows, width = module.lm_head.weight.shape
        module.lm_head = nn.Linear(width, rows, bias=False)
        module.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        after = module.generate(prompt, **FOUR)
        assert torch.equal(after, expected(module, prompt))
        assert not torch.equal(after, before)

    def test_its_bias_counts(self, module, prompt):
        accelerate(module)
        rows = len(module.lm_head.weight)
        module.lm_head.bias = nn.Parameter(torch.zeros(rows).index_fill(0, torch.tensor(9), 1e4))
        text = new(module.generate(prompt, **FOUR), prompt)[0]
        assert bool((text == 9).all())
        module.lm_head.bias.data[9], module.lm_head.bias.data[7] = 0, 1e4
        assert bool((new(module.generate(prompt, **FOUR), prompt)[0] == 7).all())
        module.lm_head.bias = None
        assert torch.equal(module.generate(prompt, **FOUR), expected(module, prompt))

    def test_one_of_its_own_where_the_config_ties_them(self, module, prompt, want):
        """Upstream calls lm_head, whatever the config says."""
        module.config.tie_word_embeddings = True
        accelerate(module)
        assert torch.equal(new(module.generate(prompt, **FOUR), prompt), want)
        module.lm_head.weight = module.model.embed_tokens.weight
        assert module.generate.lm.config.tie_embeddings
        tied = module.generate(prompt, **FOUR)
        module.lm_head.weight = nn.Parameter(module.model.embed_tokens.weight.flip(0))
        assert not module.generate.lm.config.tie_embeddings
        assert not torch.equal(module.generate(prompt, **FOUR), tied)

    def test_one_that_is_no_linear_layer(self, module):
        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        rows, width = module.lm_head.weight.shape
        module.lm_head = Scaled(width, rows, bias=False)
        message = r"^the model's lm_head must be a torch.nn.Linear, not a Scaled$"
        refuses(message, accelerate, module, kind=TypeError)


class TestCopies:
    def test_a_deep_copy_has_its_own_weights(self, module, prompt):
        accelerate(module)
        before = module.generate(prompt, **FOUR)
        twin = copy.deepcopy(module)
        assert twin.generate is not module.generate
        twin.model.embed_tokens.weight.data.neg_()
        assert torch.equal(module.generate(prompt, **FOUR), before)
        assert torch.equal(twin.generate(prompt, **FOUR), expected(twin, prompt))
        assert not torch.equal(twin.generate(prompt, **FOUR), before)
        module.model.norm.weight.data.neg_()
        assert torch.equal(twin.generate(prompt, **FOUR), expected(twin, prompt))

    def test_of_a_wrapper_and_of_a_compiled_model(self, module, prompt, want, wrap):
        wrapper = copy.deepcopy(accelerate(SimpleNamespace(model=module)))
        compiled = copy.deepcopy(accelerate(wrap(module)))
        for twin in (wrapper.model, compiled):
            assert twin.generate is not module.generate
            assert torch.equal(new(twin.generate(prompt, **FOUR), prompt), want)
        method = copy.deepcopy(module.generate)
        assert torch.equal(new(method(prompt, **FOUR), prompt), want)

    def test_a_pickle_is_upstreams_and_can_be_accelerated_again(self, module, prompt, want):
        accelerate(accelerate(module))
        module.generate(prompt, **FOUR)
        stored = io.BytesIO()
        torch.save(module, stored)
        stored.seek(0)
        for twin in (
            pickle.loads(pickle.dumps(module)),
            torch.load(stored, weights_only=False),
        ):
            assert twin.generate() == "upstream's"
            assert twin.generate.__self__ is twin
            accelerate(twin)
            assert torch.equal(new(twin.generate(prompt, **FOUR), prompt), want)
        assert torch.equal(new(module.generate(prompt, **FOUR), prompt), want)

    @pytest.mark.slow
    def test_a_pickle_needs_no_mimo_fast(self, tmp_path):
        plain = nn.Module()
        tiny = pickle.dumps(_accelerated_stand_in(plain))
        (tmp_path / "model.pickle").write_bytes(tiny)
        script = (
            "import pickle, sys; sys.modules['mimo_fast'] = None; "
            f"pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_a_pickle_names_nothing_of_this_package(self, module):
        assert b"mimo_fast" not in pickle.dumps(accelerate(module))

    def test_what_was_set_on_the_model_comes_back(self, module):
        module.generate = "their own"
        twin = pickle.loads(pickle.dumps(accelerate(module)))
        assert twin.generate == "their own"


def _accelerated_stand_in(module: nn.Module) -> nn.Module:
    """A module of torch's own class with our `generate`, as `accelerate` leaves it."""
    from mimo_fast.acceleration import Accelerated

    module.generate = Accelerated(module)  # type: ignore[assignment]
    return module


class TestRefusals:
    def test_adapters_that_are_not_merged(self, module):
        part = module.model.layers._modules["0"].self_attn.q_proj
        part.register_parameter("lora_A", nn.Parameter(torch.zeros(2, 2)))
        message = "^1 tensors belong to no layer of upstream's, such as .*lora_A: merge adapters"
        refuses(message, accelerate, module, kind=CheckpointError)

    def test_adapters_that_come_later(self, module, prompt):
        accelerate(module)
        part = module.model.layers._modules["0"].self_attn.q_proj
        part.register_parameter("lora_A", nn.Parameter(torch.zeros(2, 2)))
        refuses("merge adapters", module.generate, prompt, kind=CheckpointError)

    def test_weights_of_two_types(self, module):
        module.model.norm.double()
        message = "several dtypes, torch.float32, torch.float64: cast the model to one$"
        refuses(message, accelerate, module, kind=CheckpointError)

    def test_weights_without_values(self, module, prompt):
        accelerate(module)
        module.to("meta")
        with pytest.raises(CheckpointError, match="on the device meta: load them first"):
            module.generate(prompt)

    def test_a_layer_that_was_taken_away(self, module, prompt):
        accelerate(module)
        del module.model.norm.weight
        message = "^1 tensors are missing or misshapen, such as model.norm.weight$"
        refuses(message, module.generate, prompt, kind=CheckpointError)

    def test_a_module_beside_upstreams_is_nobodys_business(self, module, prompt, want):
        module.value_head = nn.Linear(2, 1)
        assert torch.equal(new(accelerate(module).generate(prompt, **FOUR), prompt), want)


def with_rotary(module: Any) -> Any:
    """The module with the buffers in which transformers keeps rotary frequencies."""
    for name in ("model", "local_transformer", "input_local_transformer"):
        config = module.config
        dim = {"model": config.head_dim, "local_transformer": config.local_dim}.get(name)
        dim = (dim or config.input_local_dim) // (1 if name == "model" else config.local_attn_heads)
        part = Part()
        rates = 1 / config.rope_theta ** (torch.arange(0, dim, 2) / dim)
        part.register_buffer("inv_freq", rates, persistent=False)
        module._modules[name].add_module("rotary_emb", part)
    return module


def test_rotary_frequencies_are_those_of_the_buffers(module, model, prompt, want):
    """In float32 the config's own ones, bit for bit."""
    accelerate(with_rotary(module))
    lm = module.generate.lm
    assert torch.equal(lm.backbone_rope, model.lm.backbone_rope)
    assert torch.equal(new(module.generate(prompt, **FOUR), prompt), want)
    assert module.generate.lm is lm


def test_a_cast_that_rounds_rotary_frequencies_is_followed(module, golden):
    """As transformers' modules rotate, greedily over the longest prompt."""
    ids = golden.get("prompts:icl_s2s").long()
    exact = accelerate(with_rotary(module)).generate.lm
    module.bfloat16().float()
    lm = module.generate.lm
    assert lm is not exact
    upstream = TransformersModel(lm, 8192)
    for stack, name in (
        (upstream.backbone, "model"),
        (upstream.patch_encoder, "input_local_transformer"),
        (upstream.patch_decoder, "local_transformer"),
    ):
        stack.rotary_emb.inv_freq = module._modules[name].rotary_emb.inv_freq
    with torch.no_grad():
        hidden = upstream.step(ids[None], upstream.cache(upstream.backbone))
        states = []
        for each in (lm, LM(lm.config, EMPTY, WeightSource(module.state_dict().__getitem__))):
            state = each.new_state([0], ids.shape[1] // 4)
            each.prefill(ids, state, 0)
            states.append(state.hidden[:1])
    torch.testing.assert_close(states[0], hidden, rtol=1e-4, atol=1e-4)
    assert (states[1] - hidden).abs().max() > 1e-2
    groups = [*upstream.generate(ids, 6)]
    ours = new(module.generate(ids, max_new_tokens=6), ids).unflatten(1, (6, 4))
    assert [token for token, _ in groups] == ours[0, :, 0].tolist()
    for i, (_, codes) in enumerate(groups):
        assert torch.equal(codes, ours[1:, i])
