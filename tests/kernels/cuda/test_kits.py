"""The kits of MiMo-V2.5-ASR and of the adapters with their products by the CUDA kernels, compiled
for the CPU: what the model says along the kits' own tokens.

The kits' matrices have 32 to 192 columns, and the kernels take multiples of 128 (`cuda.refuses`):
the models are widened, and in float32 say what upstream says. The kernels take 16-bit activations,
so their results are held to `mimo_fast.bench.accuracy`: the largest error of a logit, against
float32 with the same quantized values, is at most twice that of plain torch in bfloat16. Texts are
those of float32 in the short cases; in the long ones wherever it decides by twice the error.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulated import products_by_cuda
from helpers import ADAPTERS, KIT, KIT_PAIR, assert_as_exact_as_eager
from safetensors.torch import load_file
from torch import Tensor
from widened import ASR, LM, WIDTHS, Widening

import mimo_fast
from mimo_fast.runtime.lm.teacher_forcing import code_logits
from mimo_fast.testing.asr_parity import AsrGolden

CODEC = KIT_PAIR[1]
KINDS = ("qkvo", "all_linear_saved", "dora_rslora", "heads_embeddings", "bias_lora_only")
GOLDEN = load_file(ADAPTERS / "golden.safetensors")
FORMATS = ("int8", "int4", None)

NARROW, WIDE = "adapters, narrow", "adapters"
ADAPTED = [
    *((kind, NARROW, "tts_en", 1, "int8") for kind in KINDS),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            *((kind, NARROW, "asr", 4, "int4") for kind in KINDS),
            ("dora_rslora", NARROW, "tts_en", 2, None),
            ("bias_lora_only", NARROW, "tts_en", 2, None),
            ("qkvo", WIDE, "tts_en", 2, "int4"),
            ("all_linear_saved", WIDE, "tts_en", 2, None),
        )
    ),
]
"""Adapter, widths, prompt, groups, format."""

AGREE = 0.9
"""Share of codes, at least, that bfloat16 chooses as float32 does: near-ties are among the rest."""


@dataclass(frozen=True)
class Said:
    """What a model says along given tokens: logits of N texts [N, V], of all codes [M]; the codes
    that it would choose."""

    text: Tensor
    codes: Tensor
    chosen: Tensor


class Along(NamedTuple):
    """Ids as `generate` takes and gives them, how many groups of them; codes [C, G] that the patch
    decoder is to give after the prompt, whatever the token is."""

    prompt: Tensor
    tokens: Tensor
    groups: int
    patch: Tensor | None = None


def said(model: mimo_fast.MimoAudio, along: Along) -> Said:
    """The prompt is prefilled, the groups are steps."""
    prompt, tokens, groups, patch = along
    lm, size = model.lm, model.group_size
    state = lm.new_state([0], prompt.shape[1] // size + groups)
    lm.prefill(prompt.long(), state, 0)
    new = tokens[:, : groups * size].long().unflatten(1, (-1, size))
    text, codes, chosen = list[Tensor](), [state.hidden.new_empty(0)], [new.new_empty(0)]
    for group in range(groups):
        hidden, token, own = state.hidden[:1], int(new[0, group, 0]), new[1:, group]
        text.append(lm.text_logits(hidden)[0])
        if group or patch is None:
            patch = own if token == lm.empty_id else None
        if patch is not None:
            each = code_logits(lm, hidden, patch[None])
            codes += [logits.flatten() for logits in each]
            for logits, empty in zip(each, lm.config.empty_codes, strict=True):
                others = logits.clone()
                others[..., empty] = -torch.inf
                chosen.append(others.argmax(-1).flatten())
        if group + 1 < groups:
            lm.stage(state, 0, token, own)
            lm.step(state, state.rows[:1])
    return Said(torch.stack(text), torch.cat(codes), torch.cat(chosen))


def compare(
    library: ctypes.CDLL,
    load: Callable[[str], mimo_fast.MimoAudio],
    along: Along,
    beside: frozenset[str] = frozenset(),
    near_ties: bool = False,
) -> Said:
    """Compares what the model says by the CUDA kernels and in float32, which is returned.

    Args:
        load: the model in a dtype.
        beside: implementations of products that may be others than CUDA's.
        near_ties: whether texts may be others where float32 decides by less than twice the error.
    """
    exact = said(load("float32"), along)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMO_FAST_KERNELS", "torch")
        eager = said(load("bfloat16"), along)
    with products_by_cuda(library) as counts:
        got = said(load("bfloat16"), along)
    assert counts
    assert {name for name in counts if not name.startswith("CUDA")} <= beside
    assert_as_exact_as_eager(got.text, eager.text, exact.text)
    assert_as_exact_as_eager(got.codes, eager.codes, exact.codes)
    first, second = exact.text.topk(2).values.unbind(-1)
    decided = first - second > 2 * (got.text - exact.text).abs().max()
    decided |= not near_ties
    assert torch.equal(got.text.argmax(-1)[decided], exact.text.argmax(-1)[decided])
    if len(exact.chosen):
        assert (got.chosen == exact.chosen).float().mean() > AGREE
    return exact


@pytest.fixture(scope="module")
def asr_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asr")
    return Widening(ASR, WIDTHS["asr"]).write_lm(folder / "lm")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Path]]]:
    """Widths of the language model -> its folder, and those of the adapters."""
    made = {}
    for widths in (WIDE, NARROW):
        folder, widening = tmp_path_factory.mktemp("adapted"), Widening(LM, WIDTHS[widths])
        adapters = {kind: widening.write_adapter(ADAPTERS / kind, folder / kind) for kind in KINDS}
        made[widths] = widening.write_lm(folder / "lm"), adapters
    return made


@pytest.fixture(scope="module")
def asr_golden() -> AsrGolden:
    return AsrGolden(KIT / "asr", CODEC)


class TestAsr:
    def along(self, golden: AsrGolden, name: str, groups: int) -> Along:
        return Along(golden.get(f"prompt.{name}"), golden.get(f"generate.{name}"), groups)

    def test_the_widened_model_says_what_upstream_says(self, asr_lm, asr_golden):
        model = mimo_fast.load(asr_lm, CODEC, device="cpu", dtype="float32")
        for name in asr_golden.meta["generated"]:
            want = asr_golden.get(f"generate.{name}").long()
            found = said(model, self.along(asr_golden, name, 20))
            assert torch.equal(found.text.argmax(-1), want[0, ::4]), name
            logits = asr_golden.get(f"text_logits.{name}")
            assert (found.text[0] - logits).abs().max() < 1e-4 * logits.abs().max()

    @pytest.mark.parametrize("quantization", FORMATS)
    @pytest.mark.parametrize(
        ("name", "groups"), [("en_tiny", 2), pytest.param("auto", 13, marks=pytest.mark.slow)]
    )
    def test_along_upstreams_tokens(
        self, emulated_cuda, asr_lm, asr_golden, name, groups, quantization
    ):
        def load(dtype: str) -> mimo_fast.MimoAudio:
            how = {"dtype": dtype, "quantization": quantization, "max_seq_len": 96}
            return mimo_fast.load(asr_lm, CODEC, device="cpu", **how)

        along = self.along(asr_golden, name, groups)
        exact = compare(emulated_cuda, load, along, near_ties=name != "en_tiny")
        if quantization is None:
            want = asr_golden.get(f"generate.{name}")[0, : 4 * groups : 4]
            assert torch.equal(exact.text.argmax(-1), want.long())


class TestAdapters:
    def along(self, golden, kind: str, prompt: str, groups: int) -> Along:
        said, patch = (GOLDEN[f"{kind}.{name}.{prompt}"] for name in ("generate", "local_greedy"))
        return Along(golden.get(f"prompts:{prompt}"), said, groups, patch.T.long())

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_widened_model_says_what_upstream_says(self, adapted, golden, kind):
        for lm, adapters in adapted.values():
            chosen = {kind: adapters[kind]}
            model = mimo_fast.load(lm, CODEC, device="cpu", adapters=chosen, max_seq_len=64)
            for prompt in ("asr", "tts_en"):
                along = self.along(golden, kind, prompt, 16)
                found = said(model, along)
                text, *codes = along.tokens.long().unflatten(1, (-1, model.group_size))
                assert torch.equal(found.text.argmax(-1), text[:, 0]), prompt
                speaks = text[1:, 0] == model.lm.empty_id
                spoken = torch.stack(codes, 1)[1:][speaks]
                assert torch.equal(found.chosen, torch.cat((along.patch[None], spoken)).flatten())
                want = GOLDEN[f"{kind}.text_logits.{prompt}"]
                assert (found.text[0] - want).abs().max() < 1e-4 * want.abs().max(), prompt

    @pytest.mark.parametrize(("kind", "widths", "prompt", "groups", "quantization"), ADAPTED)
    def test_along_upstreams_tokens(
        self, emulated_cuda, adapted, golden, kind, widths, prompt, groups, quantization
    ):
        lm, adapters = adapted[widths]

        def load(dtype: str) -> mimo_fast.MimoAudio:
            how = {"dtype": dtype, "quantization": quantization, "max_seq_len": 64}
            return mimo_fast.load(lm, CODEC, device="cpu", adapters={kind: adapters[kind]}, **how)

        refused = {"torch dense", "torch widened"} if widths == NARROW else set()
        along = self.along(golden, kind, prompt, groups)
        compare(emulated_cuda, load, along, frozenset(refused), near_ties=groups > 1)
