"""Sessions go back: the last turn taken back, or a dialogue restarted from some exchanges."""

import dataclasses

import pytest
import torch
from dialogues import limit_context
from test_session import GROUP, NEXT, REPLY, groups, say, started

from mimo_fast import PromptError
from mimo_fast.runtime.session import Exchange
from mimo_fast.text.prompt import TEXT_FILLER, SpokenReply, UserText


def state(session):
    sequence = session._sequence
    return session.ids.clone(), sequence.cached, sequence.draws, session.turns


def same(before, after):
    return torch.equal(before[0], after[0]) and before[1:] == after[1:]


class TestTakeBack:
    @pytest.mark.parametrize("taken", [0, 1, 9, None])
    def test_leaves_no_trace(self, model, audio, taken):
        session, other = (model.session("Be brief.", audio[0], seed=7) for _ in range(2))
        say(session, audio[1], NEXT)
        say(other, audio[1], NEXT)
        before = state(session)
        if taken is None:
            say(session, audio[2])
        else:
            running = started(session, audio[2], taken)
        session.take_back()
        assert same(before, state(session))
        if taken is not None:
            assert list(running) == []
        audio_of = [torch.cat([c.audio for c in say(each, audio[2])]) for each in (session, other)]
        assert torch.equal(*audio_of)
        assert torch.equal(session.ids, other.ids)
        assert session.prefilled == other.prefilled

    def test_what_was_learned_of_the_voice_goes_too(self, model, audio):
        session, other = model.session(seed=7), model.session(seed=7)
        list(session.stream(audio[1], max_new_tokens=REPLY, lookahead="elastic"))
        assert session._voice.heard is not None
        session.take_back()
        assert session._voice.heard is None
        heard = [
            [c.audio for c in each.stream(audio[2], max_new_tokens=NEXT, lookahead="elastic")]
            for each in (session, other)
        ]
        assert torch.equal(*map(torch.cat, heard))

    def test_turns_that_were_pushed_out_are_back(self, greedy, audio):
        limit_context(greedy, 150)
        session = greedy.session()
        for turn in (0, 1):
            say(session, audio[turn], NEXT)
        before = state(session)
        say(session, torch.zeros(24000 * 8), NEXT)
        assert session.turns < 3
        session.take_back()
        after = state(session)
        assert torch.equal(before[0], after[0])
        assert before[3] == after[3] == 2
        # What was overwritten in the cache is prefilled again.
        assert after[1] <= before[1]
        fresh = greedy.session()
        for turn in (0, 1, 2):
            say(fresh, audio[turn], NEXT)
        say(session, audio[2], NEXT)
        assert torch.equal(session.ids, fresh.ids)

    def test_only_a_turn_that_is_there(self, greedy, audio):
        session = greedy.session()
        with pytest.raises(ValueError, match="no turn to take back"):
            session.take_back()
        say(session, audio[1], NEXT)
        session.take_back()
        for undo in (session.take_back, session.reset, lambda: session.interrupt(0)):
            if undo != session.take_back:
                say(session, audio[1], NEXT)
                undo()
            with pytest.raises(ValueError, match="no turn to take back"):
                session.take_back()

    def test_a_turn_that_failed_changes_nothing(self, greedy, audio):
        limit_context(greedy, 90)
        session = greedy.session()
        say(session, audio[1], NEXT)
        said = session.ids
        with pytest.raises(PromptError):
            session.stream(torch.zeros(24000 * 20))
        assert torch.equal(session.ids, said)
        session.take_back()
        assert session.turns == 0


class TestRestart:
    def dialogue(self, greedy, audio):
        session = greedy.session("Be brief.", audio[0])
        for turn in (1, 2, 0):
            say(session, audio[turn], NEXT)
        return session

    def test_the_same_exchanges_change_nothing(self, greedy, audio):
        session = self.dialogue(greedy, audio)
        before = state(session)
        assert [groups(each.reply) for each in session.exchanges] == [NEXT] * 3
        session.restart(session.exchanges)
        assert same(before, state(session))
        session.interrupt(0)
        assert groups(session.ids) < groups(before[0])

    def test_before_any_turn_there_are_none(self, greedy, audio):
        session = greedy.session("Be brief.", audio[0])
        ids = session.ids
        assert session.exchanges == ()
        session.restart([])
        assert torch.equal(session.ids, ids)

    def test_another_session_goes_on_from_them(self, greedy, audio):
        session, other = self.dialogue(greedy, audio), greedy.session("Be brief.", audio[0])
        other.restart(session.exchanges)
        assert torch.equal(session.ids, other.ids)
        say(session, audio[1], NEXT)
        say(other, audio[1], NEXT)
        assert torch.equal(session.ids, other.ids)
        assert other.prefilled > session.prefilled

    def test_what_both_begin_with_stays_cached(self, greedy, audio):
        session, fresh = self.dialogue(greedy, audio), greedy.session("Be brief.", audio[0])
        first, second, third = session.exchanges
        cut = dataclasses.replace(second, reply=second.reply[:, : 3 * GROUP])
        session.restart([first, cut, third])
        fresh.restart([first, cut, third])
        assert torch.equal(session.ids, fresh.ids)
        cached = session._sequence.cached
        assert 0 < cached < groups(session.ids)
        for each in (session, fresh):
            say(each, audio[2], NEXT)
        assert torch.equal(session.ids, fresh.ids)

    def test_the_oldest_go_where_there_is_no_room(self, greedy, audio):
        session = self.dialogue(greedy, audio)
        exchanges = session.exchanges
        limit_context(greedy, groups(session.ids) * 3 // 4)
        small = greedy.session("Be brief.")
        small.restart(exchanges)
        assert 0 < small.turns < 3
        assert torch.equal(small.exchanges[-1].reply, exchanges[-1].reply)

    def test_refuses_what_is_no_reply(self, greedy, audio):
        session = self.dialogue(greedy, audio)
        before = state(session)
        wrong = Exchange(session.exchanges[0].said, torch.zeros(3, 4, dtype=torch.int64))
        with pytest.raises(PromptError, match="a reply's ids must be"):
            session.restart([wrong])
        assert same(before, state(session))

    def test_a_reply_that_was_packed_is_one(self, greedy, audio):
        session = self.dialogue(greedy, audio)
        first = session.exchanges[0]
        reply = greedy.pack([SpokenReply(UserText("Yes."), first.reply[1:])])
        assert (reply[0] == TEXT_FILLER).any()
        session.restart([Exchange(first.said, reply)])
        assert torch.equal(session.exchanges[0].reply, reply)

    @pytest.mark.parametrize("channel", [0, 1, -1])
    @pytest.mark.parametrize("id", [-1, 2**40])
    def test_refuses_ids_of_another_model(self, greedy, audio, channel, id):
        session = self.dialogue(greedy, audio)
        before = state(session)
        first = session.exchanges[0]
        reply = first.reply.clone()
        reply[channel, -1] = id
        with pytest.raises(PromptError, match="none of this model"):
            session.restart([Exchange(first.said, reply)])
        assert same(before, state(session))
