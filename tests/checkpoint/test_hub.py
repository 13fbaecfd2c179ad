"""Which commit of a repository is used: recorded beside the cache, told where it changes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import KIT_PAIR, copy_tree, write

from mimo_fast.bench.machine import describe_checkpoint
from mimo_fast.checkpoint.files import find_checkpoint
from mimo_fast.checkpoint.hub import resolved_commit, revision_record
from mimo_fast.runtime.loading import HubOptions, find

HUB_ID, OTHER = "OWNER/NAME", "OWNER/OTHER"
ONE, TWO = "1" * 40, "2" * 40


class Cache:
    """A cache as huggingface_hub keeps it, without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def holds(self, hub_id: str, commit: str, revision: str = "main") -> Path:
        """Puts a snapshot there, to which `revision` points from now on."""
        repository = self.folder / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        if not snapshot.exists():
            write(snapshot, {"x": torch.ones(1)})
        return snapshot

    @property
    def record(self) -> Path:
        return revision_record(self.folder)

    def find(self, hub_id: str = HUB_ID, revision: str | None = None) -> Path:
        options: HubOptions = {"cache_dir": self.folder, "local_files_only": True}
        return find(hub_id, options | {"revision": revision})

    def told(self, hub_id: str = HUB_ID, revision: str | None = None) -> list[str]:
        """The warnings of finding a checkpoint."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.find(hub_id, revision)
        return [str(each.message) for each in caught]


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "hub")


def test_the_commit_is_recorded_beside_the_cache(cache):
    snapshot = cache.holds(HUB_ID, ONE)
    assert cache.find() == snapshot
    assert resolved_commit(snapshot) == ONE
    assert cache.record.parent == cache.folder.parent
    assert json.loads(cache.record.read_text()) == {f"{HUB_ID}@main": ONE}


def test_a_change_is_told_once_with_both(cache):
    cache.holds(HUB_ID, ONE)
    assert not cache.told()
    assert not cache.told()
    cache.holds(HUB_ID, TWO)
    (message,) = cache.told()
    assert "\n" not in message
    assert all(part in message for part in (HUB_ID, "'main'", ONE, TWO, "--revision"))
    assert not cache.told()


def test_a_pinned_commit_never_changes(cache):
    cache.holds(HUB_ID, ONE)
    assert not cache.told()
    cache.holds(HUB_ID, TWO)
    assert not cache.told(revision=ONE)
    assert resolved_commit(cache.find(revision=ONE)) == ONE
    assert json.loads(cache.record.read_text()) == {f"{HUB_ID}@main": ONE}


def test_ids_and_revisions_are_told_apart(cache):
    cache.holds(HUB_ID, ONE)
    cache.holds(HUB_ID, TWO, "v2")
    cache.holds(OTHER, TWO)
    assert not cache.told()
    assert not cache.told(revision="v2")
    assert not cache.told(OTHER)
    names = {f"{HUB_ID}@main": ONE, f"{HUB_ID}@v2": TWO, f"{OTHER}@main": TWO}
    assert json.loads(cache.record.read_text()) == names
    cache.holds(HUB_ID, ONE, "v2")
    (message,) = cache.told(revision="v2")
    assert "'v2'" in message


@pytest.mark.parametrize("content", ["", "[]", "{", '{"OWNER/NAME@main": [1]}', "null"])
def test_a_damaged_record_is_written_anew(cache, content):
    cache.holds(HUB_ID, ONE)
    cache.record.write_text(content)
    (message,) = cache.told()
    assert "\n" not in message
    assert json.loads(cache.record.read_text()) == {f"{HUB_ID}@main": ONE}


def test_a_record_that_cannot_be_written_does_not_stop_anything(cache):
    cache.holds(HUB_ID, ONE)
    cache.record.mkdir()
    assert any("not remembered" in message for message in cache.told())


def test_a_folder_has_no_commit_and_no_record(tmp_path):
    directory = write(tmp_path / "lm", {"x": torch.ones(1)})
    assert resolved_commit(find_checkpoint(directory)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


@pytest.mark.parametrize("part", ["lm", "codec"])
def test_info_shows_the_commit(cache, part):
    copy_tree(KIT_PAIR[part == "codec"], cache.holds(HUB_ID, ONE))
    options: HubOptions = {"cache_dir": cache.folder, "local_files_only": True}
    lines = [*describe_checkpoint(HUB_ID, part, options)]
    assert any(line.split() == ["revision", ONE] for line in lines)
    lines = [*describe_checkpoint(KIT_PAIR[part == "codec"], part, options)]
    assert not any("revision" in line for line in lines)
