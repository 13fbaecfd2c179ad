"""`LanguageModel`: upstream's `MiMoAudioForCausalLM`, as far as its users touch it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.generation import config_options, generate
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.finite import tensors
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.pipeline import Pipeline
from mimo_fast.upstream.config import LanguageModelArguments, LanguageModelConfig
from mimo_fast.upstream.module import ModuleView


@checked
class LanguageModel(ModuleView):
    """A view of the language model of a pipeline; it decodes with the pipeline's engine.

    Args:
        path: where the model was loaded from, as the caller gave it.
    """

    def __init__(self, pipeline: Pipeline, path: str) -> None:
        self.pipeline, special = pipeline, pipeline.tokenizer.special
        config = pipeline.lm.config
        self.config = LanguageModelConfig.of(config)
        self.args = LanguageModelArguments(
            path,
            special.sosp,
            special.eosp,
            special.sostm,
            special.eostm,
            special.eot,
            special.empty,
        )
        self.group_size, self.audio_channels = config.group_size, config.channels
        self.speech_vocab_sizes = list(config.code_sizes)
        self.speech_empty_ids, self.delay_pattern = list(config.empty_codes), list(config.delays)

    @property
    def lm(self) -> LM:
        """The language model itself.

        Raises:
            ClosedError: the model has been closed.
        """
        self.pipeline.owner.check()
        return self.pipeline.lm

    @property
    def engine(self) -> Engine:
        return self.pipeline.engine

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return tensors(self.lm)

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        synced_gpus: bool | None = None,
        global_sampler: Any = None,
        local_sampler: Any = None,
        warmup_run: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `generate_as_upstream`."""
        stops, samplers = (stopping_criteria, streamer), (global_sampler, local_sampler)
        return generate_as_upstream(self, inputs, generation_config, *stops, *samplers, kwargs)


def generate_as_upstream(
    model: Any,
    inputs: Any,
    generation_config: Any,
    stopping_criteria: Any,
    streamer: Any,
    global_sampler: Any,
    local_sampler: Any,
    options: dict[str, Any],
) -> Any:
    """`mimo_fast.generate` with upstream's arguments, among which two have no effect here.

    Ids are int64, as the tokens that upstream appends are.

    Args:
        options: `input_ids`, `seed`, `adapter` and options of generation_config, which take
            precedence over those in it.
    """
    options = dict(options)
    by_name = options.pop("input_ids", None)
    own = {name: options.pop(name, None) for name in ("seed", "adapter")}
    if options:
        generation_config = config_options(generation_config) | options
    ids = by_name if inputs is None else inputs
    if isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int16):
        ids = ids.long()
    stops, samplers = (stopping_criteria, streamer), (global_sampler, local_sampler)
    return generate(model, ids, generation_config, *stops, *samplers, **own)
