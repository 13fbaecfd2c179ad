"""What the backbone reads at each position: a word's embedding or an encoded patch, chosen on the device."""

import torch
from torch import Tensor


def input_embed(text: Tensor, patches: Tensor, table: Tensor, empty_id: int) -> Tensor:
    return torch.where((text == empty_id)[:, None], patches, table[text])
