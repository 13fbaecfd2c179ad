"""`accelerate`: our `generate` for an upstream model that is already in memory."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mimo_fast.arguments import as_type, checked
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig
from mimo_fast.errors import CheckpointError
from mimo_fast.generation import config_options, generate
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.lm.model import LM


@checked
def accelerate(model: Any) -> Any:
    """Replaces `generate` of an upstream model by `mimo_fast.generate`.

    The model is a `MimoAudio` or `MiMoAudioForCausalLM`, or any object with the same attributes:
    `config`, `args.empty_idx` and `state_dict()` on the language model, `model` on its wrapper. The
    weights are shared, not copied: call it once the model is on its device and in its dtype.

    Returns:
        The same object.

    Raises:
        TypeError: the model lacks these attributes.
        CheckpointError: its tensors do not match its config.
    """
    causal: Any = model if hasattr(model, "args") else getattr(model, "model", None)
    missing = [name for name in ("config", "args", "state_dict") if not hasattr(causal, name)]
    if missing:
        raise TypeError(
            f"a {type(model).__name__} is not an upstream MiMo-Audio model, it lacks "
            f"{', '.join(missing)}; pass a MimoAudio or MiMoAudioForCausalLM, or load the "
            "checkpoint with mimo_fast.load(lm, codec)"
        )
    config = LMConfig.from_dict(_as_mapping(causal.config), f"config of {type(causal).__name__}")
    tensors = causal.state_dict()
    if not isinstance(tensors, Mapping) or any(not isinstance(t, Tensor) for t in tensors.values()):
        raise TypeError("state_dict() of the model must return tensors by name")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name, shape in lm_shapes(config).items() if shapes.get(name) != shape]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors are missing or misshapen, such as {', '.join(wrong[:4])}"
        )
    source = WeightSource(tensors.__getitem__, join=False)
    causal._mimo_fast_lm = LM(config, _empty_id(causal.args, config), source)

    def upstream_generate(
        inputs: Any = None,
        generation_config: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        synced_gpus: bool | None = None,
        global_sampler: Any = None,
        local_sampler: Any = None,
        warmup_run: bool | None = None,
        input_ids: Any = None,
        **options: Any,
    ) -> Any:
        """`mimo_fast.generate` with upstream's arguments; ignores synced_gpus and warmup_run."""
        seed = options.pop("seed", None)
        if options:
            # Options of generation_config may come as keywords too; keywords take precedence.
            generation_config = config_options(generation_config) | options
        ids, samplers = input_ids if inputs is None else inputs, (global_sampler, local_sampler)
        stops = stopping_criteria, streamer
        return generate(causal, ids, generation_config, *stops, *samplers, seed=seed)

    causal.generate = upstream_generate
    return model


def _empty_id(args: Any, config: LMConfig) -> int:
    """The id of `<|empty|>` in the arguments of an upstream model."""
    empty = as_type(int, getattr(args, "empty_idx", None), "args.empty_idx of the model")
    if not 0 <= empty < config.vocab_size:
        raise ValueError(f"args.empty_idx must be 0 to {config.vocab_size - 1}, not {empty}")
    return empty


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not hasattr(config, "__dict__"):
        raise TypeError(
            f"a model's config is an object or a mapping, not a {type(config).__name__}"
        )
    # Attributes first: to_dict() of a transformers config may omit defaults of the class.
    return {**vars(config), **(config.to_dict() if hasattr(config, "to_dict") else {})}
