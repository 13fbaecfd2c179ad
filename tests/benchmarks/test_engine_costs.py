"""The engine's cost model: its bytes are the model's, its phases the tables', and its seconds come
from runs that an H100 measured, of which it says what it is known to say."""

import ctypes
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.engine_calibration import Calibration, read_studies, usual_run
from benchmarks.engine_changes import CHANGES, columns
from benchmarks.engine_checks import checks, committed, studies
from benchmarks.engine_costs import Launch
from benchmarks.engine_grids import PROCESSORS, Shared, grid_of
from benchmarks.engine_measured import BLOCKS, INSTRUCTIONS, measured_patch_decoder
from benchmarks.engine_pieces import CONTEXT, Pieces, cards, grid, network, pair
from benchmarks.engine_report import section
from benchmarks.engine_runs import parts
from benchmarks.projection import CARDS
from benchmarks.records import NOT_MEASURED, RESULTS
from mimo_fast.bench.floor import patch_work, word_work
from mimo_fast.bench.synthetic import preset_configs, weightless_lm
from mimo_fast.kernels.cuda.engine import MOST_ROWS, Operation, Order
from mimo_fast.kernels.cuda.engine_launch import DEPTHS, KEPT_SHARE, declared
from mimo_fast.runtime.lm.programs import backbone_tables, patch_decoder_tables
from mimo_fast.runtime.lm.transformer import TransformerWeights

CONFIG, _ = preset_configs("7b")
MEASURED = studies(committed(RESULTS))
FORMATS = 8, 4


@pytest.fixture(scope="module")
def card() -> Calibration:
    return Calibration.of(MEASURED, CONFIG)


def launches(card: Calibration, bits: int, streams: int = 1) -> tuple[Launch, ...]:
    """word, patch encoder, patch decoder."""
    return tuple(launch for _, launch in Pieces.of(grid(card), bits, streams).launches)


@pytest.mark.parametrize("bits", FORMATS)
def test_bytes_are_those_of_the_models_weights(card: Calibration, bits: int) -> None:
    word, encoder, decoder = launches(card, bits)
    formats = dict.fromkeys(("backbone", "patch_decoder", "patch_encoder"), f"int{bits}")
    lm = weightless_lm(CONFIG, {"lm_head": "int8", **formats}, word.tables.dtype)
    of_word, speech = word_work(lm, CONTEXT), patch_work(lm, CONTEXT)
    # Biases are no part of the queues.
    weights = of_word.bytes["backbone"] - biases_of(lm.backbone)
    assert word.nbytes == weights + of_word.bytes["text head"]
    read = sum(times * cost.read for cost, times in word.costs.items())
    assert read == of_word.bytes["cache"]
    joint = lm.backbone_to_patch.nbytes
    weights = speech.bytes["patch encoder"] - biases_of(lm.patch_encoder)
    assert encoder.nbytes + joint == weights
    # The last active tile has rows of another channel.
    heads = sum(cost.nbytes * n for cost, n in decoder.costs.items() if cost.name == "code heads")
    active = CONFIG.group_size * lm.code_heads.nbytes
    assert 1 <= heads / active < 1.02
    weights = speech.bytes["patch decoder"] - CONFIG.patch_steps * biases_of(lm.patch_decoder)
    assert decoder.nbytes - heads - joint == weights - active


def biases_of(stack: TransformerWeights) -> int:
    """Bytes of those of qkv."""
    return sum(layer.qkv.bias.nbytes for layer in stack.layers if layer.qkv.bias is not None)


def test_phases_are_those_of_the_tables(card: Calibration) -> None:
    word, encoder, decoder = launches(card, 4)
    layers = CONFIG.patch_decoder.layers
    assert len(decoder.steps) == CONFIG.patch_steps
    assert [len(step) for step in decoder.steps] == [4 * layers + 4, *[4 * layers + 3] * 10]
    # Every phase waits once, but for the joint, whose x is there before, and the last step's embed.
    assert decoder.exchanges == CONFIG.patch_steps * (4 * layers + 3) - 1
    # Attention of the backbone waits for q, k and v, then for the other parts; x is there before.
    # The norm, the text head and the text have one each.
    assert word.exchanges == CONFIG.backbone.layers * 6 - 1 + 3
    assert encoder.exchanges == CONFIG.patch_encoder.layers * 4 - 1 + 2
    for launch in (word, encoder, decoder):
        names = {cost.name for cost in launch.costs}
        kinds = {Operation(phase.operation) for phase in launch.tables.phases}
        assert {"attention", "norm", "draw", "embed", "text"} & names == {
            {Operation.ATTEND: "attention", Operation.NORMALIZE: "norm"}.get(x, x.name.lower())
            for x in kinds - {Operation.PRODUCT}
        }
        assert names >= {"out", "gate/up", "down"}
        assert sum(launch.costs.values()) == sum(map(len, launch.steps))


def test_a_block_has_what_the_design_says(card: Calibration) -> None:
    """On 128 blocks: qkv on half of them with 24 units each, out and down as half tiles."""
    on = replace(grid(card), blocks=128)
    tables = patch_decoder_tables(network(4), on.blocks)
    costs = {cost.name: cost for cost in Launch("", tables, on, 1).costs}
    qkv, out, down = (costs[x] for x in ("qkv and attention", "out", "down"))
    assert (qkv.units, qkv.tiles, qkv.mean_tiles) == (24, 3, 1.5)
    assert (out.tiles, out.mean_tiles, down.units, down.mean_tiles) == (1, 1, 32, 1)
    assert costs["gate/up"].mean_tiles == costs["gate/up"].tiles == 4
    orders = {Order(x.order) for x in tables.matrices if x.n}
    assert orders == {Order.HEADS, Order.HALF, Order.GATED, Order.ACTIVE}
    # 8 bytes are four values: a block reads all of a row's 1024 columns as 2 KB.
    assert out.reads == ((2048, 2048),)
    assert out.items == 1
    # Tiles of all warps of a scheduler: 24 units, of which each of four has 6.
    assert (qkv.issued, out.issued, down.issued) == (6, 2, 8)
    # Eight rows have one product on tensor cores, and one attention for each.
    eight = {cost.name: cost for cost in Launch("", tables, on, 8).costs}
    assert eight["qkv and attention"].issued == qkv.issued
    assert eight["down"].items == 8 * down.items
    assert eight["down"].reads == ((65536, 65536),)


def test_more_of_anything_takes_longer(card: Calibration) -> None:
    for launch in (*launches(card, 8), *launches(card, 4)):
        if launch.name != "patch encoder":
            times = [replace(launch, rows=rows) for rows in range(1, MOST_ROWS + 1)]
            for of in (Launch.in_turn, Launch.ahead):
                seconds = [of(x, card) for x in times]
                # Room for x may come from shorter queues, which one row more then has.
                assert all(a < 1.02 * b for a, b in pairwise(seconds))
                assert seconds[-1] > 1.2 * seconds[0]
        assert launch.in_turn(card) >= launch.ahead(card)
        weights = launch.terms(card)
        assert launch.ahead(card) >= weights["bytes of weights"]
        assert min(weights.values()) >= 0
        assert sum(weights.values()) == pytest.approx(launch.in_turn(card))
        slower = replace(card, read_Bps=card.read_Bps / 4)
        assert slower_stream(launch, slower) == pytest.approx(4 * slower_stream(launch, card))
        assert launch.ahead(slower) > launch.ahead(card)
        for name in ("handling", "waiting"):
            more = replace(card, **{name: 1.1 * getattr(card, name)})
            assert launch.in_turn(more) > launch.in_turn(card)
            assert launch.ahead(more) > launch.ahead(card)
    on = grid(card)
    tables = backbone_tables(network(4), on.blocks)
    contexts = [Launch("", tables, on, 1, n).in_turn(card) for n in (16, 254, 1000, 8000)]
    assert contexts == sorted(contexts)


def slower_stream(launch: Launch, card: Calibration) -> float:
    return launch.terms(card)["bytes of weights"]


def test_queues_hide_what_they_hold(card: Calibration) -> None:
    """Where memory is as fast as can be, ahead is the chain; where it is slow, its bytes."""
    for launch in launches(card, 8):
        chain = launch.in_turn(card) - slower_stream(launch, card)
        fast = replace(card, read_Bps=card.read_Bps * 1e4, cache_Bps=card.cache_Bps * 1e4)
        assert launch.ahead(fast) == pytest.approx(chain, rel=0.03)
        slow = replace(card, read_Bps=card.read_Bps / 100, cache_Bps=card.cache_Bps / 100, kept=0)
        read = launch.nbytes / slow.read_Bps
        assert launch.ahead(slow) == pytest.approx(read, rel=0.05)
        deeper = [
            replace(launch, grid=replace(launch.grid, depth=depth)).ahead(card)
            for depth in sorted(DEPTHS)
        ]
        assert deeper == sorted(deeper, reverse=True)
        # What is kept in L2 is a part of the loop that fits.
        assert (launch.kept > 0) == (launch.name == "patch decoder")
        assert launch.kept <= launch.grid.kept_bytes


def test_changes_are_of_the_design_as_it_is(card: Calibration) -> None:
    for launch in columns(grid(card)).values():
        now = CHANGES["as it is"](card, launch)
        assert now == (launch.in_turn(card), launch.ahead(card))
        for name in ("exchanges take as long as alone", "half of the handling"):
            assert all(a < b for a, b in zip(CHANGES[name](card, launch), now, strict=True))
        if launch.name == "patch decoder":
            fewer = CHANGES["embeddings with the draw"](card, launch)
            assert all(a < b for a, b in zip(fewer, now, strict=True))
            sampled = CHANGES["draws with top-k and top-p"](card, launch)
            assert all(a > b for a, b in zip(sampled, now, strict=True))
        assert CHANGES["these four"](card, launch) < min(
            CHANGES[name](card, launch) for name in list(CHANGES)[:5]
        )


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_card_that_is_not_here_is_divided(card: Calibration, name: str) -> None:
    found = dict(cards(card))[name]
    on = grid(found)
    assert (on.blocks, on.threads) == (PROCESSORS[name], None)
    for streams in (1, MOST_ROWS):
        for _, launch in Pieces.of(on, 4, streams).launches:
            program, (threads, depth) = launch.divided
            used = Shared().mimo_fast_engine_shared(_Reference(program), threads, depth)
            assert used <= on.shared
            # A card with 99 KB of shared memory does not hold the queues of 512 threads.
            assert threads == 512 or on.shared < 100 * 1024


@pytest.mark.slow
def test_shared_memory_is_what_the_engine_says(
    card: Calibration, emulated_cuda: ctypes.CDLL
) -> None:
    library = declared(emulated_cuda)
    for on in (grid(card), grid(card.scaled(CARDS[3]))):
        for streams in (1, 3, MOST_ROWS):
            for launch in launches(card, 4, streams):
                launch = replace(launch, grid=replace(on, threads=256))
                program, asked = launch.divided
                found = library.mimo_fast_engine_shared(ctypes.byref(program), *asked)
                assert Shared().mimo_fast_engine_shared(_Reference(program), *asked) == found
    for size in (17, 64, 1025):
        found = library.mimo_fast_engine_draw_scratch(size)
        assert Shared().mimo_fast_engine_draw_scratch(size) == found
    for asked in ((32, 8, 128, 254), (32, 8, 128, 8192), (4, 4, 64, 100), (16, 2, 16, 513)):
        found = library.mimo_fast_engine_scratch(*asked)
        assert Shared().mimo_fast_engine_scratch(*asked) == found
    for asked in ((1, 132), (8, 132), (8, 170), (3, 1)):
        found = library.mimo_fast_engine_text_scratch(*asked)
        assert Shared().mimo_fast_engine_text_scratch(*asked) == found


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_floor_has_all_of_what_is_to_stay_in_l2(card: Calibration, name: str) -> None:
    """The floor takes a card's whole L2; the engine tells it to keep a share, and no more."""
    found = dict(cards(card))[name]
    (cache,) = (x.cache_mb * 2**20 for x in CARDS if x.name == name)
    for bits in FORMATS:
        *_, decoder = launches(found, bits)
        assert 0.9 * KEPT_SHARE * cache < decoder.kept <= KEPT_SHARE * cache
        lm = weightless_lm(CONFIG, {"patch_decoder": f"int{bits}"}, decoder.tables.dtype)
        again = decoder.kept * (CONFIG.patch_steps - 1)
        assert again <= KEPT_SHARE * patch_work(lm, CONTEXT, cache=cache).cached
        # What is kept is read from memory once.
        seconds = decoder.terms(replace(found, kept=cache))["bytes of weights"]
        assert seconds == pytest.approx((decoder.nbytes - again) / found.read_Bps)


class _Reference:
    """As ctypes.byref gives it."""

    def __init__(self, to: object) -> None:
        self._obj = to


def test_products_took_about_the_clocks_that_their_instructions_are() -> None:
    """The line through a scheduler's units and clocks of the four products."""
    runs = dict(MEASURED)["2026-11-28-h100-engine-2.json"]
    for bits in FORMATS:
        took = {
            x["phase"]: x["clocks_mean"] for x in runs[f"int{bits}"] if x.get("time") == "multiply"
        }
        points = [
            (x.units / BLOCKS / 4, took[x.name])
            for _, x in measured_patch_decoder(CONFIG, bits).phases
            if x.units
        ]
        middle = [sum(p) / len(points) for p in zip(*points, strict=True)]
        rise = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
        rise /= sum((x - middle[0]) ** 2 for x, _ in points)
        assert 0.8 < rise / INSTRUCTIONS[bits] < 1.2


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("study", MEASURED, ids=lambda x: x[0])
def test_bytes_are_those_that_the_measured_kernel_was_given(
    study: tuple[str, dict], bits: int
) -> None:
    (given,) = (x["bytes_a_step"] for x in study[1][f"int{bits}"] if "bytes_a_step" in x)
    table = measured_patch_decoder(CONFIG, bits, heads=False)
    assert table.nbytes == given * table.steps
    assert table.count == 11 * (16 * 4 + 1)


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
    # The last version of it.
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
    table = measured_patch_decoder(CONFIG, 8, heads=False)
    for without, waits in ((3, False), (2, True)):
        took = usual_run(last["int8"], without)["us_a_patch"] / 1e6
        assert card.chain(table, waits=waits) == pytest.approx(took)
    staged = {x["phase"]: x["clocks_mean"] for x in last["int8"] if x.get("time") == "stage"}
    share = 16 / (16 * 4 + 1)
    assert card.attending == pytest.approx((staged["out"] - staged["gate/up"]) * share)
    assert 0 < card.attending < card.handling
    with pytest.raises(ValueError, match="no card ran all parts"):
        Calibration.of([("a", {"int8": last["int8"]})], CONFIG)


def test_microbenchmarks_of_another_card_are_its_own(card: Calibration, tmp_path: Path) -> None:
    """As gpu.sh writes them: exchange and stream, before the decoder has run there."""
    about = [{"device": "NVIDIA GeForce RTX 4090"}]
    given = {
        x: [*about, *(dict(run) for run in MEASURED[0][1][x][1:])] for x in ("exchange", "stream")
    }
    for run in given["stream"][1:]:
        run.update(GB_s=run["GB_s"] / 3, us_a_pass=run["us_a_pass"] * 3)
    path = tmp_path / "records.jsonl"
    others = {"kind": "study", "study": "turns", "result": {"us": 1}}
    record = {"kind": "study", "study": "engine", "result": given}
    path.write_text("".join(json.dumps(x) + "\n" for x in (others, record, {"kind": "op"})))
    studied = read_studies(path)
    assert studied == [("records.jsonl", given)]
    found = Calibration.of([*MEASURED, *studied], CONFIG)
    assert found.read_Bps == pytest.approx(card.read_Bps / 3)
    fitted = "handling", "waiting", "attending"
    assert [getattr(found, x) for x in fitted] == [getattr(card, x) for x in fitted]
    assert (found.clock, found.fitted_on) == (2.52e9, "NVIDIA H100 80GB HBM3")
    predicted = dict(cards(found))
    assert predicted["RTX 4090"] is found
    assert predicted["H100 SXM"].read_Bps == pytest.approx(found.read_Bps * 3350 / 1008)
    assert grid(found) == grid_of("RTX 4090", 72 * 2**20)
    # Of a card that nothing is published of, itself alone.
    unknown = replace(found, device="A CARD")
    assert [name for name, _ in cards(unknown)] == ["A CARD"]
    assert grid(unknown).blocks == BLOCKS


def test_runs_of_the_engine_are_beside_the_predictions(
    card: Calibration, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Records as studies/engine.py writes them; none of them was measured."""
    about = {
        "device": card.device,
        "processors": 132,
        "l2_bytes": 50 * 2**20,
        "shared_bytes": 227 * 1024,
    }
    how = {"blocks": 132, "threads": 512, "depth": 8, "x_columns": 4096, "pause": 0}
    runs = [
        {"bits": 4, "check": "a row alone", "piece": "word", "failed": "rows [3] have other bits"},
        {"bits": 4, "piece": "patch decoder", "rows": 1, **how, "us": 1234.0},
        {"bits": 4, "piece": "patch encoder", "rows": 4, **how, "x_columns": 2048, "us": 321.0},
        {"bits": 4, "piece": "patch decoder", "rows": 1, "phase": "out", "times": 176}
        | {"clocks": [4321.0, 4000.0, 5000.0]},
    ]
    usual = {"columns": 1024, "depth": 8, "threads": 512}
    streams = [
        usual | {"parts": parts, "waits": waits, "us": us}
        for parts, waits, us in ((0, True, 1.0), (2, False, 3.0), (2, True, 3.5), (4, True, 9.0))
    ]
    result = {"engine-int4": [about, *runs], "phases": [about, *streams]}
    found = [*parts([("a.json", result)], card)]
    assert [(x.bits, x.grid) for x in found] == [(4, grid(card))]
    _, _, (_, decoder) = Pieces.of(grid(card), 4, 1).launches
    once, launch = found[0].launch(runs[1])
    assert once == 1
    assert launch.ahead(card) == pytest.approx(decoder.ahead(card))
    # Four patches are two launches of two.
    assert found[0].launch(runs[2])[0] == 2
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result))
    assert main(["engine", "--calibration", str(path)]) == 0
    printed = capsys.readouterr().out
    line = "| a.json | int4 | patch decoder | 1 | 132 x 512, 8 parts ahead | {} | 1.23 ms |"
    assert line.format(pair((decoder.in_turn(card), decoder.ahead(card)))) in printed
    assert "| 4,321 | 4,000 to 5,000 |" in printed
    # Half of the exchange is not hidden behind the stream; of other parts there is no stream alone.
    assert "| a.json | 1,024 | 2 | 1.00 us | 3.00 us | 3.50 us | 0.50 |" in printed
    assert printed.count("| a.json | 1,024 |") == 1
    assert "a.json, int4: {'bits': 4, 'check': 'a row alone'" in printed


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
    assert all(f"| {name} |" in printed for name in CHANGES)
    assert main(["engine", "--results", str(tmp_path)]) == 2
    assert "no card ran all parts" in capsys.readouterr().err


def test_the_reports_section_says_that_it_predicts(tmp_path: Path) -> None:
    text = "\n".join(section(RESULTS))
    assert text.startswith("## The persistent engine: predictions\n")
    assert "Predictions, not measurements: nothing of this engine has been measured." in text
    for name in PROCESSORS:
        assert text.count(f"| {name} | int4 |") == 2
    assert NOT_MEASURED in "\n".join(section(tmp_path))
