"""JSON of strangers: bounds on its values and levels, and what is no JSON."""

import base64
import json
import tracemalloc

import pytest

from mimo_fast.server.json_values import MOST_DEPTH, MOST_VALUES, parse_json


@pytest.mark.parametrize("form", [str, str.encode], ids=["text", "bytes"])
def test_values_of_the_api_are_read(form):
    audio = base64.b64encode(bytes(2**20)).decode()
    value = {"input": "one, two: three [four] {five}", "audio": audio, "n": [1, 2.5, None, True]}
    assert parse_json(form(json.dumps(value))) == value


@pytest.mark.parametrize("form", [str, str.encode], ids=["text", "bytes"])
@pytest.mark.parametrize(
    "unit",
    ["[],", "{},", "1,", '"b",', '{"a":1},'],
    ids=["lists", "objects", "numbers", "texts", "keys"],
)
def test_more_values_are_refused_without_being_made(form, unit):
    data = form(f"[{unit * 2**20}1]")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"more than {MOST_VALUES} values"):
            parse_json(data)
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()


def test_the_bound_itself():
    assert len(parse_json("[" + "1," * (MOST_VALUES - 1) + "1]")) == MOST_VALUES
    with pytest.raises(ValueError, match="values"):
        parse_json("[" + "1," * MOST_VALUES + "1]")


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
def test_levels(begin, end):
    parse_json(begin * MOST_DEPTH + "1" + end * MOST_DEPTH)
    for levels in (MOST_DEPTH + 1, 900, 30_000):
        with pytest.raises(ValueError, match="deep"):
            parse_json(begin * levels + "1" + end * levels)


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "NaN",
        '{"a": Infinity}',
        "[-Infinity]",
        "9" * 5000,
        b"\xff\xfe{}\x00",
        b'{"a": "\xff"}',
    ],
)
def test_what_is_no_json(data):
    with pytest.raises(ValueError, match=r"."):
        parse_json(data)
