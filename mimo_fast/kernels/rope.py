"""Rotary position embedding, half-split ("rotate half") form, as in Qwen2.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  angle = position / theta^(2 i / Dh)

where x1 and x2 are the halves of a head. Angles, cosines and the rotation are float32 whatever the activations are.
"""

import torch
from torch import Tensor


def rope_table(head_dim: int, theta: float, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """cos and sin of every position: [2, positions, head_dim / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    angles = torch.outer(torch.arange(positions, device=device).float(), 1.0 / theta**exponents)
    return torch.stack((angles.cos(), angles.sin()))


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates x [..., T, H, Dh] by table [2, ..., T, Dh / 2], the rows of `rope_table` for its T positions."""
    cos, sin = table.unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
