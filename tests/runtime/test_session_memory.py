"""What sessions keep: the newest turns of a full context, and all of a dialogue in a file."""

import copy

import pytest
import torch
from dialogues import limit_context
from helpers import fault, raising, watch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_session import GROUP, NEXT, PATCH_MS, closed, from_scratch, groups, say
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mimo_fast import LM, MimoAudio


class TestAFullContext:
    """Whole old turns go; voice and system prompt stay."""

    @pytest.fixture
    def short(self, greedy: MimoAudio) -> MimoAudio:
        limit_context(greedy, 220)
        return greedy

    def test_drops_the_oldest_turns(self, short, audio):
        session = short.session("Be brief.", audio[0])
        opening, seen = groups(session.ids), list[int]()
        for _ in range(9):
            before, said = session.turns, session.ids
            say(session, audio[1], NEXT)
            assert groups(session.ids) <= 220
            seen.append(session.turns)
            if session.turns <= before:
                assert groups(session.ids) - NEXT <= 110
                assert session.prefilled == groups(session.ids) - NEXT - opening
            assert torch.equal(session.ids[:, : opening * GROUP], said[:, : opening * GROUP])
        assert max(seen) > 2
        assert 1 <= min(seen[3:]) < max(seen), "nothing was dropped"

    def test_goes_on_as_a_dialogue_of_what_is_left(self, short, audio):
        session = short.session("Be brief.", audio[0])
        replies = list[Tensor]()
        while session.turns == len(replies):
            say(session, audio[1], NEXT)
            replies.append(session.ids[:, -NEXT * GROUP :])
        prompt = short.get_spoken_dialogue_sft_prompt(audio[1], "Be brief.", audio[0])
        for reply in replies[-session.turns : -1]:
            prompt = closed(short, torch.cat((prompt, reply), dim=1), audio[1])
        assert torch.equal(session.ids, from_scratch(short, prompt))

    def test_a_turn_that_fails_leaves_everything_as_it_was(self, short, audio, monkeypatch):
        session, other = (short.session("Be brief.", audio[0], seed=1) for _ in range(2))
        while session.turns < 2 or groups(session.ids) + 50 < 220:
            say(session, audio[1], NEXT)
            say(other, audio[1], NEXT)
        said = session.ids
        with monkeypatch.context() as patch:
            watch(patch, LM, "prefill_together", after=raising(RuntimeError, "device lost"))
            with pytest.raises(RuntimeError, match="device lost"):
                session.stream(audio[2])
        assert torch.equal(session.ids, said)
        say(session, audio[1], NEXT)
        say(other, audio[1], NEXT)
        assert torch.equal(session.ids, other.ids)


DAMAGES = dict.fromkeys(("missing", "text", "cut"), "cannot be read")
DAMAGES |= {"foreign": "belongs to another model", "weights": "not a session"}


class TestFiles:
    def test_a_restored_dialogue_goes_on_as_if_it_had_never_stopped(self, model, audio, tmp_path):
        session = model.session("Be brief.", audio[0], seed=3)
        say(session, audio[1], NEXT)
        session.save(tmp_path / "talk")
        restored = model.restore_session(tmp_path / "talk")
        assert torch.equal(restored.ids, session.ids)
        session.interrupt(PATCH_MS)
        restored.interrupt(PATCH_MS)
        said = session.ids
        for talk in (session, restored):
            say(talk, audio[2], NEXT)
            assert talk.prefilled < groups(talk.ids) - NEXT - groups(said) + 2
        assert torch.equal(restored.ids, session.ids)
        assert [path.name for path in tmp_path.iterdir()] == ["talk"]

    def test_another_kind_of_cache_is_computed_anew(self, model, audio, tmp_path):
        session = model.session(seed=3)
        say(session, audio[1], NEXT)
        session.save(tmp_path / "talk")
        tensors = load_file(tmp_path / "talk")
        with safe_open(tmp_path / "talk", "pt") as file:
            metadata = file.metadata()
        halved = {name: tensors[name].half() for name in tensors if name.startswith("cache")}
        save_file(tensors | halved, tmp_path / "other", metadata=metadata)
        restored = model.restore_session(tmp_path / "other")
        # Else its beginning, which others may have had, is not computed.
        model.engine.steps.prefixes.clear()
        say(restored, audio[2], NEXT)
        say(session, audio[2], NEXT)
        assert torch.equal(restored.ids, session.ids)
        assert restored.prefilled == groups(restored.ids) - NEXT

    @pytest.mark.parametrize(("damage", "problem"), DAMAGES.items())
    def test_a_file_that_is_no_session(self, model, audio, tmp_path, damage, problem):
        path = tmp_path / "talk"
        if damage == "text":
            path.write_text("no session")
        if damage == "weights":
            save_file({"ids": torch.zeros(1)}, path)
        if damage in ("cut", "foreign"):
            session = model.session(seed=3)
            say(session, audio[1], 2)
            session.save(path)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        if damage == "foreign":
            model = copy.copy(model)
            model.lm = copy.copy(model.lm)
            model.lm.__dict__["fingerprint"] = "another"
        message = fault(lambda: model.restore_session(path))
        assert str(path) in message
        assert problem in message


def test_the_twentieth_turn_computes_its_own_tokens(greedy, audio):
    """All products but attention's, up to those of the pending group, a patch or a word."""
    session = greedy.session("Be brief.", audio[0])
    say(session, audio[1], NEXT)
    turn = groups(closed(greedy, session.ids, audio[1])) - groups(session.ids) + 1
    products = list[int]()
    for _ in range(2, 21):
        with FlopCounterMode(display=False) as counter:
            next(session.stream(audio[1], max_new_tokens=NEXT, min_new_tokens=NEXT))
        counts = counter.get_flop_counts()["Global"]
        products.append(sum(count for op, count in counts.items() if "attention" not in str(op)))
        assert session.prefilled == turn
    assert max(products) <= 1.02 * min(products)
