"""Adapters that PEFT saved, against its own merge, and what is refused before weights are read."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import adapter
from helpers import ADAPTERS, KIT_PAIR, copy_tree, fault, raising, seeded, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimo_fast.checkpoint.adapters import AdaptedWeights, Change, open_adapter
from mimo_fast.checkpoint.files import Weights, open_weights
from mimo_fast.errors import CheckpointError, ConfigError
from mimo_fast.runtime.loading import open_lm

KINDS = ("qkvo", "all_linear_saved", "dora_rslora", "heads_embeddings", "bias_lora_only")
LM = KIT_PAIR[0]
GOLDEN = load_file(ADAPTERS / "golden.safetensors")
MODULE = "model.layers.0.self_attn.q_proj"


def adapted(folder: Path) -> AdaptedWeights:
    weights = open_lm(LM, {"a": folder})[1]
    assert isinstance(weights, AdaptedWeights)
    return weights


def pair(name: str = MODULE, shape: tuple[int, int] = (64, 64), rank: int = 2, seed: int = 0):
    draw = seeded(seed)
    a, b = torch.randn(rank, shape[1], generator=draw), torch.randn(shape[0], rank, generator=draw)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


@pytest.mark.parametrize("kind", KINDS)
class TestMerged:
    def test_has_the_bits_of_pefts_merge(self, kind):
        weights, start = adapted(ADAPTERS / kind), f"{kind}.merged."
        golden = {name[len(start) :]: GOLDEN[name] for name in GOLDEN if name.startswith(start)}
        assert len(golden) >= 2
        for name, want in golden.items():
            assert torch.equal(weights.get(name), want), name
            assert torch.equal(weights.finite(name), want), name

    def test_changes_what_peft_changed_and_nothing_else(self, kind):
        weights, base = adapted(ADAPTERS / kind), open_weights(LM)
        stated = json.loads((ADAPTERS / "golden.json").read_text())["adapters"][kind]
        differs = {
            name for name in base.names() if not torch.equal(weights.get(name), base.get(name))
        }
        assert differs == weights.changed
        assert len(differs) == stated["changed"]
        assert {name.partition(".")[0] for name in differs} == set(stated["prefixes"])

    def test_has_the_names_shapes_and_types_of_the_checkpoint(self, kind):
        weights, base = adapted(ADAPTERS / kind), open_weights(LM)
        assert [*weights.names()] == [*base.names()]
        for name in base.names():
            tensor = weights.get(name)
            assert (tuple(tensor.shape), tensor.dtype) == (base.shape(name), base.dtype(name))
            assert tensor.is_contiguous()


class TestRule:
    """Against double precision, with other shapes, ranks and dtypes than the kit's."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize(("out", "width", "rank"), [(5, 3, 1), (64, 33, 7), (1, 130, 64)])
    def test_matrices(self, dtype, out, width, rank):
        draw = seeded(out)
        w, a, b = (
            torch.randn(*shape, generator=draw)
            for shape in ((out, width), (rank, width), (out, rank))
        )
        m, w = torch.rand(out, generator=draw) + 0.5, w.to(dtype)
        want = w.double() + 0.3 * b.double() @ a.double()
        bound = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
        got = Change(a=a, b=b, scale=0.3).merged(w)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **bound)
        got = Change(a=a, b=b, scale=0.3, magnitude=m).merged(w)
        want *= (m.double() / want.norm(dim=1))[:, None]
        torch.testing.assert_close(got.double(), want, **bound)
        table = Change(a=b.T.contiguous(), b=a.T.contiguous(), scale=0.3, transposed=True).merged(w)
        want = w.double() + 0.3 * b.double() @ a.double()
        torch.testing.assert_close(table.double(), want, **bound)

    def test_a_replaced_base_gets_the_product_too(self):
        draw = seeded(1)
        w, base, b = (torch.randn(4, 2, generator=draw) for _ in range(3))
        a = torch.randn(2, 2, generator=draw)
        got = Change(base=base, a=a, b=b, scale=2.0).merged(w)
        torch.testing.assert_close(got, base + 2 * b @ a)
        assert torch.equal(Change(base=base).merged(w), base)

    def test_the_first_pattern_that_matches_a_names_end_counts(self, tmp_path):
        other = "local_transformer.layers.0.self_attn.q_proj"
        tensors = pair(rank=2) | pair(other, (32, 32), rank=4)
        patterns = {
            "rank_pattern": {"^local_transformer.*q_proj": 4, "q_proj": 2},
            "alpha_pattern": {"proj_q": 7, "model.layers.0.self_attn.q_proj": 8, "q_proj": 5},
        }
        changes = open_adapter(adapter(tmp_path, tensors, r=9, **patterns)).changes
        # "local_transformer.layers..." does not end in a part "model.layers...".
        assert changes[f"{other}.weight"].scale == 5 / 4
        assert changes[f"{MODULE}.weight"].scale == 8 / 2
        rooted = open_adapter(adapter(tmp_path, tensors, r=9, use_rslora=True, **patterns)).changes
        assert rooted[f"{other}.weight"].scale == 5 / 2

    def test_modules_are_those_of_the_tensors(self, tmp_path):
        found = open_adapter(adapter(tmp_path, pair(), target_modules=["nothing", "2"]))
        assert [*found.changes] == [f"{MODULE}.weight"]

    def test_options_that_have_no_effect_or_are_off(self, tmp_path):
        options = {
            "lora_dropout": 0.1,
            "auto_mapping": {"base_model_class": "X"},
            "use_something_new": False,
            "something_newer": {},
            "init_lora_weights": "gaussian",
            "bias": None,
        }
        assert len(open_adapter(adapter(tmp_path, pair(), **options)).changes) == 1

    def test_digests_tell_adapters_apart(self, tmp_path):
        def digest(folder: str, tensors: dict[str, Tensor], **config: Any) -> str:
            return open_adapter(adapter(tmp_path / folder, tensors, **config)).digest

        known = digest("a", pair())
        assert digest("b", pair()) == known
        others = {
            digest("c", pair(seed=1)),
            digest("d", pair(), lora_alpha=4),
            digest("e", pair(), use_rslora=True),
            digest("f", pair(MODULE.replace("q_", "o_"))),
        }
        assert len(others | {known}) == 5


class TestMemory:
    def test_what_is_not_changed_stays_in_the_checkpoints_file(self):
        base, config = open_weights(LM), open_adapter(ADAPTERS / "bias_lora_only")
        weights = AdaptedWeights(base, config)
        same = [name for name in base.names() if name not in weights.changed]
        assert len(same) > 50
        for name in same:
            assert weights.get(name).data_ptr() == base.get(name).data_ptr()

    def test_nothing_is_read_before_it_is_asked_for(self, monkeypatch):
        monkeypatch.setattr(Change, "merged", raising(AssertionError, "a weight was read"))
        weights = adapted(ADAPTERS / "all_linear_saved")
        assert len(weights.changed) == 62


DORA: dict[str, Any] = {"use_dora": True}
MAGNITUDE = f"{MODULE}.lora_magnitude_vector"
TABLE = "model.embed_tokens"
EMBEDDED = {
    f"{TABLE}.lora_embedding_A": torch.zeros(2, 448),
    f"{TABLE}.lora_embedding_B": torch.zeros(64, 2),
}
NAN = {f"{MODULE}.bias": torch.full((64,), float("nan"))}

REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "another type": (pair(), {"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    "no type": (pair(), {"peft_type": None}, "peft_type None is not supported"),
    "an option": (pair(), {"use_qalora": True}, "use_qalora True is not supported"),
    "an unknown option": (pair(), {"new": [1]}, r"new \[1\] is not supported"),
    "bases that training moved": (pair(), {"init_lora_weights": "pissa"}, "weight_conversion"),
    "an unknown bias": (pair(), {"bias": "some"}, "bias 'some' is not supported"),
    "replicated layers": (pair(), {"layer_replication": [[0, 1]]}, "layer_replication"),
    "no rank": (pair(), {"r": None}, "r must be a number of at least 1, not None"),
    "rank 0": (pair(), {"r": 0}, "r must be a number of at least 1, not 0"),
    "a truth as a rank": (pair(), {"r": True}, "r must be a number of at least 1, not True"),
    "alpha is NaN": (pair(), {"lora_alpha": float("nan")}, "lora_alpha must be a number"),
    "no alpha": (pair(), {"lora_alpha": "4"}, "lora_alpha must be a number"),
    "a list of patterns": (pair(), {"rank_pattern": [1]}, "rank_pattern must be an object"),
    "a pattern's value": (pair(), {"alpha_pattern": {"q": "x"}}, "alpha_pattern 'q' must be"),
    "no pattern": (pair(), {"rank_pattern": {"(": 2}}, "'\\(' is no regular expression"),
    "another rank": (pair(rank=3), {}, r"A \[3, 64\] and B \[64, 3\].* the rank is 2"),
    "half a rank": (pair(), {"r": 2.5}, "the rank is 2.5"),
    "A of three axes": (
        pair() | {f"{MODULE}.lora_A.weight": torch.zeros(2, 64, 1)},
        {},
        r"A \[2, 64, 1\]",
    ),
    "no B": ({f"{MODULE}.lora_A.weight": torch.zeros(2, 64)}, {}, "no pair of A and B"),
    "A and B of both kinds": (
        EMBEDDED | {f"{TABLE}.lora_A.weight": torch.zeros(2, 64)},
        {},
        "no pair of A and B",
    ),
    "another width": (pair(shape=(64, 63)), {}, r"has A \[2, 63\] and B \[64, 2\], for \[64, 64\]"),
    "a norm": (pair("model.norm", (64, 64)), {}, r"model\.norm\.weight has A .* for \[64\]"),
    "an embedding the other way": (
        {
            f"{TABLE}.lora_embedding_A": torch.zeros(2, 64),
            f"{TABLE}.lora_embedding_B": torch.zeros(448, 2),
        },
        {},
        r"has A \[2, 64\] and B \[448, 2\], for \[448, 64\]",
    ),
    "a longer vocabulary": (
        {"lm_head.weight": torch.zeros(449, 64)},
        {},
        r"lm_head\.weight is \[449, 64\], not \[448, 64\]",
    ),
    "a module of another model": (
        pair("model.layers.7.self_attn.q_proj"),
        {},
        r"changes model\.layers\.7\.self_attn\.q_proj, which this model lacks",
    ),
    "a bias of another model": (
        {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)},
        {},
        r"up_proj\.bias, which this model lacks",
    ),
    "no magnitude": (pair(), DORA, "has no magnitude"),
    "a magnitude alone": ({MAGNITUDE: torch.ones(64)}, DORA, "magnitude without use_dora or A"),
    "a magnitude without DoRA": (
        pair() | {MAGNITUDE: torch.ones(64)},
        {},
        "magnitude without use_dora or A",
    ),
    "a magnitude of another size": (
        pair() | {MAGNITUDE: torch.ones(63)},
        DORA,
        r"a magnitude of \[63\], for \[64, 64\]",
    ),
    "DoRA of an embedding": (
        EMBEDDED | {f"{TABLE}.lora_magnitude_vector": torch.ones(64)},
        DORA,
        "an embedding with DoRA, which is not supported",
    ),
    "a name of PEFT's in memory": (
        {f"{MODULE}.lora_A.default.weight": torch.zeros(2, 64)},
        {},
        "is none of LoRA's",
    ),
    "a bias of B": ({f"{MODULE}.lora_B.bias": torch.zeros(64)}, {}, "is none of LoRA's"),
    "a tensor of another kind": ({f"{MODULE}.oft_R": torch.zeros(2)}, {}, "is none of LoRA's"),
    "one tensor under two names": (
        {f"{MODULE}.base_layer.bias": torch.zeros(64), f"{MODULE}.bias": torch.zeros(64)},
        {},
        r"gives model\.layers\.0\.self_attn\.q_proj\.bias twice",
    ),
    "NaN": (NAN, {}, "holds NaN or infinite values"),
    "infinity": (pair() | {f"{MODULE}.lora_A.weight": torch.full((2, 64), torch.inf)}, {}, "NaN"),
    "integers": ({"lm_head.weight": torch.zeros(448, 64).int()}, {}, "torch.int32"),
    "no tensors": ({}, {}, "holds no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_weight_is_read(case, tmp_path, monkeypatch):
    tensors, config, message = REFUSED[case]
    folder = adapter(tmp_path, tensors, **config)
    monkeypatch.setattr(Weights, "finite", raising(AssertionError, "a weight was read"))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_lm(LM, {"a": folder})
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_no_model_of_peft(tmp_path):
    folder = adapter(tmp_path, {})
    save_file({"x.lora_A.weight": torch.zeros(1, 1)}, folder / "adapter_model.safetensors")
    assert "x.lora_A.weight is none of LoRA's" in fault(lambda: open_adapter(folder))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"only adapter_model\.bin, a pickle, .* safe_serialization=True",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"has no adapter_model\.safetensors: give the folder",
    ),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        r"has no adapter_config\.json: give the folder",
    ),
    "cut short": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(90)),
        "is damaged or cut short",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_refused_folders(case, tmp_path):
    change, message = FOLDERS[case]
    folder = tmp_path / "a"
    copy_tree(ADAPTERS / "qkvo", folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(folder)


def test_a_pickle_is_not_opened(tmp_path):
    copy_tree(ADAPTERS / "qkvo", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Harmful()))
    assert "a pickle" in fault(lambda: open_adapter(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_no_folder_and_no_json(tmp_path):
    assert "there is no adapter directory" in fault(lambda: open_adapter(tmp_path / "none"))
    copy_tree(ADAPTERS / "qkvo", tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "not a JSON object" in fault(lambda: open_adapter(tmp_path), ConfigError)


def test_weights_that_overflow_once_merged(tmp_path):
    tensors = pair()
    tensors[f"{MODULE}.lora_A.weight"] *= 1e17
    weights = adapted(adapter(tmp_path, tensors, lora_alpha=1e6))
    message = fault(lambda: weights.finite(f"{MODULE}.weight"))
    assert "with the adapter merged holds NaN or infinite values in float32" in message
    assert torch.equal(weights.finite("lm_head.weight"), open_weights(LM).get("lm_head.weight"))


def test_a_damaged_checkpoint_is_not_the_adapters_fault(tmp_path):
    tensors = load_file(LM / "model.safetensors")
    tensors[f"{MODULE}.weight"][0, 0] = float("nan")
    weights = open_weights(write(tmp_path / "lm", tensors))
    damaged = AdaptedWeights(weights, open_adapter(ADAPTERS / "qkvo"))
    assert "the weights are damaged" in fault(lambda: damaged.finite(f"{MODULE}.weight"))


def test_a_head_that_is_the_embedding_table(tmp_path):
    found = open_adapter(adapter(tmp_path, EMBEDDED))
    shapes = {"model.embed_tokens.weight": (448, 64)}
    found.check(shapes, open_weights(LM), tied=False)
    message = fault(lambda: found.check(shapes, open_weights(LM), tied=True))
    assert "which is also this model's text head" in message
