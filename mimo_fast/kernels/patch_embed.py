"""Embedding of speech patches: per frame, the sum over channels of one table row a code, the empty code adding nothing.

    y[n, g] = sum_c table[offset_c + codes[n, c, g]]  where codes[n, c, g] != empty_c

All channels share one table, channel c owning rows offset_c ... offset_c + V_c - 1.
"""

from torch import Tensor


def patch_embed(codes: Tensor, table: Tensor, offsets: Tensor, empty: Tensor) -> Tensor:
    """codes [N, C, G], table [sum V_c, D], offsets and empty [C] -> [N, G, D]."""
    rows = table[codes + offsets[:, None]]
    return rows.masked_fill((codes == empty[:, None])[..., None], 0).sum(1)
