"""Makes the checkpoints beside this file again, each with the tool that writes its form:

    pip install torch==2.13.0 safetensors compressed-tensors==0.20.1 auto-round==0.16.1 gguf==0.19.0
    pip install transformers==5.24.0
    PYTHONPATH=. python tests/golden/formats/make.py

GPTQModel 7.7.0 has to be on PYTHONPATH too, unpacked from its sdist, of which nothing is built,
with what it imports. With names of folders only those are made. README.md says what they hold.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig

HERE = Path(__file__).parent
CONFIG = {
    "architectures": ["MiMoAudioForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "vocab_size": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rope_theta": 640000,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "local_dim": 32,
    "local_layers": 1,
    "local_attn_heads": 1,
    "local_ffn_dim": 32,
    "input_local_layers": 1,
    "input_local_dim": 32,
    "input_full_attention": True,
    "speech_vocab_size": "32-32",
    "speech_zeroemb_idx": "31-31",
    "delay_pattern": "0-1",
    "group_size": 2,
    "audio_channels": 2,
}
SHAPES = lm_shapes(LMConfig.from_dict(CONFIG))
EMBEDDINGS = ("model.embed_tokens.", "speech_embeddings.")


def base() -> dict[str, Tensor]:
    """The dense checkpoint that all others are made from."""
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return values * 0.1 + (0 if name.endswith("bias") else 1)
        return values / shape[1] ** 0.5

    return {name: draw(name, shape).bfloat16() for name, shape in SHAPES.items()}


class Weight(nn.Module):
    """What norms are here."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.bfloat16))


def model() -> nn.Module:
    """The base as modules of upstream's names."""
    root = nn.Module()
    for name, shape in SHAPES.items():
        path, _, field = name.rpartition(".")
        if field == "bias":
            continue
        parent = root
        *parts, last = path.split(".")
        for part in parts:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        if len(shape) == 1:
            module: nn.Module = Weight(shape[0])
        elif name.startswith(EMBEDDINGS):
            module = nn.Embedding(*shape, dtype=torch.bfloat16)
        else:
            module = nn.Linear(*shape[::-1], bias=f"{path}.bias" in SHAPES, dtype=torch.bfloat16)
        parent.add_module(last, module)
    root.load_state_dict(base())
    return root.eval().requires_grad_(False)


def write(form: str, tensors: dict[str, Tensor], about: dict, values: dict[str, Tensor]) -> None:
    folder = HERE / form
    folder.mkdir()
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(
        {name: narrow(value) for name, value in values.items()}, folder / "values.safetensors"
    )
    config = CONFIG | ({"quantization_config": about} if about else {})
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")


def narrow(values: Tensor) -> Tensor:
    """In half the bytes where that loses nothing."""
    values = values.detach().contiguous()
    half = values.bfloat16() if torch.equal(values.bfloat16(), values) else values.half()
    return half if torch.equal(half.float(), values.float()) else values


def linears(root: nn.Module) -> dict[str, nn.Linear]:
    return {name: each for name, each in root.named_modules() if isinstance(each, nn.Linear)}


# AutoRound, without tuning: scales of the nearest rounding, packed and described by its export.


def autoround(form: str, *, sym: bool, group: int, export: str, special: dict[str, dict]) -> None:
    from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym
    from auto_round.export.export_to_autogptq.export import save_quantized_as_autogptq
    from auto_round.export.export_to_autoround.export import save_quantized_as_autoround
    from auto_round.schemes import QuantizationScheme

    root = model()
    root.config = SimpleNamespace()
    scheme = {"bits": 4, "group_size": group, "sym": sym, "data_type": "int", "act_bits": 16}
    layers = {}
    for name, layer in linears(root).items():
        own = next((each for part, each in special.items() if part in name), {})
        about = vars(QuantizationScheme(**(scheme | own))) | {"in_blocks": ".layers." in name}
        layers[name] = about
        for key in ("bits", "group_size", "sym", "act_bits", "data_type"):
            setattr(layer, key, about[key])
        if about["bits"] > 8:
            continue
        quantize = quant_tensor_sym if about["sym"] else quant_tensor_asym
        _, scale, zero = quantize(layer.weight, bits=about["bits"], group_size=about["group_size"])
        layer.scale = scale.view(len(layer.weight), -1)
        layer.zp = zero.view(len(layer.weight), -1) if isinstance(zero, Tensor) else zero
    # The forms that it writes for a whole model are the backbone's and the speech parts' alike.
    blocks = ["model.layers", "local_transformer.layers", "input_local_transformer.layers"]
    described = vars(QuantizationScheme(**scheme)) | {"regex_config": {}, "iters": 0}
    options = {"output_dir": None, "model": root, "layer_config": layers, "device": "cpu"}
    if export == "auto_gptq":
        described["quant_block_list"] = [[f"{block}.0" for block in blocks]]
        described["block_name_to_quantize"] = blocks
        save_quantized_as_autogptq(**options, serialization_dict=described)
        # With a folder to write into it would add these itself.
        described |= {"quant_method": "gptq", "desc_act": False, "provider": "auto-round"}
    else:
        described["to_quant_block_names"] = blocks
        save_quantized_as_autoround(**options, serialization_dict=described, backend=export)
    described = {key: value for key, value in described.items() if value is not None}
    tensors, values = {**root.state_dict()}, {}
    for name, layer in root.named_modules():
        if hasattr(layer, "qweight"):
            # Its own product with a g_idx takes square matrices alone; these are in order.
            layer._buffers.pop("g_idx", None)
            layer.bias = None
            values[f"{name}.weight"] = layer(torch.eye(layer.infeatures, dtype=torch.float32)).T
    write(form, tensors, described, values)


def gptqmodel(form: str, *, v2: bool, group: int) -> None:
    """By GPTQModel's own layers; groups in activation order in one, and a zero of 0 in another."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    root, tensors, values = model(), dict(base()), {}
    about = QuantizeConfig(bits=4, group_size=group, sym=False, desc_act=True)
    for name, layer in linears(root).items():
        if name.startswith(("lm_head", "local_transformer_lm_heads")):
            continue
        rows, columns = layer.weight.shape
        if name.endswith("v_proj"):
            layer.weight.data[:, :group] = layer.weight.data[:, :group].abs()
        groups = columns // group
        order = torch.arange(columns) // group
        if name.endswith("down_proj"):
            order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
        for each in range(groups):
            part = layer.weight[:, order == each].float()
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, each] = ((high - low) / 15).half().float()
            zeros[:, each] = (-low / scales[:, each]).round()
        packed = TorchLinear(
            bits=4, group_size=group, sym=False, desc_act=True, in_features=columns,
            out_features=rows, bias=layer.bias is not None, format=FORMAT.GPTQ_V2,
        )  # fmt: skip
        packed.pack_original(layer, scales, zeros, order.int())
        packed.post_init()
        values[f"{name}.weight"] = packed.dequantize_weight().T.contiguous()
        if not v2:
            packed.qzero_format(format=2)
            convert_gptq_v2_to_v1_format_module(packed, about)
        del tensors[f"{name}.weight"]
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}.{part}"] = getattr(packed, part).clone()
    described = {
        "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True, "sym": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq", "lm_head": False, "pack_dtype": "int32",
        "dynamic": {"-:.*lm_head.*": {}}, "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }  # fmt: skip
    write(form, tensors, described, values)


# compressed-tensors: scales by its own rule, compressed and described by its ModelCompressor.


def compressed(form: str, groups: dict[str, dict], ignore: list[str]) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    root = model()
    config = QuantizationConfig(config_groups=groups, ignore=ignore, quantization_status="frozen")
    apply_quantization_config(root, config)
    for _, module in root.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        how, weight = scheme.weights, module.weight.detach().float()
        rows, columns = weight.shape
        if how.strategy == "group":
            parts = weight.view(rows, -1, how.group_size)
            low, high = parts.amin(-1), parts.amax(-1)
        elif how.strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        elif how.strategy == "block":
            height, width = how.block_structure
            parts = weight.view(rows // height, height, columns // width, width)
            low, high = parts.amin((1, 3)), parts.amax((1, 3))
        else:
            low, high = weight.amin().view(1), weight.amax().view(1)
        scale, zero = calculate_qparams(low, high, how)
        module.weight_scale.data = scale.to(module.weight_scale.dtype).view_as(module.weight_scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype).view_as(
                module.weight_zero_point
            )
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(root)
    compressor.compress_model(root)
    tensors = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    folder = HERE / "described"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    compressor.update_config(str(folder))
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    shutil.rmtree(folder)
    compressor.decompress_model(root)
    packed = {n for n, m in root.named_modules() if getattr(m, "quantization_scheme", None)}
    values = {f"{name}.weight": root.get_submodule(name).weight for name in packed}
    write(form, tensors, about, values)


def activation_order(form: str) -> None:
    """By the functions of compressed-tensors 0.10.2, the last to write weight_g_idx."""
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    how = QuantizationArgs(num_bits=4, group_size=32, symmetric=True, actorder="group")
    tensors, values = dict(base()), {}
    for name in (f"model.layers.0.mlp.{each}_proj" for each in ("gate", "up", "down")):
        weight = tensors.pop(f"{name}.weight")
        order = torch.arange(64, dtype=torch.int32) // 32
        order = order[torch.randperm(64, generator=torch.Generator().manual_seed(2))]
        scale = torch.stack([weight[:, order == each].abs().amax(1) / 7.5 for each in (0, 1)], 1)
        options = {"scale": scale, "zero_point": torch.zeros_like(scale, dtype=torch.int8)}
        q = quantize(weight, **options, args=how, g_idx=order, dtype=torch.int8)
        packed = pack_to_int32(q, 4)
        values[f"{name}.weight"] = dequantize(
            unpack_from_int32(packed, 4, weight.shape), **options, args=how, g_idx=order
        )
        tensors |= {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(weight.shape),
            f"{name}.weight_g_idx": order,
        }
    weights = json.loads(how.model_dump_json())
    about = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["re:.*mlp.*"], "weights": weights}},
        "quantization_status": "compressed",
    }  # fmt: skip
    write(form, tensors, about, values)


def fine_grained_fp8(form: str) -> None:
    """By transformers' own operations, in blocks of 32 x 32 rather than 128 x 128."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=(32, 32), modules_to_not_convert=["lm_head"])
    owner = SimpleNamespace(quantization_config=config)
    tensors, values = dict(base()), {}
    for name in [name for name in linears(model()) if name != "lm_head"]:
        weight = tensors.pop(f"{name}.weight")
        made = Fp8Quantize(owner).convert({f"{name}.weight": weight})
        tensors |= made
        scale = made[f"{name}.weight_scale_inv"]
        values[f"{name}.weight"] = Fp8Dequantize(owner)._dequantize_one(
            made[f"{name}.weight"], scale, torch.bfloat16
        )
    write(form, tensors, config.to_dict(), values)


# GGUF: by llama.cpp's own Python package.

OURS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = {
    "token_embd": "Q8_0",
    "output": "BF16",
    "attn_q": "Q4_0",
    "attn_k": "Q4_0",
    "attn_v": "Q4_0",
    "attn_output": "Q5_0",
    "ffn_gate": "Q4_1",
    "ffn_up": "Q5_1",
    "ffn_down": "F16",
}


def backbone(form: str) -> None:
    folder = HERE / form
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "backbone.gguf", "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(8192)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(640000)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "bc"])
    writer.add_token_scores([0.0, 1.0])
    values = {}
    for name, tensor in base().items():
        if not name.startswith(("model.", "lm_head.")):
            continue
        module, _, field = name.rpartition(".")
        layer = "blk.0." if module.startswith("model.layers.0.") else ""
        theirs = OURS[module.removeprefix("model.layers.0.")]
        kind = KINDS[theirs] if field == "weight" and theirs in KINDS else "F32"
        type_ = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(tensor.float().numpy(), type_)
        writer.add_tensor(f"{layer}{theirs}.{field}", data, raw_dtype=type_)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, type_).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = {name: narrow(value.view(SHAPES[name])) for name, value in values.items()}
    save_file(values, folder / "values.safetensors")


def k_quants(form: str) -> None:
    """Random blocks, which the package can unpack and not pack."""
    folder = HERE / form
    folder.mkdir()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "blocks.gguf", "qwen2")
    values = {}
    for kind, halves in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.items():
        type_ = gguf.GGMLQuantizationType[kind]
        size = gguf.GGML_QUANT_SIZES[type_][1]
        data = rng.integers(0, 256, (2, 2 * size), dtype=np.uint8)
        blocks = data.reshape(4, size)
        for start in halves:
            scales = rng.uniform(0.001, 0.1, 4).astype(np.float16)
            blocks[:, start : start + 2] = scales[:, None].view(np.uint8)
        writer.add_tensor(kind, data, raw_dtype=type_)
        values[kind] = torch.from_numpy(gguf.quants.dequantize(data, type_).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(values, folder / "values.safetensors")


def main() -> None:
    import sys

    chosen = sys.argv[1:]
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    speech = r"re:(local_transformer|input_local_transformer)\..*"
    forms = {
        "base": lambda form: write(
            form, base(), {}, {"model.norm.weight": base()["model.norm.weight"]}
        ),
        "autoround": lambda form: autoround(
            form,
            sym=True,
            group=32,
            export="auto_round",
            special={
                "lm_head": {"bits": 16},
                "local_transformer.layers": {"bits": 8},
                "mlp.down_proj": {"bits": 3},
                "self_attn.o_proj": {"bits": 16},
            },
        ),
        "autoround-asym": lambda form: autoround(
            form,
            sym=False,
            group=64,
            export="auto_round",
            special={
                "downcast": {"group_size": 32, "bits": 8},
                "v_proj": {"bits": 2, "group_size": 32},
                "lm_heads": {"bits": 5, "group_size": 32},
                "local_transformer": {"group_size": 32},
                "o_proj": {"group_size": 32},
            },
        ),
        "autoround-gptq": lambda form: autoround(
            form, sym=False, group=32, export="auto_gptq", special={"lm_head": {"bits": 16}}
        ),
        "gptqmodel": lambda form: gptqmodel(form, v2=False, group=32),
        "gptqmodel-v2": lambda form: gptqmodel(form, v2=True, group=16),
        "ct-w4a16": lambda form: compressed(
            form,
            {
                "a": {
                    "targets": [r"re:model\.layers\..*proj"],
                    "weights": int4 | {"symmetric": True},
                },
                "b": {"targets": [speech], "weights": int4 | {"symmetric": False}},
                "c": {
                    "targets": ["Embedding", r"re:.*downcast"],
                    "weights": int8 | {"strategy": "channel"},
                    "format": "pack-quantized",
                },
            },
            ["re:.*lm_head.*"],
        ),
        "ct-int8": lambda form: compressed(
            form,
            {
                "a": {
                    "targets": [r"re:model\.layers\..*proj"],
                    "weights": int8 | {"strategy": "channel"},
                    "input_activations": int8 | {"strategy": "token", "dynamic": True},
                },
                "b": {
                    "targets": [speech],
                    "weights": int8 | {"strategy": "tensor", "symmetric": False},
                    "input_activations": int8 | {"strategy": "token", "dynamic": True},
                },
            },
            ["re:.*lm_head.*", "re:.*downcast"],
        ),
        "ct-fp8": lambda form: compressed(
            form,
            {
                "a": {
                    "targets": [r"re:model\.layers\..*proj"],
                    "weights": fp8 | {"strategy": "channel"},
                    "input_activations": fp8 | {"strategy": "token", "dynamic": True},
                },
                "b": {
                    "targets": [r"re:local_transformer\..*"],
                    "weights": fp8 | {"strategy": "tensor"},
                    "input_activations": fp8 | {"strategy": "tensor", "dynamic": False},
                },
                "c": {
                    "targets": [r"re:input_local_transformer\..*", r"re:.*downcast"],
                    "weights": fp8 | {"strategy": "block", "block_structure": [32, 16]},
                    "input_activations": fp8
                    | {"strategy": "group", "group_size": 16, "dynamic": True},
                },
            },
            ["re:.*lm_head.*"],
        ),
        "fp8": fine_grained_fp8,
        "gguf": backbone,
        "gguf-k": k_quants,
    }
    if chosen == ["ct-activation-order"]:
        forms["ct-activation-order"] = activation_order
    for form in chosen or forms:
        shutil.rmtree(HERE / form, ignore_errors=True)
        forms[form](form)


if __name__ == "__main__":
    main()
