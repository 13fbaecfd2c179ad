"""`generate`: upstream's low-level entry point, ids to ids, with its layouts and stop rules."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimo_fast.arguments import as_type, checked, suggestion
from mimo_fast.config import LMConfig
from mimo_fast.errors import PromptError
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.policy import Priority
from mimo_fast.runtime.engine.request import StopHook
from mimo_fast.runtime.engine.sequence import group_ids, in_seconds
from mimo_fast.runtime.lm.decode import Limits, Samplers
from mimo_fast.runtime.lm.model import LM
from mimo_fast.sampling import GREEDY, MiMoSampler, Sampler, Seed, as_sampler, row_seeds
from mimo_fast.text.prompt import TEXT_FILLER

Ids = Tensor | Sequence[Tensor]


@checked
def generate(
    model: Any,
    input_ids: Ids,
    generation_config: Any = None,
    stopping_criteria: Iterable[Callable[..., Any]] | None = None,
    streamer: Any = None,
    global_sampler: Sampler | None = None,
    local_sampler: Sampler | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    seed: Seed = None,
    adapter: str | Sequence[str | None] | None = None,
) -> Any:
    """Continues prompts group by group (upstream `MiMoAudioForCausalLM.generate`).

    Args:
        model: a `MimoAudio`, an `LM`, or an upstream model passed through `accelerate`.
        input_ids: [C + 1, T G]; or upstream's flattened [B, T G (C + 1)]; or [B, C + 1, T G]; or a
            list of [C + 1, T_b G] for prompts of different lengths.
        generation_config: any object or dict with max_length (groups, prompt included),
            max_new_tokens, min_new_tokens; do_sample, temperature, top_k and top_p replace a
            missing global_sampler.
        stopping_criteria: `MiMoStopper`s, or callables (flattened ids [1, L], None) -> bool, called
            for each row.
        streamer: receives put(flattened prompt), put(ids [1, G (C + 1)]) for each group, end();
            only with a batch of one.
        global_sampler, local_sampler: for text and for speech codes; greedy by default.
        max_new_tokens, min_new_tokens: groups; the limit defaults to the model's
            max_position_embeddings.
        seed: one for all rows, or one for each; None draws one a row from torch's global generator
            (`torch.manual_seed`). A row's tokens depend only on its own seed.
        adapter: of those that the model was loaded with, one for all rows, or one for each; None
            for the model itself.

    Returns:
        Ids in the layout, dtype and device of input_ids, prompt included. On generated groups
        channel 0 repeats the text token over the G frames. Rows that end early are padded with
        pad_token_id (or -100) and empty codes; in a list each row keeps its own length.

    Raises:
        PromptError: ids of a wrong layout or out of range, or a prompt that leaves no room.
        ValueError: the model was not loaded with an adapter.
        NumericError: the model's values are not finite.
    """
    lm = language_model(model)
    batch = _Batch.read(input_ids, lm.config)
    options = _Options.read(generation_config, stopping_criteria, max_new_tokens, min_new_tokens)
    engine = getattr(model, "engine", None)
    context = min(lm.config.max_positions, engine.capacity if engine else lm.config.max_positions)
    sizes = [prompt.shape[1] // lm.config.group_size for prompt in batch.prompts]
    limits, rows = [options.limits(size, context) for size in sizes], len(sizes)
    adapters = _row_adapters(lm, adapter, rows)
    methods = (getattr(streamer, name, None) for name in ("put", "end"))
    if streamer is not None and not all(map(callable, methods)):
        raise TypeError(f"a streamer has put() and end(), as a {type(streamer).__name__} has not")
    if streamer is not None and rows != 1:
        problem = f"a streamer takes a batch of one, not {rows}"
        raise ValueError(f"{problem}; call generate once a prompt")
    if engine is None:
        pairs = zip(sizes, limits, strict=True)
        engine = Engine(lm, rows, max(size + limit.max_new for size, limit in pairs))
    chosen = (global_sampler or options.sampler or GREEDY, local_sampler or GREEDY)
    samplers = Samplers(*map(as_sampler, chosen))
    if streamer is not None:
        streamer.put(flatten_ids(batch.prompts[0])[None].cpu())
    grown = [[prompt] for prompt in batch.prompts]
    # Rows of a batch are read one after the other, so none may pause until it is read.
    ahead, replies = None if rows > 1 else 1, []
    how_drawn = zip(row_seeds(seed, rows), adapters, strict=True)
    for parts, limit, drawn in zip(grown, limits, how_drawn, strict=True):
        sequence = engine.sequence(*drawn)
        sequence.ids = parts[0]
        hook = _stop_hook(options.callables, parts)
        how = hook, ahead, False, Priority.BATCH
        replies.append(engine.start(sequence, limit, samplers, *how))
    try:
        for reply, parts in zip(replies, grown, strict=True):
            for group in reply:
                ids = group_ids(group.text, group.codes)
                if bool((ids[1:] == NOT_FINITE).any()):
                    raise reply.not_finite()
                if not options.callables:
                    parts.append(ids)
                if streamer is not None:
                    streamer.put(flatten_ids(ids)[None])
    finally:
        for reply in replies:
            reply.close()
    if streamer is not None:
        streamer.end()
    return batch.write([torch.cat(parts, dim=1) for parts in grown], options.pad_id, lm.config)


CONFIG_OPTIONS = (
    *("max_length", "max_new_tokens", "min_new_tokens", "pad_token_id"),
    *("do_sample", "temperature", "top_k", "top_p"),
)
"""What is read of a generation_config."""

WITHOUT_EFFECT = frozenset(
    {"eos_token_id", "bos_token_id", "use_cache", "attention_mask", "synced_gpus", "warmup_run"}
    | {"transformers_version", "return_dict_in_generate"}
)
"""Options that upstream's scripts give and upstream's own loop does not read either."""

_warned = set[str]()


def config_options(config: Any) -> dict[str, Any]:
    """The options of a generation_config, a dict or any object; unknown ones warn once each.

    Of transformers' own class those that differ from its defaults are looked at.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        given = dict(config)
    else:
        stated = config.to_diff_dict() if hasattr(config, "to_diff_dict") else None
        given = stated or dict(getattr(config, "__dict__", {}))
        given |= {name: getattr(config, name, None) for name in CONFIG_OPTIONS}
    public = (name for name in map(str, given) if not name.startswith("_"))
    for name in sorted(set(public) - {*CONFIG_OPTIONS, *WITHOUT_EFFECT, *_warned}):
        value = given.get(name)
        # By type first: tensors of some kinds compare with nothing.
        off = value is None or (isinstance(value, bool | int | float) and not value)
        if not off:
            _warned.add(name)
            near = suggestion(name, CONFIG_OPTIONS)
            warnings.warn(f"generate ignores the option {name!r}: {near}", stacklevel=4)
    return given


def language_model(model: Any) -> LM:
    """The `LM` behind any object that `generate` accepts."""
    for candidate in (model, getattr(model, "lm", None)):
        if isinstance(candidate, LM):
            return candidate
    # Of an accelerated model `generate` has it, also through what wraps the model.
    for owner in (model, getattr(model, "model", None)):
        candidate = getattr(getattr(owner, "generate", None), "lm", None)
        if isinstance(candidate, LM):
            return candidate
    raise TypeError(
        f"cannot generate with a {type(model).__name__}; load one with mimo_fast.load(lm, codec), "
        "or pass an upstream model through mimo_fast.accelerate(model) first"
    )


def _row_adapters(
    lm: LM, adapter: str | Sequence[str | None] | None, rows: int
) -> list[str | None]:
    """One adapter a row, each of which the model has."""
    found = [adapter] * rows if isinstance(adapter, str | None) else [*adapter]
    if len(found) != rows:
        raise ValueError(f"{len(found)} adapters for {rows} prompts; give one, or one a prompt")
    for each in found:
        lm.place_of(each)
    return found


def flatten_ids(ids: Tensor) -> Tensor:
    """[C + 1, T G] -> upstream's flattened [T G (C + 1)], frame by frame."""
    return ids.T.reshape(-1)


def unflatten_ids(flat: Tensor, channels: int) -> Tensor:
    """Upstream's flattened [T G (C + 1)] -> [C + 1, T G]."""
    return flat.reshape(-1, channels + 1).T


def unflatten_history(flat: Tensor, config: LMConfig) -> Tensor:
    """Upstream's flattened history [1, T G (C + 1)] -> checked ids [C + 1, T G].

    Raises:
        PromptError: it has another shape or an id out of range.
    """
    if (
        not isinstance(flat, Tensor)
        or flat.is_meta
        or flat.layout != torch.strided
        or flat.numel() % config.row_width
        or not flat.numel()
    ):
        shape = list(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
        problem = f"a history is a tensor [1, T * {config.row_width}], not {shape}"
        raise PromptError(f"{problem}: set one that `history` gave, or None")
    return check_ids(unflatten_ids(flat.reshape(-1), config.channels), config)


@dataclass(frozen=True)
class _Batch:
    """Prompts [C + 1, T_b G] int64 on the CPU, and the caller's layout."""

    prompts: list[Tensor]
    layout: str
    like: Tensor

    @classmethod
    def read(cls, input_ids: Ids, config: LMConfig) -> "_Batch":
        problem = "a batch must be a non-empty list of [C + 1, T * group_size] tensors"
        if not isinstance(input_ids, Tensor):
            rows, layout = list(input_ids), "list"
            if any(not isinstance(row, Tensor) or row.ndim != 2 for row in rows):
                raise PromptError(problem)
        elif input_ids.ndim == 3:
            rows, layout = list(input_ids), "channels"
        elif input_ids.ndim == 2 and _is_single(input_ids, config):
            rows, layout = [input_ids], "single"
        elif input_ids.ndim == 2 and input_ids.shape[1] % config.row_width == 0:
            rows, layout = [unflatten_ids(row, config.channels) for row in input_ids], "flat"
        else:
            raise PromptError(
                f"input_ids of shape {list(input_ids.shape)} are neither [{config.channels + 1}, "
                f"T * {config.group_size}] nor flattened [batch, T * {config.row_width}]"
            )
        if not rows:
            raise PromptError(problem)
        like = input_ids if isinstance(input_ids, Tensor) else rows[0]
        return cls([check_ids(row, config) for row in rows], layout, like)

    def write(self, rows: list[Tensor], pad_id: int, config: LMConfig) -> Any:
        rows = [row.to(self.like.dtype) for row in rows]
        if self.layout == "list":
            return [row.to(self.like.device) for row in rows]
        longest = max(row.shape[1] for row in rows)
        pad = rows[0].new_tensor((pad_id, *config.empty_codes))[:, None]
        padding = (pad.expand(-1, longest - row.shape[1]) for row in rows)
        full = torch.stack([torch.cat(pair, dim=1) for pair in zip(rows, padding, strict=True)])
        if self.layout == "single":
            full = full[0]
        elif self.layout == "flat":
            full = torch.stack([flatten_ids(row) for row in full])
        return full.to(self.like.device)


def _is_single(ids: Tensor, config: LMConfig) -> bool:
    """Whether ids are [C + 1, T G]; in a flattened batch every row would contain text filler."""
    if ids.shape[0] != config.channels + 1 or ids.shape[1] % config.group_size:
        return False
    return ids.shape[1] % config.row_width != 0 or not bool((ids[1:] == TEXT_FILLER).any())


def check_ids(ids: Tensor, config: LMConfig) -> Tensor:
    """A prompt's ids [C + 1, T G] as int64 on the CPU.

    Raises:
        PromptError: they are no integers, not of that shape, or an id that is read is out of range.
    """
    if not isinstance(ids, Tensor):
        raise PromptError(f"ids must be a tensor of integers, not a {type(ids).__name__}")
    if (
        ids.ndim != 2
        or ids.shape[0] != config.channels + 1
        or ids.shape[1] % config.group_size
        or not ids.shape[1]
    ):
        raise PromptError(
            f"a prompt must be [{config.channels + 1}, a positive multiple of "
            f"{config.group_size}], not {list(ids.shape)}"
        )
    if ids.dtype == torch.bool or ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise PromptError(f"ids must be a tensor of integers, not {ids.dtype}")
    ids = ids.to("cpu", torch.int64)
    sizes = ids.new_tensor((config.vocab_size, *config.code_sizes))[:, None]
    text = ids[:1, :: config.group_size].repeat_interleave(config.group_size, dim=1)
    used = torch.cat((text, ids[1:]))
    wrong = (used < 0) | (used >= sizes)
    if wrong.any():
        channel, position = (int(i) for i in wrong.nonzero()[0])
        raise PromptError(
            f"id {int(used[channel, position])} of channel {channel} at frame {position} is "
            f"outside 0..{int(sizes[channel]) - 1}"
        )
    return ids


@dataclass(frozen=True)
class _Options:
    """Lengths and stop rules from generation_config, criteria and arguments."""

    max_length: int | None
    max_new: int | None
    min_length: int
    min_new: int
    stop_ids: frozenset[int]
    callables: list[Callable[..., Any]]
    sampler: MiMoSampler | None
    pad_id: int

    @classmethod
    def read(
        cls, config: Any, criteria: Iterable[Any] | None, max_new: int | None, min_new: int
    ) -> "_Options":
        given = config_options(config)

        def option(name: str, hint: Any = int | None) -> Any:
            return as_type(hint, given.get(name), f"generation_config: {name}")

        everything = list(criteria or ())
        stoppers = [criterion for criterion in everything if _is_stopper(criterion)]
        callables = [criterion for criterion in everything if not _is_stopper(criterion)]
        max_new = option("max_new_tokens") if max_new is None else max_new
        if max_new is not None and max_new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new}")
        lengths = [stopper.max_length for stopper in stoppers if stopper.max_length]
        if max_new is None and option("max_length"):
            lengths.append(option("max_length"))
        sampler = None
        if option("do_sample", bool | None):
            temperature, top_p = (option(name, float | None) for name in ("temperature", "top_p"))
            sampler = MiMoSampler(True, temperature, option("top_k"), top_p)
        pad_id = option("pad_token_id")
        return cls(
            max_length=min(lengths, default=None),
            max_new=max_new,
            min_length=max((stopper.min_length or 0 for stopper in stoppers), default=0),
            min_new=max(min_new, option("min_new_tokens") or 0),
            stop_ids=frozenset().union(*(stopper.stop_token_ids for stopper in stoppers)),
            callables=callables,
            sampler=sampler,
            pad_id=TEXT_FILLER if pad_id is None else pad_id,
        )

    def limits(self, prompt: int, context: int) -> Limits:
        """Limits of a row with a prompt of `prompt` groups in a context of `context` groups."""
        longest = min(context, self.max_length or context)
        room = longest - prompt
        if room < 1:
            raise PromptError(
                f"the prompt has {in_seconds(prompt)} and the limit is {in_seconds(longest)}, "
                "prompt included: "
                "shorten the prompt or raise max_length"
            )
        shortest = max(self.min_new, self.min_length - prompt)
        return Limits(min(room, self.max_new or room), shortest, self.stop_ids)


def _is_stopper(criterion: Any) -> bool:
    """Whether it is a `MiMoStopper`, ours or upstream's."""
    names = ("stop_token_ids", "min_length", "max_length", "group_size")
    return all(hasattr(criterion, name) for name in names)


def _any(answer: Any) -> bool:
    """Whether a criterion says yes, by a bool, or an array or tensor of them."""
    return bool(answer.any() if hasattr(answer, "any") else np.any(answer))


def _stop_hook(callables: list[Callable[..., Any]], grown: list[Tensor]) -> StopHook | None:
    """A hook that appends each new group to its row and calls every criterion with the row."""
    if not callables:
        return None

    def hook(text: int, codes: Tensor) -> bool:
        grown.append(group_ids(text, codes))
        so_far = flatten_ids(torch.cat(grown, dim=1))[None]
        return any(_any(criterion(so_far, None)) for criterion in callables)

    return hook
