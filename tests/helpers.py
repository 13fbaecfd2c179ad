"""What several test files share: error bounds, checkpoint pairs, hooks, weight formats."""

import json
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimo_fast.bench.accuracy import accuracy
from mimo_fast.checkpoint.files import open_weights, write_checkpoint
from mimo_fast.checkpoint.layout import codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig, read_json
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.quantization import (
    Format,
    QuantizationConfig,
    WeightSource,
    quantize,
    relative_error,
    stored_formats,
)

KIT = Path(__file__).parent / "golden"
KIT_PAIR = (KIT / "checkpoint" / "lm", KIT / "checkpoint" / "codec")
ADAPTERS = KIT / "adapters"
"""Adapters of the kit's language model, a folder each, and what it then says."""

THREE = {kind: ADAPTERS / kind for kind in ("qkvo", "dora_rslora", "all_linear_saved")}
"""LoRA, DoRA, and LoRA with saved modules: what requests choose from in tests."""

PAIR = ["--model", str(KIT_PAIR[0]), "--codec", str(KIT_PAIR[1])]
"""The command line's options for the kit's checkpoints."""

AUDIO = KIT / "audio" / "en_m_24k.wav"

BAD_CODES = [
    (torch.zeros(8, 5), "codes must be integers"),
    (torch.zeros(8, 0, dtype=torch.int64), r"codes must be \[1 to 12, T >= 1\], not \[8, 0\]"),
    (torch.zeros(0, 5, dtype=torch.int64), r"not \[0, 5\]"),
    (torch.zeros(13, 5, dtype=torch.int64), r"not \[13, 5\]"),
    (torch.zeros(8, dtype=torch.int64), r"not \[8\]"),
    (torch.zeros(1, 8, 5, dtype=torch.int64), r"not \[1, 8, 5\]"),
    (torch.full((8, 5), -1), "outside its codebook"),
    (torch.tensor([[64], [64], [16], [16]]), "outside its codebook; drop the empty codes"),
    (torch.tensor([[63], [63], [15], [16]]), "outside its codebook"),
]
"""Codes that the kit's codec cannot decode, and the error for each."""

INT4 = ["int4", "int4-g64", "int4-g32", "int4-sym", "int4-sym-g64"]
FORMATS = [*INT4, "int8", "int8-g128", "int8-g32", "nf4", "nf4-g32"]


def assert_rounded(
    got: Tensor, want: Tensor, roundings: float = 1, noise: float | Tensor = 0.0
) -> None:
    """got is the float64 `want` up to `roundings` to its dtype and an absolute `noise`."""
    assert got.shape == want.shape
    assert want.dtype == torch.float64
    half_ulp = torch.finfo(got.dtype).eps / 2
    error = (got.double() - want).abs()
    excess = error - want.abs() * half_ulp * roundings * 1.01 - noise
    # Written so that NaN fails.
    assert bool((excess <= 0).all()), (
        f"error {error.max():.3g} exceeds its bound by {excess.max():.3g}"
    )


def assert_as_exact_as_eager(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The rule of `mimo_fast.bench.accuracy`."""
    found = accuracy(got, eager, exact)
    assert found.accepted, str(found)


def snr_db(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    noise = (got.double() - want.double()).square().sum()
    return float(10 * torch.log10(want.double().square().sum() / noise))


def kit_config(part: str) -> dict[str, Any]:
    """A config.json of the kit's checkpoint, "lm" or "codec"."""
    return read_json(KIT / "checkpoint" / part / "config.json")


def write_pair(
    directory: Path, lm: dict[str, Any], codec: dict[str, Any], seed: int = 0
) -> tuple[Path, Path]:
    """A random checkpoint pair of the kit's configs with these changes, and the kit's tokenizer."""
    raw_lm, raw_codec = kit_config("lm") | lm, kit_config("codec") | codec
    generator = torch.Generator().manual_seed(seed)
    for part, raw, shapes in (
        ("lm", raw_lm, lm_shapes(LMConfig.from_dict(raw_lm))),
        ("codec", raw_codec, codec_shapes(CodecConfig.from_dict(raw_codec))),
    ):

        def draw(name: str, shapes=shapes) -> Tensor:
            if name.endswith("istft.window"):
                return torch.hann_window(*shapes[name])
            values = torch.randn(shapes[name], generator=generator)
            if len(shapes[name]) == 1:
                return values * 0.1 + (0 if name.endswith("bias") else 1)
            return values * (1.0 if "embed" in name else 1.5 / shapes[name][1] ** 0.5)

        write_checkpoint(directory / part, shapes, draw, dtype=torch.float32, config=raw)
    for path in KIT_PAIR[0].glob("*token*"):
        shutil.copy(path, directory / "lm" / path.name)
    return directory / "lm", directory / "codec"


def write(directory: Path, tensors: dict[str, Tensor], shard_bytes: int = 2**31) -> Path:
    """A checkpoint of these tensors, with a configuration that means nothing."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    options = {"dtype": dtypes, "config": {"a": 1}, "shard_bytes": shard_bytes}
    write_checkpoint(directory, shapes, tensors.__getitem__, **options)
    return directory


def copy_tree(source: Path, directory: Path) -> None:
    """A copy whose files may be written, whatever the source's permissions."""
    shutil.copytree(source, directory, dirs_exist_ok=True, copy_function=shutil.copyfile)


def altered_checkpoint(
    directory: Path, part: str, tensor: str, index: tuple[int, ...], add: float
) -> tuple[Path, Path]:
    """A copy of the kit's checkpoint pair in which one element of one tensor differs."""
    copy_tree(KIT / "checkpoint", directory)
    path = directory / part / "model.safetensors"
    tensors = load_file(path)
    tensors[tensor] = tensors[tensor].clone()
    tensors[tensor][index] += add
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return directory / "lm", directory / "codec"


def limited_tokenizer(directory: Path, words: list[str]) -> Path:
    """A copy of the kit's language model that states these words as all it was trained on."""
    copy_tree(KIT_PAIR[0], directory)
    path = directory / "tokenizer_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw | {"trained_words": words}), encoding="utf-8")
    return directory


def fault(call: Callable[[], object], kind: type[Exception] = CheckpointError) -> str:
    """The message of the error that `call` raises, which is one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def raising(kind: type[BaseException], *details: object) -> Callable[..., Any]:
    """A function that raises a new error of this kind, whatever it is given."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise kind(*details)

    return fail


def watch(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
) -> None:
    """Has a function or method of `owner` call these, with its arguments, at each of its calls."""
    inner = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        if before:
            before(*arguments, **options)
        result = inner(*arguments, **options)
        if after:
            after(*arguments, **options)
        return result

    monkeypatch.setattr(owner, name, watched)


def in_threads(call: Callable[[int], Any], count: int) -> list[Any]:
    """What `call` returns for 0 to count - 1, each in a thread of its own at the same time."""
    got: dict[int, Any] = {}

    def run(i: int) -> None:
        got[i] = call(i)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [got[i] for i in range(count)]


def refuses(
    match: str,
    call: Callable[..., object],
    *given: object,
    kind: type[Exception] = ValueError,
    **named: object,
) -> None:
    """The call with these arguments raises an error of this kind whose message matches."""
    with pytest.raises(kind, match=match):
        call(*given, **named)


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """Values of a parameter, of which all but the first `count` are left to `make check`."""
    return [
        value if i < count else pytest.param(value, marks=pytest.mark.slow)
        for i, value in enumerate(values)
    ]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Gaussian values; shapes of other sums have other values."""
    return (torch.randn(shape, generator=seeded(seed + sum(shape))) * scale).to(dtype)


def random_books(sizes: list[int], dim: int, seed: int = 0) -> list[Tensor]:
    """Codebooks of a residual quantizer, each of smaller rows than the one before."""
    rng = seeded(seed)
    return [torch.randn(size, dim, generator=rng) * 0.8**i for i, size in enumerate(sizes)]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def outliers(rows: int, columns: int) -> torch.Tensor:
    values = gaussian(rows, columns)
    chosen = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 1e-3
    return torch.where(chosen, values * 10, values)


def quantized(weight: Tensor, name: str, bias: Tensor | None = None) -> QuantizedWeight:
    """A weight in the format of this name."""
    return quantize(weight, Format.parse(name), bias)


def error(weight: Tensor, name: str) -> float:
    """Relative error of a weight in the format of this name."""
    return relative_error(weight, quantized(weight, name))


def source_of(
    directory: Path, dtype: torch.dtype = torch.float32, requested: QuantizationConfig | None = None
) -> WeightSource:
    weights, raw = open_weights(directory), read_json(directory / "config.json")
    return WeightSource(weights.get, dtype, stored_formats(raw, str(directory)), requested)
