"""Rows that choose their adapter: what upstream says with PEFT, and rows that do not depend on the
adapters of the rows beside them."""

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tunes import adapter, some_adapters
from helpers import ADAPTERS, KIT_PAIR, refuses, write_pair
from replays import Counted, repeated
from replies import GREEDILY, SAMPLED
from safetensors.torch import load_file
from torch import Tensor

import mimo_fast
from mimo_fast.checkpoint.adapters import open_adapter
from mimo_fast.config import LMConfig, read_json
from mimo_fast.kernels.matmul.quantized_weight import dequantize
from mimo_fast.quantization import QuantizationConfig, WeightSource, quantize, quantize_checkpoint
from mimo_fast.runtime.engine.sequence import group_ids
from mimo_fast.runtime.lm import finite
from mimo_fast.runtime.lm.decode import Decoder, Limits, Row, Samplers
from mimo_fast.runtime.lm.graphs import Graphs, PromptPart, Replay, Run
from mimo_fast.runtime.lm.model import LM, PlacedIds
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.runtime.lm.teacher_forcing import hidden_states
from mimo_fast.runtime.loading import open_lm
from mimo_fast.sampling import GREEDY, sampler_tensors
from mimo_fast.text.prompt import PackedPrompt

KINDS = ("qkvo", "all_linear_saved", "dora_rslora", "heads_embeddings", "bias_lora_only")
FOLDERS = {kind: ADAPTERS / kind for kind in KINDS}
PROMPTS = ("asr", "tts_en")
GOLDEN = load_file(ADAPTERS / "golden.safetensors")
CAPACITY = 72


def adapted(lm: Path = KIT_PAIR[0], **options: Any) -> LM:
    """The kit's language model with its five adapters."""
    options = {"device": "cpu", "adapters": FOLDERS, "max_seq_len": CAPACITY} | options
    return mimo_fast.load(lm, KIT_PAIR[1], **options).lm


@pytest.fixture(scope="module")
def lm() -> LM:
    return adapted()


@pytest.fixture(scope="module")
def plain() -> LM:
    """The same in plain torch, layer by layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMO_FAST_KERNELS", "torch")
        return adapted()


@pytest.fixture(scope="module", params=["dense", "int8", "stored int8"])
def kit_lm(request, lm, tmp_path_factory) -> LM:
    """The kit's model as it is and quantized, while loading or by its checkpoint."""
    return of_form(request.param, KIT_PAIR[0], FOLDERS, tmp_path_factory)


NANO = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "local_dim": 192,
    "local_layers": 2,
    "local_attn_heads": 4,
    "local_ffn_dim": 512,
    "input_local_layers": 1,
    "input_local_dim": 128,
}


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A model of other dimensions, with adapters that change every matrix in every way."""
    folder = tmp_path_factory.mktemp("nano")
    directory, _ = write_pair(folder, NANO, {})
    config = LMConfig.from_dict(read_json(directory / "config.json"))
    return directory, some_adapters(folder / "adapters", config)


@pytest.fixture(scope="module", params=["dense", "int8", "int4", "stored int8", "stored int4"])
def nano_lm(request, nano, tmp_path_factory) -> LM:
    """It as it is and quantized: here the native kernels take int4 too."""
    return of_form(request.param, *nano, tmp_path_factory)


def of_form(form: str, lm: Path, adapters: dict[str, Path], folders: Any) -> LM:
    if form.startswith("stored "):
        folder = folders.mktemp("stored") / "lm"
        quantize_checkpoint(lm, folder, form.removeprefix("stored "), progress=False)
        return adapted(folder, adapters=adapters)
    return adapted(lm, adapters=adapters, quantization=None if form == "dense" else form)


@dataclass
class Talk:
    """A prompt with its adapter, and what decoding gave: groups, and hidden states after each."""

    ids: Tensor
    adapter: str | None
    samplers: Samplers
    seed: int
    max_new: int
    groups: list[tuple[int, list[int]]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def join(self, lm: LM, state: DecodeState, slot: int) -> Row:
        state.adapters[slot] = lm.place_of(self.adapter)
        groups = self.ids.shape[1] // lm.config.group_size
        return Row(slot, Limits(self.max_new), self.samplers, self.seed, groups)

    def alone(self, lm: LM) -> "Talk":
        """The same in a state of its own."""
        talk = Talk(self.ids, self.adapter, self.samplers, self.seed, self.max_new)
        together(lm, [talk], [0])
        return talk


def together(
    lm: LM, talks: Sequence[Talk], arrivals: Sequence[int], graphs: Any = None
) -> DecodeState:
    """Decodes all in one state; each joins at its step and leaves at its end."""
    state = lm.new_state([0] * len(talks), CAPACITY)
    for part in state.cache.parts:
        part.fill_(float("nan"))
    decoder = Decoder(lm, state, graphs(lm, state) if graphs else None)
    slots, rows, now = [*range(len(talks))], dict[int, Row](), 0
    while now <= max(arrivals) or rows:
        coming = [i for i, at in enumerate(arrivals) if at == now]
        for i in coming:
            # Slots of others before it, as whoever left makes room.
            rows[i] = talks[i].join(lm, state, slots.pop((7 * i) % len(slots)))
        parts = [PlacedIds(talks[i].ids, rows[i].slot) for i in coming]
        with torch.no_grad():
            if decoder.graphs:
                for ids, slot, _ in parts:
                    decoder.graphs.prefill(ids, slot)
            else:
                lm.prefill_together(parts, state)
        current = [*rows.values()]
        for (i, row), group in zip([*rows.items()], decoder.next_groups(current), strict=True):
            talks[i].groups.append((group.text, group.codes.flatten().tolist()))
            talks[i].hidden.append(state.hidden[row.slot].clone())
            if group.finished:
                state.adapters[row.slot] = 0
                slots.append(row.slot)
                del rows[i]
        now += 1
    return state


def talks_of(
    golden: Any, seed: int, adapters: Sequence[str | None], groups: int = 30
) -> list[Talk]:
    """A talk with each adapter, of prompts from so many groups on."""
    made = []
    for i, name in enumerate(adapters):
        ids = golden.get(f"prompts:{PROMPTS[(i + seed) % 2]}").long()
        ids = ids[:, : 4 * min(ids.shape[1] // 4, groups + 3 * i)]
        samplers = (GREEDILY, SAMPLED)[(i + seed) % 2]
        made.append(Talk(ids, name, samplers, 31 * seed + i, 5 + (i + seed) % 4))
    return made


MIXED = (None, "qkvo", "dora_rslora", "qkvo", "all_linear_saved", "heads_embeddings", None)
ARRIVALS = (0, 0, 1, 2, 0, 4, 3)


class TestGolden:
    @pytest.mark.parametrize("path", ["native", "torch"])
    @pytest.mark.parametrize("prompt", PROMPTS)
    @pytest.mark.parametrize("kind", [*KINDS, None])
    def test_says_what_upstream_says_with_peft(
        self, lm, plain, golden, kind, prompt, path, monkeypatch
    ):
        if path == "torch":
            monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
        self.compare(lm if path == "native" else plain, golden, kind, prompt)

    def compare(self, lm: LM, golden: Any, kind: str | None, prompt: str) -> None:
        def want(what: str) -> Tensor:
            return GOLDEN[f"{kind or 'base'}.{what}.{prompt}"]

        ids = golden.get(f"prompts:{prompt}").long()
        state, variant = lm.new_state([0], CAPACITY), lm.variant(lm.place_of(kind))
        state.adapters[0] = lm.place_of(kind)
        lm.prefill(ids, state, 0)
        local = variant.local_hidden(state.hidden[:1])
        for got, what in (
            (variant.text_logits(state.hidden[:1])[0], "text_logits"),
            (local[0], "local_hidden"),
        ):
            difference = (got - want(what)).abs().max()
            assert difference < 1e-4 * want(what).abs().max(), what
        greedy = sampler_tensors([GREEDY], lm.device)
        codes = lm.decode_patch(local, state, state.rows[:1], greedy)
        assert torch.equal(codes[0].T, want("local_greedy"))
        tokens = want("generate").long()
        talk = Talk(ids, kind, GREEDILY, 0, tokens.shape[1] // lm.config.group_size)
        together(lm, [talk], [0])
        for (text, drawn), group in zip(
            talk.groups, tokens.split(lm.config.group_size, dim=1), strict=True
        ):
            codes = torch.tensor(drawn).view(lm.config.channels, -1)
            assert torch.equal(group_ids(text, codes), group)


class TestRows:
    """Of a mixed batch they are those of lone runs."""

    @pytest.mark.parametrize("seed", [0, 1, 5])
    def test_of_the_kit(self, kit_lm, golden, seed):
        talks = talks_of(golden, seed, MIXED)
        together(kit_lm, talks, ARRIVALS)
        assert len({str(talk.groups) for talk in talks}) == len(talks)
        for talk in talks:
            self.compare(talk, talk.alone(kit_lm))

    @pytest.mark.parametrize("seed", [0, 3, 4])
    def test_of_other_dimensions(self, nano_lm, golden, seed):
        talks = talks_of(golden, seed, (None, "linear", "scaled", "linear", "heads", None))
        together(nano_lm, talks, ARRIVALS[:6])
        assert len({str(talk.groups) for talk in talks}) == len(talks)
        for talk in talks:
            self.compare(talk, talk.alone(nano_lm))

    def compare(self, talk: Talk, lone: Talk, bits: bool = True) -> None:
        assert talk.groups == lone.groups, talk.adapter
        for got, want in zip(talk.hidden, lone.hidden, strict=True):
            if bits:
                assert torch.equal(got, want), talk.adapter
            else:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", [None, "int8", pytest.param("int4", marks=pytest.mark.slow)])
    def test_in_plain_torch(self, plain, golden, form, monkeypatch):
        """Rows whose adapter nobody else has, to the bit."""
        monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
        lm = plain if form is None else adapted(quantization=form)
        talks = talks_of(golden, 2, [None, "qkvo", "dora_rslora", "all_linear_saved"], groups=6)
        together(lm, talks, [0, 1, 0, 0])
        for talk in talks:
            self.compare(talk, talk.alone(lm))

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_of_one_adapter_in_plain_torch(self, plain, golden, seed, monkeypatch):
        """As rows of dense products of any model are: the order of sums goes by their number."""
        monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
        talks = talks_of(golden, seed, MIXED)
        together(plain, talks, ARRIVALS)
        for talk in talks:
            self.compare(talk, talk.alone(plain), bits=False)

    def test_a_slot_may_change_its_adapter(self, lm, golden):
        ids = golden.get("prompts:asr").long()
        state = lm.new_state([0, 0], CAPACITY)
        found = []
        for name in (None, "qkvo", "dora_rslora", "qkvo"):
            state.adapters[1] = lm.place_of(name)
            lm.prefill(ids, state, 1)
            found.append(state.hidden[1].clone())
        assert torch.equal(found[1], found[3])
        assert len({tuple(each.tolist()) for each in found}) == 3

    def test_of_one_call_that_packs_prompts(self, lm, golden):
        ids = golden.get("prompts:asr").long()[:, :40].unflatten(1, (-1, 4))
        packed = torch.stack([ids, ids.flip(1), ids])
        places = torch.tensor([[0, 0, 10], [2, 0, 10], [1, 0, 10]])
        state, want = (lm.new_state([0] * 3, CAPACITY) for _ in range(2))
        state.adapters[:3] = want.adapters[:3] = [1, 3, 0]
        last = lm.prefill_packed(packed, places, state)
        for part, place, got in zip(packed, places, last, strict=True):
            place_of = want.adapters[int(place[0])]
            assert torch.equal(lm.variant(place_of).prefill_padded(part, place, want)[0], got)
        assert torch.equal(state.hidden[:3], want.hidden[:3])

    def test_hidden_states_by_chunk(self, lm, golden):
        ids = golden.get("prompts:asr").long()
        state = lm.new_state([0], CAPACITY)
        for place in range(len(KINDS) + 1):
            state.adapters[0] = place
            hidden = torch.cat([*lm.hidden_chunks(ids, state, 0)])
            lm.prefill(ids, state, 0)
            assert torch.equal(hidden[-1], state.hidden[0])
            groups = ids.unflatten(1, (-1, 4))
            text, codes = groups[0, :, 0], groups[1:].transpose(0, 1)
            whole = hidden_states(lm.variant(place), text[None], codes[None])[0]
            torch.testing.assert_close(whole, hidden, rtol=1e-4, atol=1e-4)


class Overwriting:
    """A stand-in for graphs that share memory: a replay overwrites the results of all others."""

    def __init__(self) -> None:
        self.results = list[Tensor]()

    def __call__(self, run: Run) -> tuple[Replay, Tensor]:
        again, result = repeated(run)
        self.results.append(result)

        def replay() -> None:
            for other in self.results:
                if other is not result:
                    other.fill_(-77)
            again()

        return replay, result


class Joining:
    """A step and a patch as one launch, run one after the other."""

    def __init__(self, *of: Any) -> None:
        self.step, self.patch, self.tokens = of[:3]

    def launch(self) -> None:
        self.step()
        self.drawn = self.tokens.tolist()
        self.patch()

    def wait(self) -> list[int]:
        return self.drawn


class TestGraphs:
    @pytest.mark.parametrize("join", [None, Joining])
    @pytest.mark.parametrize("prompts", [False, True])
    def test_rows_are_those_of_lone_runs(self, lm, golden, join, prompts):
        talks = talks_of(golden, 3, MIXED)

        def graphs(lm: LM, state: DecodeState) -> Graphs:
            return Graphs(lm, state, Overwriting(), join, prompts=prompts, packed=prompts)

        together(lm, talks, ARRIVALS, graphs)
        for talk in talks:
            assert talk.groups == talk.alone(lm).groups, talk.adapter

    def test_a_step_replays_one_for_each_adapter(self, lm, golden):
        counted = Counted()
        state = lm.new_state([0] * 6, CAPACITY)
        graphs = Graphs(lm, state, counted, prompts=True, packed=True)
        graphs.warmup()
        known = counted.captures
        # Two a size, and what no prompt has: sizes 1, 2, 4 and 6.
        assert known == 2 * 4 + len(graphs._prompt_graphs())
        state.adapters[:6] = [0, 1, 1, 3, 0, 1]
        for adapters, want in (([0, 0], 1), ([1, 1, 1], 1), ([0, 3, 1, 0], 3)):
            slots = [state.adapters.index(place) for place in adapters]
            before = counted.replays
            graphs.step(slots)
            assert counted.replays - before == want
        # Those of adapters 1 (4 and 1 rows) and 3, each a step and a patch.
        assert counted.captures - known == 2 * 3
        ids = PackedPrompt(golden.get("prompts:asr").long()[:, :40])
        before = counted.replays
        graphs.prefill_parts([PromptPart(ids, slot, 0) for slot in (1, 3, 2)])
        assert counted.replays - before == 2

    def test_a_refused_join_ends_conditional_graphs(self, lm, golden):
        made = []

        def refusing(*of: Any) -> Joining:
            if made and len(made) >= sizes:
                raise RuntimeError("CUDA error 801")
            made.append(of)
            return Joining(*of)

        talks = talks_of(golden, 3, [None, "qkvo", None])
        sizes = 3

        def graphs(lm: LM, state: DecodeState) -> Graphs:
            return Graphs(lm, state, repeated, refusing)

        with pytest.warns(UserWarning, match="without conditional graphs: CUDA error 801"):
            together(lm, talks, (0, 2, 0), graphs)
        for talk in talks:
            assert talk.groups == talk.alone(lm).groups


class TestCost:
    def test_without_adapters_a_model_is_what_it_was(self, model):
        assert type(model.lm) is LM
        assert model.lm.adapters == ()
        assert model.lm.adapter_digests == ("",)
        assert model.lm.adapter_nbytes == 0
        assert model.lm.variant(0) is model.lm

    @pytest.mark.parametrize("join", [None, Joining])
    def test_rows_without_one_take_the_launches_of_a_model_without(self, model, lm, golden, join):
        found = []
        for each in (model.lm, lm):
            counted = Counted()

            def graphs(lm: LM, state: DecodeState, counted: Counted = counted) -> Graphs:
                return Graphs(lm, state, counted, join, prompts=True)

            talks = talks_of(golden, 1, [None] * 4)
            together(each, talks, (0, 0, 2, 1), graphs)
            found.append((counted.captures, counted.replays, [talk.groups for talk in talks]))
        assert found[0] == found[1]

    def test_what_an_adapter_leaves_alone_is_shared(self, lm):
        def of(place: int) -> dict[str, Tensor]:
            return dict(finite.tensors(lm.variant(place)))

        base = of(0)
        for place, kind in enumerate(KINDS, 1):
            own, changes = of(place), open_adapter(FOLDERS[kind]).changes
            for name, tensor in base.items():
                change = changes.get(name)
                # DoRA's bias comes after its factor.
                replaced = change is not None and (change.base is not None or change.transposed)
                table = name.startswith(("speech_embeddings.", "local_transformer_lm_heads."))
                if replaced or (table and change is not None):
                    assert own[name].data_ptr() != tensor.data_ptr(), name
                elif name in own and not table:
                    assert own[name].data_ptr() == tensor.data_ptr(), name
            added = own.keys() - base.keys()
            products = sum(change.a is not None for change in changes.values())
            assert bool(added) == bool(products)
        for name in ("backbone_rope", "encoder_rope", "decoder_rope", "code_steps"):
            assert getattr(lm.variant(2), name) is getattr(lm, name)
        # Nothing of qkvo's is a table.
        for name in ("text_embeddings", "code_embeddings", "code_heads", "decoder_embeddings"):
            assert getattr(lm.variant(1), name) is getattr(lm, name)

    def test_bytes_beside_the_weights(self, lm):
        def whole(rank: int) -> int:
            return rank + -rank % 8

        pairs = [
            (change.a, change.b)
            for change in open_adapter(FOLDERS["qkvo"]).changes.values()
            if change.a is not None and change.b is not None
        ]
        want = sum(whole(len(a)) * (a.shape[1] + len(b)) for a, b in pairs)
        one = adapted(adapters={"qkvo": FOLDERS["qkvo"]}, merge_adapters=False)
        assert one.adapter_nbytes == 4 * want
        assert lm.adapter_nbytes > one.adapter_nbytes


class Unpacked:
    """What a variant stands for: reads dense tensors in float32, of quantized weights what they
    are, with s B A added to them."""

    def __init__(self, lm: Path, adapter: Path, form: str, stored: bool) -> None:
        self.opened, self.changes = open_lm(lm), open_adapter(adapter).changes
        self.chosen, self.stored = QuantizationConfig.parse(form), stored

    def rounded(self, name: str, dense: Tensor) -> Tensor:
        assert self.chosen is not None
        found = self.chosen.format_of(name, tuple(dense.shape))
        return dense if found is None else dequantize(quantize(dense, found))

    def __call__(self, name: str) -> Tensor:
        dense, change = self.opened.weights.get(name), self.changes.get(name)
        if change is None:
            return self.rounded(name, dense)
        if change.base is None and not change.transposed:
            return change.merged(self.rounded(name, dense))
        # Merged before it is stored; into the stored form where there is no other.
        dense = self.rounded(name, dense) if self.stored else dense
        return self.rounded(name, change.merged(dense))

    def model(self, lm: LM) -> LM:
        return LM(self.opened.config, lm.empty_id, WeightSource(self, torch.float32))


class TestQuantized:
    @pytest.mark.parametrize("which", [pytest.param("kit", marks=pytest.mark.slow), "nano"])
    @pytest.mark.parametrize("form", ["int8", "int4"])
    @pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(("forced", "bound"), [("torch", 1e-5), ("", 5e-4)])
    def test_is_the_unpacked_base_with_the_adapter(
        self, nano, golden, tmp_path_factory, monkeypatch, which, form, stored, forced, bound
    ):
        """In plain torch; the native products take x in fixed point, here as without an adapter."""
        monkeypatch.setenv("MIMO_FAST_KERNELS", forced)
        folder, adapters = nano if which == "nano" else (KIT_PAIR[0], FOLDERS)
        lm = of_form(f"{'stored ' * stored}{form}", folder, adapters, tmp_path_factory)
        ids = golden.get("prompts:asr").long()
        for name, fine_tune in adapters.items():
            variant, found = lm.variant(lm.place_of(name)), []
            for each in (variant, Unpacked(folder, fine_tune, form, stored).model(lm)):
                state = each.new_state([0], CAPACITY)
                each.prefill(ids, state, 0)
                hidden = state.hidden[:1]
                found.append((hidden, each.text_logits(hidden), each.local_hidden(hidden)))
            for got, want in zip(*found, strict=True):
                assert (got - want).abs().max() < bound * want.abs().max(), name

    @pytest.mark.parametrize("form", ["int8", "int4"])
    def test_weights_packed_for_torch(self, golden, monkeypatch, form):
        """In bfloat16 plain torch has a form of its own, of which DoRA's norms are taken too."""
        wide = adapted(quantization=form)
        monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
        lm = adapted(quantization=form, dtype="bfloat16")
        qkv: list[Any] = [each.variant(3).backbone.layers[0].qkv for each in (lm, wide)]
        assert qkv[0].base.torch_scales is not None
        torch.testing.assert_close(qkv[0].factor, qkv[1].factor, rtol=5e-3, atol=0)
        ids, hidden = golden.get("prompts:asr").long(), []
        for each in (lm, wide):
            state = each.new_state([0], CAPACITY)
            state.adapters[0] = 3
            each.prefill(ids, state, 0)
            hidden.append(state.hidden[0].float())
        assert (hidden[0] - hidden[1]).abs().max() < 0.05 * hidden[1].abs().max()

    def test_one_beside_a_stored_one_is_not_merged(self, tmp_path):
        quantize_checkpoint(KIT_PAIR[0], tmp_path / "lm", "int8", progress=False)
        one = {"mine": FOLDERS["qkvo"]}
        assert adapted(tmp_path / "lm", adapters=one).adapters == ("mine",)
        assert adapted(adapters=one).adapters == ()
        assert adapted(adapters=one, merge_adapters=False).adapters == ("mine",)
        assert adapted(adapters={}).adapters == ()


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
    def test_say_the_same(self, lm, golden, copied):
        other = copied(lm)
        assert other.adapters == lm.adapters
        assert other.adapter_nbytes == lm.adapter_nbytes
        for talk in talks_of(golden, 4, ["qkvo", "dora_rslora", None]):
            one, two = talk.alone(lm), talk.alone(other)
            assert one.groups == two.groups
            assert all(map(torch.equal, one.hidden, two.hidden))


class TestNames:
    def test_places(self, lm):
        assert [lm.place_of(name) for name in (None, *KINDS)] == [*range(6)]
        assert lm.adapters == KINDS
        digests = ["", *(open_adapter(FOLDERS[kind]).digest for kind in KINDS)]
        assert lm.adapter_digests == tuple(digests)

    def test_unknown_ones(self, lm, model):
        refuses(r"^no adapter 'qkv': did you mean 'qkvo'\? Use qkvo, ", lm.place_of, "qkv")
        refuses(r"^no adapter 'qkvo': load the model with adapters=", model.lm.place_of, "qkvo")

    def test_places_of_none(self, lm, model):
        for each, place in ((lm, 6), (lm, -1), (model.lm, 1), (model.lm, -1)):
            refuses(f"^place must be 0 to {len(each.adapters)}, not {place}$", each.variant, place)

    def test_the_fingerprint_is_that_of_the_model(self, lm, model):
        assert lm.fingerprint == model.lm.fingerprint


class TestRefused:
    """What merging refuses too, and what only shows beside the weights."""

    def test_a_scale_that_makes_it_infinite(self, tmp_path):
        module = "model.layers.0.self_attn.q_proj"
        a, b = torch.full((2, 64), 1e-6), torch.full((64, 2), 1e17)
        tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        folder = adapter(tmp_path / "a", tensors, lora_alpha=1e6)
        message = f"with its scale the adapter of {module}.weight holds NaN"
        given = {"adapters": {"a": folder}, "merge_adapters": False}
        refuses(message, adapted, kind=mimo_fast.CheckpointError, **given)

    def test_a_magnitude_without_a_norm(self, tmp_path):
        module = "model.layers.0.self_attn.q_proj"
        a, b = torch.zeros(2, 64), torch.zeros(64, 2)
        weight = open_lm(KIT_PAIR[0]).weights.get(f"{module}.weight")
        # B A is -W in the first row alone.
        a[0], b[0, 0] = weight[0], -1.0
        tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        tensors[f"{module}.lora_magnitude_vector"] = torch.ones(64)
        folder = adapter(tmp_path / "a", tensors, lora_alpha=2, use_dora=True)
        given = {"adapters": {"a": folder}, "merge_adapters": False}
        refuses("q_proj.weight holds NaN", adapted, kind=mimo_fast.CheckpointError, **given)

    def test_a_table_that_is_also_the_text_head(self, tmp_path):
        directory, _ = write_pair(tmp_path, {"tie_word_embeddings": True}, {})
        adapters = {"a": FOLDERS["heads_embeddings"], "b": FOLDERS["qkvo"]}
        kind = mimo_fast.CheckpointError
        refuses("changes lm_head|text head", adapted, directory, kind=kind, adapters=adapters)


def test_a_weight_of_an_adapter_that_is_not_finite_is_named(lm, golden):
    broken = copy.deepcopy(lm.variant(1))
    qkv: Any = broken.backbone.layers[0].qkv
    qkv.rows[1].b.blocks[0][3, 0] = float("nan")
    why = finite.explain(broken, golden.get("prompts:asr").long(), None)
    assert why.startswith("model.layers.0.self_attn.k_proj.lora_B.weight holds 1 NaN")
