"""The line of `mimo-fast bench`: which format it names, and what it says of machines too small."""

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.records import RESULTS
from benchmarks.records import Measured as Records
from mimo_fast.bench.advice import (
    Measured,
    Measurement,
    advise,
    choose,
    computed,
)
from mimo_fast.bench.cards import beside, duration, known_machines, usual_share
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.floor import request_floor
from mimo_fast.bench.synthetic import preset_setup, weightless_lm
from mimo_fast.runtime.memory import GB

CARD = Ceiling(3.1e12, 2.5e12, {"float32": 5e13, "bfloat16": 6e14})
"""About what an H100 was measured to do."""

SLOW = Ceiling(3.2e10, 3e10, {"float32": 1.7e11})
BF16 = torch.bfloat16


def made(quantization="int4", free=79 * GB, machine=CARD, setup=None) -> Measurement:
    setup = setup or preset_setup("7b", quantization, BF16)
    return Measurement(setup, None, quantization, machine, free, 107, 12, 50)


def rows(*factors: float) -> list[Measured]:
    return [Measured(2**i, factor, 0.1 * 2**i) for i, factor in enumerate(factors)]


@pytest.fixture(scope="module")
def ratios() -> dict[str | None, float]:
    """Floor of one request in a format over that in int4, by the definition."""
    config = preset_setup("7b", None, BF16).lm

    def floor(form: str | None) -> float:
        return request_floor(CARD, weightless_lm(config, form, BF16), None, 1, 107, 12, 50)

    return {form: floor(form) / floor("int4") for form in (None, "int8", "int4")}


def test_the_most_exact_format_that_carries_as_many_is_taken(ratios):
    assert ratios[None] > ratios["int8"] > ratios["int4"] == 1
    cases = [
        (0.99 / ratios[None], None),
        (0.99 / ratios["int8"], "int8"),
        (1.01 / ratios["int8"], "int4"),
    ]
    for factor, form in cases:
        chosen = choose(made(), rows(factor))
        assert (chosen.quantization, chosen.streams) == (form, 1)
        assert chosen.factor == pytest.approx(factor * ratios[form])


def test_what_does_not_fit_is_not_taken():
    fast = rows(0.01)
    needs = {form: made().need(form, 1) for form in (None, "int8", "int4")}
    assert needs[None] > needs["int8"] > needs["int4"] > 9 * GB
    for form, need in needs.items():
        assert choose(made(free=need), fast).quantization == form
    # What was measured did fit.
    assert choose(made(free=needs["int4"] - 1), fast).quantization == "int4"
    assert choose(made(free=None), fast).quantization is None
    # Room for more streams is room for their caches.
    assert made().need("int8", 64) > needs["int8"]
    assert choose(made(free=needs["int8"]), rows(*7 * [0.01])).quantization == "int4"


def test_a_smaller_format_than_the_measured_one_is_named_where_it_carries_more():
    line = advise(made("int8"), rows(0.6, 1.05))
    assert line.startswith("1 simultaneous stream in real time, first audio after 100 ms with 1 ")
    assert "(measured in int8); take int4: it needs 9." in line
    assert line.endswith(" and is expected to carry 2 (by its floor, not measured)")


def test_the_line_is_one_and_says_all():
    assert advise(made(), rows(0.3, 0.7, 1.2)) == (
        "2 simultaneous streams in real time, first audio after 100 ms with 1 and 200 ms with 2 "
        "(measured in int4); take int4: more exact formats do not fit, or are expected to carry "
        "fewer"
    )
    more = advise(made(), rows(0.01, 0.02))
    assert more.startswith("2 or more simultaneous streams in real time")
    assert re.search(r"take bf16: it needs 2\d\.\d GB of 79\.0 GB free and is more exact", more)
    none = advise(made(machine=SLOW, free=20 * GB), [Measured(1, 11.57, 22.3)])
    assert none == (
        "no stream in real time, one takes 11.6 times as long as it plays, first audio after "
        "22.3 s with 1 (measured in int4); take int4 for files, the fastest that fits"
    )
    unheard = advise(made(free=12 * GB), [Measured(1, 0.5, None)])
    assert "first audio" not in unheard


def test_a_checkpoint_that_is_stored_quantized_is_taken_as_it_is():
    stored = replace(made(), quantization=None)
    line = advise(stored, rows(0.5, 1.5))
    assert line.endswith("(measured in the format it is stored in)")
    assert choose(stored, rows(0.5)).quantization is None


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(("free", "read"), [(4, 3e10), (12, 3e10), (12, 3e11), (40, 3e11)])
def test_what_the_published_dimensions_need_is_computed(kind, free, read):
    machine = Ceiling(read, read, {"float32": 1e14})
    line = computed(BF16, torch.device(kind), machine, free * GB)
    assert line.startswith("the published dimensions (computed, not measured): in ")
    form = line.rpartition("take ")[2]
    need = float(re.search(rf"in {form} they need ([\d.]+) GB \({free}.0 GB are free\)", line)[1])
    share, where = usual_share(kind, form)
    floor, expected = re.search(
        r"at least (\d+) ms for 160 ms of speech, ([\d,]+) ms at the share of its floor of "
        f"{where}",
        line,
    ).groups()
    assert int(expected.replace(",", "")) == pytest.approx(int(floor) / share, rel=0.03)
    enough = need <= free and int(expected.replace(",", "")) < 160
    assert enough == ("one stream is expected to come in real time" in line)
    if not enough:
        rate = int(re.search(r"that reads (\d+) GB/s or more", line)[1])
        # A machine of that bandwidth would just do.
        wanted = int(floor) * 1e-3 * read / share / 0.16 / 1e9
        assert rate == pytest.approx(wanted, rel=0.03)


def test_expectations_by_floors_hold_for_what_was_measured():
    """int8 and 16 bits, expected from int4 on each known machine: never much faster than they are.

    Faster than expected is what a smaller share lost to launches makes of larger weights.
    """
    for machine in known_machines():
        timed = {form: known for form, known in machine.formats.items() if known.audio_group}
        floors = {form: known.audio_group * known.of_floor for form, known in timed.items()}
        for form, known in timed.items():
            expected = timed["int4"].audio_group * floors[form] / floors["int4"]
            assert 0.9 < expected / known.audio_group < 1.6, f"{form} on {machine.name}"


def test_known_machines_are_those_of_the_records():
    names = {machine.name for machine in known_machines()}
    devices = {e.device for e in Records.read(RESULTS).find("groups") if "7b" in e.title}
    assert names == devices
    text = "\n".join(beside())
    assert all(f"{name} (measured 2026-" in text for name in names)
    (card,) = (machine for machine in known_machines() if "H100 80GB HBM3" in machine.name)
    known = card.formats["int4"]
    assert f"int4 {known.streams} streams, first audio {duration(known.first_audio)}, " in str(card)


def test_shares_are_those_of_the_slowest_machine_of_a_kind():
    shares = [m.formats["int4"].of_floor for m in known_machines() if m.type == "cuda"]
    assert usual_share("cuda", "int4")[0] == min(shares)
    assert usual_share("abacus", "int4") is None
    assert (duration(0.0955), duration(22.33)) == ("96 ms", "22.3 s")
