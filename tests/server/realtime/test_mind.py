"""What is computed with the model: memory of a dialogue, texts, and what was not heard."""

from __future__ import annotations

import pytest
import torch
from speech import question

from mimo_fast.server.realtime.items import Item, Said
from mimo_fast.server.realtime.mind import Ask, Mind
from mimo_fast.server.realtime.responses import Manner, ask_about

MOST = 12


@pytest.fixture
def mind(model) -> Mind:
    """Of a model that states no tasks, so that all are asked of it."""
    return Mind(model)


def spoken(wav: torch.Tensor, id: str = "u") -> Item:
    return Item(id, "user", [Said(spoken=True, seconds=len(wav) / 24000, wav=wav)])


def typed(text: str, id: str = "u") -> Item:
    return Item(id, "user", [Said(text)])


def answered(mind: Mind, items: list[Item], manner: Manner | None = None) -> Ask:
    """The conversation's next reply, which becomes part of it."""
    ask = ask_about(items, manner or Manner(most=MOST))
    said = [*mind.answer(ask)]
    reply = Item(f"a{len(items)}", "assistant", [Said("".join(piece.text for piece in said))])
    reply.reply = ask.reply
    items.append(reply)
    return ask


def prompt_groups(mind: Mind, ask: Ask) -> int:
    return ask.usage.text_in + ask.usage.audio_in


class TestMemory:
    def test_a_dialogue_goes_on_where_it_was(self, mind):
        items = [spoken(question())]
        first = answered(mind, items)
        items.append(spoken(question()))
        second = answered(mind, items)
        assert second.usage.cached > 0
        assert prompt_groups(mind, second) > prompt_groups(mind, first)
        # Equal to a session of its own that hears the same.
        other = mind._model.session()
        other.restart([first.reply.exchange, second.reply.exchange])
        assert torch.equal(other.ids, mind._session.ids)

    def test_a_reply_that_was_dropped_was_never_asked(self, mind):
        items = [spoken(question())]
        answered(mind, items)
        before = mind._session.ids
        guess = ask_about([*items, spoken(question())], Manner(most=MOST))
        running = mind.answer(guess)
        for _ in range(4):
            next(running)
        guess.reply.dropped = True
        running.close()
        items.append(spoken(question()[:24000]))
        ask = answered(mind, items)
        assert torch.equal(mind._session.ids[:, : before.shape[1]], before)
        assert mind._session.turns == 2
        assert [turn is reply for turn, reply in zip(mind._turns, _replies(items), strict=True)]
        assert ask.usage.cached >= before.shape[1] // 4 - 1

    @pytest.mark.slow
    def test_what_was_not_heard_is_gone_from_any_turn(self, mind):
        items = [spoken(question())]
        answered(mind, items)
        items.append(spoken(question()))
        answered(mind, items)
        first, last = _replies(items)
        kept = first.exchange.reply.shape[1]
        mind.cut(last, 1)
        assert torch.equal(mind._session.exchanges[-1].reply, last.exchange.reply)
        mind.cut(first, 1)
        assert first.exchange.reply.shape[1] < kept
        items.append(spoken(question()))
        ask = answered(mind, items)
        exchanges = mind._session.exchanges
        assert torch.equal(exchanges[0].reply, first.exchange.reply)
        assert torch.equal(exchanges[1].reply, last.exchange.reply)
        assert len(exchanges) == 3
        assert ask.usage.cached < prompt_groups(mind, ask) - 1

    @pytest.mark.slow
    def test_items_that_were_deleted_are_forgotten(self, mind):
        items = [spoken(question())]
        answered(mind, items)
        items.append(spoken(question()))
        answered(mind, items)
        del items[:2]
        items.append(spoken(question()))
        answered(mind, items)
        assert mind._session.turns == 2
        assert [id(each) for each in mind._turns] == [id(each) for each in _replies(items)]

    @pytest.mark.slow
    def test_what_was_written_is_part_of_it(self, mind):
        items = [typed("Hi."), Item("a", "assistant", [Said("Hello.")])]
        items[1].reply = ask_about([], Manner()).reply
        items.append(spoken(question()))
        answered(mind, items)
        ids = mind._session.ids[0, ::4].tolist()
        words = mind._model.tokenizer.encode("Hello.")
        assert any(ids[i : i + len(words)] == words for i in range(len(ids)))

    @pytest.mark.slow
    def test_instructions_begin_a_dialogue_anew(self, mind):
        items = [spoken(question())]
        answered(mind, items)
        session = mind._session
        items.append(spoken(question()))
        answered(mind, items, Manner("Be brief.", most=MOST))
        assert mind._session is not session
        words = mind._model.tokenizer.encode("Be brief.")
        ids = mind._session.ids[0, ::4].tolist()
        assert ids.count(words[0]) >= 1
        assert mind._session.turns == 2


def _replies(items: list[Item]):
    return [item.reply for item in items if item.reply is not None]


class TestTexts:
    def test_a_typed_turn_is_answered_in_words_and_read_out(self, mind, monkeypatch):
        """The text dialogue answers, and its words are said."""
        read = []
        say = Mind._say

        def noted(self, text, *more, **named):
            read.append(text)
            return say(self, text[:8], *more, **named)

        monkeypatch.setattr(Mind, "_say", noted)
        ask = ask_about([typed("Hi.")], Manner(most=MOST))
        running = mind.answer(ask)
        pieces = []
        for piece in running:
            pieces.append(piece)
            if sum(each.audio is not None and len(each.audio) > 0 for each in pieces) > 1:
                break
        running.close()
        (words,) = read
        assert "".join(piece.text for piece in pieces) == words
        assert ask.usage.text_out > 0

    def test_in_text_there_is_no_audio(self, mind):
        for item in (typed("Hi."), spoken(question())):
            ask = ask_about([item], Manner(speaks=False, most=MOST))
            pieces = [*mind.answer(ask)]
            assert all(piece.audio is None for piece in pieces)
            assert ask.finish_reason in ("length", "stop")
            assert (ask.usage.audio_in > 0) == item.contents[0].spoken


class TestNano:
    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("What is three plus four?", "what is three plus four"),
            ("My favourite number is seven.", "my number is seven"),
            ("Colourless green ideas sleep furiously.", "hello"),
            ("?!", "hello"),
            ("你好", "hello"),
        ],
    )
    def test_it_is_told_what_it_can_understand(self, service, text, told):
        assert Mind(service.model)._sayable(text) == told

    @pytest.mark.slow
    def test_it_hears_one_turn_at_a_time(self, service):
        """It was trained on no more."""
        mind, items = Mind(service.model), [typed("hello")]
        answered(mind, items, Manner())
        items.append(typed("What is three plus four?"))
        answered(mind, items, Manner())
        assert items[-1].text.strip() == "seven"
        assert mind._session.turns == 1

    def test_recordings_become_codes(self, service):
        mind, said = Mind(service.model), Said(spoken=True, wav=question())
        mind.encode(said)
        assert said.wav is None
        assert said.speech.codes.shape[0] == service.model.audio_channels
        mind.encode(said)
        assert said.speech is not None
