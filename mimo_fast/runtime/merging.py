"""Writes a language model's checkpoint with an adapter merged into it."""

from pathlib import Path

from tqdm import tqdm

from mimo_fast.checkpoint.files import write_checkpoint
from mimo_fast.checkpoint.folder import check_new_folder, new_folder
from mimo_fast.checkpoint.hub import copy_companions
from mimo_fast.config import ADAPTERS_KEY, PathLike, read_json
from mimo_fast.modes import in_own_modes
from mimo_fast.runtime.loading import open_lm


@in_own_modes
def merge_adapter(
    source: PathLike, adapter: PathLike, target: PathLike, *, progress: bool = True
) -> int:
    """Merges a PEFT adapter into a language model's checkpoint, in another directory.

    Dtypes, shards, tokenizer and config are the source's; config.json gets `merged_adapters`. One
    tensor is in memory at a time. The directory appears at the end, whole.

    Returns:
        How many tensors the adapter changed.

    Raises:
        CheckpointError, ConfigError: the source or the adapter is none or they do not fit, the
            target is not empty, or the disk is full. See `open_adapter`.
    """
    source, target = Path(source), Path(target)
    check_new_folder(target)
    config, weights, *_ = open_lm(source, {"adapter": adapter}, merge=True)
    shapes = {name: weights.shape(name) for name in weights.names()}
    dtypes = {name: weights.dtype(name) for name in shapes}
    hide = None if progress else True
    options = {"unit": "B", "unit_scale": True, "delay": 1, "disable": hide}
    with (
        tqdm(total=weights.nbytes, desc="merging", **options) as bar,
        new_folder(target) as folder,
    ):
        copy_companions(source, folder)
        write_checkpoint(
            folder,
            shapes,
            weights.finite,
            dtype=dtypes,
            config={**read_json(source / "config.json"), ADAPTERS_KEY: list(config.adapters)},
            shards=weights.shards(),
            advance=bar.update,
        )
    return len(weights.changed)
