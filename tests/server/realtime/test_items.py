"""The conversation, and what was heard of a reply."""

import pytest

from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.items import Conversation, Item, Reply, Said
from mimo_fast.server.realtime.responses import Manner, ask_about


def ids(conversation: Conversation) -> str:
    return "".join(item.id for item in conversation.items)


def written(id: str, role: str = "user", text: str = "hello") -> Item:
    reply = Reply() if role == "assistant" else None
    return Item(id, role, [Said(text)], reply=reply)


class TestOrder:
    def test_items_are_put_where_they_belong(self):
        conversation = Conversation()
        assert conversation.add(written("b")) is None
        assert conversation.add(written("d")) == "b"
        assert conversation.add(written("a"), "root") is None
        assert conversation.add(written("c"), "b") == "b"
        assert ids(conversation) == "abcd"
        conversation.remove("b")
        assert ids(conversation) == "acd"
        assert conversation.last == "d"

    @pytest.mark.parametrize(
        ("refused", "code"),
        [
            (lambda each: each.add(written("a")), "item_create_duplicate_item_id"),
            (lambda each: each.add(written("z"), "y"), "item_create_invalid_previous_item_id"),
            (lambda each: each.get("z"), "item_retrieve_invalid_item_id"),
            (lambda each: each.get("z", "truncate"), "item_truncate_invalid_item_id"),
            (lambda each: each.remove("z"), "item_delete_invalid_item_id"),
        ],
    )
    def test_what_is_refused_changes_nothing(self, refused, code):
        conversation = Conversation()
        conversation.add(written("a"))
        with pytest.raises(ApiError) as caught:
            refused(conversation)
        assert caught.value.code == code
        assert ids(conversation) == "a"


class TestHeard:
    @pytest.mark.parametrize(
        ("ms", "text"),
        [(0, ""), (299, ""), (300, "one"), (699, "one"), (700, "one two"), (1000, "one two three")],
    )
    def test_words_that_are_paced(self, ms, text):
        words = [("one", 0.0), (" two", 300.0), (" three", 700.0)]
        assert Reply(words=words, ms=1000).heard_by(ms) == text

    def test_words_that_came_together_share_their_time(self):
        reply = Reply(words=[("one two three four", 0.0), (" five", 800.0)], ms=1000)
        assert [reply.heard_by(ms) for ms in (199, 200, 600, 999)] == [
            "",
            "one",
            "one two three",
            "one two three four",
        ]

    def test_all_and_nothing(self):
        assert Reply(words=[("一二三", 0.0)], ms=500).heard_by(499) == ""
        assert Reply(words=[("一二三", 0.0)], ms=500).heard_by(500) == "一二三"
        assert Reply().heard_by(10) == ""


class TestAsked:
    def test_the_last_turn_after_the_ones_before(self):
        said = written("a", text="one"), written("c", text="two"), written("d", text="three")
        reply = written("b", "assistant", "yes")
        ask = ask_about([said[0], reply, *said[1:]], Manner("Be brief."))
        assert [each.text for each in ask.said] == ["two", "three"]
        ((before, kept, text),) = ask.before
        assert (before[0].text, kept, text) == ("one", reply.reply, "yes")
        assert ask.instructions == "Be brief."

    def test_what_the_system_says_is_an_instruction(self):
        ask = ask_about([written("s", "system", "Sums."), written("a")], Manner("Be brief."))
        assert ask.instructions == "Be brief.\nSums."
        assert [each.text for each in ask.said] == ["hello"]

    def test_nothing_new_asks_again_or_as_told(self):
        items = [written("a", text="one"), written("b", "assistant", "yes")]
        assert ask_about(items, Manner()).said[0].text == "one"
        assert ask_about(items, Manner(asked="two")).said[0].text == "two"
        assert ask_about([], Manner(asked="two")).said[0].text == "two"
        assert ask_about([], Manner()).said[0].text == "hello"
        # A greeting is remembered with what it answers.
        items[0].contents = []
        items[1].reply.asked = (Said("greet"),)
        assert ask_about([items[1]], Manner()).before[0][0][0].text == "greet"
