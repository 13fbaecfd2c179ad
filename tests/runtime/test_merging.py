"""A model with an adapter merged says what upstream's says with PEFT, in every way to it."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ADAPTERS, KIT_PAIR, copy_tree, fault, refuses
from safetensors.torch import load_file, save_file
from torch import Tensor

import mimo_fast
from mimo_fast.checkpoint.adapters import Change
from mimo_fast.checkpoint.files import open_weights, write_checkpoint
from mimo_fast.config import read_json
from mimo_fast.quantization import quantize_checkpoint
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.loading import open_lm
from mimo_fast.runtime.merging import merge_adapter
from mimo_fast.sampling import GREEDY, sampler_tensors

KINDS = ("qkvo", "all_linear_saved", "dora_rslora", "heads_embeddings", "bias_lora_only")
PROMPTS = ("asr", "tts_en")
LM_FOLDER, CODEC = KIT_PAIR
GOLDEN = load_file(ADAPTERS / "golden.safetensors")
FORMATS = (None, "int8", "int4", "nf4")


def loaded(kind: str | None = None, lm: Path = LM_FOLDER, **options: Any) -> mimo_fast.MimoAudio:
    adapters = None if kind is None else {kind: ADAPTERS / kind}
    return mimo_fast.load(lm, CODEC, device="cpu", adapters=adapters, max_seq_len=64, **options)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kit's language model with each adapter, on disk."""
    folder = tmp_path_factory.mktemp("merged")
    for kind in KINDS:
        merge_adapter(LM_FOLDER, ADAPTERS / kind, folder / kind, progress=False)
    return {kind: folder / kind for kind in KINDS}


def tensors_of(part: Any) -> Iterator[Tensor]:
    """Every tensor that a part of a model holds, in an order of its own."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from tensors_of(each)
    elif hasattr(part, "__dataclass_fields__"):
        for name in part.__dataclass_fields__:
            yield from tensors_of(getattr(part, name))


def weights_of(lm: LM) -> list[Tensor]:
    return [*tensors_of([lm.network, lm.text_embeddings, lm.code_embeddings])]


def assert_equal_weights(one: LM, other: LM) -> None:
    pairs = [*zip(weights_of(one), weights_of(other), strict=True)]
    assert len(pairs) > 40
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class TestGolden:
    @pytest.mark.parametrize("prompt", PROMPTS)
    @pytest.mark.parametrize("kind", [*KINDS, None])
    def test_says_what_upstream_says_with_peft(self, kind, golden, prompt):
        with loaded(kind) as model:
            self.compare(model, kind, golden, prompt)

    def compare(self, model, kind, golden, prompt):
        def want(what: str) -> Tensor:
            return GOLDEN[f"{kind or 'base'}.{what}.{prompt}"]

        ids = golden.get(f"prompts:{prompt}").long()
        state = model.lm.new_state([0], ids.shape[1] // model.group_size)
        model.lm.prefill(ids, state, 0)
        local = model.lm.local_hidden(state.hidden[:1])
        for got, what in (
            (model.lm.text_logits(state.hidden[:1])[0], "text_logits"),
            (local[0], "local_hidden"),
        ):
            difference = (got - want(what)).abs().max()
            assert difference < 1e-4 * want(what).abs().max(), what
        greedy = sampler_tensors([GREEDY], model.lm.device)
        codes = model.lm.decode_patch(local, state, state.rows[:1], greedy)
        assert torch.equal(codes[0].T, want("local_greedy"))
        tokens = want("generate").long()
        got = mimo_fast.generate(model, ids, max_new_tokens=tokens.shape[1] // model.group_size)
        assert torch.equal(got[:, -tokens.shape[1] :].cpu().long(), tokens)

    def test_each_says_something_of_its_own(self):
        said = {
            tuple(GOLDEN[f"{kind}.generate.{prompt}"].flatten().tolist())
            for kind in (*KINDS, "base")
            for prompt in PROMPTS
        }
        assert len(said) == len(PROMPTS) * (len(KINDS) + 1)


class TestMergedOnDisk:
    @pytest.mark.parametrize("kind", KINDS)
    def test_has_the_bits_of_merging_while_loading(self, merged, kind):
        weights = open_weights(merged[kind])
        adapted = open_lm(LM_FOLDER, {"a": ADAPTERS / kind})[1]
        assert {*weights.names()} == {*adapted.names()}
        for name in weights.names():
            assert torch.equal(weights.get(name), adapted.get(name)), name

    @pytest.mark.parametrize("quantization", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_has_the_bits_once_quantized(self, merged, kind, quantization):
        with (
            loaded(kind, quantization=quantization) as one,
            loaded(lm=merged[kind], quantization=quantization) as other,
        ):
            assert_equal_weights(one.lm, other.lm)
            assert one.lm.fingerprint == other.lm.fingerprint

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_of_a_checkpoint_in_bfloat16(self, tmp_path, dtype):
        source = open_weights(LM_FOLDER)
        copy_tree(LM_FOLDER, tmp_path / "lm")
        (tmp_path / "lm" / "model.safetensors").unlink()
        halves = {name: source.get(name).bfloat16() for name in source.names()}
        save_file(halves, tmp_path / "lm" / "model.safetensors")
        merge_adapter(tmp_path / "lm", ADAPTERS / "qkvo", tmp_path / "merged", progress=False)
        stored = open_weights(tmp_path / "merged")
        assert {stored.dtype(name) for name in stored.names()} == {torch.bfloat16}
        with (
            loaded("qkvo", lm=tmp_path / "lm", dtype=dtype) as one,
            loaded(lm=tmp_path / "merged", dtype=dtype) as other,
        ):
            assert_equal_weights(one.lm, other.lm)

    def test_quantized_on_disk_equals_quantized_while_loading(self, merged, tmp_path):
        quantize_checkpoint(merged["dora_rslora"], tmp_path / "int4", "int4", progress=False)
        with (
            loaded("dora_rslora", quantization="int4") as one,
            loaded(lm=tmp_path / "int4") as other,
        ):
            assert_equal_weights(one.lm, other.lm)

    def test_keeps_config_and_tokenizer(self, merged):
        for path in LM_FOLDER.iterdir():
            copy = merged["qkvo"] / path.name
            if path.name == "config.json":
                held = read_json(copy)
                (digest,) = held.pop("merged_adapters")
                assert len(digest) == 64
                assert held == read_json(path)
            elif path.suffix != ".safetensors":
                assert copy.read_bytes() == path.read_bytes()
        assert {path.name for path in merged["qkvo"].iterdir()} == {
            path.name for path in LM_FOLDER.iterdir()
        }

    def test_keeps_dtypes_and_shards(self, tmp_path):
        source = open_weights(LM_FOLDER)
        shapes = {name: source.shape(name) for name in source.names()}
        dtypes = {name: torch.float16 if "norm" in name else torch.float32 for name in shapes}
        options: dict[str, Any] = {"config": read_json(LM_FOLDER / "config.json"), "dtype": dtypes}
        write_checkpoint(tmp_path / "lm", shapes, source.get, shard_bytes=200_000, **options)
        # Published indices list names by the alphabet, and shards by layers.
        index = tmp_path / "lm" / "model.safetensors.index.json"
        raw = read_json(index)
        raw["weight_map"] = dict(sorted(raw["weight_map"].items(), reverse=True))
        index.write_text(json.dumps(raw))
        merge_adapter(tmp_path / "lm", ADAPTERS / "qkvo", tmp_path / "out", progress=False)
        shards = sorted(path.name for path in (tmp_path / "lm").glob("*.safetensors"))
        assert len(shards) > 3
        for shard in shards:
            before, after = (load_file(tmp_path / folder / shard) for folder in ("lm", "out"))
            assert before.keys() == after.keys()
            for name, tensor in after.items():
                assert tensor.dtype == dtypes[name]
        maps = [read_json(tmp_path / folder / index.name)["weight_map"] for folder in ("lm", "out")]
        assert maps[0] == maps[1]

    def test_one_adapter_after_the_other(self, merged, tmp_path):
        twice = tmp_path / "twice"
        merge_adapter(merged["qkvo"], ADAPTERS / "bias_lora_only", twice, progress=False)
        config = open_lm(twice)[0]
        assert len({*config.adapters}) == 2
        with loaded(lm=twice) as one, loaded("bias_lora_only", lm=merged["qkvo"]) as other:
            assert_equal_weights(one.lm, other.lm)
            assert one.lm.fingerprint == other.lm.fingerprint

    @pytest.mark.parametrize("problem", ["the target", "the adapter", "the disk"])
    def test_leaves_nothing_half_done(self, tmp_path, monkeypatch, problem):
        target, adapter = tmp_path / "out", tmp_path / "a"
        copy_tree(ADAPTERS / "qkvo", adapter)
        before = {LM_FOLDER / "config.json": (LM_FOLDER / "config.json").read_bytes()}
        if problem == "the target":
            target.mkdir()
            (target / "notes.txt").write_text("mine")
            message = "exists and is not an empty directory"
        elif problem == "the adapter":
            (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
            message = "peft_type 'IA3' is not supported"
        else:
            message = "with the adapter merged"
            infinite = torch.full((64, 64), torch.inf)
            monkeypatch.setattr(Change, "merged", lambda _change, _weight: infinite)
        assert message in fault(lambda: merge_adapter(LM_FOLDER, adapter, target, progress=False))
        assert [path.name for path in tmp_path.iterdir() if path != adapter] == (
            ["out"] if problem == "the target" else []
        )
        if problem == "the target":
            assert (target / "notes.txt").read_text() == "mine"
        assert all(path.read_bytes() == data for path, data in before.items())

    def test_does_not_write_over_the_source(self, tmp_path):
        copy_tree(LM_FOLDER, tmp_path / "lm")
        merge = (tmp_path / "lm", ADAPTERS / "qkvo", tmp_path / "lm")
        assert "already holds weights" in fault(lambda: merge_adapter(*merge, progress=False))


class TestRefused:
    def test_several(self):
        adapters = {name: ADAPTERS / name for name in ("qkvo", "dora_rslora")}
        message = r"^2 adapters were given \(qkvo, dora_rslora\), and one can be merged"
        options: dict[str, Any] = {"adapters": adapters, "merge_adapters": True}
        kind = mimo_fast.CheckpointError
        refuses(message, mimo_fast.load, *KIT_PAIR, device="cpu", kind=kind, **options)

    def test_none(self):
        with mimo_fast.load(*KIT_PAIR, device="cpu", adapters={}) as model, loaded() as other:
            assert_equal_weights(model.lm, other.lm)
            assert model.lm.fingerprint == other.lm.fingerprint

    def test_a_folder_in_place_of_a_mapping(self):
        adapters = ADAPTERS / "qkvo"
        refuses("adapters must be", mimo_fast.load, adapters=adapters, kind=TypeError)

    def test_a_matrix_that_is_stored_quantized(self, tmp_path):
        quantize_checkpoint(LM_FOLDER, tmp_path / "int8", "int8", progress=False)
        message = fault(lambda: loaded("qkvo", lm=tmp_path / "int8", merge_adapters=True))
        assert "quantized, into which nothing is merged" in message
        assert "merge_adapters=False" in message
        # Biases are dense in every checkpoint.
        copy_tree(ADAPTERS / "bias_lora_only", tmp_path / "a")
        path = tmp_path / "a" / "adapter_model.safetensors"
        biases = {name: tensor for name, tensor in load_file(path).items() if "bias" in name}
        save_file(biases, path)
        merge_adapter(tmp_path / "int8", tmp_path / "a", tmp_path / "out", progress=False)
        with (
            mimo_fast.load(
                tmp_path / "int8", CODEC, adapters={"a": tmp_path / "a"}, merge_adapters=True
            ) as one,
            loaded(lm=tmp_path / "out") as other,
        ):
            assert_equal_weights(one.lm, other.lm)


class TestSessions:
    def test_one_of_another_adapter_is_refused(self, tmp_path):
        path, speech = tmp_path / "talk", torch.zeros(12000)
        with loaded() as model:
            session = model.session(seed=1)
            [*session.stream(speech, max_new_tokens=2)]
            session.save(path)
            model.restore_session(path)
        with loaded("qkvo") as model:
            assert "it belongs to another model" in fault(lambda: model.restore_session(path))

    def test_fingerprints(self):
        found = set()
        for kind in (*KINDS, None):
            with loaded(kind) as model:
                found.add(model.lm.fingerprint)
        assert len(found) == len(KINDS) + 1


class Alive:
    """How many merged weights are in memory at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.most, inner = 0, 0, Change.merged

        def counted(change: Change, weight: Tensor) -> Tensor:
            made = inner(change, weight)
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(made, self._freed)
            return made

        monkeypatch.setattr(Change, "merged", counted)

    def _freed(self) -> None:
        self.now -= 1


class TestMemory:
    def test_merging_holds_one_weight_at_a_time(self, tmp_path, monkeypatch):
        alive = Alive(monkeypatch)
        merge_adapter(LM_FOLDER, ADAPTERS / "qkvo", tmp_path / "out", progress=False)
        # The next one is made while the last one is still named.
        assert (alive.now, alive.most) == (0, 2)

    def test_quantizing_while_loading_holds_a_joined_matrix_at_a_time(self, monkeypatch):
        alive = Alive(monkeypatch)
        with loaded("qkvo", quantization="int4"):
            # The local transformers stay dense: theirs are the weights that the model holds.
            assert alive.now < 24
            # q, k and v of one layer are one matrix.
            assert alive.most <= alive.now + 3

    def test_what_is_not_changed_is_still_mapped(self):
        with loaded("bias_lora_only") as one, loaded() as other:
            assert one.setup.merged
            assert not other.setup.merged
            sizes = open_weights(LM_FOLDER)
            changed = sum(4 * sizes.get(name).numel() for name in one.setup.merged)
            assert one.setup.total - other.setup.total == changed
