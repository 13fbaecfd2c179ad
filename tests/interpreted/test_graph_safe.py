"""What is captured as a graph asks nothing of the device, and launches little outside the layers.

Kernels are counted and not run: which they are must not depend on values, or a replay would repeat
a choice.
"""

import pytest
import torch
from launch_counter import Launches

import mimo_fast
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.graphs import Graphs
from mimo_fast.runtime.lm.state import NO_POSITION

READS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "lift_fresh",
    "lift_fresh_copy",
    "equal",
}
"""torch ops that wait for the device, or copy to it from the host."""

BOOLEAN = (torch.bool, torch.uint8)


class Strict(Launches):
    """Fails at the first op that a capture could not hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, f"{name} reads the device"
        if name in ("index", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype not in BOOLEAN for index in args[1]), (
                f"{name} by a mask"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def strict(launches: Launches) -> Strict:
    mode = Strict()
    mode.names = launches.names
    return mode


@pytest.mark.parametrize("slots", [1, 3])
def test_pieces_ask_nothing_of_the_device(strict: Strict, kit, slots: int) -> None:
    model = mimo_fast.load(
        kit / "checkpoint" / "lm", kit / "checkpoint" / "codec", device="cpu", max_seq_len=80
    )
    engine = Engine(model.lm, slots, 80)
    graphs, config = Graphs(model.lm, engine.state), model.lm.config
    rows = engine.state.rows[:slots]
    model.lm.backbone_rope  # noqa: B018
    with strict:
        graphs._step(rows)
    step = list(strict.names)
    strict.names.clear()
    with strict:
        graphs._patch(rows)
    patch = list(strict.names)
    layers = {
        "step": config.backbone.layers,
        "patch": config.patch_decoder.layers * config.patch_steps,
    }
    assert len([name for name in step if name == "split_attention_kernel"]) == layers["step"]
    assert len([name for name in patch if name == "small_decode_kernel"]) == layers["patch"]
    # Beside the layers: reads and writes of single rows of the state. (Blocks that a CPU does not
    # join need cat.)
    outside = [
        [name for name in piece if name.startswith("torch.") and name != "torch.cat"]
        for piece in (step, patch)
    ]
    assert len(outside[0]) == 15, outside
    # From 5 rows on, which is 2 slots of the patch encoder, dense products are torch's.
    assert slots > 1 or len(outside[1]) == 6, outside


def test_a_prompt_asks_nothing_of_the_device(strict: Strict, kit) -> None:
    model = mimo_fast.load(
        kit / "checkpoint" / "lm", kit / "checkpoint" / "codec", device="cpu", max_seq_len=80
    )
    config, state = model.lm.config, model.lm.new_state([0], 80)
    ids = torch.zeros(config.channels + 1, 32, config.group_size, dtype=torch.int64)
    place = torch.tensor([1, NO_POSITION, 0])
    model.lm.backbone_rope  # noqa: B018
    with strict:
        model.lm.prefill_padded(ids, place, state)
    for kernel in ("rope_append_kernel", "prefill_attention_kernel"):
        assert strict.names.count(kernel) == config.backbone.layers
    assert strict.names.count("rotary_attention_kernel") == config.patch_encoder.layers
