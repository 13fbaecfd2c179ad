"""What `mimo-fast info` prints: machine, versions, kernels, a checkpoint's parts and bytes."""

import importlib.metadata
import math
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mimo_fast import __version__
from mimo_fast.checkpoint.adapters import AdaptedWeights
from mimo_fast.checkpoint.hub import resolved_commit
from mimo_fast.checkpoint.layout import codec_shapes, codec_training_state, lm_shapes
from mimo_fast.config import LMConfig, PathLike
from mimo_fast.kernels import defaults, dispatch
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cuda import engine_launch
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.defaults import NewPath
from mimo_fast.kernels.matmul.plan import explain
from mimo_fast.kernels.matmul.product import QuantizedWeight, Weight
from mimo_fast.quantization import Format, WeightSource, quantize
from mimo_fast.runtime.codec.encoder_graphs import BUCKETS, longest_encode
from mimo_fast.runtime.lm.graphs import CAPTURE_BYTES, CAPTURE_SECONDS, PROMPTS
from mimo_fast.runtime.loading import HubOptions, describe_rope, find, open_codec, open_lm
from mimo_fast.runtime.memory import encoder_graph_bytes

SHARED_PRODUCT = 2**20
"""Least number of weights for which a product with one row is shared between cores."""

PARTS = {
    "lm": {
        "model.embed_tokens": "text embeddings",
        "model.": "backbone",
        "lm_head": "text head",
        "input_local_transformer": "patch encoder",
        "speech_group_downcast": "patch encoder",
        "speech_embeddings.": "code embeddings",
        "local_transformer": "patch decoder",
        "speech_embeddings_to_local": "patch decoder",
        "hidden_states_downcast": "patch decoder",
    },
    "codec": {
        "encoder.quantizer": "codebooks",
        "encoder.": "encoder",
        "decoder.vocoder": "vocoder",
        "decoder.": "decoder",
    },
}
"""Tensor name prefix -> part of the model, the first match counts."""


STACKS = {
    "backbone": "model",
    "patch encoder": "input_local_transformer",
    "patch decoder": "local_transformer",
}
"""Transformer of a language model -> prefix of its tensors."""

SHOWN_ROWS = (1, 8, 64, 512)

SOME_ROWS = 64
"""Rows of a matrix that tell how products with it are computed; torch packs so many at a time."""


def describe_machine() -> Iterator[str]:
    """Lines about this machine and what is installed on it."""
    system = f"{platform.system()} {platform.machine()}"
    yield f"mimo-fast {__version__}, Python {platform.python_version()}, {system}"
    packages = ("torch", "triton", "safetensors", "tokenizers", "soundfile", "transformers")
    yield "packages: " + ", ".join(f"{name} {_version(name)}" for name in packages)
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    memory = pages and pages * os.sysconf("SC_PAGE_SIZE")
    threads = torch.get_num_threads()
    yield f"cpu: {cpu_name()}, {usable_cores()} cores, {threads} threads, {memory / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        yield "gpu: none that this torch can use"
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield (
            f"gpu {i}: {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.1f} "
            f"GiB, {card.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
        )
    yield f"native kernels: {native.state()}"
    yield f"triton kernels: {dispatch.TRITON.line()}"
    for i in range(torch.cuda.device_count() if dispatch.triton else 0):
        if reason := dispatch.refusal(torch.device("cuda", i)):
            yield f"triton kernels on gpu {i}: not used, plain torch takes their place: {reason}"
    yield f"cuda kernels: {cuda.state()}"
    for i in range(torch.cuda.device_count()):
        yield from defaults.describe(
            torch.device("cuda", i), {NewPath.ENGINE: engine_launch.refuses_device}
        )


def describe_checkpoint(
    source: PathLike,
    kind: str,
    hub: HubOptions,
    codec_rope: str | None = None,
    adapters: Mapping[str, PathLike] | None = None,
    merge: bool | None = None,
) -> Iterator[str]:
    """Lines about a checkpoint ("lm" or "codec"): its parts, parameters and bytes.

    Only headers and adapters are read. codec_rope, adapters, merge: as in `LoadOptions`.
    """
    directory = find(source, hub)
    if kind == "lm":
        config, weights, _, kept = open_lm(directory, adapters, merge)
        shapes = lm_shapes(config)
    else:
        codec_config, weights = open_codec(directory, codec_rope)
        shapes = codec_shapes(codec_config) | codec_training_state(codec_config)
    parts: dict[str, list[int]] = {}
    for name in weights.names():
        part = next(label for prefix, label in PARTS[kind].items() if name.startswith(prefix))
        totals = parts.setdefault(part, [0, 0])
        # A quantized matrix is counted once, by its packed words.
        totals[0] += math.prod(shapes.get(name.removesuffix(".words"), (0,)))
        totals[1] += math.prod(weights.shape(name)) * weights.dtype(name).itemsize
    parameters, size = (sum(totals[i] for totals in parts.values()) for i in (0, 1))
    dtypes = sorted({str(weights.dtype(name)).removeprefix("torch.") for name in weights.names()})
    yield f"{kind}: {directory}, {', '.join(dtypes)}"
    if commit := resolved_commit(directory):
        yield f"  revision        {commit}"
    for part, (count, nbytes) in [*parts.items(), ("total", [parameters, size])]:
        yield f"  {part:<16}{count:>16,} parameters{nbytes / 1e6:>12,.1f} MB"
    if kind == "lm":
        if isinstance(weights, AdaptedWeights):
            adapter = weights.adapter
            yield f"  adapter         {adapter.directory}, {adapter.description}"
        for name, adapter in kept.items():
            yield f"  adapter         {name}: {adapter.directory}, {adapter.description}"
        if held := len(config.adapters) - isinstance(weights, AdaptedWeights):
            yield f"  merged          adapters in the checkpoint's weights: {held}"
        yield (
            f"  graphs          on a GPU of prompts of {PROMPTS[0]} to {PROMPTS[-1]} groups, as "
            f"many as are captured at load in {CAPTURE_SECONDS:g} s and "
            f"{CAPTURE_BYTES / 1e6:,.0f} MB"
        )
    else:
        yield f"  rope            {describe_rope(directory, codec_config, codec_rope)}"
        seconds = longest_encode(codec_config, BUCKETS[-1]) / codec_config.sample_rate
        nbytes = encoder_graph_bytes(codec_config, torch.bfloat16)
        yield (
            f"  graphs          on a GPU of encodes of up to {seconds:.0f} s, captured at load in "
            f"about {nbytes / 1e6:,.0f} MB, where that path is on"
        )


def describe_products(source: PathLike | None, hub: HubOptions) -> Iterator[str]:
    """Lines about which kernel computes products of few and many rows on each device, and why not
    another: with the matrices of a language model, or with one in each format. Reads some rows."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        made = _of_formats(device) if source is None else _of_model(find(source, hub), device)
        for name, weight, dtype in made:
            yield f"products on {device}, {name}, {str(dtype).removeprefix('torch.')}:"
            lines: dict[str, list[int]] = {}
            for rows in SHOWN_ROWS:
                chosen, passed_over = explain(weight, device, dtype, rows)
                because = [f"not {', '.join(them)}: {why}" for why, them in passed_over.items()]
                lines.setdefault("; ".join([chosen, *because]), []).append(rows)
            for line, counts in lines.items():
                yield f"  {', '.join(map(str, counts))} rows: {line}"


Product = tuple[str, Weight | QuantizedWeight, torch.dtype]
"""What it is called, its weight and the dtype of x."""


def _of_formats(device: torch.device) -> Iterator[Product]:
    values = torch.randn(
        SOME_ROWS,
        256,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        device="cpu",
    )
    for dtype in (torch.bfloat16, torch.float32):
        yield "dense", Weight.stack([values.to(device, dtype)]), dtype
    for name in ("int8", "int4", "nf4"):
        yield name, quantize(values.to(device), Format.parse(name)), torch.bfloat16


def _of_model(directory: Path, device: torch.device) -> Iterator[Product]:
    config, weights, stored, _ = open_lm(directory)
    dtype = weights.dtype("model.norm.weight")
    if device.type == "cuda":
        dtype = torch.bfloat16
    elif dtype == torch.float16:
        # As models are loaded.
        dtype = torch.float32

    def read(name: str) -> torch.Tensor:
        return weights.get(name, device="cpu")[:SOME_ROWS].to(device)

    products = {
        label: [f"{stack}.layers.0.self_attn.{part}_proj" for part in "qkv"]
        for label, stack in STACKS.items()
    }
    products["text head"] = ["model.embed_tokens" if config.tie_embeddings else "lm_head"]
    for label, names in products.items():
        form = stored.get(f"{names[0]}.weight")
        weight = WeightSource(read, dtype, stored).stored_weight(*names)
        yield f"{label} ({form or 'dense'})", weight, dtype


def useful_threads(config: LMConfig) -> int:
    """Number of threads that torch should use for a language model on the CPU.

    It is the number of cores that this process may use, or one: a product smaller than
    SHARED_PRODUCT is done before other threads have been woken, and waiting for them costs many
    times the work where other programs use the cores.
    """
    shared = config.backbone.dim * config.backbone.ffn_dim >= SHARED_PRODUCT
    return min(usable_cores(), torch.get_num_threads()) if shared else 1


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = (line for line in lines if line.startswith("model name"))
        return next(names).partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
