"""Weight formats: error, packing, products, files and imports."""

import json
import math
import shutil
from importlib.resources import files

import pytest
import torch
from helpers import KIT, kit_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mimo_fast.checkpoint import open_weights
from mimo_fast.config import LMConfig
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.qmatmul import (
    CPU_PACKED_ROWS,
    QuantizedWeight,
    Weight,
    dequantize,
    dequantize_to,
    matmul,
    pack_for_cpu,
    pack_words,
    qmatmul_bytes,
    unpack_words,
)  # fmt: skip
from mimo_fast.layout import lm_shapes
from mimo_fast.quantization import (
    Format,
    QuantizationConfig,
    WeightSource,
    checkpoint_bytes,
    from_gptq,
    import_gptq,
    quantize,
    quantize_checkpoint,
    relative_error,
    stored_formats,
    stored_shapes,
)  # fmt: skip
from mimo_fast.quantization.formats import CONFIG_KEY
from mimo_fast.quantization.search import NF4_LEVELS

FORMATS = [
    "int4", "int4-g64", "int4-g32", "int4-sym", "int4-sym-g64", "int8", "int8-g128", "int8-g32", "nf4", "nf4-g32",
]  # fmt: skip


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def outliers(rows: int, columns: int) -> torch.Tensor:
    values = gaussian(rows, columns)
    chosen = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 1e-3
    return torch.where(chosen, values * 10, values)


def error(weight: torch.Tensor, name: str) -> float:
    return relative_error(weight, quantize(weight, Format.parse(name)))


def test_error_on_gaussian_weights():
    weight = gaussian(256, 4096)
    assert error(weight, "int4-g64") < 0.088 < error(weight, "nf4") < 0.092
    assert error(weight, "int4") < 0.095
    assert error(weight, "int4-sym-g64") < 0.092
    assert error(weight, "int8-g128") < 0.007
    assert error(weight, "int8") < 0.009


def test_error_on_weights_with_outliers():
    weight = outliers(256, 4096)
    assert error(weight, "int4-g64") < error(weight, "nf4")
    assert error(weight, "int8-g128") < 0.01


@pytest.mark.parametrize("weight", [gaussian(64, 1024), outliers(64, 1024)], ids=["gaussian", "outliers"])
@pytest.mark.parametrize(("name", "steps"), [("int4-sym", 7), ("int8", 127), ("int8-g128", 127)])
def test_search_beats_plain_absmax(weight, name, steps):
    group = Format.parse(name).group or weight.shape[1]
    values = weight.view(-1, group)
    scale = values.abs().amax(1, keepdim=True) / steps
    plain = ((values / scale).round() * scale - values).norm() / values.norm()
    # Scales are rounded to bfloat16, which absmax here is not: nothing is gained at 8 bits on Gaussian rows.
    assert error(weight, name) < plain * (1.005 if steps == 127 else 0.97)


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(64, 512)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    want = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(dequantize(quantize(weight, Format.parse("nf4"))), want, rtol=1e-6, atol=0)


def test_nf4_values_are_nearest_levels_times_absmax():
    weight = outliers(3, 192)
    groups = weight.view(-1, 64)
    scale = groups.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    nearest = (groups[..., None] / scale[..., None] - levels).abs().argmin(-1)
    torch.testing.assert_close(dequantize(quantize(weight, Format.parse("nf4"))).view(-1, 64), levels[nearest] * scale)


@pytest.mark.parametrize("name", FORMATS)
def test_quantizing_again_changes_nothing(name):
    """Values on the grid stay on it, up to the float32 and bfloat16 rounding of new scales."""
    once = dequantize(quantize(outliers(5, 256), Format.parse(name)))
    assert error(once, name) < (0.004 if name.startswith("int8") else 0.03)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("factor", [1e-12, 1e-4, 1.0, 1e6])
def test_error_does_not_depend_on_magnitude(name, factor):
    weight = gaussian(8, 256)
    assert error(weight * factor, name) == pytest.approx(error(weight, name), rel=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_and_constant_groups(name):
    weight = torch.zeros(4, 128)
    weight[1], weight[2] = 3.0, -0.5
    weight[3, :64] = 1e-38
    got = dequantize(quantize(weight, Format.parse(name)))
    assert got.isfinite().all()
    torch.testing.assert_close(got, weight, rtol=0.005, atol=1e-30)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(bad):
    weight = gaussian(2, 32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, Format.parse("int8"))


def test_input_is_left_alone_and_its_dtype_does_not_matter():
    weight = gaussian(4, 128).bfloat16()
    before = weight.clone()
    quantized, wide = (quantize(w, Format.parse("int4")) for w in (weight, weight.float()))
    relative_error(weight.float(), wide)
    assert torch.equal(weight, before)
    assert torch.equal(quantized.words, wide.words)


def test_relative_error_is_that_of_the_whole_matrix():
    weight = outliers(100, 4096)
    quantized = quantize(weight, Format.parse("int4"))
    want = (dequantize(quantized).double() - weight.double()).norm() / weight.double().norm()
    assert relative_error(weight, quantized) == pytest.approx(float(want), rel=1e-4)
    assert relative_error(torch.zeros(2, 32), quantize(torch.zeros(2, 32), Format.parse("int8"))) == 0


@given(bits=st.sampled_from([4, 8]), group=st.sampled_from([32, 64, 96, 128, 256]), blocks=st.integers(1, 3),
       rows=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_packing_is_undone_by_unpacking(bits, group, blocks, rows, seed):
    q = torch.randint(2**bits, (rows, blocks * group), generator=torch.Generator().manual_seed(seed))
    words = pack_words(q, bits, group)
    assert words.shape == (rows, blocks * group * bits // 32)
    assert torch.equal(unpack_words(words, bits, group), q.int())


def test_packed_layout():
    """Plane p of word w is column p W + w of a block: pinned, because files hold it."""
    q = torch.zeros(1, 256, dtype=torch.int64)
    q[0, 128 + 3 * 16 + 5] = 11
    words = pack_words(q, 4, 128)
    assert words.nonzero().tolist() == [[0, 16 + 5]]
    assert words[0, 21] == 11 << 12
    q = torch.zeros(1, 64, dtype=torch.int64)
    q[0, 3 * 8 + 2] = 200
    assert pack_words(q, 8, 32).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(7, 128), (48, 256), (32, 384)])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_product_is_that_of_the_dequantized_weight(name, rows, columns, shape, dtype):
    bias = gaussian(1, rows, 3)[0].to(dtype)
    weight = pack_for_cpu(quantize(gaussian(rows, columns), Format.parse(name), bias))
    x = gaussian(math.prod(shape), columns, 2).view(*shape, columns).to(dtype)
    dense = dequantize(weight)
    want = x.float() @ dense.T + bias.float()
    got = matmul(x, weight)
    assert got.dtype == dtype
    # Twice the error of the same product in this dtype, whose weight and result are both rounded.
    noise = x.float().abs() @ dense.abs().T + bias.abs().float()
    eager = (torch.nn.functional.linear(x, dense.to(dtype), bias).float() - want).abs().max()
    assert float((got.float() - want).abs().max()) <= 2 * float(eager) + 1e-6 * float(noise.max())


def test_cpu_products_are_used_where_they_can_be():
    usable = quantize(gaussian(32, 128), Format.parse("int4"))
    assert pack_for_cpu(usable).packed is not None
    assert pack_for_cpu(quantize(gaussian(32, 96), Format.parse("int8"))).packed is not None
    for rows, name in ((33, "int4"), (32, "nf4"), (32, "int8-g32")):
        assert pack_for_cpu(quantize(gaussian(rows, 128), Format.parse(name))).packed is None


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int8"])
def test_many_rows_and_few_agree(name):
    weight = pack_for_cpu(quantize(gaussian(32, 256), Format.parse(name)))
    x = gaussian(CPU_PACKED_ROWS + 1, 256, 5).bfloat16()
    many, few = matmul(x, weight), torch.cat([matmul(row[None], weight) for row in x])
    torch.testing.assert_close(many.float(), few.float(), rtol=0.02, atol=0.2)


@pytest.mark.parametrize("quantized", [False, True])
def test_epilogues(quantized):
    dense = gaussian(64, 128)
    weight = quantize(dense, Format.parse("int8")) if quantized else Weight.stack([dense[:32], dense[32:]])
    values = dequantize(weight) if quantized else dense
    x, residual = gaussian(3, 128, 1), gaussian(3, 32, 2)
    gate, up = (x @ values.T).chunk(2, -1)
    torch.testing.assert_close(
        matmul(x, weight, residual=residual, swiglu=True), residual + torch.nn.functional.silu(gate) * up
    )
    wide = gaussian(3, 64, 2)
    torch.testing.assert_close(matmul(x, weight, residual=wide), wide + x @ values.T)


def test_width_that_does_not_match_is_refused():
    with pytest.raises(ValueError, match="last dimension"):
        matmul(torch.ones(2, 64), quantize(gaussian(4, 128), Format.parse("int8")))


def test_rows_join_and_are_taken():
    parts = [
        quantize(gaussian(rows, 128, rows), Format.parse("int4"), torch.full((rows,), rows * 1.0)) for rows in (3, 5)
    ]
    joined = QuantizedWeight.stack(parts)
    assert joined.shape == (8, 128)
    assert torch.equal(dequantize(joined), torch.cat([dequantize(part) for part in parts]))
    assert joined.bias.tolist() == [3.0] * 3 + [5.0] * 5
    assert torch.equal(dequantize(joined.take(torch.tensor([6, 0, 6]))), dequantize(joined)[[6, 0, 6]])
    assert torch.equal(dequantize_to(joined, torch.float32), dequantize(joined))
    with pytest.raises(ValueError, match="one format"):
        QuantizedWeight.stack([parts[0], quantize(gaussian(5, 128), Format.parse("int8"))])


def test_bytes_of_a_product():
    weight = quantize(gaussian(6, 256), Format.parse("int4"), torch.zeros(6, dtype=torch.bfloat16))
    assert weight.nbytes == 6 * 256 // 2 + 6 * 2 * (2 + 2) + 6 * 2
    assert qmatmul_bytes(3, weight, 6, 2) == weight.nbytes + 3 * (256 + 6) * 2


@pytest.mark.parametrize(("text", "want"), [
    ("int4", Format("int4", 128, False)), ("int4-sym", Format("int4", 128)), ("int4-sym-g64", Format("int4", 64)),
    ("int8", Format("int8", None)), ("int8-g128", Format("int8", 128)), ("nf4", Format("nf4", 64)),
])
def test_format_names(text, want):
    assert Format.parse(text) == want
    assert Format.parse(str(want)) == want


@pytest.mark.parametrize("text", ["", "int3", "int4-g48", "nf4-sym", "int4-g64 "])
def test_unknown_formats_are_refused(text):
    with pytest.raises(ValueError, match="no weight format"):
        Format.parse(text)


@pytest.mark.parametrize(("columns", "group"), [(4096, 128), (192, 64), (96, 32), (320, 64)])
def test_groups_shrink_until_they_divide(columns, group):
    assert Format.parse("int4").fit(columns).group == group
    assert Format.parse("int8").fit(columns).group is None


def test_odd_widths_stay_dense():
    assert Format.parse("int4").fit(48) is None
    assert Format.parse("int8").fit(80) is None


def test_parts():
    chosen = QuantizationConfig.parse("int4")
    assert chosen.parts() == {"backbone": "int4-g128", "lm_head": "int8", "text_embeddings": "int8",
                              "patch_decoder": "int8", "patch_encoder": None, "codec": None}
    assert QuantizationConfig.parse(chosen.parts()) == chosen
    assert QuantizationConfig.parse("nf4").backbone == Format("nf4", 64)
    assert QuantizationConfig.parse("int8").text_embeddings is None
    assert QuantizationConfig.parse({"lm_head": "dense"}) == QuantizationConfig()
    assert chosen.format_of("model.layers.0.self_attn.q_proj.bias", (64,)) is None
    assert chosen.format_of("speech_embeddings.0.weight", (64, 64)) is None
    assert chosen.format_of("local_transformer.layers.0.mlp.up_proj.weight", (64, 64)) == Format("int8", None)


@pytest.mark.parametrize("bad", ["int5", {"head": "int8"}, {"lm_head": "int9"}])
def test_unknown_quantizations_are_refused(bad):
    with pytest.raises(ValueError, match="no "):
        QuantizationConfig.parse(bad)


def published() -> LMConfig:
    return LMConfig.from_dict(json.loads((files("mimo_fast") / "presets" / "7b-lm.json").read_text()))


def test_size_at_the_published_dimensions():
    assert checkpoint_bytes(published(), QuantizationConfig.parse("int4")) <= 5.2e9
    dense = sum(map(math.prod, lm_shapes(published()).values())) * 2
    assert checkpoint_bytes(published(), None) == dense
    int8 = checkpoint_bytes(published(), QuantizationConfig.parse("int8"))
    assert 0.5 * dense < int8 < 0.6 * dense


@pytest.fixture(scope="module", params=["int4", "int8", "nf4"])
def written(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("quantized") / request.param
    return request.param, target, quantize_checkpoint(KIT / "checkpoint" / "lm", target, request.param, progress=False)


def source_of(directory, dtype=torch.float32, requested=None) -> WeightSource:
    weights, raw = open_weights(directory), json.loads((directory / "config.json").read_text())
    return WeightSource(weights.get, dtype, stored_formats(raw, str(directory)), requested)


def test_a_checkpoint_survives_the_disk_bit_for_bit(written):
    name, target, errors = written
    config = LMConfig.from_dict(kit_config("lm"))
    chosen, shapes = QuantizationConfig.parse(name), lm_shapes(config)
    formats = chosen.formats(shapes)
    dense, stored = open_weights(KIT / "checkpoint" / "lm"), load_file(target / "model.safetensors")
    assert {key: tuple(t.shape) for key, t in stored.items()} == stored_shapes(shapes, formats)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == checkpoint_bytes(config, chosen, torch.float32)
    assert errors.keys() == formats.keys()
    for matrix, shape in shapes.items():
        if matrix not in formats:
            assert torch.equal(stored[matrix], dense.get(matrix))
            continue
        want = quantize(dense.get(matrix), formats[matrix])
        assert torch.equal(stored[f"{matrix}.words"], want.words)
        assert torch.equal(stored[f"{matrix}.scales"], want.scales)
        assert (want.zeros is None) or torch.equal(stored[f"{matrix}.zeros"], want.zeros)
        assert want.shape == shape
        assert errors[matrix] == pytest.approx(relative_error(dense.get(matrix), want))


def test_errors_and_formats_are_kept_in_the_config(written):
    _, target, errors = written
    raw = json.loads((target / "config.json").read_text())
    kept = raw[CONFIG_KEY]["tensors"]
    assert {name: about["error"] for name, about in kept.items()} == {n: round(e, 6) for n, e in errors.items()}
    assert raw["hidden_size"] == kit_config("lm")["hidden_size"]
    assert 0 < max(errors.values()) < 0.12
    assert (target / "tokenizer.json").read_bytes() == (KIT / "checkpoint" / "lm" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_at_load_equals_loading_quantized(written, dtype):
    name, target, _ = written
    loaded = source_of(target, dtype)
    made = source_of(KIT / "checkpoint" / "lm", dtype, QuantizationConfig.parse(name))
    layer = "model.layers.0.self_attn"
    qkv = [source.weight(*(f"{layer}.{p}_proj" for p in "qkv"), bias=True) for source in (loaded, made)]
    assert all(isinstance(weight, QuantizedWeight) for weight in qkv)
    x = gaussian(3, 64).to(dtype)
    assert torch.equal(matmul(x, qkv[0]), matmul(x, qkv[1]))
    embeddings = "model.embed_tokens.weight"
    assert loaded(embeddings).dtype == dtype
    assert torch.equal(loaded(embeddings), made(embeddings))
    assert torch.equal(loaded("model.norm.weight"), made("model.norm.weight"))


def test_source_of_a_dense_checkpoint():
    source = source_of(KIT / "checkpoint" / "lm")
    modules = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    weight = source.weight(*modules)
    assert isinstance(weight, Weight)
    assert all(torch.equal(b, source(f"{m}.weight")) for b, m in zip(weight.blocks, modules, strict=True))


def test_shards(tmp_path):
    quantize_checkpoint(KIT / "checkpoint" / "lm", tmp_path / "a", "int4", progress=False)
    quantize_checkpoint(KIT / "checkpoint" / "lm", tmp_path / "b", "int4", progress=False, shard_bytes=20_000)
    whole, shards = open_weights(tmp_path / "a"), open_weights(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert all(torch.equal(whole.get(name), shards.get(name)) for name in whole.names())


def test_quantizing_twice_is_refused(written):
    _, target, _ = written
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(target, target.parent / "again", "int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        source_of(target, requested=QuantizationConfig.parse("int8"))


@pytest.mark.parametrize(("entry", "match"), [
    ({"version": 9}, "is unknown"), ([], "is unknown"), ({"version": 1}, "damaged"),
    ({"version": 1, "tensors": {"a": {"format": "int3"}}}, "damaged"), ({"version": 1, "tensors": []}, "damaged"),
])
def test_damaged_entries_are_refused(entry, match):
    with pytest.raises(CheckpointError, match=match):
        stored_formats({CONFIG_KEY: entry}, "config.json")


def gptq_layer(n: int, k: int, group: int, *, v1: bool, order: list[int] | None = None, seed: int = 0):
    """A layer packed one integer at a time, and its values: an implementation that shares nothing with ours."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(16, (n, k), generator=generator)
    zeros = torch.randint(1, 16, (k // group, n), generator=generator)
    scales = (torch.rand(k // group, n, generator=generator) * 0.01 + 0.001).half()
    g_idx = order or [i // group for i in range(k)]

    def word(nibbles):
        value = sum(int(nibble) * 16**i for i, nibble in enumerate(nibbles))
        return value - 2**32 if value >= 2**31 else value

    kept = zeros - 1 if v1 else zeros
    layer = {
        "qweight": torch.tensor([[word(q[j, i : i + 8]) for j in range(n)] for i in range(0, k, 8)], dtype=torch.int32),
        "qzeros": torch.tensor([[word(row[j : j + 8]) for j in range(0, n, 8)] for row in kept], dtype=torch.int32),
        "scales": scales, "g_idx": torch.tensor(g_idx, dtype=torch.int32),
    }
    wide = scales.float()
    want = torch.tensor([[float(wide[g_idx[i], j]) * int(q[j, i] - zeros[g_idx[i], j]) for i in range(k)]
                         for j in range(n)])
    return layer, want


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(16, 128, 32), (8, 128, 64), (8, 256, 128), (8, 256, 256)])
def test_gptq_values_are_kept_exactly(v1, n, k, group):
    layer, want = gptq_layer(n, k, group, v1=v1)
    imported = from_gptq(**layer, v1=v1)
    assert isinstance(imported, QuantizedWeight)
    assert torch.equal(dequantize(imported), want)


def test_gptq_in_activation_order_is_unpacked_exactly():
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3)) // 32
    layer, want = gptq_layer(8, 128, 32, v1=True, order=order.tolist())
    imported = from_gptq(**layer)
    assert isinstance(imported, torch.Tensor)
    assert torch.equal(imported, want)


def test_gptq_with_a_group_we_lack_is_unpacked_exactly():
    layer, want = gptq_layer(8, 64, 16, v1=True)
    assert torch.equal(from_gptq(**layer), want)


def test_gptq_tensors_that_do_not_fit_are_refused():
    layer, _ = gptq_layer(16, 64, 32, v1=True)
    with pytest.raises(CheckpointError, match="4-bit GPTQ"):
        from_gptq(layer["qweight"], layer["qzeros"], layer["scales"][:, :8])
    with pytest.raises(CheckpointError, match="g_idx"):
        from_gptq(**layer | {"g_idx": layer["g_idx"] + 1})


def write_gptq(directory, about):
    """The kit's checkpoint with the matrices of the backbone in GPTQ form, one of them in activation order."""
    directory.mkdir()
    tensors, want = load_file(KIT / "checkpoint" / "lm" / "model.safetensors"), {}
    for name in [n for n in tensors if n.startswith("model.layers.") and n.endswith("proj.weight")]:
        n, k = tensors.pop(name).shape
        order = [i % (k // 32) for i in range(k)] if name == "model.layers.1.mlp.down_proj.weight" else None
        layer, want[name] = gptq_layer(n, k, 32, v1=True, order=order)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in layer.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(kit_config("lm") | {"quantization_config": about}))
    shutil.copy(KIT / "checkpoint" / "lm" / "tokenizer.json", directory)
    return want


@pytest.mark.parametrize("about", [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
])
def test_gptq_checkpoint(tmp_path, about):
    want = write_gptq(tmp_path / "in", about)
    errors = import_gptq(tmp_path / "in", tmp_path / "out", {"lm_head": "int8"}, progress=False)
    assert list(errors) == ["lm_head.weight"]
    source = source_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert open_weights(tmp_path / "out").names() == stored_shapes(
        lm_shapes(LMConfig.from_dict(config)), stored_formats(config, "")
    ).keys()
    for name, values in want.items():
        weight = source.weight(name.removesuffix(".weight"))
        unpacked = name == "model.layers.1.mlp.down_proj.weight"
        if unpacked:
            assert torch.equal(weight.blocks[0], values.bfloat16().float())
        else:
            assert torch.equal(dequantize(weight), values)


@pytest.mark.parametrize(("about", "match"), [
    ({}, "no GPTQ"), ({"quant_method": "awq", "bits": 4}, "no GPTQ"), ({"quant_method": "gptq", "bits": 8}, "8-bit"),
    ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"}, "no GPTQ"),
])
def test_other_quantized_checkpoints_are_refused(tmp_path, about, match):
    write_gptq(tmp_path / "in", about)
    with pytest.raises(CheckpointError, match=match):
        import_gptq(tmp_path / "in", tmp_path / "out", progress=False)
