"""Which format of the weights a machine should take, and the one line that says so.

One format is measured. Others are expected to take as many times longer or shorter as their floor
is higher or lower, that is, to reach the same share of it: on known machines shares of int4, int8
and 16 bits lie between 0.40 and 0.61 on a GPU and between 0.50 and 0.54 on a CPU
(docs/performance.md, the first table). What is expected is called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from mimo_fast.bench.cards import duration, usual_share
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.floor import GroupWork, request_floor
from mimo_fast.bench.synthetic import preset_setup, weightless_lm
from mimo_fast.bench.target import PATCH_SAMPLES, SAMPLE_RATE
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.quantization import QuantizationConfig
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.memory import GB, Setup

FORMATS = (None, "int8", "int4")
"""Quantizations to choose from, the most exact first."""

CONTEXT = 8192
"""Groups of context that one stream has room for in a format that is said to fit."""

USUAL_CONTEXT = 1000
"""Groups of context at which needs are computed, as in the projection to other cards."""

PATCH = PATCH_SAMPLES / SAMPLE_RATE
"""Seconds of speech of a group."""

DENSE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Measured:
    """A number of streams, their real-time factor and median of the first audio, in seconds."""

    streams: int
    factor: float
    first_audio: float | None


@dataclass(frozen=True)
class Measurement:
    """What a table of streams was made with.

    Args:
        setup: of the measured model, with room for one request.
        quantization: the measured one, None for dense weights or as they are stored.
        prompt, words, patches: groups of a request.
        free: bytes of the device before anything was loaded; None if it does not tell.
    """

    setup: Setup
    codec: Codec | None
    quantization: str | None
    machine: Ceiling
    free: int | None
    prompt: int
    words: int
    patches: int
    _shapes: dict[str | None, LM] = field(default_factory=dict, init=False, repr=False)

    @property
    def stored(self) -> bool:
        """Whether the checkpoint's own weights are quantized, so that nothing is to be chosen."""
        return bool(self.setup.formats) and self.quantization is None

    @property
    def formats(self) -> tuple[str | None, ...]:
        """What can be taken, the most exact first."""
        return (None,) if self.stored else tuple(dict.fromkeys((*FORMATS, self.quantization)))

    def name(self, quantization: str | None) -> str:
        """A format's name; dense weights have that of their type."""
        if self.stored:
            return "the format it is stored in"
        return quantization or dense_name(self.setup.dtype)

    def _weightless(self, quantization: str | None) -> LM:
        """The model's shapes in a format, made once."""
        if quantization not in self._shapes:
            made = weightless_lm(self.setup.lm, quantization, self.setup.dtype)
            self._shapes[quantization] = made
        return self._shapes[quantization]

    def need(self, quantization: str | None, streams: int) -> int:
        """Bytes for so many such requests, and at least for one stream with a long context."""
        setup = self.setup
        if quantization != self.quantization:
            chosen = QuantizationConfig.parse(quantization)
            shapes = lm_shapes(setup.lm)
            setup = replace(setup, formats=chosen.formats(shapes) if chosen else {})
        room = self.prompt + self.words + self.patches + 2
        long = min(CONTEXT, setup.lm.max_positions)
        return max(
            replace(setup, max_batch=n, max_seq_len=length).total
            for n, length in ((streams, room), (1, long))
        )

    def fits(self, quantization: str | None, streams: int) -> bool:
        return self.free is None or self.need(quantization, streams) <= self.free

    def slower(self, quantization: str | None, streams: int) -> float:
        """Floor of a format over that of the measured one, for so many requests at once."""
        if quantization == self.quantization:
            return 1.0
        floors = [
            request_floor(
                self.machine,
                self._weightless(each),
                self.codec,
                streams,
                self.prompt,
                self.words,
                self.patches,
                self.setup.kv_cache is not None,
            )
            for each in (quantization, self.quantization)
        ]
        return floors[0] / floors[1]


@dataclass(frozen=True)
class Choice:
    """A format, and what is measured or expected of it.

    Args:
        streams: how many it carries in real time.
        factor: real-time factor of one stream.
        need: bytes for those streams.
    """

    quantization: str | None
    streams: int
    factor: float
    need: int


def choose(made: Measurement, rows: Sequence[Measured]) -> Choice:
    """The most exact format that fits and carries as many streams as any.

    Where none carries one, it is the fastest of those that fit.
    """
    choices = list[Choice]()
    for form in made.formats:
        carried = [
            row.streams
            for row in rows
            if row.factor * made.slower(form, row.streams) < 1
            and (form == made.quantization or made.fits(form, row.streams))
        ]
        streams, factor = max(carried, default=0), rows[0].factor * made.slower(form, 1)
        if form == made.quantization or made.fits(form, 1):
            choices.append(Choice(form, streams, factor, made.need(form, max(1, streams))))
    most = max(choice.streams for choice in choices)
    if most:
        return next(choice for choice in choices if choice.streams == most)
    return min(choices, key=lambda choice: choice.factor)


def advise(made: Measurement, rows: Sequence[Measured]) -> str:
    """The line: streams in real time, the first audio, the format to take.

    Args:
        rows: of one stream and more, in order.
    """
    carried, measured = [row for row in rows if row.factor < 1], made.name(made.quantization)
    if carried:
        more = " or more" if carried[-1] is rows[-1] else ""
        plural = "" if carried[-1].streams == 1 else "s"
        said = f"{carried[-1].streams}{more} simultaneous stream{plural} in real time"
        heard = dict.fromkeys((carried[0], carried[-1]))
    else:
        said = f"no stream in real time, one takes {rows[0].factor:.1f} times as long as it plays"
        heard = dict.fromkeys(rows[:1])
    times = (f"{duration(r.first_audio)} with {r.streams}" for r in heard if r.first_audio)
    first = " and ".join(times)
    said += f"{first and f', first audio after {first}'} (measured in {measured})"
    if len(made.formats) == 1:
        return said
    return (
        f"{said}; take {_reasons(made, choose(made, rows), len(carried) and carried[-1].streams)}"
    )


def _reasons(made: Measurement, chosen: Choice, carried: int) -> str:
    """The chosen format, and why, beside the measured one that carries so many streams."""
    name = made.name(chosen.quantization)
    if chosen.quantization == made.quantization:
        if not chosen.streams:
            return f"{name} for files, the fastest that fits"
        if chosen.quantization == made.formats[0]:
            return f"{name}, the most exact"
        return f"{name}: more exact formats do not fit, or are expected to carry fewer"
    why = f"is expected to carry {chosen.streams}"
    if not chosen.streams:
        why = f"is expected to take {chosen.factor:.1f} times as long as it plays, for files"
    elif chosen.streams == carried:
        why = "is more exact and expected to carry as many"
    free = "" if made.free is None else f" of {made.free / GB:.1f} GB free"
    return (
        f"{name}: it needs {chosen.need / GB:.1f} GB{free} and {why} (by its floor, not measured)"
    )


@dataclass(frozen=True)
class Needs:
    """What the published dimensions need in a format.

    Args:
        memory: bytes, with one stream of CONTEXT groups.
        read: bytes that a group of speech reads at least.
        floor: seconds of a group of speech at best.
        share: of the floor that a known machine reaches, 1 where none is like this one.
        where: that machine, or "".
    """

    name: str
    memory: int
    read: int
    floor: float
    share: float
    where: str

    @classmethod
    def of(
        cls, quantization: str | None, dtype: torch.dtype, device: torch.device, machine: Ceiling
    ) -> Needs:
        name = quantization or dense_name(dtype)
        setup = replace(preset_setup("7b", quantization, dtype), max_seq_len=CONTEXT)
        work = GroupWork.of(weightless_lm(setup.lm, quantization, dtype), 1, USUAL_CONTEXT).audio
        share, where = usual_share(device.type, name) or (1.0, "")
        read = work.total - work.cached
        return cls(name, setup.total, read, work.floor(machine, dtype), share, where)

    @property
    def expected(self) -> float:
        """Seconds of a group of speech at the share that a known machine reaches."""
        return self.floor / self.share


def computed(dtype: torch.dtype, device: torch.device, machine: Ceiling, free: int | None) -> str:
    """The line where the published dimensions were not measured: what they need, from floors."""
    found = [Needs.of(form, dtype, device, machine) for form in FORMATS]
    fitting = [each for each in found if free is None or each.memory <= free]
    # The most exact that is fast enough, else the smallest.
    chosen = next((each for each in fitting if each.expected < PATCH), found[-1])
    said = f"in {chosen.name} they need {chosen.memory / GB:.1f} GB"
    said += "" if free is None else f" ({free / GB:.1f} GB are free)"
    said += f" and at least {duration(chosen.floor)} for {duration(PATCH)} of speech"
    if chosen.where:
        said += f", {duration(chosen.expected)} at the share of its floor of {chosen.where}"
    verdict = "so one stream is expected to come in real time"
    if chosen not in fitting or chosen.expected >= PATCH:
        rate = chosen.read / chosen.share / PATCH / 1e9
        verdict = f"so take a machine with that memory that reads {rate:,.0f} GB/s or more"
    return (
        f"the published dimensions (computed, not measured): {said}; {verdict}; take {chosen.name}"
    )


def dense_name(dtype: torch.dtype) -> str:
    """Short name of weights that are not quantized."""
    full = str(dtype).removeprefix("torch.")
    return DENSE.get(full, full)
