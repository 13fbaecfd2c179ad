"""Finding a checkpoint: directories, hub ids and caches, and one clear line for each fault."""

import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import fault, write
from huggingface_hub import errors as hub_errors

from mimo_fast.checkpoint.files import find_checkpoint, open_weights


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """A hub that records its arguments and returns, or raises, `answer`."""
    asked = SimpleNamespace(answer=None, arguments=None)

    def snapshot_download(*args: object, **kwargs: object) -> str:
        asked.arguments = (args, kwargs)
        if isinstance(asked.answer, Exception):
            raise asked.answer
        return str(asked.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("source", ["here", "./here", "~/here", "OWNER/NAME", Path("here")])
def test_a_local_directory_is_used_as_it_is(source, hub):
    directory = Path(source).expanduser()
    write(directory, {"x": torch.ones(1)})
    assert find_checkpoint(source) == directory
    assert hub.arguments is None


LOCAL = ["./a", "../a", "/nowhere/a", "~/a", "a", "a/b/c", r"a\b", "", Path("a/b")]


@pytest.mark.parametrize("source", LOCAL)
def test_what_looks_local_is_not_asked_of_the_hub(source, hub):
    message = fault(lambda: find_checkpoint(source))
    assert "config.json" in message or "no directory" in message
    assert hub.arguments is None


def test_a_file_is_not_a_directory():
    Path("model.safetensors").write_bytes(b"")
    assert "model.safetensors is a file" in fault(lambda: find_checkpoint("model.safetensors"))


def test_a_hub_id_is_downloaded(tmp_path, hub):
    hub.answer = write(tmp_path / "cached", {"x": torch.ones(1)})
    options = {"revision": "v1", "cache_dir": "cache", "token": "t", "local_files_only": True}
    found = find_checkpoint("OWNER/NAME", **options)
    assert found == hub.answer
    patterns = ["*.json", "*.safetensors", "merges.txt", "vocab.json"]
    options = {"revision": "v1", "cache_dir": "cache", "token": "t", "local_files_only": True}
    assert hub.arguments == (("OWNER/NAME",), {"allow_patterns": patterns, **options})


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (hub_errors.GatedRepoError, "is gated: accept its terms"),
        (hub_errors.RepositoryNotFoundError, "has no such repository or hides it as private"),
        (hub_errors.RevisionNotFoundError, "has no revision 'v1'"),
        (hub_errors.HFValidationError, "neither a directory nor a hub id"),
        (hub_errors.LocalEntryNotFoundError, "hf download OWNER/NAME --local-dir DIR"),
        (ConnectionError, "hf download OWNER/NAME --local-dir DIR"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, kind, says):
    # Built without their constructors, which take different arguments in different versions.
    hub.answer = kind.__new__(kind)
    hub.answer.args = ("first line\nsecond line",)
    message = fault(lambda: find_checkpoint("OWNER/NAME", revision="v1"))
    assert says in message
    assert "OWNER/NAME" in message


def test_an_empty_cache_offline_and_an_impossible_hub_id(tmp_path):
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    message = fault(lambda: find_checkpoint("OWNER/NAME", **options))
    assert "OWNER/NAME is not in the cache" in message
    assert "'bad..name/x'" in fault(lambda: find_checkpoint("bad..name/x", **options))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no config.json"),
        (["model.safetensors"], "no config.json"),
        (["config.json"], "no *.safetensors"),
        (["config.json", "pytorch_model.bin"], "only safetensors are read"),
        (["config.json", "model.pt"], "only safetensors are read"),
    ],
)
def test_an_incomplete_directory_says_what_is_missing(tmp_path, files, says):
    directory = tmp_path / "partial"
    directory.mkdir()
    for name in files:
        (directory / name).write_text("{}")
    assert says in fault(lambda: find_checkpoint(directory))
    assert says in fault(lambda: open_weights(directory))


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_links_into_a_cache_are_followed(tmp_path):
    blobs = write(tmp_path / "blobs", {f"t{i}": torch.ones(4) for i in range(2)}, shard_bytes=16)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert torch.equal(open_weights(find_checkpoint(snapshot)).get("t1"), torch.ones(4))
