"""torch's attention, with what is not finite kept so."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`; NaN for a sequence whose queries or keys are not finite.

    On a CPU torch gives 0 where all scores of a query are NaN, as if it saw no key, and may give
    numbers where they are infinite. q [N, ..., Dh], k and v [N, ..., Dh]: N sequences.
    """
    out = F.scaled_dot_product_attention(q, k, v, **options)
    # A sum is cheap, and the host need not wait for it.
    if out.device.type == "cpu" and not bool((q.sum() + k.sum()).isfinite()):
        finite = [x.flatten(1).isfinite().all(1) for x in (q, k)]
        lost = ~(finite[0] & finite[1])
        out = out.masked_fill(lost.view(-1, *[1] * (out.ndim - 1)), torch.nan)
    return out
