"""Checkpoints of the hub: downloads, and which commit of a repository is used.

A hub id without a revision is whatever its main branch holds on that day. The commit that it was
resolved to is therefore recorded in a file beside the cache, and another one later is told.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from mimo_fast.checkpoint.folder import write_json
from mimo_fast.errors import CheckpointError, ConfigError
from mimo_fast.json_files import cut, read_json

HUB_FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.json")
MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
RECORD_SUFFIX = ".mimo-fast-revisions.json"


def download(hub_id: str, **options: Any) -> Path:
    """The folder of a repository's snapshot, downloaded or found in the cache.

    Warns if a branch or tag is at another commit than when it was last used.

    Raises:
        CheckpointError: the hub refuses, is out of reach, or has no such repository or revision.
    """
    import huggingface_hub
    from huggingface_hub import errors

    by_hand = f"where there is a network run `hf download {hub_id} --local-dir DIR` and give DIR"
    problems = {
        errors.GatedRepoError: f"{hub_id} is gated: accept its terms on its hub page and log in "
        "with `hf auth login`",
        errors.RepositoryNotFoundError: f"there is no directory {hub_id}, and the hub has no such "
        "repository or hides it as private: check the name, or log in with `hf auth login`",
        errors.RevisionNotFoundError: f"{hub_id} has no revision {options['revision']!r}: check "
        "its hub page",
        errors.HFValidationError: f"{hub_id!r} is neither a directory nor a hub id OWNER/NAME: "
        "check its spelling",
        errors.LocalEntryNotFoundError: f"{hub_id} is not in the cache and the hub is out of "
        f"reach: {by_hand}",
    }
    try:
        patterns = list(HUB_FILES)
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, **options)
    # The HTTP library behind huggingface_hub, and with it the exception of a broken connection,
    # changes by version.
    except Exception as error:
        known = (problem for kind, problem in problems.items() if isinstance(error, kind))
        problem = f"cannot download {hub_id} ({cut(error)}): {by_hand}"
        raise CheckpointError(next(known, problem)) from error
    directory = Path(folder)
    _remember(hub_id, options.get("revision"), directory)
    return directory


def resolved_commit(directory: Path) -> str | None:
    """The commit whose snapshot in a cache this folder is; None for any other folder."""
    in_cache = directory.parent.name == "snapshots" and COMMIT.fullmatch(directory.name)
    return directory.name if in_cache else None


def revision_record(cache: Path) -> Path:
    """The file beside a cache that remembers commits: {"OWNER/NAME@REVISION": commit}."""
    return cache.with_name(cache.name + RECORD_SUFFIX)


def _remember(hub_id: str, revision: str | None, directory: Path) -> None:
    """Records the commit that a moving revision was resolved to, and warns of a change."""
    commit, asked = resolved_commit(directory), revision or MAIN
    if commit is None or COMMIT.fullmatch(asked):
        return
    record, name = revision_record(directory.parents[2]), f"{hub_id}@{asked}"
    try:
        known = read_json(record) if os.path.lexists(record) else {}
    except ConfigError as error:
        warnings.warn(f"{error}; it is written anew", stacklevel=2)
        known = {}
    before = known.get(name)
    if before == commit:
        return
    if before is not None:
        warnings.warn(
            f"{hub_id} at {asked!r} is now commit {commit}, and was {cut(before)} when it was last "
            f"used: pin one with revision={json.dumps(commit)} (--revision, --codec-revision)",
            stacklevel=2,
        )
    try:
        write_json(record, known | {name: commit})
    except CheckpointError as error:
        warnings.warn(f"the commit of {hub_id} is not remembered: {error}", stacklevel=2)


def copy_companions(source: Path, target: Path) -> None:
    """Copies what lies beside a checkpoint's config and weights: the tokenizer's files and such.

    Raises:
        CheckpointError: the disk refuses.
    """
    skipped = {"config.json", "model.safetensors.index.json"}
    for pattern in HUB_FILES:
        for path in source.glob(pattern):
            if path.suffix == ".safetensors" or path.name in skipped or not path.is_file():
                continue
            try:
                shutil.copyfile(path, target / path.name)
            except OSError as error:
                problem = f"cannot copy {path} ({error.strerror or error})"
                raise CheckpointError(f"{problem}: free space or write elsewhere") from error
