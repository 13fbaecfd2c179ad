"""Import of a backbone from a GGUF file of llama.cpp; the speech parts come from a checkpoint.

llama.cpp knows Qwen2, which MiMo-Audio's backbone is, and none of its speech parts. A converted
Qwen2 keeps the order of rows (a converted Llama's q and k are permuted), so its tensors are
upstream's by other names. Q4_0, Q5_0 and Q8_0 are our int4 and int8 with groups of 32; the values
of the other types are unpacked. The facts are those of https://github.com/ggml-org/llama.cpp.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from mimo_fast.checkpoint.files import abridge
from mimo_fast.checkpoint.gguf import GGUF
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.config import LMConfig
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import shown
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.quantization.formats import PackedMatrices
from mimo_fast.quantization.integers import Integers, by_rows

ARCHITECTURE = "qwen2"

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name of a module, of a block where it is in one -> upstream's."""

BACKBONE = ("model.", "lm_head.")

UNPACKED_AT_ONCE = 2**16
"""Blocks that are unpacked at a time: bounds memory."""


def packed_matrices(file: GGUF, shapes: Shapes, config: LMConfig) -> PackedMatrices:
    """All tensors of the backbone, norms and biases too.

    Raises:
        CheckpointError: the file is of another model or lacks some of them.
    """
    _check_metadata(file, config)
    stored = {_upstream_name(name): name for name in file.tensors}
    layouts: dict[str, Integers] = {}

    def get(name: str) -> QuantizedWeight | Tensor:
        kind, blocks = file.tensors[stored[name]].type.name, file.blocks(stored[name])
        if name in layouts:
            layout, unpack = layouts[name], _INTEGERS[kind]
            return by_rows(
                len(blocks),
                layout.columns,
                lambda part: layout.converted(*unpack(blocks[part])),
            )
        return _unpacked(kind, blocks).view(shapes[name])

    found = PackedMatrices(get)
    backbone = {name: shape for name, shape in shapes.items() if name.startswith(BACKBONE)}
    if strange := [name for name in file.tensors if _upstream_name(name) not in backbone]:
        raise CheckpointError(
            f"{file.path} has tensors that the backbone lacks ({abridge(strange)}): use "
            "--speech-from with the checkpoint that this file was converted from"
        )
    for name, shape in backbone.items():
        if name not in stored or file.tensors[stored[name]].shape != shape:
            have = [*file.tensors[stored[name]].shape] if name in stored else "missing"
            raise CheckpointError(
                f"{file.path}: {name} is {have}, not {[*shape]}: use --speech-from with the "
                "checkpoint that this file was converted from"
            )
        kind = file.tensors[stored[name]].type.name
        if kind in _INTEGERS and len(shape) == 2:
            bits = 4 if kind == "Q4_0" else 5 if kind == "Q5_0" else 8
            layouts[name] = Integers(bits, shape[1], 32, zeros=False, middle=True, in_order=True)
            found.dtypes[f"{name}.scales"] = torch.float16
        found.add(name, shape, layouts[name].form if name in layouts else None, (name,))
    return found


def _check_metadata(file: GGUF, config: LMConfig) -> None:
    about, backbone = file.metadata, config.backbone
    if (found := about.get("general.architecture")) != ARCHITECTURE:
        raise CheckpointError(
            f"{file.path} is of architecture {shown(found)}, and MiMo-Audio's backbone is "
            f"{ARCHITECTURE}: give a file that was converted from a MiMo-Audio checkpoint"
        )
    wanted = {
        "block_count": backbone.layers,
        "attention.head_count": backbone.heads,
        "attention.head_count_kv": backbone.kv_heads,
        "rope.freq_base": backbone.rope_theta,
        "attention.layer_norm_rms_epsilon": backbone.norm_eps,
    }
    for key, value in wanted.items():
        have = about.get(f"{ARCHITECTURE}.{key}")
        # They are float32 there.
        if not isinstance(have, int | float) or abs(have - value) > 1e-6 * value:
            raise CheckpointError(
                f"{file.path} says that {key} is {shown(have)}, and the checkpoint of the speech "
                f"parts {value:g}: use the one that this file was converted from"
            )


def _upstream_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def _unpacked(kind: str, blocks: Tensor) -> Tensor:
    """Blocks [R, B, bytes] as float32, flattened."""
    unpack = _UNPACK[kind]
    parts = blocks.flatten(0, 1).split(UNPACKED_AT_ONCE)
    return torch.cat([unpack(part).flatten() for part in parts])


def _half(data: Tensor) -> Tensor:
    """Bytes [..., 2 n] as float32 [..., n], of float16."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """Bytes [..., n] -> int32 [..., 2 n]: all low halves, then all high ones."""
    return torch.cat((data & 15, data >> 4), dim=-1).int()


def _bits(data: Tensor) -> Tensor:
    """Bytes [..., n] -> int32 [..., 8 n], the lowest bits first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[..., None] >> shifts) & 1).flatten(-2).int()


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _nibbles(blocks[..., 2:]).flatten(1), _scales(blocks)


def _q5_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    q = _nibbles(blocks[..., 6:]) | (_bits(blocks[..., 2:6]) << 4)
    return q.flatten(1), _scales(blocks)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    q = blocks[..., 2:].contiguous().view(torch.int8).int() + 128
    return q.flatten(1), _scales(blocks)


def _scales(blocks: Tensor) -> Tensor:
    """The float16 that every block [R, B, bytes] begins with: [R, B]."""
    return blocks[..., :2].contiguous().view(torch.float16)[..., 0]


_INTEGERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
}
"""Blocks [R, B, bytes] -> offsets [R, K] and scales [R, B]."""


def _q4_1(blocks: Tensor) -> Tensor:
    scale, low = _half(blocks[:, :4]).split(1, dim=1)
    return scale * _nibbles(blocks[:, 4:]).float() + low


def _q5_1(blocks: Tensor) -> Tensor:
    scale, low = _half(blocks[:, :4]).split(1, dim=1)
    q = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return scale * q.float() + low


def _q4_k(blocks: Tensor) -> Tensor:
    scales, lows = _k_scales(blocks)
    return scales * _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32) - lows


def _q5_k(blocks: Tensor) -> Tensor:
    scales, lows = _k_scales(blocks)
    q = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    # Bit s of byte i is the fifth of value i in part s.
    high = _bits(blocks[:, 16:48]).view(-1, 32, 8).transpose(1, 2)
    return scales * (q | (high << 4)) - lows


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and lows [B, 8, 1] of Q4_K and Q5_K: float16 times integers of 6 bits each."""
    first, second, third = blocks[:, 4:16].int().split(4, dim=1)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    lows = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    of_scales, of_lows = _half(blocks[:, :4]).split(1, dim=1)
    return (of_scales * scales)[..., None], (of_lows * lows)[..., None]


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 2, 4, 32)
    pairs = blocks[:, 128:192].int().view(-1, 2, 1, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.int32, device=blocks.device)[:, None]
    q = (low | (((pairs >> shifts) & 3) << 4)) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (_half(blocks[:, 208:]) * scales)[..., None] * q.view(-1, 16, 16)


def _integers(kind: str) -> Callable[[Tensor], Tensor]:
    """Unpacks what could be packed in a matrix, of a tensor that is none."""
    middle = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}[kind]

    def unpack(blocks: Tensor) -> Tensor:
        q, scales = _INTEGERS[kind](blocks[:, None])
        return scales.float() * (q - middle).float()

    return unpack


_UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda blocks: blocks.contiguous().view(torch.float32),
    "F16": _half,
    "BF16": lambda blocks: blocks.contiguous().view(torch.bfloat16).float(),
    **{kind: _integers(kind) for kind in _INTEGERS},
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Blocks [B, bytes] -> float32 [B, values]."""
