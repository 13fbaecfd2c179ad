"""Who computes an op: ours, plain torch, torch.compile, and what else there is for products with
stored weights.

    ours-gpu      the op's launcher on a CUDA device: a kernel of csrc/cuda where it was built and takes it, or Triton
    ours-cpu      the same launcher on a CPU: a kernel of csrc/ where it was built and takes the case, else plain torch
    eager         the op's reference in plain torch; quantized weights are unpacked for each call
    compile       torch.compile of that
    unpacked      our CPU product of quantized weights for many rows: unpacked some rows at a time, in float32
    linear        one F.linear with a joined dense weight (cuBLAS on a GPU), norm and epilogues in plain torch
    torch-int8, torch-int4, torch-int4-cuda    torch's products with packed weights, on the CPU and on CUDA
    bitsandbytes-int8, bitsandbytes-nf4        its matmul and matmul_4bit

Products round weights, and bitsandbytes' int8 the activations too, before they multiply: such a
provider is held to the exact result for what it multiplies, as the op's own formats are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Inputs, Outputs, Provider
from mimo_fast.kernels.dispatch import ENVIRONMENT, triton
from mimo_fast.kernels.matmul.cpu import pack_for_torch, packed_product, unpacked_product
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.kernels.matmul.quantized_weight import (
    QuantizedWeight,
    dequantize_to,
    torch_int4_order,
    unpack_words,
)
from mimo_fast.kernels.norm import rms_norm_ref
from mimo_fast.kernels.swiglu import swiglu_ref

Run = Callable[[Inputs], Outputs]
Product = Callable[[Tensor, Any], Tensor]
Missing = Callable[[torch.device], str | None]

INNER_K_TILES = 8
"""Of torch's int4 product on CUDA."""


def ours(run: Run) -> tuple[Provider, ...]:
    """The launcher of an op, by the name of the path that it takes."""
    return (
        Provider("ours-gpu", run, missing=needs_triton),
        Provider("ours-cpu", run, missing=needs_plain_path),
    )


def plain(reference: Run, *, ours_on_cpu: bool = True) -> tuple[Provider, ...]:
    """Plain torch and torch.compile of it. ours_on_cpu: whether that is what our op does on a
    CPU."""

    def missing(device: torch.device) -> str | None:
        return "is what ours-cpu runs" if device.type == "cpu" and ours_on_cpu else None

    return Provider("eager", reference, missing=missing), compiled(reference)


def compiled(reference: Run) -> Provider:
    def prepare(inputs: Inputs) -> dict[str, Any]:
        # Past eight shapes of one function dynamo would quietly run it uncompiled.
        torch._dynamo.reset()
        return {"run": torch.compile(reference, dynamic=False), "inputs": inputs}

    return Provider(
        "compile", lambda prepared: prepared["run"](prepared["inputs"]), prepare, needs_compiler
    )


def needs_triton(device: torch.device) -> str | None:
    if triton is None:
        return "triton is not installed"
    if os.environ.get(ENVIRONMENT) == "torch":
        return f"{ENVIRONMENT}=torch turns it off"
    return _cuda_only(device)


def needs_plain_path(device: torch.device) -> str | None:
    return (
        f"{ENVIRONMENT}=triton turns it off"
        if os.environ.get(ENVIRONMENT) == "triton"
        else _cpu_only(device)
    )


def needs_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if triton is not None else "triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return "no C++ compiler is installed"
    return None


def needs_package(name: str) -> Missing:
    return lambda device: None if find_spec(name) is not None else f"{name} is not installed"


def product_providers(run: Run, form: str) -> tuple[Provider, ...]:
    """For a product with a weight of this format and what is around it (see `around`)."""
    own = (*ours(run), *plain(unpacked, ours_on_cpu=form == "dense"))
    if form == "dense":
        return (*own, Provider("linear", lambda i: around(i, F.linear), join))
    if form in ("int8", "int4"):
        own = (*own, Provider("unpacked", lambda i: around(i, unpacked_product), missing=_cpu_only))
    if form == "int8":
        return (
            *own,
            Provider("torch-int8", _torch_packed, _pack_torch, _cpu_only),
            Provider(
                "bitsandbytes-int8",
                _bitsandbytes_int8,
                _pack_bitsandbytes_int8,
                needs_package("bitsandbytes"),
                _exact_bitsandbytes_int8,
            ),
        )
    if form == "int4":
        on_cuda = Provider(
            "torch-int4-cuda", _torch_int4_cuda, _pack_int4_cuda, _cuda_only, _exact_int4_cuda
        )
        return (*own, Provider("torch-int4", _torch_packed, _pack_torch, _lacks_int4), on_cuda)
    return (
        *own,
        Provider(
            "bitsandbytes-nf4",
            _bitsandbytes_nf4,
            _pack_bitsandbytes_nf4,
            needs_package("bitsandbytes"),
            _exact_bitsandbytes_nf4,
        ),
    )


def around(inputs: Inputs, product: Product) -> Outputs:
    """The op in plain torch but for its product x W^T: norm, bias, SwiGLU and residual, as the
    inputs have them."""
    x, norm, residual = inputs["x"], inputs.get("norm"), inputs.get("residual")
    y = product(x if norm is None else rms_norm_ref(x, norm.weight, norm.eps), inputs["weight"])
    bias = inputs.get("bias")
    y = y if bias is None else y + bias
    y = swiglu_ref(y) if inputs.get("swiglu") else y
    return (y if residual is None else residual + y,)


def unpacked(inputs: Inputs) -> Outputs:
    """The reference of a product: dense, row block by row block, in the dtype of x."""
    weight, dtype = inputs["weight"], inputs["x"].dtype
    if isinstance(weight, QuantizedWeight):
        weight = Weight.stack([dequantize_to(weight, dtype)], [weight.bias])

    def product(x: Tensor, weight: Weight) -> Tensor:
        pairs = zip(weight.blocks, weight.biases, strict=True)
        parts = [
            F.linear(x, block.to(dtype), None if bias is None else bias.to(dtype))
            for block, bias in pairs
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    return around({**inputs, "weight": weight}, product)


def join(inputs: Inputs) -> Inputs:
    """The weight as one dense matrix, its biases apart."""
    weight, dtype = inputs["weight"], inputs["x"].dtype
    if isinstance(weight, QuantizedWeight):
        return {**inputs, "weight": dequantize_to(weight, dtype), "bias": weight.bias}
    bias = None if weight.biases[0] is None else torch.cat(weight.biases)
    return {**inputs, "weight": torch.cat(weight.blocks), "bias": bias}


def _holding(inputs: Inputs, dense: Tensor) -> Inputs:
    """The case with a weight of these values, in float32."""
    bias = inputs["weight"].bias
    return {
        **inputs,
        "weight": Weight.stack([dense.float()], [None if bias is None else bias.float()]),
    }


def _cpu_only(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "needs the CPU"


def _lacks_int4(device: torch.device) -> str | None:
    if device.type == "cpu" and torch_int4_order() is None:
        return "this torch has no packed int4 form for this CPU"
    return _cpu_only(device)


def _cuda_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def _pack_torch(inputs: Inputs) -> dict[str, Any]:
    return {**inputs, "weight": pack_for_torch(inputs["weight"])}


def _torch_packed(inputs: Inputs) -> Outputs:
    return around(inputs, lambda x, w: packed_product(x, w, w.torch_scales))


def _pack_int4_cuda(inputs: Inputs) -> dict[str, Any]:
    weight = inputs["weight"]
    q = unpack_words(weight.words, 4, weight.group)
    packed = torch.ops.aten._convert_weight_to_int4pack(
        (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), INNER_K_TILES
    )
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    # It computes scale (q - 8) + offset.
    offsets = -(weight.scales.float() * zeros.float())
    pairs = (
        torch.stack([weight.scales.bfloat16(), offsets.bfloat16()], dim=-1)
        .transpose(0, 1)
        .contiguous()
    )
    return {**inputs, "weight": (packed, weight.group, pairs), "bias": weight.bias}


def _torch_int4_cuda(inputs: Inputs) -> Outputs:
    return around(inputs, lambda x, w: torch.ops.aten._weight_int4pack_mm(x, *w))


def _exact_int4_cuda(inputs: Inputs, prepared: dict[str, Any]) -> Inputs:
    weight = inputs["weight"]
    q = unpack_words(weight.words, 4, weight.group).float().unflatten(1, (-1, weight.group)) - 8
    scales, offsets = prepared["weight"][2].float().transpose(0, 1)[..., None].unbind(2)
    return _holding(inputs, (q * scales + offsets).flatten(1))


def _pack_bitsandbytes_nf4(inputs: Inputs) -> dict[str, Any]:
    from bitsandbytes import functional

    weight = inputs["weight"]
    dense = dequantize_to(weight, inputs["x"].dtype)
    return {
        **inputs,
        "weight": functional.quantize_4bit(dense, blocksize=64, quant_type="nf4"),
        "bias": weight.bias,
    }


def _bitsandbytes_nf4(inputs: Inputs) -> Outputs:
    import bitsandbytes

    return around(inputs, lambda x, w: bitsandbytes.matmul_4bit(x, w[0].t(), quant_state=w[1]))


def _exact_bitsandbytes_nf4(inputs: Inputs, prepared: dict[str, Any]) -> Inputs:
    from bitsandbytes import functional

    packed, state = prepared["weight"]
    return _holding(inputs, functional.dequantize_4bit(packed, state))


def _pack_bitsandbytes_int8(inputs: Inputs) -> dict[str, Any]:
    import bitsandbytes

    # It says at every call that it converts to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    weight, state = inputs["weight"], bitsandbytes.MatmulLtState()
    dense = dequantize_to(weight, torch.float16)
    state.CB, state.SCB, _ = bitsandbytes.functional.int8_vectorwise_quant(dense)
    # As its Linear8bitLt sets it for inference.
    state.has_fp16_weights, state.is_training, state.threshold = False, False, 0.0
    return {**inputs, "weight": state, "bias": weight.bias}


def _bitsandbytes_int8(inputs: Inputs) -> Outputs:
    import bitsandbytes

    return around(inputs, lambda x, state: bitsandbytes.matmul(x, state.CB, state=state))


def _exact_bitsandbytes_int8(inputs: Inputs, prepared: dict[str, Any]) -> Inputs:
    from bitsandbytes import functional

    x, norm, state = inputs["x"], inputs.get("norm"), prepared["weight"]
    x = x if norm is None else rms_norm_ref(x, norm.weight, norm.eps)
    q, scales, _ = functional.int8_vectorwise_quant(x.half())
    held = _holding(inputs, state.CB.float() * (state.SCB[:, None] / 127))
    return {**held, "x": (q.float() * (scales[:, None] / 127)).to(x.dtype), "norm": None}
