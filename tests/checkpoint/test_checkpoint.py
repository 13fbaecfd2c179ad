"""Checkpoints: written tensors are read back without copies, and each fault is one line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fault, write
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_memory
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimo_fast.checkpoint.files import DTYPES, Weights, open_weights, write_checkpoint
from mimo_fast.errors import CheckpointError, ConfigError

MIB = 2**20
ROLLUP = Path("/proc/self/smaps_rollup")
INDEX = "model.safetensors.index.json"
SMALL = {f"layer.{i}": (2, 3) for i in range(12)}


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (got, want)]
    return got.shape == want.shape and got.dtype == want.dtype and torch.equal(*raw)


@st.composite
def tensor_tables(draw: st.DrawFn) -> dict[str, Tensor]:
    name = st.text('abc.0ü"', min_size=1, max_size=6)
    names = draw(st.lists(name, min_size=1, max_size=8, unique=True))
    table = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        raw = np.frombuffer(draw(st.binary(min_size=8 * 125, max_size=8 * 125)), np.uint8)
        values = torch.from_numpy(raw.copy()).view(torch.float64).nan_to_num()
        table[name] = values.to(dtype)[: int(np.prod(shape))].reshape(shape)
    return table


@given(tensor_tables(), st.integers(1, 400))
def test_what_is_written_is_read_back(tmp_path_factory, tensors, shard_bytes):
    directory = write(tmp_path_factory.mktemp("any"), tensors, shard_bytes)
    weights = open_weights(directory)
    assert set(weights.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == tensor.dtype
        assert same(weights.get(name), tensor)
    assert weights.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert weights.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for path in directory.glob("*.safetensors"):
        held = load_file(path)
        assert all(same(tensor, tensors[name]) for name, tensor in held.items())
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= shard_bytes


def test_published_file_names(tmp_path):
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(3)}
    one, many = write(tmp_path / "one", tensors), write(tmp_path / "many", tensors, shard_bytes=32)
    assert sorted(path.name for path in one.iterdir()) == ["config.json", "model.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in many.iterdir()) == ["config.json", *shards, INDEX]
    index = json.loads((many / INDEX).read_text())
    weight_map = {"t0": shards[0], "t1": shards[0], "t2": shards[1]}
    assert index == {"metadata": {"total_size": 48}, "weight_map": weight_map}
    assert json.loads((one / "config.json").read_text()) == {"a": 1}


def test_the_kits_checkpoint_opens(kit):
    want = load_file(kit / "checkpoint/codec" / "model.safetensors")
    weights = open_weights(kit / "checkpoint/codec")
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in want.items())
    assert set(weights.names()) == set(want)


def test_dtype_is_converted_on_request(tmp_path):
    values = torch.randn(7)
    weights = open_weights(write(tmp_path, {"x": values}))
    assert torch.equal(weights.get("x", dtype=torch.bfloat16), values.bfloat16())
    assert torch.equal(weights.get("x", dtype=torch.float32, device="cpu"), values)


def test_pieces_and_progress(tmp_path):
    values, heard = torch.randn(10, 3), []
    pieces = {"x": iter(values.split(4))}
    given = {"dtype": torch.float16, "config": {}, "advance": heard.append}
    write_checkpoint(tmp_path, {"x": (10, 3)}, pieces.get, **given)
    assert torch.equal(open_weights(tmp_path).get("x"), values.half())
    assert heard == [24, 24, 12]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, int, int]:
    """A checkpoint of 200 MiB: directory, size, and by how much memory grew during the write."""
    directory, rows = tmp_path_factory.mktemp("large"), 50

    def read(name: str) -> Iterator[Tensor]:
        return (torch.full((MIB,), float(i)) for i in range(rows))

    shapes = {"x": (rows, MIB)}
    grown = peak_memory(
        lambda: write_checkpoint(directory, shapes, read, dtype=torch.float32, config={})
    )
    return directory, 4 * rows * MIB, grown


def test_writing_takes_the_memory_of_a_piece(large):
    _, size, grown = large
    assert grown < size // 4


@pytest.mark.skipif(not ROLLUP.exists(), reason="needs Linux's account of anonymous memory")
def test_loading_takes_no_anonymous_memory(large):
    directory, size, _ = large

    def anonymous() -> int:
        lines = ROLLUP.read_text().splitlines()
        line = next(line for line in lines if line.startswith("Anonymous:"))
        return int(line.split()[1]) * 1024

    before = anonymous()
    tensor = open_weights(directory).get("x", dtype=torch.float32)
    assert tensor[:, ::512].sum() == (MIB // 512) * sum(range(50)), "every page is touched"
    assert anonymous() - before < 8 * MIB
    copy = tensor.clone()
    assert anonymous() - before >= size
    assert torch.equal(copy[-1], tensor[-1]), "the tensor outlives the Weights it came from"


def test_writing_to_a_view_leaves_the_file_alone(tmp_path):
    path = write(tmp_path, {"x": torch.zeros(1000)}) / "model.safetensors"
    before = path.read_bytes()
    open_weights(tmp_path).get("x").fill_(7)
    assert path.read_bytes() == before


@pytest.fixture
def small(tmp_path) -> Weights:
    tensors: dict[str, Tensor] = dict.fromkeys(SMALL, torch.zeros(2, 3))
    tensors["steps"] = torch.zeros(1, dtype=torch.int64)
    return open_weights(write(tmp_path, tensors))


def test_validate_accepts_optional_tensors_that_match(small):
    small.validate(SMALL, {"steps": (1,), "elsewhere": (5,)})
    assert "steps is [1], not [2]" in fault(lambda: small.validate(SMALL, {"steps": (2,)}))


def test_validate_reports_everything_at_once(small):
    shapes = SMALL | {"layer.1": (3, 2), "steps": (1,), "head": (4,)}
    del shapes["layer.0"]
    message = fault(lambda: small.validate(shapes))
    for part in (
        "1 missing (head)",
        "1 unexpected (layer.0)",
        "1 wrongly shaped (layer.1 is [2, 3], not [3, 2])",
        "1 not floating point (steps is I64)",
        str(small.directory),
    ):
        assert part in message


def test_validate_abridges_long_lists(small):
    shapes = {f"other.{i}": (1,) for i in range(9)} | {"steps": (1,)}
    message = fault(lambda: small.validate(shapes))
    missing = ", ".join(f"other.{i}" for i in range(8))
    assert f"9 missing ({missing} and 1 more)" in message
    assert "12 unexpected (" in message
    assert "and 4 more)" in message


def test_unknown_names_and_types(small, tmp_path):
    assert "no tensor nothing" in fault(lambda: small.get("nothing"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_numpy({"x": np.zeros(3, np.uint16)}, other / "model.safetensors")
    assert "x is of type U16" in fault(lambda: open_weights(other).get("x"))
    assert "x is U16" in fault(lambda: open_weights(other).validate({"x": (3,)}))


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write(tmp_path / "sharded", {f"t{i}": torch.zeros(4) for i in range(3)}, shard_bytes=16)


def test_a_tensor_absent_from_its_shard_and_a_missing_shard_are_named(sharded):
    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    shutil.copy(sharded / first, sharded / second)
    assert f"t1 from {second}" in fault(lambda: open_weights(sharded))
    (sharded / second).unlink()
    assert f"{second} is missing" in fault(lambda: open_weights(sharded))


ELSEWHERE = ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "..", "", r"..\x"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_must_not_lead_elsewhere(sharded, name):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "model.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"t0": name}}))
    assert repr(name) in fault(lambda: open_weights(sharded))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(sharded, content):
    (sharded / INDEX).write_text(content)
    assert "weight_map" in fault(lambda: open_weights(sharded))


def test_an_index_that_is_not_json(sharded):
    (sharded / INDEX).write_text("{")
    assert INDEX in fault(lambda: open_weights(sharded), ConfigError)


def test_the_only_file_may_have_any_name(tmp_path):
    write(tmp_path, {"x": torch.ones(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert torch.equal(open_weights(tmp_path).get("x"), torch.ones(2))
    shutil.copy(tmp_path / "weights.safetensors", tmp_path / "more.safetensors")
    assert "more.safetensors, weights.safetensors" in fault(lambda: open_weights(tmp_path))


@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    directory = write(tmp_path_factory.mktemp("any"), {"x": torch.ones(3), "y": torch.ones(2, 2)})
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        message = fault(lambda: open_weights(directory))
        assert "model.safetensors is damaged or cut short" in message
        return
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + data.draw(st.binary(min_size=1, max_size=1)) + whole[at + 1 :])
    try:
        said = " ".join(open_weights(directory).names())
    except CheckpointError as error:
        said = str(error)
    assert said
    assert "\n" not in said


def test_a_pointer_file_of_git_lfs_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert "model.safetensors is damaged" in fault(lambda: open_weights(tmp_path))


class TestWriting:
    def interrupted(self, name: str) -> Iterator[Tensor]:
        yield torch.zeros(2)
        if name == "b":
            raise KeyboardInterrupt
        yield torch.zeros(2)

    def test_an_interrupted_write_leaves_only_whole_files(self, tmp_path):
        shapes = {"a": (4,), "b": (4,)}
        given = {"dtype": torch.float32, "config": {}, "shard_bytes": 16}
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, shapes, self.interrupted, **given)
        assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
        assert list(load_file(next(tmp_path.iterdir()))) == ["a"]

    @pytest.mark.parametrize(
        "given", [torch.zeros(3), torch.zeros(5), iter(torch.ones(3).split(2))]
    )
    def test_a_tensor_of_another_size(self, tmp_path, given):
        shapes = {"a": (2, 2)}
        about = {"dtype": torch.half, "config": {}}
        message = fault(lambda: write_checkpoint(tmp_path, shapes, lambda _: given, **about))
        assert "tensor a does not fill its shape [2, 2]" in message
        assert not list(tmp_path.iterdir())

    def test_weights_are_not_overwritten(self, tmp_path):
        write(tmp_path, {"x": torch.ones(1)})
        assert "already holds weights" in fault(lambda: write(tmp_path, {"x": torch.zeros(1)}))
        assert open_weights(tmp_path).get("x") == 1

    def test_a_path_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot write" in fault(lambda: write(tmp_path / "file" / "x", {"x": torch.ones(1)}))


def test_mixed_types_are_aligned(tmp_path):
    tensors = {"a": torch.zeros(3).char(), "b": torch.ones(2), "c": torch.ones(1).half()}
    weights = open_weights(write(tmp_path, tensors))
    assert all(weights.get(name).data_ptr() % x.itemsize == 0 for name, x in tensors.items())
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours, theirs = ((tmp_path / f"{x}.safetensors").stat().st_size for x in ("model", "theirs"))
    assert theirs <= ours + 64
