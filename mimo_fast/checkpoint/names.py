"""Language models whose tensors are named as a wrapper named them: a table, nothing is guessed.

Training saves the state dict of whatever object holds the model, so a fine-tune's names may have a
part more than upstream's. A row of the table is taken only if it makes every name of the files one
of upstream's, and leaves out none of them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_fast.checkpoint.files import Weights, abridge, open_weights
from mimo_fast.checkpoint.layout import lm_counts, lm_shapes
from mimo_fast.config import LMConfig
from mimo_fast.errors import CheckpointError


@dataclass(frozen=True)
class Renaming:
    """How one kind of wrapper renames a state dict.

    Args:
        added: what it puts into a name.
        anywhere: before any part of a name, since inner modules may be wrapped; else in front of
            every name.
        by: who does that, for people.
    """

    added: str
    anywhere: bool
    by: str

    def undone(self, names: Iterable[str]) -> dict[str, str]:
        """Name without the addition -> name, of those that may have it."""
        if self.anywhere:
            added = re.compile(rf"(?<![^.]){re.escape(self.added)}")
            return {added.sub("", name): name for name in names}
        return {
            name.removeprefix(self.added): name for name in names if name.startswith(self.added)
        }


RENAMINGS = (
    Renaming("module.", False, "DistributedDataParallel, DataParallel, DeepSpeed"),
    Renaming("_orig_mod.", True, "torch.compile"),
    Renaming("module._orig_mod.", False, "DistributedDataParallel of a compiled model"),
    Renaming("_orig_mod.module.", False, "torch.compile of a distributed model"),
    Renaming("_fsdp_wrapped_module.", True, "FullyShardedDataParallel"),
    Renaming("_checkpoint_wrapped_module.", True, "activation checkpointing"),
    Renaming("base_model.model.", False, "PEFT, merged in place"),
    Renaming("model.", False, "a trainer's module that holds it as `model`"),
    Renaming("language_model.", False, "a multimodal wrapper that holds it as `language_model`"),
    Renaming("model.language_model.", False, "transformers' multimodal wrappers"),
)
"""What the state dicts of fine-tunes have been named by."""


def open_lm_weights(directory: Path, config: LMConfig) -> Weights:
    """The tensors of a language model by upstream's names, a renaming of the table undone.

    What other tools put beside a module, packed values or scales, keeps its place there. Which
    tensors there are is otherwise not checked, but for what the config counts.

    Raises:
        CheckpointError: see `open_weights`; or the names are neither upstream's nor of the table.
    """
    weights = open_weights(directory)
    modules = {name.rpartition(".")[0] for name in lm_shapes(config)}
    if _modules(weights.names(), modules) != modules:
        weights = _renamed(weights, modules)
    weights.check_counts(lm_counts(config))
    return weights


def _renamed(weights: Weights, modules: set[str]) -> Weights:
    """The tensors by upstream's names; unchanged if what is wrong with them is not their names."""
    names = [*weights.names()]
    tables = [row.undone(names) for row in RENAMINGS]
    # A wrapper neither leaves out a tensor nor makes two into one.
    whole = [table for table in tables if len(table) == len(names)]
    fitting = [table for table in whole if _modules(table, modules) == modules]
    if len(fitting) == 1:
        return _with_names(weights, fitting[0])
    # A model of another size has upstream's names, of other numbers.
    kinds = {_unnumbered(module) for module in modules}
    strange = [name for name in names if _module(_unnumbered(name), kinds) is None]
    if 2 * len(strange) <= len(names):
        return weights
    missing = [f"{module}.*" for module in sorted(modules - _modules(names, modules))]
    known = ", ".join(row.added for row in RENAMINGS)
    raise CheckpointError(
        f"{weights.directory}: tensors are named neither as upstream's nor with one of the known "
        f"additions ({known}): missing {abridge(missing)}; unexpected {abridge(strange)}: rename "
        "them"
    )


def _modules(names: Iterable[str], modules: set[str]) -> set[str | None]:
    """The modules of the model that the tensors belong to, None for a tensor of none."""
    return {_module(name, modules) for name in names}


def _module(name: str, modules: set[str]) -> str | None:
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return None


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def _with_names(weights: Weights, names: Mapping[str, str]) -> Weights:
    """The same tensors by other names: new name -> name in the file."""
    shards = {id(file): _RenamedFile(file, names) for file in weights._files.values()}
    files = {new: shards[id(weights._files[stored])] for new, stored in names.items()}
    return Weights(weights.directory, files)


class _RenamedFile:
    """A safetensors file whose tensors have other names."""

    def __init__(self, file: Any, names: Mapping[str, str]) -> None:
        self._file, self._names = file, names

    def get_slice(self, name: str) -> Any:
        return self._file.get_slice(self._names[name])

    def get_tensor(self, name: str) -> Any:
        return self._file.get_tensor(self._names[name])
