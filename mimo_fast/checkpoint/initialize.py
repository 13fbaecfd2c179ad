"""Writes checkpoint pairs with random weights, to test and measure without a download.

Names, dimensions and files are those of the published checkpoints, or tiny ones ("presets"). Every
tensor has its own random generator, seeded from the seed and the tensor's name, so its values
depend on nothing else.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from mimo_fast.checkpoint.files import write_checkpoint
from mimo_fast.checkpoint.folder import check_new_folder, new_folder, write_json
from mimo_fast.checkpoint.layout import Shapes, codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import shown
from mimo_fast.text.tokenizer import MODEL_TOKENS

Draw = Callable[[str], Iterator[Tensor]]

PIECE = 2**24
"""Number of values drawn at once; it bounds the memory."""

CHAT_AND_TEXT = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>", "</think>")
TOKEN_IDS = {
    "tiny": dict(zip((*CHAT_AND_TEXT, *MODEL_TOKENS.values()), range(400, 413), strict=True)),
    "7b": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    | dict(zip(MODEL_TOKENS.values(), range(151665, 151673), strict=True)),
}
"""Special tokens of each preset, published ids in 7b; ids below 256 are bytes, others unused."""

README = """# Random weights
`mimo-fast init-checkpoint --preset {preset} --seed {seed}` made these two checkpoints, `lm` and
`codec`. Nothing was trained: what the model says is noise, and the tokenizer knows bytes and
special tokens only. Names, shapes and files are those of real checkpoints, so what loads those
loads these.
"""

SPEAKING = """
This preset is biased towards speaking, so that a random model produces audio: the weights are
arranged so that `<|empty|>`, the token of an audio position, is usually the likeliest, and
`<|im_end|>` comes up now and then.
"""

CODEBOOK_STD, CODEBOOK_DECAY = 0.5, 0.8
"""Scales of the first codebook and from each to the next, as residuals of unit variance shrink."""

BIAS_STD = 0.02

HEAD_GAIN = 2.0
"""Scale of the output heads over unit variance: logits must differ enough to sample from."""

PUSH, EMPTY_LEAN, END_LEAN = 8.0, 2.0, 0.9
"""Size of the bias that `_lean_to_speech` makes."""


def init_checkpoint(
    directory: str | os.PathLike[str],
    preset: str = "tiny",
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Writes DIR/lm and DIR/codec with random weights and returns their paths.

    DIR appears at the end, whole.

    Args:
        preset: "tiny" (2.3 MB, float32) or "7b" (the published dimensions, 18.6 GB in bfloat16).
        dtype: of all tensors; by default the preset's.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: the preset is unknown, the directory is not empty, or the disk lacks space.
    """
    directory = Path(directory).expanduser()
    if preset not in TOKEN_IDS:
        raise CheckpointError(f"no preset {shown(preset)}: use one of {', '.join(TOKEN_IDS)}")
    check_new_folder(directory)
    raw = {part: preset_config(preset, part, dtype) for part in ("lm", "codec")}
    config = LMConfig.from_dict(raw["lm"])
    shapes = {"lm": lm_shapes(config), "codec": codec_shapes(CodecConfig.from_dict(raw["codec"]))}
    parameters = {part: sum(map(math.prod, shapes[part].values())) for part in shapes}
    total = sum(count * _dtype(raw[part]).itemsize for part, count in parameters.items())
    _require_space(directory, total)
    draws: dict[str, Draw] = {part: partial(_draw, shapes[part], seed) for part in shapes}
    if preset == "tiny":
        draws["lm"] = partial(_lean_to_speech, draws["lm"], config, TOKEN_IDS[preset])
    readme = README.format(preset=preset, seed=seed) + (SPEAKING if preset == "tiny" else "")
    hide = None if progress else True
    with (
        new_folder(directory) as folder,
        tqdm(total=total, desc="writing", unit="B", unit_scale=True, delay=1, disable=hide) as bar,
    ):
        write_tokenizer(folder / "lm", raw["lm"], TOKEN_IDS[preset])
        (folder / "README.md").write_text(readme, encoding="utf-8")
        for part in shapes:
            write = partial(write_checkpoint, dtype=_dtype(raw[part]), config=raw[part])
            write(folder / part, shapes[part], draws[part], advance=bar.update)
    return directory / "lm", directory / "codec"


def preset_config(preset: str, part: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """A preset's config.json, with its dtype replaced if one is given."""
    text = (files("mimo_fast") / "presets" / f"{preset}-{part}.json").read_text(encoding="utf-8")
    raw: dict[str, Any] = json.loads(text)
    return raw | ({} if dtype is None else {"torch_dtype": str(dtype).removeprefix("torch.")})


def _dtype(raw: dict[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, raw["torch_dtype"])
    return dtype


def _draw(shapes: Shapes, seed: int, name: str) -> Iterator[Tensor]:
    """Values of one tensor, flattened, in float32 pieces."""
    shape = shapes[name]
    size = math.prod(shape)
    if name.endswith("istft.window"):
        yield torch.hann_window(size, dtype=torch.float32, device="cpu")
        return
    mean, std = _spread(name, shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    for start in range(0, size, PIECE):
        yield (
            torch.randn(
                min(PIECE, size - start), generator=generator, dtype=torch.float32, device="cpu"
            )
            .mul_(std)
            .add_(mean)
        )


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor: norms are one, matrices keep the variance of their input."""
    if len(shape) == 1:
        return (0.0, BIAS_STD) if name.endswith("bias") else (1.0, 0.0)
    if match := re.search(r"vq\.layers\.(\d+)\._codebook", name):
        return 0.0, CODEBOOK_STD * CODEBOOK_DECAY ** int(match[1])
    if re.match(r"model\.embed_tokens|speech_embeddings\.", name):
        return 0.0, 1.0
    gain = HEAD_GAIN if "lm_head" in name else 1.0
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _lean_to_speech(
    draw: Draw, config: LMConfig, ids: dict[str, int], name: str
) -> Iterator[Tensor]:
    """The tensors of `draw`, changed so that the text head prefers `<|empty|>`, then `<|im_end|>`.

    Attention weights add up to one, so a constant in the last layer's value bias reaches all
    positions alike. o_proj moves it to coordinate 0 of the hidden state, which so is always
    positive and can serve as a bias of lm_head.
    """
    layer, backbone = f"model.layers.{config.backbone.layers - 1}.self_attn", config.backbone
    values = torch.cat(list(draw(name)))
    if name == f"{layer}.v_proj.bias":
        values += 1
    elif name == f"{layer}.o_proj.weight":
        values.view(backbone.dim, -1)[0] += PUSH / (backbone.heads * backbone.head_dim)
    elif name == "lm_head.weight":
        rows = values.view(-1, backbone.dim)
        rows[:, 0] = 0
        rows[ids["<|empty|>"], 0], rows[ids["<|im_end|>"], 0] = EMPTY_LEAN, END_LEAN
    yield values


def write_tokenizer(directory: Path, raw: dict[str, Any], ids: dict[str, int]) -> None:
    """Writes a byte-level tokenizer without merges: a token a byte of UTF-8, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | ids
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(ids))
    write_json(directory / "tokenizer.json", json.loads(tokenizer.to_str()))
    names = {i: token for token, i in ids.items()}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    flags["special"] = True
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": names[raw["eos_token_id"]],
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {str(i): {"content": token} | flags for token, i in ids.items()},
    }
    write_json(directory / "tokenizer_config.json", config)


def _require_space(directory: Path, nbytes: int) -> None:
    target = directory.absolute()
    existing = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        need, have = (f"{size / 2**30:.2f} GiB" for size in (nbytes, free))
        problem = f"{directory} needs {need}, but its disk has {have} free"
        raise CheckpointError(f"{problem}: free space or use another disk")
