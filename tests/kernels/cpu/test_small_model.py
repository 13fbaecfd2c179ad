"""Small models in native calls, against plain torch: the same draws, the same greedy codes, hidden
states to 1e-5."""

import copy

import pytest
import torch
from helpers import gaussian, source_of, write_pair
from rows import SAMPLERS, SIZE, rows_not_finite, rows_of

from mimo_fast.config import LMConfig, read_json
from mimo_fast.kernels import sample_text
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu import transformer as small
from mimo_fast.kernels.sample import NOT_FINITE, gumbel
from mimo_fast.kernels.sample_text import sample_text_ref
from mimo_fast.quantization import QuantizationConfig
from mimo_fast.runtime.lm.executor import (
    FusedBackbone,
    FusedDecoder,
    FusedEncoder,
    choose,
    layer_by_layer,
)
from mimo_fast.runtime.lm.model import LM
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)

NANO = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "speech_vocab_size": "257-257-129-129-129-129-129-129",
    "speech_zeroemb_idx": "256-256-128-128-128-128-128-128",
    "local_dim": 192,
    "local_layers": 2,
    "local_attn_heads": 4,
    "local_ffn_dim": 512,
    "input_local_layers": 1,
    "input_local_dim": 128,
}
CODEC = {"codebook_size": [256, 256, 128]}
MIXED = [*SAMPLERS, GREEDY, MiMoSampler(True, 0.9, top_p=0.95), MiMoSampler(True, 0.6, 50, 0.95)]


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> LM:
    """Random weights of the tiny pair's dimensions."""
    return load(write_pair(tmp_path_factory.mktemp("nano"), NANO, CODEC)[0])


def load(directory, formats: str | None = None) -> LM:
    config = LMConfig.from_dict(read_json(directory / "config.json"))
    return LM(config, 1, source_of(directory, requested=QuantizationConfig.parse(formats)))


@pytest.fixture(params=["kit", "nano", "int8", "int4"])
def lm(request, nano, model, tmp_path) -> LM:
    if request.param in ("kit", "nano"):
        return model.lm if request.param == "kit" else nano
    return load(write_pair(tmp_path, NANO, CODEC)[0], request.param)


def fused(lm: LM) -> list[bool]:
    """Of backbone, patch encoder and patch decoder, which are one native call."""
    parts, kinds = lm._executor, (FusedBackbone, FusedEncoder, FusedDecoder)
    each = (parts.backbone, parts.patch_encoder, parts.patch_decoder)
    return [isinstance(*pair) for pair in zip(each, kinds, strict=True)]


def plainly(monkeypatch, lm: LM, call):
    """Product by product; dense ones in plain torch, quantized ones by the native product, as
    without this."""
    with monkeypatch.context() as patch:
        patch.setattr(lm, "_executor", layer_by_layer(lm.network))
        if not isinstance(lm.backbone.layers[0].qkv, small.QuantizedWeight):
            patch.setenv("MIMO_FAST_KERNELS", "torch")
        return call()


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To 1e-5 of the largest value."""
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, 1 << 40])
def test_noise_is_that_of_the_reference(seed):
    for draw, slot, first in ((0, 0, 0), (5, 1, 1), (2**31, 4, 514), (3, 2, 150_000)):
        ids = torch.arange(first, first + 1111)
        want = gumbel(*(torch.tensor([x]) for x in (seed, draw, slot)), ids)[0]
        assert torch.equal(native.gumbel(seed, draw, slot, first, len(ids)), want)


@pytest.mark.parametrize(
    "kind", ["normal", "steep", "narrow", "ties", "pairs", "-inf", "one-hot", "flat"]
)
@pytest.mark.parametrize("banned", [None, "some", "rows", "all"])
def test_text_is_drawn_as_by_the_reference(kind, banned):
    logits = rows_of(kind)
    rows = len(logits)
    settings = sampler_tensors(MIXED).select(torch.arange(rows) % len(MIXED))
    index, ids = torch.arange(rows), torch.arange(SIZE)
    ban = None if banned is None else ids % 3 < (3 if banned == "all" else 1)
    ban = (ids + index[:, None]) % 3 == 0 if banned == "rows" else ban
    assert native.takes_logits(logits, settings, index, index, ban)
    for draw in range(5):
        want = sample_text_ref(logits, settings, index, index + draw, ban)
        assert torch.equal(
            sample_text.sample_text(logits, settings, index, index + draw, ban), want
        )


@pytest.mark.parametrize("size", [1, 2, 63, 65, 151_680])
def test_any_vocabulary(size):
    logits, index = gaussian(3, size, size) * 8, torch.arange(3)
    for sampler in MIXED:
        settings = sampler_tensors([sampler] * 3)
        want = sample_text_ref(logits, settings, index, index + 3)
        assert torch.equal(native.sample_text(logits, settings, index, index + 3, None, 0), want)


@pytest.mark.parametrize("size", [2, 129, 3000])
def test_logits_that_are_no_numbers_draw_nothing(size):
    logits, banned, lost = rows_not_finite(size)
    index = torch.arange(len(logits))
    for sampler in MIXED:
        settings = sampler_tensors([sampler] * len(logits))
        ids = native.sample_text(logits, settings, index, index, banned, 0)
        assert torch.equal(ids == NOT_FINITE, lost)
        assert torch.equal(ids, sample_text_ref(logits, settings, index, index, banned))


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_a_patch_is_that_of_plain_torch(lm, rows, monkeypatch):
    """Greedy and sampled rows side by side, slots in any order."""
    assert isinstance(lm._executor.patch_decoder, FusedDecoder)
    local = gaussian(rows, lm.config.patch_decoder.dim, rows) * 3
    state = lm.new_state(range(20, 29), 1)
    state.draws[:] = torch.arange(10) + 1
    slots = torch.arange(9).flip(0)[:rows]
    for samplers in (
        [GREEDY] * rows,
        [MIXED[(3 * r + rows) % len(MIXED)] for r in range(rows)],
        MIXED[-2:],
    ):
        settings = sampler_tensors((samplers * rows)[:rows])
        codes = lm.decode_patch(local, state, slots, settings)
        assert torch.equal(
            codes,
            plainly(monkeypatch, lm, lambda s=settings: lm.decode_patch(local, state, slots, s)),
        )
        for r in range(rows):
            alone = lm.decode_patch(local[r : r + 1], state, slots[r : r + 1], settings.select([r]))
            assert torch.equal(alone[0], codes[r])


def test_a_step_of_the_backbone_is_that_of_plain_torch(lm, monkeypatch):
    """Ten steps of rows at positions of their own; then every cached key and value."""
    assert isinstance(lm._executor.backbone, FusedBackbone)
    states = [lm.new_state([0] * 4, 40) for _ in range(2)]
    slots, lengths = torch.tensor([3, 0, 2]), torch.tensor([0, 5, 29])
    for state in states:
        for part in state.cache.parts:
            part[:] = gaussian(1, part.numel()).view(part.shape)
        state.lengths[slots] = lengths
    for t in range(10):
        for state in states:
            state.text[slots] = torch.tensor([lm.empty_id, 5, t])
            state.patches[slots] = gaussian(3, lm.config.backbone.dim, t)
        lm.step(states[0], slots)
        plainly(monkeypatch, lm, lambda: lm.step(states[1], slots))
        assert_close(states[0].hidden[slots], states[1].hidden[slots])
        assert torch.equal(states[0].lengths, states[1].lengths)
    for got, want in zip(states[0].cache.parts, states[1].cache.parts, strict=True):
        assert_close(got, want)


def test_positions_that_do_not_exist_write_nothing(nano):
    state = nano.new_state([0] * 3, 4)
    for part in state.cache.parts:
        part[:] = 1e4
    before = [part.clone() for part in state.cache.parts]
    state.lengths[:] = torch.tensor([-1, 4, 0, -1])
    nano.step(state, torch.arange(2))
    assert all(torch.equal(*pair) for pair in zip(state.cache.parts, before, strict=True))
    assert state.hidden[:2].isfinite().all()


@pytest.mark.parametrize("patches", [1, 2, 5])
def test_an_encoded_patch_is_that_of_plain_torch(lm, patches, monkeypatch):
    config = lm.config
    sizes = torch.tensor(config.code_sizes)[:, None]
    codes = (
        gaussian(patches, config.channels * config.group_size, 2).view(patches, config.channels, -1)
        * 1e4
    ).long()
    codes = codes % sizes
    assert_close(
        lm.encode_patches(codes), plainly(monkeypatch, lm, lambda: lm.encode_patches(codes))
    )


def test_a_causal_encoder_does_not_see_what_follows(nano):
    assert isinstance(nano._executor.patch_encoder, FusedEncoder)
    part, config, patches = nano._executor.patch_encoder.native, nano.config, 3
    x = gaussian(patches * config.group_size, config.patch_encoder.dim).view(
        patches, config.group_size, -1
    )
    shorter = part.encode(x[:, :-1], causal=True)
    assert torch.equal(part.encode(x, causal=True)[:, :-1], shorter)
    assert not torch.equal(part.encode(x, causal=False)[:, :-1], shorter)


def test_results_do_not_depend_on_what_memory_held(nano):
    state, local = nano.new_state([1, 2, 3], 4), gaussian(3, 192)
    settings = sampler_tensors([MiMoSampler(True, 0.9, top_p=0.95)] * 3)
    want = (
        nano.decode_patch(local, state, torch.arange(3), settings),
        nano.encode_patches(torch.zeros(3, 8, 4).long()),
    )
    for _ in range(10):
        for shape in ((3, 192), (3, 8, 4), (3, 4, 128), (3, 1024)):
            poison = torch.full(shape, float("nan"))
            del poison
        state.patch_cache.k[:] = state.patch_cache.v[:] = float("nan")
        assert torch.equal(nano.decode_patch(local, state, torch.arange(3), settings), want[0])
        assert torch.equal(nano.encode_patches(torch.zeros(3, 8, 4).long()), want[1])


def test_what_it_does_not_know_goes_elsewhere(nano, tmp_path, monkeypatch):
    def parts(changed: dict, dtype: torch.dtype = torch.float32) -> list[bool]:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        lm_dir, _ = write_pair(directory, NANO | changed, CODEC)
        config = LMConfig.from_dict(read_json(lm_dir / "config.json"))
        return fused(LM(config, 1, source_of(lm_dir, dtype)))

    assert parts({}) == [True, True, True]
    assert parts({}, torch.bfloat16) == [False, False, False]
    assert parts({"local_ffn_dim": 500}) == [True, True, False]
    assert parts({"head_dim": 20}) == [False, True, True]
    monkeypatch.setattr(small, "SMALL", 2**22)
    assert parts({}) == [False, True, True]
    quantized_cache = nano.new_state([0], 4, quantized_cache=True)
    nano.step(quantized_cache, torch.tensor([0]))
    assert quantized_cache.lengths[0] == 1


def test_without_the_native_module_torch_computes(nano, tmp_path, monkeypatch):
    directory = write_pair(tmp_path, NANO, CODEC)[0]
    lm, settings = load(directory), sampler_tensors([MiMoSampler(True)])
    local, slots = gaussian(1, 192), torch.tensor([0])
    want = lm.decode_patch(local, lm.new_state([1], 4), slots, settings)
    monkeypatch.setattr(native, "_native", None)
    plain = load(directory)
    assert fused(plain) == [False, False, False]
    assert torch.equal(plain.decode_patch(local, plain.new_state([1], 4), slots, settings), want)


def test_weights_in_training_are_not_held(tmp_path):
    directory = write_pair(tmp_path, NANO, CODEC)[0]
    lm = load(directory)
    lm.patch_decoder.layers[1].out.blocks[0].requires_grad_()
    assert choose(lm.network).patch_decoder is not lm._executor.patch_decoder
    lm._executor = choose(lm.network)
    assert fused(lm) == [True, True, False]


def test_a_copy_reads_its_own_weights(nano):
    """All that a copy of a model shares with it are numbers."""
    local, settings, slots = gaussian(2, 192), sampler_tensors([GREEDY] * 2), torch.arange(2)
    want = nano.decode_patch(local, nano.new_state([1, 2], 4), slots, settings)
    copied = copy.deepcopy(nano)
    assert torch.equal(
        copied.decode_patch(local, copied.new_state([1, 2], 4), slots, settings), want
    )
    copied.code_heads.neg_()
    assert not torch.equal(
        copied.decode_patch(local, copied.new_state([1, 2], 4), slots, settings), want
    )
    assert torch.equal(nano.decode_patch(local, nano.new_state([1, 2], 4), slots, settings), want)
