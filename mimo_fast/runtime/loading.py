"""Checkpoint directories -> language model, codec and tokenizer on a device."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.arguments import suggestion
from mimo_fast.checkpoint.adapters import AdaptedWeights, Adapter, open_adapter
from mimo_fast.checkpoint.files import Weights, find_checkpoint, open_weights
from mimo_fast.checkpoint.layout import (
    codec_counts,
    codec_shapes,
    codec_training_state,
    lm_shapes,
)
from mimo_fast.checkpoint.names import open_lm_weights
from mimo_fast.config import (
    ROPE_FREQUENCIES,
    CodecConfig,
    LMConfig,
    PathLike,
    RopeFrequencies,
    read_calibration,
    read_json,
)
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import cut, shown
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.modes import in_own_modes, on_device
from mimo_fast.process import check_may_load
from mimo_fast.quantization import (
    FOREIGN_KEY,
    Format,
    QuantizationConfig,
    SharedSource,
    VariantSource,
    WeightSource,
    stored_formats,
    stored_shapes,
    stored_types,
)
from mimo_fast.quantization.convert import Read
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.network import statistics_on
from mimo_fast.runtime.codec.state import NormStatistics
from mimo_fast.runtime.engine.sequence import in_seconds
from mimo_fast.runtime.lm.graphs import wanted
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.variants import AdaptedLM
from mimo_fast.runtime.memory import (
    DEFAULT_BATCH,
    OFFLOADABLE,
    Setup,
    check_memory,
    free_bytes,
    largest_batch,
)
from mimo_fast.text.tokenizer import Tokenizer


class HubOptions(TypedDict, total=False):
    """How hub ids are resolved; the arguments are huggingface_hub's."""

    revision: str | None
    codec_revision: str | None
    cache_dir: PathLike | None
    token: str | bool | None
    local_files_only: bool


class LoadOptions(HubOptions, total=False):
    """Options of memory use and of the codec, besides those of the hub.

    Attributes:
        adapters: Name -> folder of a PEFT adapter of the language model.
        merge_adapters: True to merge the one adapter into the weights as they are read, so that
            every request has it; False to keep adapters beside the weights, so that each request
            chooses one or none. None merges where one is given and the weights are not stored
            quantized.
        codec_rope: Rotary frequencies of the codec, "exact" or "bfloat16", that is rounded to it as
            upstream rounds those of the published codec; None for what the checkpoint states.
        max_batch: Number of requests decoded at once; None for as many as fit, at most 4.
        max_seq_len: Number of groups that a sequence may have; None for the model's context.
        kv_cache: "int8" for a KV cache of half the size; None for the model's dtype.
        offload: Parts that stay in host memory, of "text_embeddings" and "codec_encoder".
        prepare: Whether recordings that tasks are given are prepared, see `prepare_speech`;
            upstream takes them as they are.
        max_load: Share of real time that the replies of listeners may need together, as the engine
            measures it: a request beyond raises BusyError, so that nobody stutters. None for no
            bound. The first listener is always let in.
        max_parked_bytes: Host memory that requests without a slot may need, as predicted: a request
            beyond raises BusyError. None for no bound.
    """

    adapters: Mapping[str, PathLike] | None
    merge_adapters: bool | None
    codec_rope: str | None
    max_batch: int | None
    max_seq_len: int | None
    kv_cache: str | None
    offload: Iterable[str]
    prepare: bool
    max_load: float | None
    max_parked_bytes: int | None


@in_own_modes
def load_parts(
    lm: PathLike,
    codec: PathLike,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    quantization: Any,
    options: LoadOptions,
) -> tuple[LM, Codec, Tokenizer, Setup]:
    """Loads a pair; both are found, checked and planned before any weight is read."""
    check_may_load()
    requested, codec_requested = _split_parts(QuantizationConfig.parse(quantization))
    check_codec_rope(options.get("codec_rope"))
    target = find_device(device)
    for_codec = LoadOptions(**options)
    for_codec["revision"] = options.get("codec_revision")
    lm_dir, codec_dir = find(lm, options), find(codec, for_codec)
    opened = open_lm(lm_dir, options.get("adapters"), options.get("merge_adapters"))
    lm_config, lm_weights, stored = opened.config, opened.weights, opened.stored
    codec_config, codec_weights = open_codec(codec_dir, options.get("codec_rope"))
    _check_pair(lm_config, codec_config)
    tokenizer = Tokenizer.from_directory(lm_dir)
    tokenizer.check_vocab(lm_config.vocab_size)
    # Norms are never quantized: their type is the checkpoint's, unless the config states another.
    chosen, stored_dtype = parse_dtype(dtype), lm_weights.dtype("model.norm.weight")
    own_dtype = parse_dtype(lm_config.dtype) or stored_dtype
    if chosen is None and target.type == "cuda":
        chosen = torch.bfloat16
    elif chosen is None and target.type == "cpu" and own_dtype in (torch.float16, torch.float64):
        # Few CPUs compute in float16, and no kernel does in float64.
        chosen = torch.float32
    lm_dtype = chosen or own_dtype
    codec_dtype = chosen or codec_weights.dtype("encoder.conv1.weight")
    if codec_dtype == torch.float64:
        codec_dtype = torch.float32
    formats = stored or (requested.formats(lm_shapes(lm_config)) if requested else {})
    codec_formats = codec_requested.formats(codec_shapes(codec_config)) if codec_requested else {}
    setup = Setup(lm_config, codec_config, lm_dtype, codec_dtype, formats, codec_formats)
    graphs = wanted(target)
    captured = graphs and enabled(NewPath.PROMPT_GRAPHS, target)
    encodes = graphs and enabled(NewPath.ENCODER_GRAPHS, target)
    setup = replace(
        setup,
        mapped=target.type == "cpu",
        converted=lm_dtype != stored_dtype,
        codec_converted=codec_dtype != codec_weights.dtype("encoder.conv1.weight"),
        merged=lm_weights.changed,
        adapters=tuple(adapter.changes for adapter in opened.adapters.values()),
        graphs=graphs,
        prompt_graphs=captured,
        encoder_graphs=encodes,
    )
    setup = planned(setup, target, options)
    tensors = len([*lm_weights.names(), *codec_weights.names()])
    # tqdm shows the bar only on a terminal.
    progress = tqdm(total=tensors, desc="loading", unit="tensor", leave=False, disable=None)
    with on_device(target), progress as bar:
        offloaded = "text_embeddings" in setup.offload and not lm_config.tie_embeddings

        def reader(weights: Weights) -> Read:
            return _reader(weights, target, bar, "model.embed_tokens." if offloaded else None)

        of_model = reader(lm_weights), lm_dtype, stored, requested
        language_model = _language_model(opened, tokenizer.special.empty, of_model, reader)
        read = _reader(codec_weights, target, bar)
        source = WeightSource(read, codec_dtype, requested=codec_requested)
        audio_codec = Codec(codec_config, source, codebook=WeightSource(read, torch.float32))
    audio_codec.calibration = _calibration(audio_codec, codec_dir)
    if "codec_encoder" in setup.offload:
        audio_codec.offload_encoder()
    return language_model, audio_codec, tokenizer, setup


def _language_model(
    opened: "OpenedLM", empty_id: int, of_model: tuple[Any, ...], reader: Callable[[Weights], Read]
) -> LM:
    """The model, and a variant of it for each adapter that is not merged.

    of_model: arguments of its `WeightSource`. reader: makes what reads from given weights.
    """
    config, kept = opened.config, opened.adapters
    if not kept:
        return LM(config, empty_id, WeightSource(*of_model))
    shapes, source = lm_shapes(config), SharedSource(*of_model)
    base = LM(config, empty_id, source)
    variants = []
    for adapter in kept.values():
        merged = reader(AdaptedWeights(opened.weights, adapter))
        own = VariantSource(source, adapter, merged, shapes)
        variants.append(LM(config, empty_id, own, base=base))
    return AdaptedLM(base, variants, [*kept], [adapter.digest for adapter in kept.values()])


def planned(setup: Setup, device: torch.device, options: LoadOptions) -> Setup:
    """The setup that the options ask for.

    Raises:
        ValueError: an option is out of range.
        DeviceMemoryError: the device has too little memory free.
    """
    longest, wanted = setup.lm.max_positions, options.get("max_seq_len")
    batch = options.get("max_batch")
    cache, offload = options.get("kv_cache"), frozenset(options.get("offload") or ())
    if wanted is not None and not 2 <= wanted <= longest:
        most = in_seconds(longest)
        raise ValueError(f"max_seq_len must be between 2 and the model's {most}, not {wanted}")
    if batch is not None and batch < 1:
        raise ValueError(f"max_batch must be at least 1, not {batch}")
    load = options.get("max_load")
    if load is not None and not load > 0:
        raise ValueError(f"max_load must be above 0, not {load}")
    parked = options.get("max_parked_bytes")
    if parked is not None and parked < 1:
        raise ValueError(f"max_parked_bytes must be at least 1, not {parked}")
    if cache not in (None, "int8"):
        raise ValueError(f"kv_cache must be 'int8' or None, not {shown(cache)}")
    for unknown in sorted(map(str, offload - set(OFFLOADABLE))):
        near = suggestion(unknown, OFFLOADABLE)
        known = ", ".join(OFFLOADABLE)
        raise ValueError(f"nothing called {unknown} to offload, {near}: use {known}")
    setup = replace(setup, max_seq_len=wanted or longest, kv_cache=cache, offload=offload)
    setup = replace(setup, max_load=load, max_parked_bytes=parked)
    free = free_bytes(device)
    if free is None:
        return replace(setup, max_batch=batch or DEFAULT_BATCH)
    setup = replace(setup, max_batch=batch or largest_batch(setup, free))
    check_memory(setup, free, "the GPU" if device.type == "cuda" else "the machine")
    return setup


def _split_parts(
    requested: QuantizationConfig | None,
) -> tuple[QuantizationConfig | None, QuantizationConfig | None]:
    """The parts for the language model and for the codec; None where nothing is quantized."""
    if requested is None:
        return None, None
    parts = replace(requested, codec=None), QuantizationConfig(codec=requested.codec)
    lm, codec = (None if part == QuantizationConfig() else part for part in parts)
    return lm, codec


def _check_pair(lm: LMConfig, codec: CodecConfig) -> None:
    """Checks that every code but the last, the empty one, is a row of the codec's codebook."""
    sizes = codec.codebook_sizes
    if lm.channels > len(sizes):
        problem = f"the language model speaks {lm.channels} codebooks and the codec has"
        raise CheckpointError(f"{problem} {len(sizes)}: they do not belong together")
    for channel, (size, empty) in enumerate(zip(lm.code_sizes, lm.empty_codes, strict=True)):
        if not size - 1 == empty == sizes[channel]:
            raise CheckpointError(
                f"codebook {channel} has {sizes[channel]} codes in the codec and {size} with the "
                f"empty code {empty} in the language model: they do not belong together"
            )


def find(source: PathLike, hub: HubOptions) -> Path:
    return find_checkpoint(
        source,
        revision=hub.get("revision"),
        cache_dir=hub.get("cache_dir"),
        token=hub.get("token"),
        local_files_only=hub.get("local_files_only", False),
    )


class OpenedLM(NamedTuple):
    """A language model of which no weight has been read.

    Attributes:
        weights: Its tensors; with an adapter that is merged they are `AdaptedWeights`.
        stored: Formats of the matrices that they hold quantized.
        adapters: Those that are kept beside them, by name.
    """

    config: LMConfig
    weights: Weights
    stored: dict[str, Format]
    adapters: dict[str, Adapter]


def open_lm(
    directory: Path,
    adapters: Mapping[str, PathLike] | None = None,
    merge: bool | None = None,
) -> OpenedLM:
    """A language model whose names and shapes, and those of its adapters, are checked.

    adapters, merge: as in `LoadOptions`.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if raw.get(FOREIGN_KEY):
        raise CheckpointError(
            f"{directory} was quantized by another tool: convert it with "
            f"`mimo-fast quantize {directory} OUT` and load OUT"
        )
    config, stored = LMConfig.from_dict(raw, str(path)), stored_formats(raw, str(path))
    weights, shapes = open_lm_weights(directory, config), lm_shapes(config)
    for name, chosen in stored.items():
        shape = shapes.get(name, ())
        if len(shape) != 2 or chosen.fit(shape[1]) != chosen:
            raise CheckpointError(
                f"{path} says that {cut(name)} is stored as {chosen}, which no matrix of that name "
                "in this model can be: quantize again"
            )
    weights.validate(stored_shapes(shapes, stored), packed=stored_types(shapes, stored))
    folders = dict(adapters or {})
    merging = (len(folders) == 1 and not stored) if merge is None else merge
    if merging and len(folders) > 1:
        names = ", ".join(cut(name) for name in folders)
        raise CheckpointError(
            f"{len(folders)} adapters were given ({names}), and one can be merged into the "
            "weights: give one, or leave merge_adapters out, so that each request chooses its own"
        )
    kept = {name: open_adapter(folder) for name, folder in folders.items()}
    for adapter in kept.values():
        adapter.check(shapes, weights, config.tie_embeddings, merging)
    if not merging or not kept:
        return OpenedLM(config, weights, stored, kept)
    (adapter,) = kept.values()
    config = replace(config, adapters=(*config.adapters, adapter.digest))
    return OpenedLM(config, AdaptedWeights(weights, adapter), stored, {})


def open_codec(directory: Path, rope: str | None = None) -> tuple[CodecConfig, Weights]:
    """Config and weights of a codec; names and shapes are checked.

    rope: in place of the config's `rope_frequencies`, see `LoadOptions.codec_rope`.
    """
    path = directory / "config.json"
    config = CodecConfig.from_dict(read_json(path), str(path))
    if chosen := check_codec_rope(rope):
        config = replace(config, rope_frequencies=chosen)
    weights = open_weights(directory)
    weights.check_counts(codec_counts(config))
    weights.validate(codec_shapes(config), optional=codec_training_state(config))
    return config, weights


def check_codec_rope(value: str | None) -> RopeFrequencies | None:
    """`LoadOptions.codec_rope`, which must be one of the two or None."""
    chosen = next((name for name in ROPE_FREQUENCIES if name == value), None)
    if value is not None and chosen is None:
        known = " or ".join(map(repr, ROPE_FREQUENCIES))
        raise ValueError(f"codec_rope must be {known} or None, not {shown(value)}")
    return chosen


def describe_rope(directory: Path, config: CodecConfig, asked: str | None) -> str:
    """Which rotary frequencies a codec of `open_codec` has, and why."""
    rounded = config.rope_frequencies == "bfloat16"
    if asked is not None:
        why = "as asked"
    elif read_json(directory / "config.json").get("rope_frequencies") is not None:
        why = "as its config states"
    elif rounded:
        why = "as upstream runs the published codec, whose dimensions it has"
    else:
        why = "as nothing is stated and its dimensions are not the published ones"
    return f"{'frequencies rounded to bfloat16' if rounded else 'exact frequencies'}, {why}"


@in_own_modes
def load_codec(
    source: PathLike,
    device: str | torch.device | None,
    hub: HubOptions,
    codec_rope: str | None = None,
) -> Codec:
    """A codec alone, in float32, to measure with; its folder is `find`'s."""
    check_may_load()
    target, directory = find_device(device), find(source, hub)
    config, weights = open_codec(directory, codec_rope)
    with tqdm(total=len([*weights.names()]), desc="loading", leave=False, disable=None) as bar:
        read = WeightSource(_reader(weights, target, bar), torch.float32)
        codec = Codec(config, read, codebook=read)
    codec.calibration = _calibration(codec, directory)
    return codec


def _calibration(codec: Codec, directory: Path) -> NormStatistics | None:
    moments = read_calibration(directory)
    return None if moments is None else statistics_on(codec.device, codec.config, moments)


def find_device(device: str | torch.device | None) -> torch.device:
    """A device, tried out; the default one for None.

    Raises:
        ValueError: this machine, or this PyTorch, has no such device.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        torch.zeros(1, dtype=torch.float32, device=found).cpu()
    except Exception as error:  # which one depends on the device and on PyTorch's build
        cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        problem = f"there is no device {device} here, or PyTorch was built without it"
        raise ValueError(f"{problem}: use {' or '.join([*cards, 'cpu'])}") from error
    return found


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype from itself or its name ("bfloat16", "bf16", ...)."""
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16"}
    short |= {"fp32": "float32", "float": "float32"}
    chosen = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype {shown(dtype)} is not one of float32, bfloat16, float16")
    return chosen


def _reader(weights: Weights, device: torch.device, bar: Any, on_host: str | None = None) -> Read:
    """A reader to the device; for a GPU, names that start with `on_host` stay in pinned memory."""

    def read(name: str) -> Tensor:
        bar.update(1)
        if on_host and name.startswith(on_host) and device.type == "cuda":
            return weights.finite(name).pin_memory()
        return weights.finite(name, device)

    return read
