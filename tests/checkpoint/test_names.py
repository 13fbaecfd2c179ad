"""Fine-tunes whose tensors were renamed by what held the model while it trained."""

import json
import shutil

import pytest
import torch
from helpers import KIT, KIT_PAIR, fault, kit_config
from safetensors.torch import load_file, save_file

from mimo_fast.checkpoint.files import INDEX_FILE, write_checkpoint
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.checkpoint.names import RENAMINGS, open_lm_weights
from mimo_fast.config import LMConfig
from mimo_fast.quantization import import_checkpoint, quantize_checkpoint
from mimo_fast.runtime.loading import open_lm

FORMS = KIT / "formats"

WRAPPED = {
    "DistributedDataParallel": "module.{}",
    "torch.compile": "_orig_mod.{}",
    "both": "module._orig_mod.{}",
    "the other way round": "_orig_mod.module.{}",
    "PEFT": "base_model.model.{}",
    "a trainer's module": "model.{}",
    "a multimodal wrapper": "language_model.{}",
    "transformers' wrapper": "model.language_model.{}",
}
"""State dicts of a wrapped model, by what wraps it: the names of all tensors."""

INNER = {
    "compiled layers": ("model.layers.0.", "model.layers.0._orig_mod."),
    "a compiled backbone": ("model.layers.", "model._orig_mod.layers."),
    "sharded layers": ("model.layers.1.", "model.layers.1._fsdp_wrapped_module."),
    "checkpointed layers": (
        "local_transformer.layers.0.mlp.",
        "local_transformer.layers.0._checkpoint_wrapped_module.mlp.",
    ),
}
"""What becomes of names where inner modules are wrapped."""


@pytest.fixture(scope="module")
def tensors():
    return load_file(KIT_PAIR[0] / "model.safetensors")


def written(directory, tensors, shard_bytes=2**31):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    options = {"config": kit_config("lm"), "shard_bytes": shard_bytes}
    write_checkpoint(directory, shapes, tensors.__getitem__, dtype=torch.float32, **options)
    return directory


def opened(directory):
    return open_lm(directory)[1]


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("shard_bytes", [2**31, 2**18])
def test_a_wrapped_model_is_opened(tmp_path, tensors, wrapper, shard_bytes):
    renamed = {WRAPPED[wrapper].format(name): tensor for name, tensor in tensors.items()}
    weights = opened(written(tmp_path, renamed, shard_bytes))
    assert (tmp_path / INDEX_FILE).exists() == (shard_bytes == 2**18)
    assert len(weights.shards()) == (
        1 if shard_bytes == 2**31 else len([*tmp_path.glob("*.safetensors")])
    )
    assert set(weights.names()) == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(weights.get(name), tensor)
        assert weights.shape(name) == tuple(tensor.shape)


@pytest.mark.parametrize("wrapper", INNER)
def test_wrapped_inner_modules_are_opened(tmp_path, tensors, wrapper):
    old, new = INNER[wrapper]
    renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    weights = opened(written(tmp_path, renamed))
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in tensors.items())


def test_every_row_of_the_table_is_tried():
    names = [*WRAPPED.values(), *(new for _, new in INNER.values())]
    assert all(any(row.added in name for name in names) for row in RENAMINGS)


def refused(directory, tensors):
    return fault(lambda: opened(written(directory, tensors)))


def test_other_names_are_refused_with_the_table(tmp_path, tensors):
    message = refused(tmp_path, {f"net.{name}": tensor for name, tensor in tensors.items()})
    assert "missing hidden_states_downcast.*" in message
    assert "unexpected net." in message
    assert all(row.added in message for row in RENAMINGS)
    assert len(message) < 1500


def test_a_renaming_must_make_all_names_fit(tmp_path, tensors):
    renamed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    lost = {name: tensor for name, tensor in renamed.items() if "downcast" not in name}
    assert "missing" in refused(tmp_path / "a", lost)
    more = renamed | {"module.extra.weight": torch.ones(3)}
    assert "named neither" in refused(tmp_path / "b", more)
    # Part of them only: whatever is right, it is not for us to say.
    half = {name if "layers.0" in name else f"module.{name}": t for name, t in tensors.items()}
    assert "unexpected" in refused(tmp_path / "c", half)
    twice = renamed | {"model.norm.weight": torch.ones(64)}
    assert "named neither" in refused(tmp_path / "d", twice)


def test_models_of_other_sizes_are_told_so(tmp_path, tensors):
    """Their names are upstream's: what is wrong is config.json."""
    fewer = {name: t for name, t in tensors.items() if not name.startswith("model.layers.1.")}
    assert "num_hidden_layers" in refused(tmp_path / "a", fewer)
    more = {name.replace("layers.1.", "layers.7."): t for name, t in tensors.items()}
    assert "unexpected" in refused(tmp_path / "b", tensors | more)
    wrapped = {f"module.{name}": t for name, t in fewer.items()}
    assert "named neither" in refused(tmp_path / "c", wrapped)


def test_converting_undoes_a_renaming(tmp_path, tensors):
    lm = written(tmp_path / "lm", {f"_orig_mod.{name}": t for name, t in tensors.items()})
    for source, target in ((lm, "a"), (KIT_PAIR[0], "b")):
        quantize_checkpoint(source, tmp_path / target, "int4", progress=False)
    got, want = (load_file(tmp_path / target / "model.safetensors") for target in "ab")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_imports_undo_a_renaming(tmp_path):
    form = FORMS / "autoround"
    packed = {f"model.{name}": t for name, t in load_file(form / "model.safetensors").items()}
    (tmp_path / "in").mkdir()
    save_file(packed, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    shutil.copy(form / "config.json", tmp_path / "in")
    for source, target in ((tmp_path / "in", "a"), (form, "b")):
        import_checkpoint(source, tmp_path / target, progress=False)
    got, want = (load_file(tmp_path / target / "model.safetensors") for target in "ab")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_whole_checkpoint_is_opened_as_it_is(tensors):
    config = LMConfig.from_dict(kit_config("lm"))
    weights = open_lm_weights(KIT_PAIR[0], config)
    assert set(weights.names()) == lm_shapes(config).keys()
    assert json.dumps(sorted(weights.names())) == json.dumps(sorted(tensors))
