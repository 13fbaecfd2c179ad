"""The kits' language models with their patch decoder, patch encoder and backbone as persistent
kernels, compiled for the CPU; bounds are those of test_kits.py."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulated import products_by_cuda
from engine_launches import grid_of
from engine_models import logits_of_codes
from helpers import KIT, KIT_PAIR, assert_as_exact_as_eager, slow_after
from replies import CAPACITY, RequestSpec, drawn, poison, replies_of
from torch import Tensor
from widened import ASR, LM, WIDTHS, Widening

import mimo_fast
from mimo_fast.kernels.cuda.engine_launch import Grid
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.persistent import Persistent
from mimo_fast.runtime.lm.teacher_forcing import code_logits
from mimo_fast.sampling import GREEDY, sampler_tensors
from mimo_fast.testing.asr_parity import AsrGolden

CODEC = KIT_PAIR[1]
PROMPTS = ("tts_en", "asr", "text", "dialogue_multiturn")
RECORDINGS = ("en_tiny", "auto", "en", "zh_t31")
FORMATS = ("int8", "int4", None)

AGREE = 0.9
"""Share of codes, at least, that bfloat16 chooses as float32 does: near-ties are among the rest."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The widened language models."""
    folder = tmp_path_factory.mktemp("kits")
    return {
        "lm": Widening(LM, WIDTHS["adapters"]).write_lm(folder / "lm"),
        "asr": Widening(ASR, WIDTHS["asr"]).write_lm(folder / "asr"),
    }


@contextmanager
def persistent(
    library: ctypes.CDLL, folder: Path, quantization: str | None, grid: Grid
) -> Iterator[tuple[mimo_fast.MimoAudio, Counter[str]]]:
    """The model in bfloat16, and how often each of its persistent kernels was launched. A launch
    that is refused, or cannot go on, is an error."""
    counts = Counter[str]()
    how = {"dtype": "bfloat16", "quantization": quantization, "max_seq_len": 256}
    with products_by_cuda(library, grid=grid):
        model = mimo_fast.load(folder, CODEC, device="cpu", **how)
        kernels = of(model)
        for name in ("backbone", "encoder", "decoder"):
            launcher = getattr(kernels, name).launcher

            def counted(*arguments, launcher=launcher, name=name, **options) -> None:
                counts[name] += 1
                launcher.run(*arguments, **options)

            launcher.attempt = counted
        yield model, counts
        assert int(kernels.error.word) == 0


def of(model: mimo_fast.MimoAudio) -> Persistent:
    kernels = model.lm._executor.persistent
    assert kernels is not None
    return kernels


class Along(NamedTuple):
    """Ids as `generate` takes and gives them, and how many groups of them."""

    prompt: Tensor
    tokens: Tensor
    groups: int


class Said(NamedTuple):
    """Logits of N texts [N, V], of the codes of all patches [M]; codes [C, G] of each."""

    text: Tensor
    codes: Tensor
    patches: list[Tensor]


def said(
    model: mimo_fast.MimoAudio, along: Along, drawn_before: list[Tensor] | None = None
) -> Said:
    """Along given tokens, with a patch for each group, whatever its token is: drawn by the
    persistent kernel, or those that it has drawn."""
    lm, size, greedy = model.lm, model.group_size, sampler_tensors([GREEDY])
    state = lm.new_state([0], along.prompt.shape[1] // size + along.groups)
    slots, logits = state.rows[:1], None
    lm.prefill(along.prompt.long(), state, 0)
    new = along.tokens[:, : along.groups * size].long().unflatten(1, (-1, size))
    text, codes, patches = list[Tensor](), list[Tensor](), list[Tensor]()
    for group in range(along.groups):
        hidden = state.hidden[:1]
        text.append((lm.text_logits(hidden) if logits is None else logits)[0])
        if drawn_before is None:
            decoder = of(model).decoder
            assert decoder is not None
            patches.append(lm.sample_patch(state, slots, greedy)[0].clone())
            each = logits_of_codes(decoder.launcher, lm, 1)
        else:
            each = code_logits(lm, hidden, drawn_before[group][None])
        codes += [of_channel.flatten() for of_channel in each]
        if group + 1 < along.groups:
            lm.stage(state, 0, int(new[0, group, 0]), new[1:, group])
            logits = lm.step(state, slots)
    return Said(torch.stack(text), torch.cat(codes), patches)


def chosen(model: mimo_fast.MimoAudio, logits: Tensor, groups: int) -> list[Tensor]:
    """The codes [C, G] of each group that these logits choose."""
    config = model.lm.config
    made = []
    sizes = [config.group_size * size for size in config.code_sizes]
    for group in logits.view(groups, -1):
        patch = []
        for of_channel, empty in zip(group.split(sizes), config.empty_codes, strict=True):
            own = of_channel.view(config.group_size, -1).clone()
            own[:, empty] = -torch.inf
            patch.append(own.argmax(-1))
        made.append(torch.stack(patch))
    return made


def compare(library: ctypes.CDLL, folder: Path, quantization: str | None, along: Along) -> Said:
    """What float32 says."""
    with persistent(library, folder, quantization, grid_of()) as (model, counts):
        got = said(model, along)
        assert counts["backbone"] == along.groups - 1
        assert counts["decoder"] == along.groups
        assert counts["encoder"] >= along.groups

    def others(dtype: str) -> Said:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MIMO_FAST_KERNELS", "torch")
            how = {"dtype": dtype, "quantization": quantization, "max_seq_len": 256}
            plain = mimo_fast.load(folder, CODEC, device="cpu", **how)
            return said(plain, along, got.patches)

    eager, exact = others("bfloat16"), others("float32")
    assert_as_exact_as_eager(got.text, eager.text, exact.text)
    assert_as_exact_as_eager(got.codes, eager.codes, exact.codes)
    own = chosen(model, got.codes, along.groups)
    assert torch.equal(torch.stack(own), torch.stack(got.patches))
    first, second = exact.text.topk(2).values.unbind(-1)
    decided = first - second > 2 * (got.text - exact.text).abs().max()
    assert torch.equal(got.text.argmax(-1)[decided], exact.text.argmax(-1)[decided])
    right = torch.stack(chosen(model, exact.codes, along.groups)) == torch.stack(got.patches)
    assert right.float().mean() > AGREE
    return exact


def cases(names: tuple[str, ...], short: int, long: int) -> list:
    every = [(name, quantization) for name in names for quantization in FORMATS]
    quick = [(*every[0], short)]
    return [*quick, *(pytest.param(*each, long, marks=pytest.mark.slow) for each in every)]


@pytest.mark.parametrize(("prompt", "quantization", "groups"), cases(PROMPTS, 3, 24))
def test_the_kits_prompts(emulated_cuda, folders, golden, prompt, quantization, groups):
    tokens = golden.get(f"model:generate.{prompt}")
    along = Along(golden.get(f"prompts:{prompt}"), tokens, groups)
    exact = compare(emulated_cuda, folders["lm"], quantization, along)
    if quantization is None:
        assert torch.equal(exact.text.argmax(-1), tokens[0, : 4 * groups : 4].long())


@pytest.mark.parametrize(("recording", "quantization", "groups"), cases(RECORDINGS, 3, 20))
def test_the_asr_kits_recordings(emulated_cuda, folders, recording, quantization, groups):
    golden = AsrGolden(KIT / "asr", CODEC)
    tokens = golden.get(f"generate.{recording}")
    along = Along(golden.get(f"prompt.{recording}"), tokens, groups)
    exact = compare(emulated_cuda, folders["asr"], quantization, along)
    if quantization is None:
        assert torch.equal(exact.text.argmax(-1), tokens[0, : 4 * groups : 4].long())


@pytest.mark.parametrize("quantization", slow_after(1, FORMATS))
def test_whole_replies_alone_and_together_in_any_grid(
    emulated_cuda, folders, requests: list[RequestSpec], quantization
):
    """Of several tasks, greedy and sampled, with words and with patches."""
    some = requests if quantization is None else requests[:3]
    how = emulated_cuda, folders["lm"], quantization
    with persistent(*how, grid_of(2, 64)) as (model, counts):
        want = []
        for request in some:
            engine = Engine(model.lm, 1, CAPACITY)
            poison(engine)
            want.append(drawn(list(request.start(engine))))
        assert min(counts[name] for name in ("backbone", "encoder", "decoder")) > 0
    with persistent(*how, grid_of(5, 96, depth=4)) as (model, _):
        emulated_cuda.set_seed_of_fibers(5)
        engine = Engine(model.lm, 3, CAPACITY)
        poison(engine)
        assert replies_of(engine, some) == want
