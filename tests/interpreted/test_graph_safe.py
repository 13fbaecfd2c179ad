"""Captured code never reads the device; kernels are counted, not run, as values must not matter."""

import pytest
import torch
import torch.nn.functional as F
from launch_counter import Launches

import mimo_fast
from mimo_fast.runtime.codec import encoder_graphs
from mimo_fast.runtime.codec.encoder_graphs import PaddedEncoder
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.graphs import Graphs
from mimo_fast.runtime.lm.state import NO_POSITION

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"}
READS |= {"lift_fresh", "lift_fresh_copy"}
"""torch ops that wait for the device, or copy to it from the host."""

BOOLEAN = (torch.bool, torch.uint8)


def load(kit) -> mimo_fast.MimoAudio:
    pair = (kit / "checkpoint" / part for part in ("lm", "codec"))
    model = mimo_fast.load(*pair, device="cpu", max_seq_len=80)
    model.lm.backbone_rope  # noqa: B018
    return model


class Strict(Launches):
    """Fails at the first op that a capture could not hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, f"{name} reads the device"
        if name in ("index", "index_put_", "_index_put_impl_"):
            masks = [x for x in args[1] if x is not None and x.dtype in BOOLEAN]
            assert not masks, f"{name} by a mask"
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def strict(launches: Launches) -> Strict:
    mode = Strict()
    mode.names = launches.names
    return mode


@pytest.mark.parametrize("slots", [1, 3])
def test_pieces_ask_nothing_of_the_device(strict, kit, slots):
    model = load(kit)
    engine = Engine(model.lm, slots, 80)
    graphs, config = Graphs(model.lm, engine.state), model.lm.config
    rows = engine.state.rows[:slots]
    with strict:
        graphs._step(model.lm, rows)
    step = list(strict.names)
    strict.names.clear()
    with strict:
        graphs._patch(model.lm, rows)
    patch = list(strict.names)
    assert step.count("split_attention_kernel") == config.backbone.layers
    layers = config.patch_decoder.layers * config.patch_steps
    assert patch.count("small_decode_kernel") == layers
    # Beside the layers: reads and writes of single rows of the state. (Blocks that a CPU does not
    # join need cat.)
    ops = [[name for name in piece if name.startswith("torch.")] for piece in (step, patch)]
    outside = [[name for name in piece if name != "torch.cat"] for piece in ops]
    assert len(outside[0]) == 15, outside
    # From 5 rows on, which is 2 slots of the patch encoder, dense products are torch's.
    assert slots > 1 or len(outside[1]) == 6, outside


def test_a_prompt_asks_nothing_of_the_device(strict, kit):
    model = load(kit)
    config, state = model.lm.config, model.lm.new_state([0], 80)
    ids = torch.zeros(config.channels + 1, 32, config.group_size, dtype=torch.int64)
    place = torch.tensor([1, NO_POSITION, 0])
    with strict:
        model.lm.prefill_padded(ids, place, state)
    for kernel in ("rope_append_kernel", "prefill_attention_kernel"):
        assert strict.names.count(kernel) == config.backbone.layers
    assert strict.names.count("rotary_attention_kernel") == config.patch_encoder.layers


def test_packed_prompts_ask_nothing_of_the_device(strict, kit):
    model = load(kit)
    config, state = model.lm.config, model.lm.new_state([0, 0], 80)
    ids = torch.zeros(2, config.channels + 1, 32, config.group_size, dtype=torch.int64)
    places = torch.tensor([[2, NO_POSITION, 0]] * 2)
    with strict:
        model.lm.prefill_packed(ids, places, state)
    # One launch for both prompts; a cat for each of their patch encoders' blocks and no more.
    for kernel in ("rope_append_kernel", "prefill_attention_kernel"):
        assert strict.names.count(kernel) == config.backbone.layers
    assert strict.names.count("rotary_attention_kernel") == 2 * config.patch_encoder.layers


def test_an_encode_asks_nothing_of_the_device(strict, kit, monkeypatch):
    codec = load(kit).codec
    encoder = PaddedEncoder(codec, 50, 8)
    # A CPU's own check for values that are not finite, which a GPU does not make.
    monkeypatch.setattr(encoder_graphs, "sdpa", F.scaled_dot_product_attention)
    with strict, torch.no_grad():
        encoder.run()
    assert strict.names.count("rvq_encode_kernel") == 1
    assert strict.names.count("layer_norm_kernel") == 2 * codec.config.encoder_layers + 2
