"""`accelerate`: our `generate` for an upstream model that is already in memory."""

import copy
import operator
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mimo_fast.arguments import as_type, checked
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig, TransformerConfig
from mimo_fast.errors import CheckpointError
from mimo_fast.modes import in_own_modes
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.lm.finite import tensors as tensors_of
from mimo_fast.runtime.lm.model import LM, Frequencies
from mimo_fast.upstream.language_model import generate_as_upstream

WRAPPERS = ("_orig_mod", "module")
"""Where `torch.compile` and the data-parallel wrappers keep the model that they wrap."""

EMBEDDINGS, HEAD, TO_LOCAL = (
    f"{name}.weight" for name in ("model.embed_tokens", "lm_head", "speech_embeddings_to_local")
)
HEAD_BIAS = "lm_head.bias"

Tensors = dict[str, Tensor]


@checked
def accelerate(model: Any) -> Any:
    """Replaces `generate` of an upstream model by `mimo_fast.generate`.

    The model is a `MimoAudio` or `MiMoAudioForCausalLM`, or any object with the same attributes:
    `config`, `args.empty_idx` and `state_dict()` on the language model, `model` on its wrapper; it
    may be wrapped by `torch.compile`. The weights are shared, not copied, and looked at again at
    each call, so it may be moved, cast, trained or given other parameters or another `lm_head`. A
    deep copy is accelerated too. A pickle has upstream's `generate` and needs no mimo-fast; what is
    unpickled can be accelerated again.

    Returns:
        The same object.

    Raises:
        TypeError: the model lacks these attributes, or its lm_head is no linear layer.
        CheckpointError: its tensors do not match its config, or lie on several devices. `generate`
            raises both too, where they hold by then.
    """
    causal = _inner(model)
    if not hasattr(causal, "args"):
        causal = _inner(getattr(causal, "model", None))
    missing = [name for name in ("config", "args", "state_dict") if not hasattr(causal, name)]
    if missing:
        raise TypeError(
            f"a {type(model).__name__} is not an upstream MiMo-Audio model, it lacks "
            f"{', '.join(missing)}; pass a MimoAudio or MiMoAudioForCausalLM, or load the "
            "checkpoint with mimo_fast.load(lm, codec)"
        )
    accelerated = Accelerated(causal)
    # What can be wrong is said here, and not in the first call.
    _ = accelerated.lm
    causal.generate = accelerated
    return model


class Accelerated:
    """Upstream's `generate`, computed by us with the weights that the model has at each call.

    Args:
        model: upstream's language model.
    """

    def __init__(self, model: Any) -> None:
        before = getattr(model, "__dict__", {}).get("generate")
        # What the model had as an attribute of its own, besides its class's method.
        self._before: Any = before._before if isinstance(before, Accelerated) else before
        self._begin(model)

    def _begin(self, model: Any) -> None:
        self._model, self._lock = model, threading.Lock()
        self._lm: LM | None = None
        self._to_local: Tensor | None = None

    @property
    def lm(self) -> LM:
        """The language model of these weights; it is made again where they are others by now."""
        with self._lock:
            tensors = _tensors(self._model)
            config = _config(self._model, tensors)
            empty = _empty_id(self._model.args, config)
            if self._lm is None or not self._is_made_of(self._lm, config, empty, tensors):
                # The old one is freed first: it may hold weights that the model has replaced.
                self._lm = None
                self._lm, self._to_local = _build(self._model, config, empty, tensors)
            return self._lm

    def _is_made_of(self, lm: LM, config: LMConfig, empty: int, tensors: Tensors) -> bool:
        """Whether a language model was made of these tensors.

        Shared ones are the same memory: what is written there needs no notice. The few that it
        copies, tables and heads of codes, are compared, as no counter sees writes to `.data`.
        """
        if lm.config != config or lm.empty_id != empty or (HEAD_BIAS in tensors) != _biased(lm):
            return False
        pairs = zip(lm.frequencies, _frequencies(self._model, config), strict=True)
        if not all(a is b if a is None or b is None else _equal(a, b) for a, b in pairs):
            return False
        for name, mine in tensors_of(lm):
            # A dtype that differs at the same address is that of a view.
            if mine.dtype != tensors[name].dtype or not _equal(mine, tensors[name]):
                return False
        return self._to_local is None or torch.equal(self._to_local, tensors[TO_LOCAL])

    def __call__(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        synced_gpus: bool | None = None,
        global_sampler: Any = None,
        local_sampler: Any = None,
        warmup_run: bool | None = None,
        **options: Any,
    ) -> Any:
        """See `generate_as_upstream`."""
        stops, samplers = (stopping_criteria, streamer), (global_sampler, local_sampler)
        return generate_as_upstream(self.lm, inputs, generation_config, *stops, *samplers, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Accelerated":
        # With the model of which it is an attribute; that has an entry in memo by now.
        twin = object.__new__(Accelerated)
        memo[id(self)] = twin
        twin._before = copy.deepcopy(self._before, memo)
        twin._begin(copy.deepcopy(self._model, memo))
        return twin

    def __reduce__(self) -> Any:
        """Pickles as what it replaces, so that a pickled model needs no mimo-fast."""
        if self._before is None and hasattr(type(self._model), "generate"):
            return getattr, (self._model, "generate")
        return operator.itemgetter(0), ((self._before,),)


def _inner(model: Any) -> Any:
    """The model inside the wrappers of torch."""
    while isinstance(model, torch.nn.Module):
        inner = (model._modules.get(name) for name in WRAPPERS)
        found = next((each for each in inner if each is not None), None)
        if found is None:
            break
        model = found
    return model


def _tensors(model: Any) -> Tensors:
    """The tensors of a model by upstream's names, whatever of it is compiled."""
    given = model.state_dict()
    if not isinstance(given, Mapping) or any(not isinstance(t, Tensor) for t in given.values()):
        raise TypeError("state_dict() of the model must return tensors by name")
    split = ((str(name).split("."), tensor) for name, tensor in given.items())
    named = ((".".join(part for part in parts if part != "_orig_mod"), t) for parts, t in split)
    return {name: tensor.detach() for name, tensor in named}


def _config(model: Any, tensors: Tensors) -> LMConfig:
    """The config of a model, whose tensors are checked against it.

    Raises:
        ConfigError, CheckpointError: see `accelerate`.
    """
    config = LMConfig.from_dict(_as_mapping(model.config), f"config of {type(model).__name__}")
    head, embeddings = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    if config.tie_embeddings and head is not None and embeddings is not None:
        # A head of its own, whatever the config says.
        same = HEAD_BIAS not in tensors and _equal(head, embeddings)
        config = replace(config, tie_embeddings=same)
    shapes = lm_shapes(config)
    if HEAD_BIAS in tensors:
        shapes[HEAD_BIAS] = (config.vocab_size,)
    _check_modules(model, tensors, shapes)
    wrong = [name for name, shape in shapes.items() if _shape(tensors, name) != shape]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors are missing or misshapen, such as {', '.join(wrong[:4])}"
        )
    used = [tensors[name] for name in shapes]
    for what, kinds, fix in (
        ("devices", {tensor.device for tensor in used}, "move the model to one"),
        ("dtypes", {tensor.dtype for tensor in used}, "cast the model to one"),
    ):
        if len(kinds) > 1:
            names = ", ".join(sorted(map(str, kinds)))
            raise CheckpointError(f"the model's weights have several {what}, {names}: {fix}")
    if used[0].is_meta:
        raise CheckpointError("the model's weights are on the device meta: load them first")
    return config


def _check_modules(model: Any, tensors: Tensors, shapes: Mapping[str, Any]) -> None:
    """Refuses what the model would compute and we would not: adapters, biases, other heads.

    Raises:
        TypeError: lm_head is no linear layer.
        CheckpointError: a layer has tensors that upstream's has not.
    """
    head = getattr(model, "lm_head", None)
    head = getattr(head, "_orig_mod", head)
    # A bare module that only holds a weight computes nothing of its own.
    plain = torch.nn.Linear.forward, torch.nn.Module.forward
    if isinstance(head, torch.nn.Module) and type(head).forward not in plain:
        kind = type(head).__name__
        raise TypeError(f"the model's lm_head must be a torch.nn.Linear, not a {kind}")
    layers = {name.rpartition(".")[0] for name in shapes}
    strange = [
        name
        for name in tensors
        if name not in shapes
        and name not in (HEAD, HEAD_BIAS)
        and not layers.isdisjoint(_ancestors(name))
    ]
    if strange:
        problem = f"{len(strange)} tensors belong to no layer of upstream's"
        raise CheckpointError(
            f"{problem}, such as {', '.join(strange[:2])}: merge adapters into the weights first "
            "(merge_and_unload() of peft)"
        )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _shape(tensors: Tensors, name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return a.shape == b.shape
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and not a.is_meta and torch.equal(a, b)


def _biased(lm: LM) -> bool:
    return any(bias is not None for bias in getattr(lm.text_head, "biases", ()))


@in_own_modes
def _build(model: Any, config: LMConfig, empty: int, tensors: Tensors) -> tuple[LM, Tensor | None]:
    """A language model, and a copy of the projection that its tables went through."""
    source = WeightSource(tensors.__getitem__, join=False)
    lm = LM(config, empty, source, _frequencies(model, config))
    if HEAD_BIAS in tensors:
        lm.text_head = source.weight("lm_head", bias=True)
    return lm, tensors[TO_LOCAL].clone() if lm.embeddings_to_local is not None else None


def _frequencies(model: Any, config: LMConfig) -> Frequencies:
    """Rotary frequencies float32 in a model's modules, None where they hold none.

    They are in no state dict. A cast, `model.bfloat16()`, rounds them for good, and transformers
    then turns heads by what is left of them, in float32.
    """

    def of(name: str, stack: TransformerConfig) -> Tensor | None:
        module = getattr(getattr(model, name, None), "rotary_emb", None)
        found = getattr(module, "inv_freq", None)
        if not isinstance(found, Tensor) or found.is_meta or len(found) != stack.head_dim // 2:
            return None
        return found.detach().float().clone()

    return (
        of("model", config.backbone),
        of("input_local_transformer", config.patch_encoder),
        of("local_transformer", config.patch_decoder),
    )


def _empty_id(args: Any, config: LMConfig) -> int:
    """The id of `<|empty|>` in the arguments of an upstream model."""
    given = args.get("empty_idx") if isinstance(args, Mapping) else getattr(args, "empty_idx", None)
    empty = as_type(int, given, "args.empty_idx of the model")
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
