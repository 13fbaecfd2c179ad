"""Adapters as PEFT writes them, of random values, for models of any dimensions."""

import json
from pathlib import Path
from typing import Any

import torch
from helpers import seeded
from safetensors.torch import save_file
from torch import Tensor

from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig


def adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(described))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def some_adapters(folder: Path, config: LMConfig, seed: int = 0) -> dict[str, Path]:
    """Adapters of a model by name; between them they change every matrix in every way."""
    rng, shapes = seeded(seed), lm_shapes(config)
    matrices = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=rng) * scale

    def beside(module: str, rank: int) -> dict[str, Tensor]:
        rows, columns = shapes[f"{module}.weight"]
        a, b = draw(rank, columns, scale=columns**-0.5), draw(rows, rank, scale=rank**-0.5)
        return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}

    def like(name: str, mean: float = 0.0) -> Tensor:
        shape = shapes[name]
        return draw(*shape, scale=0.1 if len(shape) == 1 else shape[1] ** -0.5) + mean

    def of(rank: int, *ends: str) -> dict[str, Tensor]:
        chosen = [module for module in matrices if module.endswith(ends)]
        return {name: part for module in chosen for name, part in beside(module, rank).items()}

    linear = of(3, *(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")))
    scaled = of(8, "q_proj", "v_proj", "down_proj", "gate_proj", "downcast", "_to_local")
    for name in [*scaled]:
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            rows = shapes[f"{module}.weight"][0]
            scaled[f"{module}.lora_magnitude_vector"] = 0.5 + torch.rand(rows, generator=rng)
    biases = [name for name in shapes if name.endswith("q_proj.bias")]
    scaled |= {name: like(name) for name in biases}
    tables = [module for module in matrices if module.startswith("speech_embeddings.")]
    heads = of(2, "lm_head", "k_proj", *(f"lm_heads.{c}" for c in range(config.channels)))
    for module in ["model.embed_tokens"] * (not config.tie_embeddings) + tables:
        rows, columns = shapes[f"{module}.weight"]
        heads[f"{module}.lora_embedding_A"] = draw(2, rows)
        heads[f"{module}.lora_embedding_B"] = draw(columns, 2, scale=0.3)
    # Modules that were saved, in a matrix of which k has an adapter.
    heads |= {f"{m}.weight": like(f"{m}.weight") for m in matrices if m.endswith("v_proj")}
    heads["model.norm.weight"] = like("model.norm.weight", mean=1)
    return {
        "linear": adapter(folder / "linear", linear, r=3, lora_alpha=1),
        "scaled": adapter(folder / "scaled", scaled, r=8, use_dora=True, use_rslora=True),
        "heads": adapter(folder / "heads", heads, lora_alpha=1),
    }
