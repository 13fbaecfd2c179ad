"""Session files with every field of the header, every tensor and every byte changed."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mutations as m
import pytest
from pairs import SECOND, Bystander, check_speech, write_special
from trials import Case, Note, Wrong, check

COUNT, CHUNKS, SECONDS = 700, 1, 30

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_foreign_session_is_restored_or_refused(chunk: int, tmp_path: Path) -> None:
    check("sessions", COUNT, CHUNKS, chunk, tmp_path)


def header_changed(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One or two fields of the JSON header; sometimes one of the metadata beside it."""
    outer, body = m.unpacked(data)
    metadata = outer["__metadata__"]
    if rng.random() < 0.1:
        changed, what = m.json_tree(metadata, rng)
        return m.repacked({**outer, "__metadata__": changed}, body), f"metadata {what}"
    tree = json.loads(metadata["session"])
    if rng.random() < 0.1:
        text, what = m.json_text(metadata["session"], rng)
        fields = {**metadata, "session": text.decode("utf-8", "replace")}
        return m.repacked({**outer, "__metadata__": fields}, body), f"header {what}"
    said = []
    for _ in range(rng.choice([1, 1, 2])):
        tree, what = m.json_tree(tree, rng, rng.choice([1, 1, None]))
        said.append(what)
        if not isinstance(tree, dict):
            break
    metadata = {**metadata, "session": json.dumps(tree)}
    return m.repacked({**outer, "__metadata__": metadata}, body), f"header {', '.join(said)}"


def ids_changed(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Ids of the dialogue or of a turn's speech out of range, in the middle or everywhere."""
    header, body = m.unpacked(data)
    names = [name for name in header if name == "ids" or name.startswith("speech.")]
    name = rng.choice(names)
    begin, end = header[name]["data_offsets"]
    value = rng.choice([-1, -100, 10**6, 2**31, 2**62, -(2**63), 255, 129, 1025, 0])
    count = (end - begin) // 8
    chosen = range(count) if rng.random() < 0.2 else [rng.randrange(max(1, count))][:count]
    changed = bytearray(body)
    for i in chosen:
        changed[begin + 8 * i : begin + 8 * i + 8] = value.to_bytes(8, "little", signed=True)
    # The text of a group is in its first frame alone; what the others hold is not read.
    codes = count - header["ids"]["shape"][1] if name == "ids" else count
    read = [i for i in chosen if i >= count - codes]
    what = f"{name}[{chosen}] = {value}"
    return m.repacked(header, bytes(changed)), what + (REFUSE if read and abs(value) > 9999 else "")


REFUSE = ", out of range"
"""Ends the description of a change that no restored session may have."""

CHANGES: tuple[Callable[[bytes, random.Random], tuple[bytes, str]], ...] = (
    *(header_changed, header_changed, header_changed, m.safetensors_file, m.safetensors_file),
    ids_changed,
)


def prepare(folder: Path) -> Case:
    bystander = Bystander()
    model = bystander.model
    originals = []
    for turns in (0, 1, 2):
        session = model.session("Be brief.", SECOND if turns else None, seed=3)
        for _ in range(turns):
            [*session.stream(SECOND, max_new_tokens=4, min_new_tokens=4)]
        session.save(folder / "session")
        originals.append((folder / "session").read_bytes())
    path = folder / "changed"

    def case(rng: random.Random, note: Note) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        data, what = rng.choice(originals[1:] * 4 + originals[:1]), ""
        if rng.random() < 0.02:
            write_special(path, rng, note)
        else:
            data, what = rng.choice(CHANGES)(data, rng)
            note(what)
            path.write_bytes(data)
        with bystander.watched(rng):
            session = model.restore_session(path)
            if what.endswith(REFUSE):
                raise Wrong("codes out of range are restored")
            if rng.random() < 0.2:
                session.interrupt(rng.choice([0.0, 100.0, 1e9]))
            for _ in range(rng.choice([1, 1, 2, 6])):
                check_speech([*session.stream(SECOND, max_new_tokens=3, min_new_tokens=3)])
            session.save(folder / "again")
            model.restore_session(folder / "again")
            os.unlink(folder / "again")
            session.reset()
            check_speech([*session.stream(SECOND, max_new_tokens=3)])

    return case
