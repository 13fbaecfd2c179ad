"""Adapters that PEFT saved, and their merge into a language model's weights as these are read.

A folder holds adapter_config.json and adapter_model.safetensors. For a matrix W [out, in] with A
[r, in] and B [out, r], as PEFT's own merge computes it:

    W' = W + s B A          s = alpha / r, or alpha / sqrt(r) with use_rslora
    W' = W + s (B A)^T      of an embedding W [V, D] with A [r, V] and B [D, r]
    W'[i] m[i] / |W'[i]|    DoRA: each row gets the norm that lora_magnitude_vector m [out] holds

Tensors of other names replace the model's: modules_to_save, biases, base layers. The names of the
tensors say which modules are meant; target_modules does not, which PEFT compresses to suffixes.

What is kept beside the weights instead, and how, `quantization/variants.py` says.

Sums are in float32 and on the CPU, and are rounded once to the dtype that W is stored in: a weight
that is merged while loading has the bits of the one that `mimo-fast merge` writes.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_fast.checkpoint.files import (
    DENSE,
    DTYPE_NAMES,
    LARGEST,
    Weights,
    is_finite,
    open_safetensors,
)
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.config import PathLike
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import cut, read_json, shown

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
PREFIX = "base_model.model."

READ = frozenset({"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}) | frozenset(
    {"use_rslora", "use_dora", "bias", "init_lora_weights"}
)
"""Options that are read here."""

WITHOUT_EFFECT = frozenset(
    # What the tensors' names say already.
    {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"}
    | {"layers_pattern", "ensure_weight_tying"}
    # What concerns training alone.
    | {"lora_dropout", "inference_mode", "task_type", "loftq_config", "eva_config"}
    | {"corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"}
    # Where it comes from.
    | {"base_model_name_or_path", "revision", "peft_version", "auto_mapping"}
)
"""Options that change nothing of what is merged. Any other must be absent, null, false or empty."""

BIASES = ("none", "all", "lora_only")

KEPT_AT_START = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights with which training began at the model's own weights."""


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter does to one tensor W of the model.

    Attributes:
        base: In place of W; None for W itself.
        a, b: Of the product that is added; None where nothing is.
        scale: Of the product.
        transposed: Whether the product is of an embedding.
        magnitude: Norms of the rows of the sum, [out]; None for those that it has.
    """

    base: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    transposed: bool = False
    magnitude: Tensor | None = None

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Which of its tensors cannot belong to a W of this shape, and why; None if all do."""
        if self.base is not None and tuple(self.base.shape) != shape:
            return f"is {list(self.base.shape)}, not {list(shape)}"
        if self.a is None or self.b is None:
            return None
        made = (len(self.b), *self.a.shape[1:])
        if len(shape) != 2 or (made[::-1] if self.transposed else made) != shape:
            return f"has A {list(self.a.shape)} and B {list(self.b.shape)}, for {list(shape)}"
        if self.magnitude is not None and tuple(self.magnitude.shape) != shape[:1]:
            return f"has a magnitude of {list(self.magnitude.shape)}, for {list(shape)}"
        return None

    def merged(self, weight: Tensor) -> Tensor:
        """W' of W, both in W's dtype; a replaced tensor may be a view of the adapter's file."""
        base = weight if self.base is None else self.base.to(weight.dtype)
        if self.a is None or self.b is None:
            return base
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = self.b.to(exact) @ self.a.to(exact)
        # In place: beside W' no more than one matrix in float32 is in memory.
        total = total.mul_(self.scale)
        total = (total.T if self.transposed else total).add_(base)
        if self.magnitude is not None:
            norms = torch.linalg.norm(total, dim=1)
            total.mul_((self.magnitude.to(exact) / norms)[:, None])
        return total.to(weight.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class Adapter:
    """A PEFT adapter whose tensors are mapped; made by `open_adapter`.

    Attributes:
        changes: By the name of the model's tensor.
        description: Its kind and ranks, in words.
        digest: Tells it from others: of its tensors and what scales them.
    """

    directory: Path
    changes: Mapping[str, Change]
    description: str
    digest: str

    def check(self, shapes: Shapes, weights: Weights, tied: bool, merging: bool = True) -> None:
        """Compares it with a model, whose tensors `shapes` has, before any weight is read.

        tied: whether the text head is the table of text embeddings.
        merging: whether it is going to be merged.

        Raises:
            CheckpointError: the model lacks a module, a shape does not fit, or a matrix into which
                it is merged is stored quantized.
        """
        for name, change in self.changes.items():
            if name not in shapes:
                module = cut(name.removesuffix(".weight"))
                raise CheckpointError(
                    f"{self.directory} changes {module}, which this model lacks: use the model "
                    "that the adapter was trained on"
                )
            if problem := change.misfit(shapes[name]):
                raise CheckpointError(
                    f"{self.directory}: {name} {problem}: use the model that the adapter was "
                    "trained on"
                )
            if merging and name not in weights.names():
                raise CheckpointError(
                    f"{weights.directory} has {name} quantized, into which nothing is merged: use "
                    "the checkpoint that it was made from, with quantization= or --quantization, "
                    "or load the adapter with merge_adapters=False"
                )
        if tied and "model.embed_tokens.weight" in self.changes:
            raise CheckpointError(
                f"{self.directory} changes model.embed_tokens, which is also this model's text "
                "head: whether that is meant to change is not stated, merge it with PEFT"
            )


class AdaptedWeights(Weights):
    """A checkpoint's tensors with an adapter merged, one at a time, as each is read.

    What the adapter does not change stays a view of the checkpoint's file.
    """

    def __init__(self, weights: Weights, adapter: Adapter) -> None:
        super().__init__(weights.directory, weights._files)
        self.adapter, self.changed = adapter, frozenset(adapter.changes)

    def get(
        self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """One tensor, see `Weights.get`.

        Raises:
            CheckpointError: merged, and only then, it holds NaN, infinite or absurd values.
        """
        if name not in self.adapter.changes:
            return super().get(name, dtype=dtype, device=device)
        weight = super().get(name)
        merged = self.adapter.changes[name].merged(weight)
        if not is_finite(merged) and is_finite(weight):
            kind = str(merged.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.adapter.directory}: {name} with the adapter merged holds NaN or infinite "
                f"values in {kind}, or some beyond {LARGEST:g}: train the adapter again"
            )
        return merged.to(device).to(dtype=dtype)


def open_adapter(directory: PathLike) -> Adapter:
    """Opens a folder that PEFT's save_pretrained wrote, and checks all that can be without a model.

    Its tensors are read once, for NaN and for the digest.

    Raises:
        CheckpointError: nothing is there, the file is damaged or a pickle, a tensor or an option is
            of a kind that is not merged here, or values are not finite.
        ConfigError: adapter_config.json is not a JSON object.
    """
    directory = Path(os.path.expanduser(directory))
    weights = _open_folder(directory)
    options = _Options.read(directory)
    parts: dict[str, dict[str, Tensor]] = {}
    digest = hashlib.sha256()
    for name in sorted(weights.names()):
        module, field_ = _place(directory, name)
        if DTYPE_NAMES.get(weights.dtype(name)) not in DENSE:
            raise CheckpointError(
                f"{directory}: {cut(name)} is {weights.dtype(name)}, and only floating-point "
                "adapters are merged: save it again in float32 or bfloat16"
            )
        tensor = weights.get(name)
        if not is_finite(tensor):
            raise CheckpointError(
                f"{directory}: {cut(name)} holds NaN or infinite values, or some beyond "
                f"{LARGEST:g}: train or copy the adapter again"
            )
        if field_ in parts.setdefault(module, {}):
            raise CheckpointError(f"{directory} gives {cut(module)}.{field_} twice: save it again")
        parts[module][field_] = tensor
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    changes: dict[str, Change] = {}
    ranks: set[int] = set()
    for module, found in parts.items():
        for name, change in _changes(directory, module, found, options):
            changes[name] = change
            if change.a is not None:
                ranks.add(len(change.a))
                digest.update(f"{name} {change.scale!r}\n".encode())
    if not changes:
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE} holds no tensors: save the adapter again"
        )
    return Adapter(directory, changes, _described(options, ranks, changes), digest.hexdigest())


def _open_folder(directory: Path) -> Weights:
    wanted = "give the folder that PEFT's save_pretrained wrote"
    if not directory.is_dir():
        raise CheckpointError(f"there is no adapter directory {directory}: {wanted}")
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}: {wanted}")
    path = directory / WEIGHTS_FILE
    if not path.exists():
        pickled = next((name for name in PICKLES if (directory / name).exists()), None)
        if pickled:
            raise CheckpointError(
                f"{directory} has only {pickled}, a pickle, which may run code and is not read: "
                "save the adapter again with save_pretrained(..., safe_serialization=True)"
            )
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}: {wanted}")
    file = open_safetensors(path, "copy the adapter again")
    return Weights(directory, dict.fromkeys(file.keys(), file))


FIELDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".weight": "weight",
    ".bias": "bias",
}
"""Ends of tensor names."""


def _place(directory: Path, name: str) -> tuple[str, str]:
    """The module of a tensor, by the model's names, and what the tensor is to it."""
    end = next((end for end in FIELDS if name.endswith(end)), None)
    inner = name.removeprefix(PREFIX)
    known = end is not None and inner != name and (".lora_" not in inner or ".lora_" in end)
    if not known or end is None:
        raise CheckpointError(
            f"{directory}: {cut(name)} is none of LoRA's, DoRA's or the model's tensors as PEFT "
            "names them: merge this adapter with PEFT's merge_and_unload and load the result"
        )
    return inner.removesuffix(end).removesuffix(".base_layer"), FIELDS[end]


@dataclass(frozen=True)
class _Options:
    """What adapter_config.json says about ranks and scales."""

    rank: float
    alpha: float
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False

    @classmethod
    def read(cls, directory: Path) -> "_Options":
        """Raises CheckpointError for an option that would change the result and is not known."""
        path = directory / CONFIG_FILE
        raw = read_json(path)
        kind = raw.get("peft_type")
        other = {"peft_type": kind} if kind != "LORA" else {}
        if (raw.get("bias") or "none") not in BIASES:
            other["bias"] = raw["bias"]
        if raw.get("init_lora_weights", True) not in KEPT_AT_START:
            # PiSSA, OLoRA and their like begin with other base weights than the checkpoint's.
            other["init_lora_weights"] = raw["init_lora_weights"]
        names = sorted(raw.keys() - READ - WITHOUT_EFFECT)
        other |= {name: raw[name] for name in names if raw[name]}
        for name, value in other.items():
            advice = "merge it with PEFT's merge_and_unload and load the result"
            if name == "init_lora_weights":
                advice = "save it with PEFT's path_initial_model_for_weight_conversion"
            raise CheckpointError(
                f"{path}: {cut(name)} {shown(value)} is not supported, only LoRA with rslora, "
                f"DoRA, patterns of ranks and alphas, and saved modules is: {advice}"
            )
        return cls(
            _number(path, "r", raw.get("r")),
            _number(path, "lora_alpha", raw.get("lora_alpha"), least=0),
            _pattern(path, "rank_pattern", raw.get("rank_pattern")),
            _pattern(path, "alpha_pattern", raw.get("alpha_pattern")),
            bool(raw.get("use_rslora")),
            bool(raw.get("use_dora")),
        )

    def rank_of(self, module: str) -> float:
        return self._matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        alpha, rank = self._matching(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @staticmethod
    def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
        """The value of the first pattern that matches the end of a module's name."""
        matches = (value for key, value in patterns.items() if re.match(_ending(key), module))
        return next(matches, default)


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _number(path: Path, name: str, value: Any, least: float = 1) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (least <= value <= LARGEST):
        raise CheckpointError(
            f"{path}: {name} must be a number of at least {least}, not {shown(value)}: save the "
            "adapter again"
        )
    return value


def _pattern(path: Path, name: str, value: Any) -> dict[str, float]:
    if not isinstance(value or {}, dict):
        raise CheckpointError(
            f"{path}: {name} must be an object, not {shown(value)}: save it again"
        )
    least = 1 if name == "rank_pattern" else 0
    found = {
        key: _number(path, f"{name} {key!r}", each, least) for key, each in (value or {}).items()
    }
    for key in found:
        try:
            re.compile(_ending(key))
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: {name} {shown(key)} is no regular expression ({cut(error)}): save the "
                "adapter again"
            ) from error
    return found


def _changes(
    directory: Path, module: str, found: Mapping[str, Tensor], options: _Options
) -> list[tuple[str, Change]]:
    """Tensors of the model that the tensors of one module change."""
    changes: list[tuple[str, Change]] = []
    where = f"{directory}: {cut(module)}"
    embedded = "embedding_a" in found or "embedding_b" in found
    ends = ("embedding_a", "embedding_b") if embedded else ("a", "b")
    a, b = (found.get(end) for end in ends)
    again = "copy or save the adapter again"
    if (a is None) != (b is None) or (embedded and ("a" in found or "b" in found)):
        raise CheckpointError(f"{where} has no pair of A and B: {again}")
    weight = Change(base=found.get("weight"))
    if a is not None and b is not None:
        rank = options.rank_of(module)
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
            raise CheckpointError(
                f"{where} has A {list(a.shape)} and B {list(b.shape)}, and {CONFIG_FILE} says that "
                f"the rank is {rank}: {again}"
            )
        weight = replace(weight, a=a, b=b, scale=options.scale_of(module), transposed=embedded)
    magnitude = found.get("magnitude")
    if (magnitude is not None) != (options.dora and a is not None):
        problem = "a magnitude without use_dora or A" if magnitude is not None else "no magnitude"
        raise CheckpointError(f"{where} has {problem}, which DoRA would have: {again}")
    if magnitude is not None and embedded:
        raise CheckpointError(
            f"{where} is an embedding with DoRA, which is not supported: merge it with PEFT's "
            "merge_and_unload and load the result"
        )
    if "weight" in found or a is not None:
        changes.append((f"{module}.weight", replace(weight, magnitude=magnitude)))
    if "bias" in found:
        changes.append((f"{module}.bias", Change(base=found["bias"])))
    return changes


def _described(options: _Options, ranks: set[int], changes: Mapping[str, Change]) -> str:
    kind = "DoRA" if options.dora else "LoRA"
    spread = " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else ""
    products = sum(change.a is not None for change in changes.values())
    replaced = sum(change.base is not None for change in changes.values())
    parts = [f"{kind} of rank {spread} on {products} matrices"] if products else []
    parts += [f"{replaced} tensors replaced"] if replaced else []
    return ", ".join(parts)
