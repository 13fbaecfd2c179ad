"""A card as the engine's cost model knows it, calibrated by what one was measured to do.

`Calibration.of` takes bandwidths, exchanges and what L2 keeps from the microbenchmarks, and
handling and waiting from two int8 runs of the kernel of engine_measured.py (without waiting and
copies; without copies). All other runs of it are checks (engine_report.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.engine_measured import BLOCKS, THREADS, Phase, Table, measured_patch_decoder
from benchmarks.projection import CARDS, card_of
from benchmarks.projection import Card as Published
from benchmarks.records import study_records
from mimo_fast.config import LMConfig

Runs = Sequence[dict[str, Any]]
Study = tuple[str, dict[str, Any]]
"""Name of a file, and results of benchmarks/studies/engine.py by part."""

BOOST = {"RTX 4090": 2.52e9, "RTX 5090": 2.41e9}
"""Hz, published (NVIDIA, GeForce RTX 4090 and 5090 specifications). The H200 has the H100's chip,
and is assumed to have its measured clock."""


@dataclass(frozen=True)
class Calibration:
    """What one card was measured to do, in seconds, bytes and Hz.

    Args:
        fitted_on: the card whose patch decoder gave handling and waiting.
        kept: bytes of L2 that serve the next pass over the weights.
        exchanges: (blocks, threads, whole) -> points of (pieces that a block reads, seconds).
        trip: a read of what L2 has. Assumed: half of the least exchange of two blocks.
        handling: clocks of a phase.
        attending: clocks of them, in the mean over all phases, that every block took to attend for
            half of the heads: what out took longer than gate/up before its units.
        sources: names of the files.
    """

    device: str
    fitted_on: str
    read_Bps: float
    cache_Bps: float
    kept: float
    clock: float
    trip: float
    handling: float
    waiting: float
    attending: float
    exchanges: dict[tuple[int, int, bool], tuple[tuple[int, float], ...]]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, results: Sequence[Study], config: LMConfig) -> Calibration:
        """Of the card of the newest microbenchmarks, from studies of the engine, oldest first.

        Handling, waiting and clock are another card's, where this one has not run the patch
        decoder; then the clock is the published one, if it is known.

        Raises:
            ValueError: a part or a run is missing.
        """
        parts: dict[str, dict[str, tuple[str, Runs]]] = {}
        for name, result in results:
            for part in ("exchange", "stream", "int8"):
                if runs := result.get(part):
                    of_card = parts.pop(runs[0]["device"], {})
                    parts[runs[0]["device"]] = of_card | {part: (name, runs)}
        here = [x for x, found in parts.items() if {"exchange", "stream"} <= found.keys()]
        ran = [x for x in here if "int8" in parts[x]]
        if not ran:
            raise ValueError("no card ran all parts: exchange, stream, int8 of the engine's study")
        fitted = here[-1] if here[-1] in ran else ran[-1]
        known = cls._alone(fitted, parts[fitted]).fitted(parts[fitted]["int8"][1], config)
        if fitted == here[-1]:
            return known
        found = cls._alone(here[-1], parts[here[-1]])
        clock = found.published and BOOST.get(found.published.name)
        return replace(
            found,
            clock=clock or known.clock,
            handling=known.handling,
            waiting=known.waiting,
            attending=known.attending,
            fitted_on=known.fitted_on,
            sources=tuple(dict.fromkeys((*known.sources, *found.sources))),
        )

    @classmethod
    def _alone(cls, device: str, parts: Mapping[str, tuple[str, Runs]]) -> Calibration:
        """What the microbenchmarks say, without handling."""
        streams = [x for x in parts["stream"][1] if x.get("depth") == 4]
        usual = [x for x in streams if (x["blocks"], x["threads"]) == (BLOCKS, THREADS)]
        largest = max(usual, key=lambda x: (x["keep"] < 0, x["megabytes"]))
        # Of weights that do not fit into any L2, those of int4.
        told = [x for x in usual if x["keep"] >= 0 and 140 < x["megabytes"] < 150]
        first = next(x for x in told if x["keep"] == 0)
        saved = 1 - min(x["us_a_pass"] for x in told) / first["us_a_pass"]
        tagged = [x for x in parts["exchange"][1] if x.get("kind") == "tagged"]
        return cls(
            device=device,
            fitted_on=device,
            read_Bps=largest["GB_s"] * 1e9,
            cache_Bps=max(x["GB_s"] for x in usual) * 1e9,
            kept=saved * first["megabytes"] * 1e6,
            clock=0.0,
            trip=min(x["us"] for x in tagged if x["blocks"] == 2) / 2e6,
            handling=0.0,
            waiting=1.0,
            attending=0.0,
            exchanges=_points(tagged),
            sources=tuple(dict.fromkeys(name for name, _ in parts.values())),
        )

    def fitted(self, runs: Runs, config: LMConfig) -> Calibration:
        """With handling and waiting of these runs of the int8 patch decoder, and their clock."""
        table = measured_patch_decoder(config, 8, heads=False)
        clock = clock_of(runs, config)
        alone, waited = (usual_run(runs, without)["us_a_patch"] / 1e6 for without in (3, 2))
        plain = replace(self, clock=clock, handling=0.0, waiting=1.0)
        issue = plain.chain(table, waits=False)
        exchanged = plain.chain(table) - issue
        return replace(
            plain,
            handling=(alone - issue) * clock / table.count,
            waiting=(waited - alone) / exchanged,
            attending=_attending(runs) * config.patch_decoder.layers * table.steps / table.count,
        )

    def exchange(self, reads: float, whole: bool, blocks: int, threads: int) -> float:
        """Seconds of an exchange alone: a line through what was measured."""
        if not reads:
            return 0.0
        known = sorted({b for b, t, w in self.exchanges if (t, w) == (threads, whole)})
        below = max((b for b in known if b <= blocks), default=known[0])
        above = min((b for b in known if b >= blocks), default=known[-1])
        low, high = (_line(self.exchanges[b, threads, whole], reads) for b in (below, above))
        share = (blocks - below) / (above - below) if above > below else 0.0
        return low + min(max(share, 0.0), 1.0) * (high - low)

    def wait(self, reads: float, whole: bool, blocks: int, threads: int) -> float:
        """Seconds of an exchange within a kernel, beyond the trip that handling has."""
        alone = self.exchange(reads, whole, blocks, threads)
        return self.waiting * max(alone - self.trip, 0.0)

    # ---- The kernel that was measured

    def phase_chain(
        self, phase: Phase, blocks: int = BLOCKS, threads: int = THREADS, waits: bool = True
    ) -> float:
        """Seconds of one phase without its bytes."""
        own = (self.handling + phase.issue(blocks)) / self.clock
        if not waits:
            return own
        return own + self.wait(phase.reads, phase.reads == phase.whole, blocks, threads)

    def chain(self, table: Table, **launch: Any) -> float:
        """Seconds of all phases without their bytes."""
        each = (times * self.phase_chain(x, **launch) for times, x in table.phases)
        return table.steps * sum(each)

    def stream(self, table: Table, kept: float = 0.0) -> float:
        """Seconds of the bytes: what L2 keeps is read from memory in the first step alone."""
        held = min(kept, table.again)
        return (table.nbytes - held * (table.steps - 1)) / self.read_Bps

    @cached_property
    def published(self) -> Published | None:
        """Of the card, if it is a known one."""
        named = (card for card in CARDS if card.name == self.device)
        return next(named, None) or card_of(self.device)

    def scaled(self, card: Published) -> Calibration:
        """Another card, assumed: this one's share of the published bandwidth and of L2 that is
        kept; clocks of handling, seconds of exchanges, and L2's bandwidth as here.

        Raises:
            ValueError: nothing is published of this one.
        """
        if self.published is None:
            raise ValueError(f"nothing is published of {self.device} here")
        return replace(
            self,
            device=card.name,
            read_Bps=self.read_Bps * card.gb_per_s / self.published.gb_per_s,
            kept=self.kept * card.cache_mb / self.published.cache_mb,
            clock=BOOST.get(card.name, self.clock),
        )


def clock_of(runs: Runs, config: LMConfig) -> float:
    """Hz: the clocks of a patch's phases over the seconds of a patch with heads."""
    steps, layers = config.patch_steps, config.patch_decoder.layers
    clocks = sum(
        x["clocks_mean"] * (1 if x["phase"] in ("norm and logits", "draw") else layers)
        for x in runs
        if "phase" in x
    )
    taken = [x["us_a_patch"] for x in runs if x.get("with_heads")]
    if not clocks or not taken:
        raise ValueError("no clocks of the phases of the patch decoder")
    return steps * clocks / min(taken) * 1e6


def _attending(runs: Runs) -> float:
    """Clocks of an out phase, of blocks in the mean."""
    staged = {x["phase"]: x["clocks_mean"] for x in runs if x.get("time") == "stage"}
    return max(float(staged["out"] - staged["gate/up"]), 0.0)


def usual_run(runs: Runs, without: int) -> dict[str, Any]:
    """The fastest run of the usual launch without so much."""
    found = [
        x
        for x in runs
        if (x.get("blocks"), x.get("threads"), x.get("without")) == (BLOCKS, THREADS, without)
        and (x["keep"], x["pause"]) == (-1, 0)
    ]
    if not found:
        raise ValueError(f"no run of the patch decoder without {without}")
    return min(found, key=lambda x: x["us_a_patch"])


def read_studies(path: Path) -> list[Study]:
    """Results of the engine's study: its JSON, or records that gpu.sh wrote."""
    results = [record["result"] for record in study_records("engine", path)]
    if any("kind" in x for x in results):
        results = [x["result"] for x in results if x.get("study") == "engine"]
    return [(path.name, x) for x in results]


def _points(tagged: Runs) -> dict[tuple[int, int, bool], Any]:
    """Of vectors that all blocks make equal parts of, as the phases' are."""
    points: dict[tuple[int, int, bool], dict[int, list[float]]] = {}
    for x in tagged:
        if x["blocks"] > 2 and x["pieces"] % BLOCKS == 0:
            key = x["blocks"], x["threads"], x["pieces"] == x["read"]
            points.setdefault(key, {}).setdefault(x["read"], []).append(x["us"] / 1e6)
    return {
        key: tuple((read, sum(t) / len(t)) for read, t in sorted(each.items()))
        for key, each in points.items()
    }


def _line(points: Sequence[tuple[int, float]], x: float) -> float:
    """Through the first and last point, constant before the first."""
    (first, low), (last, high) = points[0], points[-1]
    return low + max(x - first, 0.0) * (high - low) / max(last - first, 1)
