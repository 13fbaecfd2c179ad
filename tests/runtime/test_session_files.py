"""Session files that somebody has changed: each field is checked, and a refusal changes nothing."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dialogues import limit_context
from helpers import fault, in_threads
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_session import GROUP, NEXT, say
from torch import Tensor

from mimo_fast import MimoAudio
from mimo_fast.errors import CheckpointError
from mimo_fast.runtime.lm.snapshot import Snapshot

Header = dict[str, Any]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def talk(model, audio, tmp_path_factory) -> Path:
    """A saved dialogue of two turns, with a voice."""
    session = model.session("Be brief.", audio[0], seed=3)
    for turn in (1, 2):
        say(session, audio[turn], NEXT)
    path = tmp_path_factory.mktemp("saved") / "talk"
    session.save(path)
    return path


def contents(path: Path) -> tuple[Header, Tensors]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["session"]), load_file(path)


def write(path: Path, header: Header | str, tensors: Tensors) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={"format": "mimo-fast session 1", "session": text})
    return path


def refusal(model: MimoAudio, path: Path) -> str:
    """The error of restoring a file, which begins with its name and is one line."""
    message = fault(lambda: model.restore_session(path), CheckpointError)
    assert message.startswith(f"the session in {path} cannot be read: ")
    assert len(message) < 700
    return message


ODD: list[Any] = [None, True, 1.5, "1", [], {}, [1], {"a": 1}, -1, 2**64, 10**30]
ODD += [math.nan, math.inf, -math.inf, "\ud800", [[[[]]]]]


def cases() -> list[tuple[str, Any]]:
    """Fields with each odd value that they may not have."""
    fields = ("seed", "draws", "cached", "opening", "turns", "spoken", "model", "system_prompt")
    fields += ("heard",)
    fine = {
        ("heard", "None"),
        ("seed", "-1"),
        ("spoken", "[]"),
        ("system_prompt", "None"),
        ("system_prompt", "'1'"),
    }
    pairs = [(field, value) for field in fields for value in ODD]
    return [(field, value) for field, value in pairs if (field, repr(value)) not in fine]


class TestHeader:
    @pytest.mark.parametrize(("field", "value"), cases())
    def test_a_field_of_another_type_or_range(self, model, talk, tmp_path, field, value):
        header, tensors = contents(talk)
        refusal(model, write(tmp_path / "odd", header | {field: value}, tensors))

    @pytest.mark.parametrize("field", ["seed", "draws", "cached", "opening", "turns", "model"])
    def test_a_field_that_is_missing_or_unknown(self, model, talk, tmp_path, field):
        header, tensors = contents(talk)
        assert "lacks or adds 'more'" in refusal(
            model, write(tmp_path / "odd", header | {"more": 1}, tensors)
        )
        del header[field]
        assert f"'{field}'" in refusal(model, write(tmp_path / "odd", header, tensors))

    def test_what_a_voice_is_like_is_known_or_not(self, model, talk, tmp_path):
        """A file of an earlier version says nothing of it; sums must be those of rows."""
        header, tensors = contents(talk)
        heard = {"codec": model.codec.fingerprint, "sums": [[48.0, 2.0, 50.0], [97.0, 1.0, 60.0]]}
        kept = tmp_path / "kept"
        model.restore_session(write(kept, header | {"heard": heard}, tensors)).save(kept)
        assert contents(kept)[0]["heard"] == heard
        del header["heard"]
        model.restore_session(write(kept, header, tensors)).save(kept)
        assert contents(kept)[0]["heard"] is None
        sums = heard["sums"]
        for wrong in (
            [sums[0]],
            [sums[0], [97.0, 1.0]],
            [sums[0], [0.0, 0.0, 0.0]],
            [sums[0], [97.0, 100.0, 60.0]],
            [sums[0], [97.0, 1.0, math.nan]],
            [sums[0], [math.inf, 1.0, 60.0]],
            [[-1.0, 2.0, 50.0], sums[1]],
            [sums[0], ["a", 1.0, 60.0]],
        ):
            changes = {"heard": heard | {"sums": wrong}}
            assert "'heard'" in refusal(model, write(tmp_path / "odd", header | changes, tensors))
        for odd in ({"sums": sums}, heard | {"codec": 3}, heard | {"more": 1}):
            refusal(model, write(tmp_path / "odd", header | {"heard": odd}, tensors))

    def test_places_that_contradict_each_other(self, model, talk, tmp_path):
        header, tensors = contents(talk)
        (first, reply), (second, last) = header["turns"]
        whole = tensors["ids"].shape[1] // GROUP
        wrong: list[Header] = [
            {"turns": [[second, last], [first, reply]]},
            {"turns": [[first, first], [second, last]]},
            {"turns": [[first, second + 1], [second, last]]},
            {"turns": [[first, reply], [second, whole + 1]]},
            {"turns": [[first, reply]]},
            {"turns": [[first, first + 1], [second, last]]},
            {"turns": [[first - 1, reply], [second, last]]},
            {"opening": first + 1},
            {"opening": whole + 1},
            {"cached": whole + 1},
            {"cached": 0},
            {"spoken": [whole]},
            {"spoken": [last - 1]},
            {"spoken": [last + 1, last]},
            {"spoken": [last, last]},
            {"draws": 2**63 - 1},
        ]
        for changes in wrong:
            refusal(model, write(tmp_path / "odd", header | changes, tensors))

    @pytest.mark.parametrize(
        "text",
        [
            *("", "null", "[]", "{", '{"seed": 1, "seed": 2}'),
            *("[" * 100_000, '{"a":' * 100_000, '"' + "x" * 10_000 + '"'),
        ],
    )
    def test_a_header_that_is_no_json_object(self, model, talk, tmp_path, text):
        refusal(model, write(tmp_path / "odd", text, contents(talk)[1]))


def first_of(name: str, value: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


CHANGES: dict[str, Callable[[Tensors], object]] = {
    "ids of float": lambda t: t.update(ids=t["ids"].float()),
    "ids of a row too few": lambda t: t.update(ids=t["ids"][1:].clone()),
    "ids of half a group": lambda t: t.update(ids=t["ids"][:, :-1].clone()),
    "ids of one axis": lambda t: t.update(ids=t["ids"][0].clone()),
    "ids of none": lambda t: t.update(ids=torch.tensor(3)),
    "no ids": lambda t: t.pop("ids"),
    "a negative token": first_of("ids", -1),
    "filler in place of a token": first_of("ids", -100),
    "a token beyond the vocabulary": first_of("ids", 2**40),
    "a negative code": lambda t: t["ids"][3, -1:].fill_(-1),
    "a code beyond its codebook": lambda t: t["ids"][8, -1:].fill_(17),
    "no speech": lambda t: t.pop("speech.1"),
    "more speech": lambda t: t.update({"speech.2": t["speech.1"].clone()}),
    "other speech": first_of("speech.1", 0),
    "speech of another size": lambda t: t.update({"speech.0": t["speech.0"][:, :-GROUP].clone()}),
    "speech of float": lambda t: t.update({"speech.0": t["speech.0"].double()}),
    "an unknown tensor": lambda t: t.update(more=torch.zeros(1)),
    "no hidden state": lambda t: t.pop("hidden"),
    "a cache of NaN": lambda t: t["cache.0"].view(-1)[-1:].fill_(math.nan),
    "a cache of infinities": lambda t: t["cache.1"].fill_(math.inf),
    "a hidden state of NaN": lambda t: t["hidden"].fill_(math.nan),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit(model, talk, tmp_path, change):
    header, tensors = contents(talk)
    CHANGES[change](tensors)
    refusal(model, write(tmp_path / "odd", header, tensors))


NO_CACHE: dict[str, Callable[[Tensors], object]] = {
    "of another type": lambda t: t.update({"cache.0": t["cache.0"].half()}),
    "of another length": lambda t: t.update({"cache.0": t["cache.0"][:, :, :-1].clone()}),
    "of other layers": lambda t: t.update({"cache.0": t["cache.0"][:-1].clone()}),
    "of one axis": lambda t: t.update({"cache.1": t["cache.1"].flatten()}),
    "with scales": lambda t: t.update({"cache.2": torch.zeros(1), "cache.3": torch.zeros(1)}),
    "with another hidden state": lambda t: t.update(hidden=torch.zeros(3)),
}


@pytest.mark.parametrize("change", NO_CACHE)
def test_a_cache_that_does_not_fit_is_not_used(model, talk, audio, tmp_path, change):
    header, tensors = contents(talk)
    NO_CACHE[change](tensors)
    path, *sessions = write(tmp_path / "odd", header, tensors), model.restore_session(talk)
    sessions.append(model.restore_session(path))
    for session in sessions:
        # Else its beginning, which others may have had, is not computed.
        model.engine.steps.prefixes.clear()
        say(session, audio[1], NEXT)
    assert torch.equal(sessions[0].ids, sessions[1].ids)
    assert sessions[1].prefilled > sessions[0].prefilled + 2 * NEXT


def test_a_poisoned_opening_is_shared_with_nobody(model, talk, audio, tmp_path):
    """The prefix of a voice is computed here: a file cannot put its cache under another's ids."""
    model = copy.copy(model)
    model.pipeline.engine.steps.prefixes.clear()
    header, tensors = contents(talk)
    cut = {name: t[:, :, :2].clone() for name, t in tensors.items() if name.startswith("cache")}
    poison = {name: torch.full_like(part, 3.0) for name, part in cut.items()}
    path = write(tmp_path / "odd", header | {"cached": 2}, tensors | poison)
    poisoned = model.restore_session(path)
    say(poisoned, audio[1], NEXT)
    after = model.session("Be brief.", audio[0], seed=3)
    for turn in (1, 2):
        say(after, audio[turn], NEXT)
    assert torch.equal(after.ids, tensors["ids"])


def test_a_longer_dialogue_than_the_context(greedy, talk):
    limit_context(greedy, 40)
    engine = copy.copy(greedy.pipeline.engine)
    engine.capacity = 40
    greedy.pipeline = copy.copy(greedy.pipeline)
    greedy.pipeline.__dict__["engine"] = engine
    assert "context is 40" in fault(lambda: greedy.restore_session(talk))


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "loop", "hole", "name"])
def test_what_is_no_file(model, tmp_path, kind):
    path = tmp_path / ("\0" if kind == "name" else "odd")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "loop"):
        path.symlink_to("/dev/zero" if kind == "device" else "odd")
    elif kind == "hole":
        path.touch()
        os.truncate(path, 2**40)
    fault(lambda: model.restore_session(path))


@pytest.mark.parametrize("place", ["no/folder", "file/talk", "", "x" * 300])
def test_a_place_that_cannot_be_written(model, audio, tmp_path, place):
    (tmp_path / "file").write_text("")
    session = model.session(seed=3)
    say(session, audio[1], 2)
    said = session.ids
    assert "cannot write" in fault(lambda: session.save(tmp_path / place))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not [*tmp_path.parent.glob(".*.tmp")]
    assert torch.equal(session.ids, said)


def test_a_restored_dialogue_does_not_depend_on_its_file(model, talk, audio, tmp_path):
    path = tmp_path / "talk"
    path.write_bytes(talk.read_bytes())
    sessions = [model.restore_session(each) for each in (talk, path)]
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    for session in sessions:
        say(session, audio[1], NEXT)
    assert torch.equal(sessions[0].ids, sessions[1].ids)


def test_a_refusal_changes_nothing(model, talk, audio, tmp_path):
    """A stream that runs beside it goes on, and the engine holds no more than before."""
    engine = model.pipeline.engine
    session, other = (model.session("Be brief.", audio[0], seed=4) for _ in range(2))
    want = [chunk.audio for chunk in say(other, audio[1], NEXT)]
    running = session.stream(audio[1], max_new_tokens=NEXT, min_new_tokens=NEXT)
    got = [next(running).audio]
    held = [*engine.slots.owners], len(engine.steps.prefixes), len(engine._requests)
    header, tensors = contents(talk)
    errors = []
    for changes in ({"opening": 1.5, "cached": 0}, {"seed": math.nan}, {"spoken": [None]}):
        with pytest.raises(CheckpointError) as caught:
            model.restore_session(write(tmp_path / "odd", header | changes, tensors))
        errors.append(caught.value)
        assert ([*engine.slots.owners], len(engine.steps.prefixes), len(engine._requests)) == held
        got.append(next(running).audio)
    got += [chunk.audio for chunk in running]
    assert torch.equal(torch.cat(got), torch.cat(want))


@pytest.mark.parametrize("poison", ["shape", "parts", "hidden", "length", "prefix"])
def test_a_poisoned_snapshot_fails_alone(model, audio, poison):
    """Beside innocent streams, wherever they are: in seats, waiting, or being read."""
    engine, errors = model.pipeline.engine, list[Exception]()

    def spoil(kept: Snapshot) -> Snapshot:
        parts, hidden, length = kept.parts, kept.hidden, kept.length
        if poison == "parts":
            parts = parts[:1]
        elif poison == "hidden":
            hidden = hidden[:3]
        elif poison == "length":
            length = 1.5  # type: ignore[assignment]
        else:
            parts = tuple(part[:, :, :3] for part in parts)
        return Snapshot(length, parts, hidden)

    quiet = model.session(seed=8)
    say(quiet, audio[1], NEXT)
    want = torch.cat([chunk.audio for chunk in say(quiet, audio[2], NEXT)])
    victim = model.session(None, audio[0], seed=9)
    say(victim, audio[1], NEXT)
    sequence = victim._sequence
    if poison == "prefix":
        sequence.truncate(0)
        victim.reset()
        for edge in engine.steps.prefixes._edges():
            if edge.parts is not None:
                edge.parts = tuple(part[:, :, :3] for part in edge.parts)
        victim = model.session(None, audio[0], seed=9)
    else:
        kept = engine.export(sequence)
        engine.slots.owners[sequence.slot] = None
        sequence.slot, sequence.snapshot = None, spoil(kept)

    def stream(i: int) -> Tensor | None:
        if i == 0:
            for _ in range(4):
                try:
                    say(victim, audio[2], 2)
                except Exception as error:
                    # Held on to, as a server's log may do.
                    errors.append(error)
            return None
        session = model.session(seed=8)
        say(session, audio[1], NEXT)
        return torch.cat([chunk.audio for chunk in say(session, audio[2], NEXT)])

    try:
        spoken = in_threads(stream, 6)
    finally:
        engine.steps.prefixes.clear()
    assert errors, "nothing was poisoned"
    assert all(torch.equal(each, want) for each in spoken[1:])
    assert not engine._requests
