"""Weight formats: names, errors, and the search for scales."""

import pytest
import torch
from helpers import FORMATS, error, gaussian, outliers, quantized, refuses
from torch.testing import assert_close

from mimo_fast.kernels.matmul.quantized_weight import dequantize
from mimo_fast.quantization import Format, QuantizationConfig, quantize, relative_error
from mimo_fast.quantization.search import NF4_LEVELS


def test_error_on_gaussian_weights():
    weight = gaussian(256, 4096)
    assert error(weight, "int4-g64") < 0.088 < error(weight, "nf4") < 0.092
    assert error(weight, "int4") < 0.095
    assert error(weight, "int4-sym-g64") < 0.092


@pytest.mark.parametrize("columns", [4096, 11008])
def test_error_of_int8_on_gaussian_weights(columns):
    weight = gaussian(256, columns)
    assert error(weight, "int8-g128") < 0.007
    assert error(weight, "int8") < 0.009


def test_error_on_weights_with_outliers():
    weight = outliers(256, 4096)
    assert error(weight, "int4-g64") < error(weight, "nf4")
    assert error(weight, "int8-g128") < 0.01


@pytest.mark.parametrize("make", [gaussian, outliers])
@pytest.mark.parametrize(("name", "steps"), [("int4-sym", 7), ("int8", 127), ("int8-g128", 127)])
def test_search_beats_plain_absmax(make, name, steps):
    weight = make(64, 1024)
    group = Format.parse(name).group or weight.shape[1]
    values = weight.view(-1, group)
    scale = values.abs().amax(1, keepdim=True) / steps
    plain = ((values / scale).round() * scale - values).norm() / values.norm()
    assert error(weight, name) < plain * (1 if steps == 127 else 0.97)


def test_nf4_values_are_nearest_levels_times_absmax():
    weight = outliers(3, 192)
    groups = weight.view(-1, 64)
    scale = groups.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    nearest = (groups[..., None] / scale[..., None] - levels).abs().argmin(-1)
    assert_close(dequantize(quantized(weight, "nf4")).view(-1, 64), levels[nearest] * scale)


@pytest.mark.parametrize("name", FORMATS)
def test_quantizing_again_changes_nothing(name):
    """Values on the grid stay on it, up to the float32 and bfloat16 rounding of new scales."""
    once = dequantize(quantized(outliers(5, 256), name))
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
    got = dequantize(quantized(weight, name))
    assert got.isfinite().all()
    assert_close(got, weight, rtol=0.005, atol=1e-30)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(bad):
    weight = gaussian(2, 32)
    weight[1, 3] = bad
    refuses("not finite", quantize, weight, Format.parse("int8"))


def test_input_is_left_alone_and_its_dtype_does_not_matter():
    weight = gaussian(4, 128).bfloat16()
    before = weight.clone()
    stored, wide = (quantized(w, "int4") for w in (weight, weight.float()))
    relative_error(weight.float(), wide)
    assert torch.equal(weight, before)
    assert torch.equal(stored.words, wide.words)


def test_relative_error_is_that_of_the_whole_matrix():
    weight = outliers(100, 4096)
    stored = quantized(weight, "int4")
    want = (dequantize(stored).double() - weight.double()).norm() / weight.double().norm()
    assert relative_error(weight, stored) == pytest.approx(float(want), rel=1e-4)
    assert relative_error(torch.zeros(2, 32), quantized(torch.zeros(2, 32), "int8")) == 0


PARSED = {"int4": Format("int4", 128, False), "int4-sym": Format("int4", 128)}
PARSED |= {"int4-sym-g64": Format("int4", 64), "int8": Format("int8", None)}
PARSED |= {"int8-g128": Format("int8", 128), "nf4": Format("nf4", 64)}


@pytest.mark.parametrize(("text", "want"), PARSED.items())
def test_format_names(text, want):
    assert Format.parse(text) == want
    assert Format.parse(str(want)) == want


@pytest.mark.parametrize("text", ["", "int3", "int4-g48", "nf4-sym", "int4-g64 "])
def test_unknown_formats_are_refused(text):
    refuses("no weight format", Format.parse, text)


@pytest.mark.parametrize(("columns", "group"), [(4096, 128), (192, 64), (96, 32), (320, 64)])
def test_groups_shrink_until_they_divide(columns, group):
    assert Format.parse("int4").fit(columns).group == group
    assert Format.parse("int8").fit(columns).group is None
    # Odd widths stay dense.
    assert Format.parse("int4").fit(columns + 16) is Format.parse("int8").fit(columns + 16) is None


def test_parts():
    chosen = QuantizationConfig.parse("int4")
    parts = {"backbone": "int4-g128", "patch_encoder": None, "codec": None}
    parts |= dict.fromkeys(("lm_head", "text_embeddings", "patch_decoder"), "int8")
    assert chosen.parts() == parts
    assert QuantizationConfig.parse(chosen.parts()) == chosen
    assert QuantizationConfig.parse("nf4").backbone == Format("nf4", 64)
    assert QuantizationConfig.parse("int8").text_embeddings is None
    assert QuantizationConfig.parse({"lm_head": "dense"}) == QuantizationConfig()
    assert chosen.format_of("model.layers.0.self_attn.q_proj.bias", (64,)) is None
    assert chosen.format_of("speech_embeddings.0.weight", (64, 64)) is None
    matrix = "local_transformer.layers.0.mlp.up_proj.weight"
    assert chosen.format_of(matrix, (64, 64)) == Format("int8", None)


@pytest.mark.parametrize("bad", ["int5", {"head": "int8"}, {"lm_head": "int9"}])
def test_unknown_quantizations_are_refused(bad):
    refuses("no ", QuantizationConfig.parse, bad)
