"""The persistent kernel's tables: who makes and who reads what, of the published dimensions."""

import copy
import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mimo_fast.config import LMConfig, TransformerConfig, read_json
from mimo_fast.kernels.cuda import engine_launch
from mimo_fast.kernels.cuda.engine import (
    DRAWN,
    MOST_ACTIVE,
    NONE,
    OF_TEXT,
    Operation,
    Order,
    Phase,
    Program,
    Tables,
    jobs_of,
)
from mimo_fast.kernels.cuda.engine_launch import DEPTHS, Grid, Launcher
from mimo_fast.kernels.matmul.adapted import AdaptedWeight
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.sample_codes import code_steps
from mimo_fast.runtime.lm.network import Network
from mimo_fast.runtime.lm.persistent import (
    Persistent,
    refuses_backbone,
    refuses_decoder,
    refuses_encoder,
)
from mimo_fast.runtime.lm.programs import (
    backbone_tables,
    patch_decoder_tables,
    patch_encoder_tables,
)
from mimo_fast.runtime.lm.transformer import LayerWeights, TransformerWeights

PRESETS = Path(engine_launch.__file__).parents[2] / "presets"
PUBLISHED = LMConfig.from_dict(read_json(PRESETS / "7b-lm.json"))
H100 = Grid(132, 227 * 1024, kept_bytes=30 * 10**6)


DEVICE = "meta"
"""Of weights: published ones take no memory."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def quantized(
    n: int, k: int, biased: bool = False, bits: int = 4, group: int = 128, dtype=torch.bfloat16
) -> QuantizedWeight:
    scales = empty(n, k // group, dtype=dtype)
    zeros = empty(n, k // group, dtype=torch.float16) if bits == 4 else None
    words = empty(n, k * bits // 32, dtype=torch.int32)
    return QuantizedWeight(words, scales, zeros, empty(n, dtype=dtype) if biased else None, bits)


def stack(config: TransformerConfig, **form: Any) -> TransformerWeights:
    width = config.heads * config.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            empty(config.dim),
            quantized(width + 2 * config.kv_heads * config.head_dim, config.dim, True, **form),
            quantized(config.dim, width, **form),
            empty(config.dim),
            quantized(2 * config.ffn_dim, config.dim, **form),
            quantized(config.dim, config.ffn_dim, **form),
        )

    return TransformerWeights(tuple(layer() for _ in range(config.layers)), empty(config.dim))


def network(config: LMConfig = PUBLISHED, **form: Any) -> Network:
    """Weights without values."""
    dims = [part.dim for part in (config.backbone, config.patch_encoder, config.patch_decoder)]
    rows = sum(config.code_sizes)

    def rope(part: TransformerConfig, positions: int) -> Tensor:
        return empty(2, positions, part.head_dim // 2, dtype=torch.float32)

    return Network(
        config=config,
        backbone=stack(config.backbone, **form),
        patch_encoder=stack(config.patch_encoder, **form),
        patch_decoder=stack(config.patch_decoder, **form),
        backbone_rope=rope(config.backbone, config.max_positions),
        encoder_rope=rope(config.patch_encoder, config.group_size),
        decoder_rope=rope(config.patch_decoder, config.patch_steps),
        code_heads=empty(rows, dims[2]),
        decoder_embeddings=empty(rows, dims[2]),
        code_steps=code_steps(
            config.code_sizes, config.empty_codes, config.delays, config.group_size
        ),
        patch_to_backbone=Weight.stack([empty(dims[0], config.group_size * dims[1])]),
        backbone_to_patch=Weight.stack([empty(dims[2], dims[0])]),
        text_head=quantized(config.vocab_size, dims[0], **form),
    )


@pytest.fixture(scope="module")
def all_tables() -> dict[str, Tables]:
    given = network()
    return {
        "decoder": patch_decoder_tables(given, H100.blocks, H100.kept_bytes),
        "encoder": patch_encoder_tables(given, H100.blocks),
        "backbone": backbone_tables(given, H100.blocks),
    }


def run_of(tables: Tables) -> Iterator[tuple[int, int]]:
    """Phases and steps in the order in which a launch goes through them."""
    begin, end = tables.loop.start, tables.loop.stop or len(tables.phases)
    yield from ((i, 0) for i in range(begin))
    for step in range(tables.steps):
        yield from ((i, step) for i in range(begin, end))
    yield from ((i, tables.steps - 1) for i in range(end, len(tables.phases)))


def first_column(tables: Tables, number: int, step: int) -> int:
    """Where a vector begins in all that is exchanged."""
    return number + (step * tables.loop_columns if tables.loop_columns else 0)


@pytest.mark.parametrize("name", ["decoder", "encoder", "backbone"])
def test_what_is_read_has_been_made_once(all_tables, name):
    """Vectors of a launch do not overlap; each is read as it was made, by a later phase."""
    tables, made, read = all_tables[name], dict[int, int](), Counter[int]()
    for i, step in run_of(tables):
        phase = tables.phases[i]
        places = [(phase.from_, phase.from_prologue & 1, phase.columns)]
        places += [(phase.residual, phase.from_prologue & 2, phase.width)]
        for number, outside, columns in places:
            if number == NONE:
                continue
            begin = number if outside else first_column(tables, number, step)
            # A patch's frames are one row of the last product.
            assert made[begin] * phase.fold == columns
            read[begin] += 1
        last = phase.operation == Operation.EMBED and step + 1 == tables.steps
        if phase.operation == Operation.ATTEND:
            share = PUBLISHED.backbone.heads // PUBLISHED.backbone.kv_heads
            parts = PUBLISHED.backbone.kv_heads * 8 * share * (PUBLISHED.backbone.head_dim + 2)
            assert phase.partial not in made
            made[phase.partial] = 2 * parts
            read[phase.partial] += 1
        if phase.operation == Operation.TEXT:
            made[phase.partial] = 4 * OF_TEXT * H100.blocks
            read[phase.partial] += 1
        if phase.to != NONE and not last:
            begin = first_column(tables, phase.to, step + (phase.from_prologue >> 2 & 1))
            assert begin not in made
            made[begin] = phase.width
    order = sorted(made)
    assert order[0] == 0
    for begin, after in zip(order, [*order[1:], tables.all_columns], strict=True):
        assert begin + made[begin] == after
        assert begin % 8 == made[begin] % 8 == 0
    assert set(read) == set(made)
    # qkv and the residual read x; gate and up and the residual of `down` read y.
    assert max(read.values()) == 2


def test_the_layers_of_each(all_tables):
    counts = {name: len(tables.phases) for name, tables in all_tables.items()}
    assert counts == {"decoder": 1 + 16 * 4 + 3, "encoder": 6 * 4 + 2, "backbone": 36 * 5 + 3}
    for name, config, of_layer in (
        ("decoder", PUBLISHED.patch_decoder, 4),
        ("encoder", PUBLISHED.patch_encoder, 4),
        ("backbone", PUBLISHED.backbone, 5),
    ):
        tables = all_tables[name]
        first = tables.loop.start
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        shapes = [(width, config.dim), (config.dim, config.heads * config.head_dim)]
        shapes += [(2 * config.ffn_dim, config.dim), (config.dim, config.ffn_dim)]
        x: tuple[str, int] = ("vector", 0) if name == "decoder" else ("input", 0)
        for layer in range(config.layers):
            at = slice(first + layer * of_layer, first + (layer + 1) * of_layer)
            phases, matrices = tables.phases[at], tables.matrices[at]
            products = [each for each in phases if each.operation == Operation.PRODUCT]
            assert [(each.n, each.k) for each in matrices if each.n] == shapes
            qkv, out, gate_up, down = products
            assert source(qkv) == source(out, residual=True) == x
            assert qkv.layer == layer
            assert source(gate_up) == source(down, residual=True) == ("vector", out.to)
            assert source(down) == ("vector", gate_up.to)
            assert [bool(each.eps) for each in products] == [True, False, True, False]
            for each in (qkv, gate_up):
                assert each.eps == pytest.approx(config.norm_eps)
            x = "vector", down.to


def source(phase: Phase, residual: bool = False) -> tuple[str, int]:
    number, given = (
        (phase.residual, phase.residual_input) if residual else (phase.from_, phase.input)
    )
    assert (number == NONE) != (given == NONE)
    return ("input", given) if number == NONE else ("vector", number)


def test_columns_that_are_exchanged(all_tables):
    """Of a row; a value has two bytes, float32 parts of attention two columns."""
    local, active = PUBLISHED.patch_decoder, 2 * 1025 + 2 * 129
    layers = local.layers * (3 * local.dim + local.ffn_dim)
    step = layers + -(-active // 8) * 8 + DRAWN * MOST_ACTIVE + local.dim
    assert all_tables["decoder"].all_columns == PUBLISHED.patch_steps * step == 1_298_616
    local = PUBLISHED.patch_encoder
    columns = local.layers * (3 * local.dim + local.ffn_dim) + local.dim
    assert all_tables["encoder"].all_columns == columns == 44_032
    back = PUBLISHED.backbone
    parts = 2 * back.heads * 8 * (back.head_dim + 2)
    qkv = (back.heads + 2 * back.kv_heads) * back.head_dim
    columns = back.layers * (qkv + parts + 3 * back.dim + back.ffn_dim) + back.dim
    text = PUBLISHED.vocab_size + 4 * OF_TEXT * H100.blocks
    assert all_tables["backbone"].all_columns == columns + text == 3_460_096 + 168_576


def test_who_gets_which_tiles(all_tables):
    for tables in all_tables.values():
        tiles, blocks = Counter[int](), H100.blocks
        for matrix in (each for each in tables.matrices if each.n):
            few = matrix.n < 16 * blocks
            if matrix.order in (Order.WHOLE, Order.HALF):
                assert (matrix.order == Order.HALF) == few
            tiles.update((matrix.first + job) % blocks for job in range(jobs_of(matrix)))
        assert max(tiles.values()) - min(tiles.values()) <= 1


def test_what_stays_in_l2_is_what_is_read_again(all_tables):
    for name in ("encoder", "backbone"):
        assert not any(matrix.keep for matrix in all_tables[name].matrices)
    kept = [matrix for matrix in all_tables["decoder"].matrices if matrix.keep]
    # Scales and zeros beside the values.
    size = sum(matrix.n * matrix.k // 2 + matrix.n * (matrix.k // 128) * 4 for matrix in kept)
    assert 0.9 * H100.kept_bytes < size <= H100.kept_bytes
    assert not all_tables["decoder"].matrices[0].keep


def test_the_codes_of_a_step(all_tables):
    tables = all_tables["decoder"]
    heads, draw, embed = tables.phases[-3:]
    assert tables.matrices[-3].order == Order.ACTIVE
    assert tables.matrices[-3].n == sum(PUBLISHED.code_sizes)
    assert heads.width == draw.columns == 2312
    assert draw.width == embed.columns == 32
    assert (embed.to, embed.from_prologue) == (tables.phases[0].to, 4)
    assert len(tables.code_steps) == tables.steps == PUBLISHED.patch_steps == 11


def test_vectors_of_other_kinds_are_refused():
    tables = Tables(torch.bfloat16, 4)
    with pytest.raises(ValueError, match="octets"):
        tables.vector(12)
    with pytest.raises(ValueError, match="17 steps"), tables.repeated(17):
        pass
    tables.vector(8, looped=True)
    with pytest.raises(ValueError, match="outside the loop come before"):
        tables.vector(8)
    with tables.repeated(2):
        made = tables.product(quantized(128, 128), "x")
    with pytest.raises(ValueError, match="nothing comes after"):
        tables.product(quantized(128, 128), made, to=made)


class Library:
    """Stands in for the library: it has the room that a launch takes, and notes what it is told."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.calls = error, list[SimpleNamespace]()

    def mimo_fast_engine_scratch(self, heads: int, kv_heads: int, head_dim: int, most: int) -> int:
        share = heads // kv_heads
        return 4 * ((2 * share + 3 + 16) * head_dim + share * -(-most // 512) * 64 + 2 * share)

    def mimo_fast_engine_draw_scratch(self, size: int) -> int:
        return 6 * size

    def mimo_fast_engine_text_scratch(self, rows: int, blocks: int) -> int:
        return 24 * rows * blocks

    def mimo_fast_engine_shared(self, program: Any, threads: int, depth: int) -> int:
        told = program._obj
        x = max(told.x_columns * told.rows * 2, told.scratch_bytes)
        return threads // 32 * depth * 1152 + x + 8 * told.sums_floats + 64 * told.count + 4096

    def mimo_fast_engine_run(self, program: Any, size: int, *rest: Any) -> int:
        half, blocks, threads, depth, outputs, sizes, count, _ = rest
        self.calls.append(
            SimpleNamespace(
                program=Program.from_buffer_copy(program._obj),
                size=size,
                how=(half, blocks, threads, depth),
                outputs=[(outputs[i], sizes[i]) for i in range(count)],
            )
        )
        return self.error


def launcher(tables: Tables, grid: Grid, library: Library) -> Launcher:
    error = torch.zeros(1, dtype=torch.int32)
    return Launcher(tables, grid, error, library)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("name", ["decoder", "encoder", "backbone"])
def test_shared_memory_is_divided(all_tables, name, shared):
    grid, library = replace(H100, shared=shared * 1024), Library()
    made = launcher(all_tables[name], grid, library)
    widest = max(matrix.k for matrix in all_tables[name].matrices)
    for rows in range(1, 9):
        program, (threads, depth) = made._fixed(rows, 8192 if name == "backbone" else 0)
        taken = library.mimo_fast_engine_shared(ctypes.byref(program), threads, depth)
        assert taken <= grid.shared
        assert depth in DEPTHS
        columns = program.x_columns
        assert columns == widest or columns % 2048 == 0 or (columns >= 1024 and depth == DEPTHS[-1])
        assert columns % 128 == 0
        # At least the sums of a job of each product.
        for matrix in (each for each in all_tables[name].matrices if each.n):
            assert engine_launch.sums_of_job(matrix, rows) <= program.sums_floats
        assert made.holds(rows)
    small = launcher(all_tables[name], replace(grid, shared=40_000), library)
    assert not small.holds(8)
    with pytest.raises(ValueError, match="40000 bytes of shared memory do not hold 8 rows of up"):
        small._fixed(8, 0)


def test_what_a_launch_is_told():
    tables, library = Tables(torch.float16, 4), Library()
    y = tables.product(quantized(128, 128), "x")
    tables.deliver(quantized(256, 128), y, "y")
    made = launcher(tables, Grid(4, 2**20, threads=64, depth=6, x_columns=128), library)
    x, out, codes = torch.zeros(3, 128), torch.zeros(3, 256), torch.zeros(3, 5)
    made.run(3, {"x": x, "y": out}, [out, codes], codes=codes, channels=7)
    made.run(2, {"x": x[:2], "y": out[:2]}, [out[:2]])
    made.run(8, {"x": x, "y": out}, [])
    first, second, third = library.calls
    assert first.how == (True, 4, 64, 6)
    assert first.size == 3 * 128 * 2
    assert first.outputs == [(out.data_ptr(), out.nbytes), (codes.data_ptr(), codes.nbytes)]
    assert (first.program.rows, first.program.x_columns, first.program.steps) == (3, 128, 1)
    assert (first.program.loop_begin, first.program.loop_end, first.program.count) == (0, 2, 2)
    assert first.program.pointers[:3] == [x.data_ptr(), out.data_ptr(), None]
    assert (first.program.codes, first.program.channels) == (codes.data_ptr(), 7)
    assert (second.program.codes, second.program.channels) == (None, 0)
    # Captured launches of fewer rows hold the address that they were given.
    assert first.program.exchanged == second.program.exchanged != third.program.exchanged
    assert len(made._exchanged) == 2
    with pytest.raises(ValueError, match="9 rows"):
        made.run(9, {"x": x, "y": out}, [])
    with pytest.raises(ValueError, match=r"\['x'\]"):
        made.run(1, {"x": x}, [])
    library.error = 720
    with pytest.raises(RuntimeError, match="a persistent launch of 1 rows: CUDA error 720"):
        made.run(1, {"x": x[:1], "y": out[:1]}, [])
    assert int(made.error) == 0
    made.attempt(1, {"x": x[:1], "y": out[:1]}, [out[:1], codes[0]], codes=codes)
    assert int(made.error) == 1
    assert bool(out[0].isnan().all())
    assert bool(codes[0].isnan().all())
    assert not bool(out[1:].any())


def test_a_copy_reads_its_own_weights(monkeypatch):
    narrow = {"dim": 128, "layers": 1, "heads": 8, "kv_heads": 8, "head_dim": 16, "ffn_dim": 128}
    names = ("backbone", "patch_encoder", "patch_decoder")
    parts = {name: replace(getattr(PUBLISHED, name), **narrow) for name in names}
    config = replace(PUBLISHED, **parts, vocab_size=64, max_positions=64)
    monkeypatch.setattr(f"{__name__}.DEVICE", "cpu")
    given, library = network(config), Library()
    made = Persistent(given, Grid(4, 2**18), library)  # type: ignore[arg-type]
    for each in (made, copy.deepcopy(made)):
        own = each._arguments[0]
        for part, weights, first in (
            (each.backbone, own.backbone, 0),
            (each.encoder, own.patch_encoder, 0),
            (each.decoder, own.patch_decoder, 1),
        ):
            assert part is not None
            tables = part.launcher._tables
            qkv = weights.layers[0].qkv
            assert tables.matrices[first].words == qkv.words.data_ptr()
            assert tables.phases[first].bias == qkv.bias.data_ptr()
            assert part.launcher.error.data_ptr() == each.error.word.data_ptr()
    assert own.backbone.norm.data_ptr() != given.backbone.norm.data_ptr()
    assert each.error.word.data_ptr() != made.error.word.data_ptr()


def test_structures_of_another_version_are_refused():
    def sizes(of: Any) -> None:
        of[0], of[1], of[2] = 56, 72, 8

    names = "run", "shared", "scratch", "draw_scratch", "text_scratch", "ring", "frames"
    functions = {name: SimpleNamespace() for name in names}
    loaded = SimpleNamespace(**{f"mimo_fast_engine_{name}": f for name, f in functions.items()})
    loaded.mimo_fast_engine_sizes = sizes
    with pytest.raises(RuntimeError, match=r"have \[56, 72, 8\] bytes"):
        engine_launch.declared(loaded)  # type: ignore[arg-type]


LOCAL, BACK = PUBLISHED.patch_decoder, PUBLISHED.backbone
WIDE = Weight.stack([empty(1024, 4096, dtype=torch.float32)])


def test_published_weights_are_taken():
    for form in ({}, {"bits": 8}):
        given = network(**form)
        assert [refuses_backbone(given), refuses_encoder(given), refuses_decoder(given)] == [""] * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"patch_decoder": stack(LOCAL, dtype=torch.float32)}, "not both bfloat16 or float16"),
        ({"patch_decoder": stack(LOCAL, group=64)}, "groups of 64"),
        ({"code_heads": empty(2824, 1024, dtype=torch.float32)}, "bfloat16 and float16, not"),
        ({"backbone_to_patch": WIDE}, "it is torch.float32"),
        ({"backbone_to_patch": Weight.stack([empty(512, 4096)] * 2)}, "several row blocks"),
        (
            {"config": replace(PUBLISHED, patch_decoder=replace(LOCAL, kv_heads=8))},
            "64 heads share",
        ),
        (
            {
                "config": replace(
                    PUBLISHED, patch_decoder=replace(LOCAL, head_dim=32, heads=32, kv_heads=32)
                )
            },
            "32 heads of 32",
        ),
        (
            {"config": replace(PUBLISHED, patch_decoder=replace(LOCAL, dim=1000))},
            "1000 columns are no multiple of 128",
        ),
        (
            {"code_steps": code_steps((9,) * 3, (8,) * 3, (0, 1, 30), 4)},
            "34 steps of 0 to 2 codes",
        ),
        ({"code_steps": code_steps((9,) * 9, (8,) * 9, (0,) * 9, 4)}, "4 steps of 9 to 9 codes"),
    ],
)
def test_why_a_patch_decoder_is_refused(change, reason):
    assert reason in refuses_decoder(replace(network(), **change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": replace(PUBLISHED, backbone=replace(BACK, head_dim=80))}, "heads of 80"),
        ({"text_head": quantized(151_681, 4096)}, "151681 rows of 4096 values"),
        ({"text_head": AdaptedWeight(quantized(8, 128), WIDE, ())}, "an adapter beside it"),
    ],
)
def test_why_a_backbone_is_refused(change, reason):
    assert reason in refuses_backbone(replace(network(), **change))


def test_why_a_patch_encoder_is_refused():
    given = network()
    longer = replace(given, config=replace(PUBLISHED, group_size=8))
    assert refuses_encoder(longer) == "groups of 8 frames"
    apart = replace(given.patch_encoder.layers[0], down=Weight.stack([empty(512, 4096)] * 2))
    layers = (*given.patch_encoder.layers[1:], apart)
    stacked = replace(given, patch_encoder=replace(given.patch_encoder, layers=layers))
    assert refuses_encoder(stacked) == "a weight: it is in several row blocks"


def test_why_a_device_is_refused(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert engine_launch.refuses_device(torch.device("cpu")) == "x is not on a GPU"
    monkeypatch.setenv("MIMO_FAST_KERNELS", "triton")
    assert engine_launch.refuses_device(gpu) == "MIMO_FAST_KERNELS is set"
    monkeypatch.setattr(engine_launch.cuda, "refuses_device", lambda device: "")
    monkeypatch.setattr(engine_launch, "library", lambda: None)
    assert engine_launch.refuses_device(gpu) == "the CUDA kernels were built without it"
    monkeypatch.setattr(engine_launch, "library", lambda: object())
    for error, said in ((720, "CUDA error 720"), (0, "")):
        monkeypatch.setattr(engine_launch, "_probe", lambda device, error=error: error)
        assert said in engine_launch.refuses_device(gpu)
