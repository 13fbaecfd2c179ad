"""What has been measured: the records of benchmarks/results/*.jsonl, the newest of each thing on
each device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import read_records

THING = {
    "op": ("op", "provider", "format", "m", "shape", "dtype"),
    "groups": ("model", "quantization", "dtype", "batch", "prompt_groups"),
    "request": ("model", "quantization", "dtype", "with_codec", "task", "batch", "prompt_groups"),
    "quick": ("preset", "model", "quantization", "dtype"),
    "baseline": ("provider", "model", "dtype"),
    "quality": ("model",),
    "compare": ("case",),
    "profile": ("model", "quantization", "batch", "mode"),
}
"""Kind of record -> the fields that tell what was measured; a newer record of the same takes the
older one's place."""


@dataclass(frozen=True)
class Entry:
    """A record, and the name of the file that it is from."""

    file: str
    data: dict[str, Any]

    def __getitem__(self, field: str) -> Any:
        return self.data[field]

    def get(self, field: str) -> Any:
        return self.data.get(field)

    @property
    def device(self) -> str:
        """For people."""
        about = self.data["environment"]["device"]
        if about["type"] != "cpu":
            return about["name"]
        return f"{about['name']}, {about['cores']} cores, {about['instructions']}"

    @property
    def on_gpu(self) -> bool:
        return self.data["environment"]["device"]["type"] != "cpu"

    @property
    def date(self) -> str:
        """ISO 8601, UTC."""
        return self.data["environment"]["date"]

    @property
    def commit(self) -> str:
        about = self.data["environment"]
        if about.get("commit") is None:
            return "no commit"
        return f"commit {about['commit'][:10]}{' with changes' if about.get('dirty') else ''}"

    @property
    def thing(self) -> tuple[str, ...]:
        fields = THING[self["kind"]]
        # What a quick table says of a preset's model varies with the machine's mood.
        named = [field for field in fields if field != "model" or not self.get("preset")]
        return (self.device, self["kind"], *(str(self.get(field)) for field in named))

    @property
    def title(self) -> str:
        """The model and its format; dense weights are named by their type, whatever the sweep
        called them."""
        dense = self.get("quantization") in (None, "bf16", "stored")
        kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(
            self.get("dtype"), self.get("dtype")
        )
        return f"{Path(str(self['model'])).name} {kind if dense else self['quantization']}"


@dataclass(frozen=True)
class Measured:
    """The newest entry of every thing, and what was skipped."""

    entries: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    @classmethod
    def read(cls, folder: Path) -> Measured:
        files = sorted(folder.glob("*.jsonl"))
        return cls.of(Entry(path.name, record) for path in files for record in read_records(path))

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Measured:
        newest: dict[tuple[str, ...], Entry] = {}
        skipped: dict[str, dict[str, Entry]] = {}
        for entry in entries:
            if entry["kind"] == "skipped":
                # Of files like DATE-cpu.jsonl the newest has the say.
                series = entry.file[10:]
                others = skipped.get(series, {})
                same = others if all(other.file == entry.file for other in others.values()) else {}
                skipped[series] = same | {entry["name"]: entry}
            elif entry["kind"] in THING:
                held = newest.get(entry.thing)
                if held is None or held.date <= entry.date:
                    newest[entry.thing] = entry
        return cls(
            tuple(newest.values()), tuple(e for names in skipped.values() for e in names.values())
        )

    def find(
        self,
        kind: str,
        device: str | None = None,
        where: Callable[[Entry], bool] = lambda entry: True,
    ) -> list[Entry]:
        return [
            e
            for e in self.entries
            if e["kind"] == kind and (device is None or e.device == device) and where(e)
        ]

    def devices(self, *kinds: str) -> list[str]:
        """Those with such records, GPUs first."""
        found = {e.device: e.on_gpu for e in self.entries if not kinds or e["kind"] in kinds}
        return sorted(found, key=lambda device: (not found[device], device))


def sources(entries: Iterable[Entry]) -> str:
    """The device, and for each file and commit the days and the ceiling that was measured with
    them; Markdown."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.device, entry.file, entry.commit), []).append(entry)
    lines = []
    for (device, file, commit), members in sorted(groups.items()):
        days = sorted({entry.date[:10] for entry in members})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        reads = sorted(
            entry["ceiling"]["read_Bps"] / 1e9 for entry in members if entry.get("ceiling")
        )
        span = "" if not reads else f"; the device then read {_span(reads)} GB/s"
        lines.append(f"*{device}; {when}; {commit}; [{file}](../benchmarks/results/{file}){span}.*")
    return "  \n".join(lines)


def _span(values: list[float]) -> str:
    low, high = f"{values[0]:,.1f}", f"{values[-1]:,.1f}"
    return low if low == high else f"{low} to {high}"
