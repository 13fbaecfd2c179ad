"""The engine's cost model: its bytes are the model's, its sums are the tables', and it says of the
runs that an H100 measured what it is known to say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.engine_calibration import Calibration, read_studies, usual_run
from benchmarks.engine_costs import (
    BLOCKS,
    INSTRUCTIONS,
    SCALES,
    Table,
    backbone,
    codec_decoder,
    patch_decoder,
    patch_encoder,
)
from benchmarks.engine_report import cards, changes, checks, committed, section, studies, terms
from benchmarks.records import NOT_MEASURED, RESULTS
from mimo_fast.bench.floor import patch_work, word_work
from mimo_fast.bench.synthetic import preset_configs, weightless_lm
from mimo_fast.runtime.lm.transformer import TransformerWeights

CONFIG, CODEC = preset_configs("7b")
MEASURED = studies(committed(RESULTS))
FORMATS = 8, 4


@pytest.fixture(scope="module")
def card() -> Calibration:
    return Calibration.of(MEASURED, CONFIG)


def weight_bytes(table: Table) -> float:
    """Of the units alone, without scales, of a step."""
    each = (n * x.units * (x.unit_bytes - (SCALES if x.bits < 16 else 0)) for n, x in table.phases)
    return sum(each)


def values(stack: TransformerWeights) -> int:
    return sum(
        w.shape[0] * w.shape[1]
        for layer in stack.layers
        for w in (layer.qkv, layer.out, layer.gate_up, layer.down)
    )


@pytest.mark.parametrize("bits", FORMATS)
def test_bytes_are_those_of_the_models_weights(bits: int) -> None:
    lm = weightless_lm(CONFIG, f"int{bits}", torch.bfloat16)
    joints = sum(math.prod(w.shape) for w in (lm.patch_to_backbone, lm.backbone_to_patch))
    head = lm.text_head.shape[0] * lm.text_head.shape[1]
    decoder, encoder = patch_decoder(CONFIG, bits), patch_encoder(CONFIG, bits)
    word = backbone(CONFIG, bits, 1000)
    assert weight_bytes(decoder) == values(lm.patch_decoder) * bits // 8
    assert weight_bytes(encoder) == (values(lm.patch_encoder) + joints) * bits // 8
    assert weight_bytes(word) == values(lm.backbone) * bits // 8 + head
    # Beside the floor's bytes there are a unit's own scales, where int8 has one a row, and norms.
    found = word_work(lm, 1000).bytes
    assert found["cache"] == sum(n * x.more for n, x in word.phases if x.name == "attention")
    assert 1 <= word.nbytes() / sum(found.values()) < 1.04
    # The preset's int4 has an int8 patch decoder.
    if bits == 8:
        speech = patch_work(lm, 1000).bytes["patch decoder"]
        assert 1 <= decoder.nbytes() / speech < 1.04


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("study", MEASURED, ids=lambda x: x[0])
def test_bytes_are_those_that_the_kernel_was_given(study: tuple[str, dict], bits: int) -> None:
    (given,) = (x["bytes_a_step"] for x in study[1][f"int{bits}"] if "bytes_a_step" in x)
    table = patch_decoder(CONFIG, bits, heads=False)
    assert table.nbytes() == given * table.steps


def test_phases_and_exchanges_are_counted() -> None:
    assert patch_decoder(CONFIG, 8).count == 11 * (16 * 4 + 2)
    assert patch_decoder(CONFIG, 8, heads=False).unit_count == 16 * 8192
    assert backbone(CONFIG, 4, 254).count == 36 * 6 + 2
    assert patch_encoder(CONFIG, 4).count == 6 * 4 + 2
    assert codec_decoder(CODEC).count == 4 * (32 + 16)
    # Four units of a layer a warp, 16 warps.
    layer = patch_decoder(CONFIG, 8).phases[:4]
    slots = sum(x.issue(1, BLOCKS) for _, x in layer)
    assert slots == 16 * INSTRUCTIONS[8]


def test_products_took_about_the_clocks_that_their_instructions_are() -> None:
    """The line through a scheduler's units and clocks of the four products."""
    runs = dict(MEASURED)["2026-11-28-h100-engine-2.json"]
    for bits in FORMATS:
        took = {
            x["phase"]: x["clocks_mean"] for x in runs[f"int{bits}"] if x.get("time") == "multiply"
        }
        points = [
            (x.units / BLOCKS / 4, took[x.name])
            for _, x in patch_decoder(CONFIG, bits).phases
            if x.units
        ]
        middle = [sum(p) / len(points) for p in zip(*points, strict=True)]
        rise = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
        rise /= sum((x - middle[0]) ** 2 for x, _ in points)
        assert 0.8 < rise / INSTRUCTIONS[bits] < 1.2


def test_more_of_anything_takes_longer(card: Calibration) -> None:
    tables = [patch_decoder(CONFIG, 8), backbone(CONFIG, 4, 254), patch_encoder(CONFIG, 4)]
    for table in [*tables, codec_decoder(CODEC)]:
        times = [card.seconds(table, rows) for rows in range(1, 9)]
        assert times == sorted(times)
        for in_turn, hidden in times:
            assert in_turn >= hidden >= card.stream(table)
        slower = replace(card, read_Bps=card.read_Bps / 2)
        assert slower.stream(table) == pytest.approx(2 * card.stream(table))
        for name in ("handling", "waiting"):
            more = replace(card, **{name: 1.1 * getattr(card, name)})
            assert more.seconds(table)[0] > card.seconds(table)[0]
    contexts = [card.seconds(backbone(CONFIG, 4, n))[0] for n in (16, 254, 1000, 8000)]
    assert contexts == sorted(contexts)
    kept = [card.stream(tables[0], kept=mb * 1e6) for mb in (0, 10, 100, 1000)]
    assert kept == sorted(kept, reverse=True)
    # All that a step reads again is read once.
    least = tables[0].nbytes() - 10 * tables[0].again
    assert kept[-1] == pytest.approx(least / card.read_Bps)


@pytest.mark.parametrize("bits", FORMATS)
def test_a_patch_is_the_sum_of_its_terms(card: Calibration, bits: int) -> None:
    table = patch_decoder(CONFIG, bits)
    found = terms(card, table)
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(card.seconds(table)[0])
    gains = [*changes(card, table).values()]
    assert gains[0] == max(gains)
    assert gains[-1] == min(gains) >= card.stream(table)


def test_measured_runs_are_within_what_the_model_is_known_to_miss(card: Calibration) -> None:
    """Bounds are what it said when it was made: a better model narrows them."""
    found = [*checks(MEASURED, card)]
    assert len({x.file for x in found}) == 3
    assert len(found) > 80
    for x in found:
        if x.calibrates:
            assert x.ratio == pytest.approx(1, abs=0.01), x
        elif x.usual:
            assert 0.84 < x.ratio < 1.24, x
        else:
            assert 0.94 < x.ratio < 1.49, x
    # The kernel as it is.
    newest = [x for x in found if x.file.endswith("engine-3.json") and x.usual]
    for x in newest:
        assert 0.88 < x.ratio < 1.12, x


def test_the_calibration_is_of_what_the_file_has(card: Calibration) -> None:
    first, last = MEASURED[0][1], MEASURED[-1][1]
    assert card.sources == ("2026-11-28-h100-engine.json", "2026-11-28-h100-engine-3.json")
    (whole,) = (
        x["us"]
        for x in first["exchange"]
        if (x.get("kind"), x.get("pieces"), x.get("read")) == ("tagged", 512, 512)
        and (x["blocks"], x["threads"]) == (128, 512)
    )
    assert card.exchange(512, True, 128, 512) == pytest.approx(whole / 1e6)
    assert card.exchange(0, True, 128, 512) == 0
    between = card.exchange(512, True, 96, 512)
    ends = [card.exchange(512, True, blocks, 512) for blocks in (64, 128)]
    assert min(ends) < between < max(ends)
    # Both runs that it is fitted to come out again.
    table = patch_decoder(CONFIG, 8, heads=False)
    for without, waits in ((3, False), (2, True)):
        took = usual_run(last["int8"], without)["us_a_patch"] / 1e6
        assert card.chain(table, waits=waits) == pytest.approx(took)
    with pytest.raises(ValueError, match="no card ran all parts"):
        Calibration.of([("a", {"int8": last["int8"]})], CONFIG)


def test_microbenchmarks_of_another_card_are_its_own(card: Calibration, tmp_path: Path) -> None:
    """As gpu.sh writes them: exchange and stream, before the decoder has run there."""
    about = [{"device": "NVIDIA GeForce RTX 4090"}]
    parts = {
        x: [*about, *(dict(run) for run in MEASURED[0][1][x][1:])] for x in ("exchange", "stream")
    }
    for run in parts["stream"][1:]:
        run.update(GB_s=run["GB_s"] / 3, us_a_pass=run["us_a_pass"] * 3)
    path = tmp_path / "records.jsonl"
    others = {"kind": "study", "study": "turns", "result": {"us": 1}}
    record = {"kind": "study", "study": "engine", "result": parts}
    path.write_text("".join(json.dumps(x) + "\n" for x in (others, record, {"kind": "op"})))
    given = read_studies(path)
    assert given == [("records.jsonl", parts)]
    found = Calibration.of([*MEASURED, *given], CONFIG)
    assert found.read_Bps == pytest.approx(card.read_Bps / 3)
    assert (found.handling, found.waiting) == (card.handling, card.waiting)
    assert (found.clock, found.fitted_on) == (2.52e9, "NVIDIA H100 80GB HBM3")
    predicted = dict(cards(found))
    assert predicted["RTX 4090"] is found
    assert predicted["H100 SXM"].read_Bps == pytest.approx(found.read_Bps * 3350 / 1008)
    # Of a card that nothing is published of, itself alone.
    unknown = replace(found, device="A CARD")
    assert [name for name, _ in cards(unknown)] == ["A CARD"]


def test_the_command_prints_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("")
    assert main(["engine", "--calibration", str(nothing)]) == 0
    printed = capsys.readouterr().out
    assert "no study of the engine in " in printed
    for text in ("| patch decoder | gate/up | 176 |", "calibrates", "| RTX 5090 | int4 | 8 |"):
        assert text in printed
    for name, _ in MEASURED:
        assert f"| {name} | int4 | 128 x 512, with heads, 4 units ahead |" in printed
    assert main(["engine", "--results", str(tmp_path)]) == 2
    assert "no card ran all parts" in capsys.readouterr().err


def test_the_reports_section_says_that_it_predicts(tmp_path: Path) -> None:
    text = "\n".join(section(RESULTS))
    assert text.startswith("## The persistent engine: predictions\n")
    assert "Predictions, not measurements" in text
    for name in ("H100 SXM", "H200 SXM", "RTX 4090", "RTX 5090"):
        assert text.count(f"| {name} | int4 |") == 2
    assert NOT_MEASURED in "\n".join(section(tmp_path))
