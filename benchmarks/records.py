"""Records: JSON lines as they are made, and the newest of each thing for the report.

python -m benchmarks.records STUDY FILE.json RECORDS.jsonl      appends a study's results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.environment import ROOT, environment

NOT_MEASURED = "not measured yet"
RESULTS = ROOT / "benchmarks" / "results"

THING = {
    "op": ("op", "provider", "format", "m", "shape", "dtype"),
    "groups": ("model", "quantization", "dtype", "batch", "prompt_groups"),
    "request": ("model", "quantization", "dtype", "with_codec", "task", "batch", "prompt_groups"),
    "quick": ("preset", "model", "quantization", "dtype"),
    "baseline": ("provider", "model", "dtype"),
    "quality": ("model",),
    "compare": ("case",),
    "prompt": ("instructions", "threads", "product", "quantization", "rows", "shape"),
    "profile": ("model", "quantization", "batch", "mode"),
}
"""Kind of record -> the fields that identify what was measured."""


class JsonLines:
    """Appends records to a file, each on a line and flushed before the next; None: nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # An incomplete line, of a run that was killed while it wrote.
            cut_off = path.exists() and not (b"\n" + path.read_bytes()).endswith(b"\n")
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n" if cut_off else "")

    def append(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def machine_fields(machine: Ceiling, device: torch.device) -> dict[str, Any]:
    """The fields of a record about its machine, as it is now."""
    return {"ceiling": asdict(machine), "environment": environment(device)}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; an incomplete last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def study_records(name: str, path: Path) -> list[dict[str, Any]]:
    """A study's results (JSON, or JSON lines) as records of kind "study"."""
    try:
        found = [json.loads(path.read_text(encoding="utf-8"))]
    except json.JSONDecodeError:
        found = read_records(path)
    return [
        {"kind": "study", "study": name, "result": result}
        | ({"environment": result["environment"]} if "environment" in result else {})
        for result in found
    ]


class Entry(dict[str, Any]):
    """A record; `file` is the name of its file."""

    def at(self, path: str) -> Any:
        """A property, or a nested field such as "audio_group.p50"; None if one is absent."""
        if hasattr(Entry, path) and not hasattr(dict, path):
            return getattr(self, path)
        value = self
        for field in path.split("."):
            value = None if value is None else value[field]
        return value

    @property
    def device(self) -> str:
        """Name of the device for people."""
        about = self["environment"]["device"]
        if about["type"] != "cpu":
            return about["name"]
        return f"{about['name']}, {about['cores']} cores, {about['instructions']}"

    on_gpu = property(lambda self: self["environment"]["device"]["type"] != "cpu")
    # ISO 8601, UTC.
    date = property(lambda self: self["environment"]["date"])
    # Groups at the end of the measurement.
    context = property(lambda self: self["prompt_groups"] + self["groups"])
    bytes_per_s = property(lambda self: self["bytes"] / self["seconds"]["p50"])
    flop_per_s = property(lambda self: self["flop"] / self["seconds"]["p50"])
    interval = property(lambda self: f"{self['low']:.3f} to {self['high']:.3f}")
    link = property(lambda self: f"[{self['file']}](../benchmarks/results/{self['file']})")

    @property
    def title(self) -> str:
        """The model and its format; dense weights are named by their dtype."""
        form, dtype = self.get("quantization"), self.get("dtype")
        if form in (None, "bf16", "stored"):
            form = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
        return f"{Path(str(self['model'])).name} {form}"

    @property
    def thing(self) -> tuple[str, ...]:
        """What was measured; a newer record of the same thing replaces an older one."""
        fields = THING[self["kind"]]
        # A quick table's description of a preset's model varies with the machine's load.
        named = [field for field in fields if field != "model" or not self.get("preset")]
        return (self.device, self["kind"], *(str(self.get(field)) for field in named))


@dataclass(frozen=True)
class Measured:
    """The newest entry of everything, and what was skipped."""

    entries: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    @classmethod
    def read(cls, folder: Path) -> Measured:
        files = sorted(folder.glob("*.jsonl"))
        return cls.of(Entry(x, file=path.name) for path in files for x in read_records(path))

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Measured:
        newest: dict[tuple[str, ...], Entry] = {}
        skipped: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry["kind"] == "skipped":
                # Of files like DATE-cpu.jsonl the newest counts.
                others = skipped.get(entry["file"][10:], [])
                same = [e for e in others if e["file"] == entry["file"]]
                skipped[entry["file"][10:]] = [*same, entry]
            elif entry["kind"] in THING:
                held = newest.get(entry.thing)
                if held is None or held.date <= entry.date:
                    newest[entry.thing] = entry
        # A name once, with its last reason.
        names = [e for series in skipped.values() for e in {e["name"]: e for e in series}.values()]
        return cls(tuple(newest.values()), tuple(names))

    def find(self, kind: str, device: str | None = None) -> list[Entry]:
        of_kind = (e for e in self.entries if e["kind"] == kind)
        return [e for e in of_kind if device in (None, e.device)]

    def devices(self, *kinds: str) -> list[str]:
        """Devices with such records, GPUs first."""
        found = {e.device: e.on_gpu for e in self.entries if e["kind"] in kinds}
        return sorted(found, key=lambda device: (not found[device], device))


def slug(text: str) -> str:
    """A part of a file's name from a device's: lower case, words joined by dashes."""
    words = "".join(c if c.isalnum() else " " for c in text).lower().split()
    return "-".join(words)


def picture_name(kind: str, device: str) -> str:
    """File name of a device's picture in docs/performance/."""
    return f"{kind}-{slug(device)}.svg"


def sources(entries: Iterable[Entry]) -> str:
    """The device, and for each file and commit the days and the measured ceiling; Markdown."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        about, commit = entry["environment"], "no commit"
        if about.get("commit") is not None:
            changes = " with changes" if about.get("dirty") else ""
            commit = f"commit {about['commit'][:10]}{changes}"
        groups.setdefault((entry.device, entry["file"], commit), []).append(entry)
    lines = []
    for (device, _, commit), members in sorted(groups.items()):
        when = _span(sorted(entry.date[:10] for entry in members))
        reads = sorted(e["ceiling"]["read_Bps"] for e in members if e.get("ceiling"))
        read = _span([f"{rate / 1e9:,.1f}" for rate in reads])
        span = f"; the device then read {read} GB/s" if reads else ""
        lines.append(f"*{device}; {when}; {commit}; {members[0].link}{span}.*")
    return "  \n".join(lines)


def _span(values: Sequence[str]) -> str:
    """First and last of ordered values."""
    return " to ".join(dict.fromkeys((values[0], values[-1]))) if values else ""


def add_run_options(add: Callable[..., object], each: str) -> None:
    """Adds the options for the device of a model and the file of records; `each` has one record."""
    add("--device", default=None)
    add("--threads", type=int, help="of the CPU [chosen by the model's size]")
    about = f"append a record for each {each}"
    add("-o", "--output", type=Path, metavar="FILE.jsonl", help=about)


if __name__ == "__main__":
    lines = JsonLines(Path(sys.argv[3]))
    for study in study_records(sys.argv[1], Path(sys.argv[2])):
        lines.append(study)
