"""The kits' language models at widths that the CUDA kernels take: multiples of 128.

Every value of the residual stream, every head and every unit of the feed-forward layers is there
several times, and what reads one of n copies has a weight of an n-th: powers of two, so each weight
is the kit's but for its exponent. In float32 the model says what the kit says.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from helpers import KIT, KIT_PAIR
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimo_fast.checkpoint.files import open_weights, write_checkpoint
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig, read_json

ASR = KIT / "asr" / "lm"
LM = KIT_PAIR[0]

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}

WIDTHS: dict[str, dict[str, int]] = {
    "asr": {
        **HEADS,
        "hidden_size": 384,
        "intermediate_size": 128,
        "local_dim": 128,
        "input_local_dim": 128,
        "local_attn_heads": 16,
        "local_ffn_dim": 128,
    },
    "adapters": {
        **HEADS,
        "hidden_size": 128,
        "intermediate_size": 384,
        "local_dim": 256,
        "input_local_dim": 384,
        "local_attn_heads": 32,
        "local_ffn_dim": 128,
    },
    # The patch encoder's attention and gates have 192 columns, which the CUDA kernels refuse.
    "adapters, narrow": {
        **HEADS,
        "hidden_size": 128,
        "intermediate_size": 384,
        "local_dim": 128,
        "input_local_dim": 192,
        "local_attn_heads": 16,
        "local_ffn_dim": 128,
    },
}

TABLES = ("model.embed_tokens.", "speech_embeddings.")
"""Their columns are written to the residual stream, not read from it."""

GROUPED = "speech_group_downcast.weight"
"""Reads the frames of a group, one after the other."""


class Widening:
    """Widens tensors of one language model, by their names in its checkpoint.

    Args:
        source: its folder.
        widths: values of config.json, multiples of the old ones except of `intermediate_size`.
    """

    def __init__(self, source: Path, widths: Mapping[str, int]) -> None:
        self.source, self.raw = source, read_json(source / "config.json") | widths
        self.old, self.new = (
            LMConfig.from_dict(read_json(source / "config.json")),
            LMConfig.from_dict(self.raw),
        )
        self.narrow, self.wide = lm_shapes(self.old), lm_shapes(self.new)

    def places(self, name: str, axis: int) -> Tensor:
        """Which value of a tensor each one of the widened tensor is, along an axis."""
        new, old = self.wide[name][axis], self.narrow[name][axis]
        if name == GROUPED and axis == 1:
            frames = self.old.group_size
            each = torch.arange(new // frames) % (old // frames)
            return (torch.arange(frames)[:, None] * (old // frames) + each).flatten()
        return torch.arange(new) % old

    def shares(self, name: str) -> Tensor:
        """What each column of a widened matrix has of the value that it is a copy of."""
        places = self.places(name, 1)
        return 1 / torch.bincount(places)[places]

    def columns(self, name: str, matrix: Tensor) -> Tensor:
        """[R, K] -> [R, new K]."""
        wide = matrix[:, self.places(name, 1)]
        return wide if name.startswith(TABLES) else wide * self.shares(name).to(wide.dtype)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        wide = tensor[self.places(name, 0)]
        return (self.columns(name, wide) if wide.ndim == 2 else wide).contiguous()

    def write_lm(self, target: Path) -> Path:
        """The widened language model with its tokenizer."""
        weights = open_weights(self.source)
        options = {"dtype": torch.float32, "config": self.raw}
        write_checkpoint(target, self.wide, lambda name: self(name, weights.get(name)), **options)
        for path in self.source.glob("*token*"):
            shutil.copyfile(path, target / path.name)
        return target

    def write_adapter(self, source: Path, target: Path) -> Path:
        """An adapter of the language model, as PEFT writes it, for the widened one."""
        target.mkdir(parents=True)
        shutil.copyfile(source / "adapter_config.json", target / "adapter_config.json")
        tensors = load_file(source / "adapter_model.safetensors")
        widened = {name: self._of_adapter(name, each) for name, each in tensors.items()}
        save_file(widened, target / "adapter_model.safetensors")
        return target

    def _of_adapter(self, full_name: str, tensor: Tensor) -> Tensor:
        name = full_name.removeprefix("base_model.model.").replace(".base_layer", "")
        module, _, part = name.partition(".lora_")
        weight = f"{module}.weight"
        if not part:
            return self(name, tensor)
        if part == "A.weight":
            wide = self.columns(weight, tensor)
        elif part == "B.weight":
            wide = tensor[self.places(weight, 0)]
        elif part == "embedding_A":
            wide = tensor
        elif part == "embedding_B":
            wide = tensor[self.places(weight, 1)]
        else:
            assert part == "magnitude_vector"
            # A row of n copies of an n-th each has the norm over the root of n.
            (share,) = self.shares(weight).unique().tolist()
            wide = tensor[self.places(weight, 0)] * share**0.5
        return wide.contiguous()
