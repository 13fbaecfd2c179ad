"""The report holds what the records hold and nothing else; the committed one is up to date."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import lookahead, projection, report
from benchmarks.__main__ import main
from benchmarks.cards import cards, cards_text
from benchmarks.records import NOT_MEASURED, Entry, JsonLines, Measured, picture_name
from benchmarks.report import DOCUMENT, RESULTS, document, write_report
from mimo_fast.bench.cards import CARDS
from mimo_fast.runtime.memory import GB

CARD = "NVIDIA H200"
TIMING = {"p10": 0.002, "p50": 0.0025, "p90": 0.003, "n": 9}
SPREAD = {"p50": 0.0421, "p95": 0.05, "p99": 0.06, "n": 3}
CEILING = {"read_Bps": 4.0e12, "copy_Bps": 3.5e12, "flops": {"float32": 5e13, "bfloat16": 7e14}}


COMMITTED = Measured.read(RESULTS)


def environment(date: str = "2027-01-02T03:04:05+00:00", device: str = CARD) -> dict:
    about = {"type": "cuda", "name": device}
    return {"date": date, "commit": "0123456789abcdef", "dirty": False, "device": about}


def like(kind: str, **fields) -> dict:
    """A committed record of a GPU, with other fields."""
    found = next(e for e in COMMITTED.find(kind) if e.on_gpu)
    return dict(found) | {"ceiling": CEILING, "environment": environment()} | fields


def groups(**changes) -> dict:
    fields = {"quantization": "int4", "batch": 1, "prompt_groups": 230, "groups": 24}
    fields |= {"text_group": TIMING, "audio_group": TIMING, "audio_rtf": 0.0156}
    fields["floor"] = {"prefill": 0.006, "text_group": 0.0015, "audio_group": 0.0016}
    fields["of_floor"] = {"prefill": 0.5, "text_group": 0.6, "audio_group": 0.637}
    return like("groups", **fields | changes)


def request(**changes) -> dict:
    fields = {"quantization": "int4", "task": "tts", "batch": 1, "audio_ttfp": SPREAD}
    fields |= {"audio_rtf": 0.111, "peak_bytes": 7_770_000_000, "joules": 12.5}
    return like("request", **fields | changes)


def op(**changes) -> dict:
    fields = {"op": "backbone.qkv", "provider": "ours-gpu", "seconds": TIMING, "of_ceiling": 0.789}
    return like("op", **fields | changes)


def profile(**changes) -> dict:
    kernel = {"name": "gemv_kernel", "count": 400, "seconds": 0.0015, "bytes": None}
    fields = {"quantization": "int4", "batch": 1, "mode": "graph", "audio_group": TIMING}
    fields |= {"kernels_a_group": 500, "kernel_seconds": 0.002, "kernels": [kernel]}
    fields["bytes"] = {"backbone": 5 * GB, "patch decoder": GB}
    return like("profile", **fields | changes)


def measured(*records: dict, file: str = "2027-01-02-gpu.jsonl") -> Measured:
    return Measured.of(Entry(record, file=file) for record in records)


def text_of(*records: dict, tmp_path: Path) -> str:
    return document(measured(*records), tmp_path, [])


def row_of(text: str, beginning: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(beginning))


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    assert write_report(RESULTS, tmp_path / DOCUMENT.name) == 0
    advice = "run: python -m benchmarks --report"
    assert (tmp_path / DOCUMENT.name).read_text() == DOCUMENT.read_text(), advice
    committed, drawn = (
        {p.name: p.read_bytes() for p in (folder / DOCUMENT.stem).glob("*")}
        for folder in (DOCUMENT.parent, tmp_path)
    )
    assert drawn.keys() == committed.keys()
    for name, picture in drawn.items():
        (strokes, places), (wanted, there) = _parts_of(picture), _parts_of(committed[name])
        assert strokes == wanted, f"{name}: {advice}"
        assert places == pytest.approx(there, abs=1e-3), f"{name}: {advice}"


def test_the_packages_known_machines_are_those_of_the_committed_results():
    assert CARDS.read_text() == cards_text(COMMITTED), "run: python -m benchmarks --report"
    for card in json.loads(CARDS.read_text())["cards"]:
        for form, known in card["formats"].items():
            assert known["dates"]
            for file, commit in known["sources"]:
                records = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
                seen = {e["environment"]["commit"] for e in records if "environment" in e}
                assert commit in seen, f"{card['name']} {form}"


def test_known_machines_are_written_with_the_committed_report_alone(tmp_path, monkeypatch):
    ours = tmp_path / "cards.json"
    monkeypatch.setattr(report, "CARDS", ours)
    monkeypatch.setattr("benchmarks.plots.draw", lambda *_: [])
    monkeypatch.setattr(report, "document", lambda *_: "")
    assert write_report(RESULTS, tmp_path / "other.md") == 0
    assert not ours.exists()
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "other.md")
    assert main(["--report", "-o", str(tmp_path / "other.md")]) == 0
    assert ours.read_text() == CARDS.read_text()


def test_a_machine_is_known_by_its_own_records():
    spoken = request(prompt_groups=107), request(batch=8), request(batch=16, audio_rtf=1.5)
    (card,) = cards(measured(groups(), *spoken))
    assert (card["name"], card["type"], card["read_Bps"]) == (CARD, "cuda", 4.0e12)
    assert card["formats"] == {
        "int4": {
            "audio_group": 0.0025,
            "of_floor": 0.637,
            "first_audio": 0.0421,
            "peak_bytes": 7_770_000_000,
            "streams": 8,
            "or_more": False,
            "dates": ["2027-01-02"],
            "sources": [("2027-01-02-gpu.jsonl", "0123456789abcdef")],
        }
    }
    (steady,) = cards(measured(groups()))
    found = steady["formats"]["int4"]
    assert (found["first_audio"], found["peak_bytes"], found["streams"]) == (None, None, None)


def _parts_of(picture: bytes) -> tuple[str, list[float]]:
    """An SVG without its numbers, and these: their last digits, and so the names of clips, hang on
    the CPU."""
    text, number = re.sub(r"#?\bp[0-9a-f]{10}\b", "", picture.decode()), r"-?\d+\.\d+"
    return re.sub(number, "", text), [float(found) for found in re.findall(number, text)]


def test_without_records_every_row_says_so(tmp_path):
    text = text_of(tmp_path=tmp_path)
    for place in ("**a GPU**", "**a CPU**"):
        section = text.split(place)[1].split("**")[0]
        for name in ("7b int4", "7b int8", "7b bf16"):
            assert row_of(section, f"| {name} |").count("not measured yet") == 6
    for place in ("on a GPU", "on a CPU"):
        reply = "A spoken reply by transformers' modules as upstream runs them"
        assert f"{reply} {place}: not measured yet." in text
    projected = len(projection.CARDS) * len(projection.FORMATS)
    assert text.count("projection: not measured yet") == projected


def test_records_of_a_gpu_appear(tmp_path):
    requests = request(), request(batch=16, audio_rtf=1.5), request(batch=8)
    text = text_of(groups(), *requests, op(), profile(), tmp_path=tmp_path)
    section = text.split(f"**{CARD}**")[1]
    first = row_of(section, "| 7b int4 |")
    assert first == "| 7b int4 | 2.50 ms at 254 of context | 63.7% | 0.016 | 42 ms | 8 | 7.77 GB |"
    assert row_of(section, "| 7b int8 |").count("not measured yet") == 6
    assert "**a GPU**" not in text
    assert f"*{CARD}; 2027-01-02; commit 0123456789; [2027-01-02-gpu.jsonl]" in text
    assert "| 7b int4 | tts | 16 |" in text
    assert "12.5 J" in text
    assert "78.9%" in row_of(text, "| backbone.qkv | ours-gpu |")
    assert "`gemv_kernel` | 400 | 1.50 ms | 75.0%" in text
    assert "Every op on a GPU" not in text


def test_the_newest_record_of_a_device_wins():
    old, new, other = (
        groups(audio_rtf=rtf, environment=environment(date, device))
        for rtf, date, device in (
            (0.1, "2027-01-01T00:00:00+00:00", CARD),
            (0.2, "2027-01-03T00:00:00+00:00", CARD),
            (0.3, "2027-01-02T00:00:00+00:00", "another"),
        )
    )
    for order in ([old, new, other], [new, other, old]):
        found = measured(*order).find("groups")
        assert sorted(entry["audio_rtf"] for entry in found) == [0.2, 0.3]


def test_a_quick_table_of_a_preset_replaces_the_older_one_and_tells_the_streams(tmp_path):
    about = {"kind": "quick", "preset": "7b", "quantization": "int4", "dtype": "bfloat16"}
    tables = ("so", "2027-01-01T00:00:00+00:00", 4), ("thus", "2027-01-02T00:00:00+00:00", 64)
    old, new = (
        about
        | {"model": words, "ceiling": CEILING, "environment": environment(date)}
        | {"rows": [{"streams": streams, "floor": 0.1, "metrics": request()}]}
        for words, date, streams in tables
    )
    text = text_of(new, old, tmp_path=tmp_path)
    assert "| 64 or more |" in row_of(text, "| 7b int4 | not measured yet")
    assert "| 7b int4 | 64 |" in text
    assert "| 7b int4 | 4 |" not in text


def test_what_was_skipped_is_told_by_the_newest_file_alone(tmp_path):
    files = {"01-cpu": "long ago", "02-cpu": "today", "01-gpu": "elsewhere"}
    records = [
        Entry(file=f"2027-01-{file}.jsonl", kind="skipped", name=name, reason="no room")
        for file, name in files.items()
    ]
    text = document(Measured.of(records), tmp_path, [])
    assert "long ago" not in text
    assert "| today | no room |" in text
    assert "| elsewhere | no room |" in text


def test_the_pictures_are_the_same_bytes_twice_and_old_ones_go(tmp_path):
    output, other = JsonLines(tmp_path / "2027-01-02-gpu.jsonl"), {"provider": "cublas-bf16"}
    for record in (groups(), groups(batch=4), request(), op(), op(**other, bytes=50_000_000)):
        output.append(record)
    target = tmp_path / "docs" / "report.md"
    (target.parent / "report").mkdir(parents=True)
    stale = target.parent / "report" / "gone.svg"
    stale.touch()
    assert main(["report", "--results", str(tmp_path), "-o", str(target)]) == 0
    assert not stale.exists()
    names = {picture_name(kind, CARD) for kind in ("roofline", "latency", "memory")}
    drawn = {path.name: path.read_bytes() for path in (target.parent / "report").iterdir()}
    assert drawn.keys() == names
    # Pictures stand in the text once each.
    assert all(target.read_text().count(name) == 1 for name in names)
    shutil.rmtree(target.parent)
    target.parent.mkdir()
    assert main(["report", "--results", str(tmp_path), "-o", str(target)]) == 0
    assert {path.name: path.read_bytes() for path in (target.parent / "report").iterdir()} == drawn


def test_labels_of_a_roofline_lie_on_nothing():
    """Many ops at one place: every number is beside all points, lines and other numbers."""
    pytest.importorskip("matplotlib")
    from matplotlib.text import Annotation

    from benchmarks import plots

    ops = [op(op=f"x.{i}", seconds=TIMING | {"p50": 0.0025 + i * 1e-6}) for i in range(30)]
    entries = measured(*ops).find("op")
    (axes,) = plots.roofline(entries, CARD).axes
    points = [plots._in_points(axes, *plots._point(entry)) for entry in entries]
    notes = [text for text in axes.texts if isinstance(text, Annotation)]
    numbers = [text for text in notes if text.get_text().isdigit()]
    assert len(numbers) == plots.OUTLIERS
    places = []
    for text in numbers:
        at = plots._in_points(axes, *text.xy)
        places.append(tuple(a + b for a, b in zip(at, text.xyann, strict=True)))
    for i, (x, y) in enumerate(places):
        assert all(max(abs(x - px), abs(y - py)) >= 8 for px, py in points)
        assert all(max(abs(x - ox), abs(y - oy)) >= 10 for ox, oy in places[:i])


def test_the_latency_picture_has_floors_and_says_what_is_missing():
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    others = groups(batch=4), groups(prompt_groups=4000), groups(quantization="int8")
    entries = measured(groups(), *others).find("groups")
    short, longest, by_context = plots.latency(entries, CARD, ["7b int4", "7b int8"]).axes
    assert [axes.get_title() for axes in (short, longest, by_context)] == [
        "short context: 254 groups",
        "long context: 4,024 groups",
        "smallest batch",
    ]
    assert [text.get_text() for text in longest.texts] == ["not measured: 7b int8"]
    dashed = [line for line in short.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[1, 4], [1]]
    assert all(set(line.get_ydata()) == {1.6} for line in dashed)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert write_report(tmp_path, tmp_path / "report.md") == 1
    error = capsys.readouterr().err
    assert "pip install 'mimo-fast[bench]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.md").exists()


def test_a_projection_is_the_formula(tmp_path):
    eager = profile(mode="eager", kernels_a_group=9000)
    known = projection.basis(measured(profile(), eager), "int4")
    # 6 GB at 4 TB/s (of 4.8 published) are 1.5 ms of 2.5; the rest is that of 500 kernels.
    assert known.latency == pytest.approx(2e-6)
    assert known.share == pytest.approx(4 / 4.8)
    card = next(card for card in projection.CARDS if card.name == "RTX 4090")
    floor, seconds = projection.project(card, "int4", known)
    work = projection.group_work("int4", 72 * 2**20)
    # What kernels take beyond their bytes does not grow with the bytes' time.
    assert seconds == pytest.approx(work.total / (1008e9 * known.share) + 500 * 2e-6)
    # Ten of the eleven steps find what the cache has kept of the one before.
    assert floor == pytest.approx((work.total - 10 * 72 * 2**20) / 1008e9)
    (own,) = (c for c in projection.CARDS if c.name == "H200 SXM")
    assert projection.project(own, "int4", known)[1] == pytest.approx(work.total / 4e12 + 1e-3)
    text = text_of(groups(), profile(), tmp_path=tmp_path)
    row = row_of(text, "| RTX 4090 | int4 |")
    assert "projection: " in row
    assert f"{CARD}: 2.50 ms" in row
    assert "not measured" not in row
    assert "projection: not measured yet" in row_of(text, "| RTX 4090 | int8 |")
    # The measured card has a measurement.
    assert "| H200 SXM | int4 |" not in text


def test_nothing_is_projected_from_a_cpu_an_unknown_card_or_without_a_profile():
    cpu = {"type": "cpu", "name": "a CPU", "cores": 2, "instructions": "AVX2"}
    unknown = environment(device="NVIDIA Unheard Of")
    for records in (
        [groups()],
        [profile(batch=4)],
        [profile(mode="eager")],
        [profile(quantization="int8")],
        [profile(environment=unknown)],
        [profile(environment=environment() | {"device": cpu})],
    ):
        assert projection.basis(measured(*records), "int4") is None


def test_what_fits_into_a_card(tmp_path):
    text = text_of(tmp_path=tmp_path)
    for card, form, fits in (
        ("RTX 3060 12 GB", "int4", "yes"),
        ("RTX 3060 12 GB", "bf16", "no"),
        ("RTX 4090", "bf16", "yes"),
    ):
        assert f"| {fits}: " in row_of(text, f"| {card} | {form} |")


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Ti", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "H200 SXM"),
    ],
)
def test_a_card_is_known_by_its_drivers_name(driver, name):
    card = projection.card_of(driver)
    assert (card and card.name) == name


def test_look_ahead_is_shown_over_both_voices(tmp_path):
    places = {
        place: {"snr_db": {"mean": 20.0, "worst": 9.5}, "mel_db": {"mean": 0.2, "worst": 0.5}}
        for place in ("first_1", "first_3", "first_10", "whole")
    }
    counts = {"words_wrong": 1, "words": 25, "unlike": 2, "sentences": 8}
    rows = [
        {"voice": voice, "statistics": kind, "lookahead": look, **measured}
        for voice in ("replies", "unheard")
        for kind, look, measured in (
            ("one-shot", None, counts),
            ("recording", None, counts | {"words_wrong": 0}),
            ("own", 2, places),
            ("own", "elastic", places | counts),
        )
    ]
    rows[2] = rows[2] | {
        "first_3": {"snr_db": {"mean": 30.0, "worst": 8.5}, "mel_db": {"mean": 0.4, "worst": 0.45}}
    }
    name = "2027-01-02-lookahead.json"
    about = environment()
    assert NOT_MEASURED in "\n".join(lookahead.section(tmp_path))
    (tmp_path / name).write_text(json.dumps({"environment": about, "rows": rows}))
    text = "\n".join(lookahead.section(tmp_path))
    wide = "20.0 (9.5) | 25.0 (8.5) | 20.0 (9.5) | 20.0 (9.5) | 0.20 (0.50) | 0.30 (0.50)"
    assert f"| own | 2 | {wide}" in text
    assert "| own | elastic | 2 of 50 | 4 of 16 |" in text
    assert "| own | 2 | 2 of 50" not in text
    assert "Of the recordings 0 of 50 words are wrong, of one-shot decoding 2 of 50." in text
    assert name in text
