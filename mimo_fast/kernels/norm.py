"""RMSNorm and LayerNorm over the last dimension.

    rms_norm:   y = x / sqrt(mean(x^2) + eps) * weight
    layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Statistics and scaling are float32; one rounding to x.dtype at the end (RMSNorm rounds once before the weight as well,
as Qwen2 does).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in x.dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D] -> [..., D] in x.dtype."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
