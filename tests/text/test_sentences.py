"""Texts in sentences, and in pieces that a model says at once."""

from time import perf_counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mimo_fast.text.sentences import split_sentences, split_to_say
from mimo_fast.text.spelling import spell


@pytest.mark.parametrize(
    "marked",
    [
        "a b c. |d e f.",
        "Hello there. |How are you? |Fine!",
        "hello there. |how are you? |fine! |good night",
        # Abbreviations, initials, acronyms.
        "Dr. Smith met Mr. Jones at 5 p.m. on Main St. |He paid $3.50. |Then left.",
        "J. R. R. Tolkien wrote it. |So did John F. Kennedy.",
        "A B C. |D E F.",
        "See e.g. the cat, i.e. Tom. |Cats vs. Dogs etc. |They won.",
        "The U.S. is big. |In the U.S. |We live.",
        "No. 5 is alive. |I said no. |Five came. |See Fig. 3 on p. 12. |Good.",
        "Vitamin C. |It is good. |So do I. |We go.",
        "Apple Inc. makes phones in Jan. and Feb. |It does.",
        # Numbers, addresses, lists.
        "Pi is 3.14, or 3,14. |It costs 1.000.000 at 10.30. |Yes.",
        "Visit example.com or a.b@c.de. |Version 1.2.3 is out.",
        "1. First item\n|2. Second item\n|- third\n|• fourth",
        "7. |8. |9.",
        "In 1999. |Then 2000.",
        "A title\n\n|a text that\ngoes on",
        # Quotes and brackets.
        'He said "Go!" and left. |"Really?" she asked. |"Yes." |Then silence.',
        "(It was late.) |We left (see p. 5).",
        "“Stop.” |‘Why?’ |«Non.» |Oui.",
        # Hesitation.
        "Wait... what? |I was... tired… very. |So... |The end.",
        "What?! |No!! |Stop.",
        # Other scripts.
        "你好。|今天天气真好！|你呢？|“好。”|他说。",
        "你好!|你是谁?|我是3.5版.|好",
        "我……不知道。|圆周率是3．14。",
        "今日は。|元気？|はい。",
        "안녕하세요. |반갑습니다.",
        "नमस्ते। |आप कैसे हैं? |अच्छा।",
        "كيف حالك؟ |بخير.",
        # Nothing to say is no sentence.
        "Hello. |:-) Bye. ♥ ! ...",
        "?! Hello.",
        "...",
        "",
    ],
)
def test_sentences(marked):
    assert split_sentences(marked.replace("|", "")) == marked.split("|")


TEXTS = st.text("abA1 .!?…。！,;:\n\"'”)(-–今", max_size=60) | st.text(max_size=60)


@given(TEXTS)
def test_sentences_join_to_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    if any(character.isalnum() for character in text):
        assert all(any(character.isalnum() for character in each) for each in sentences)


@given(TEXTS, st.integers(0, 3), st.integers(0, 9))
@example("one two three four five six", 0, 4)
@example("\x1b\rA:A", 0, 1)
def test_pieces_join_to_the_text_and_are_short(text, sentences, words):
    pieces = split_to_say(text, sentences, words)
    assert "".join(pieces) == text
    if not sentences and not words:
        assert pieces == [text]
    for piece in pieces:
        if sentences:
            assert len(split_sentences(piece)) <= sentences + 1
        # One number may be many words, and they are not cut.
        if words and not any(character.isdigit() for character in text):
            spoken = [part for part in piece.split() if spell(part)]
            assert len(spell(piece)) <= words or len(spoken) == 1


def test_long_sentences_are_cut_where_a_line_or_a_clause_ends():
    text = "seven eight nine, ten eleven twelve; thirteen,000 is 742 and fourteen\nfifteen sixteen"
    assert split_to_say(text, 1, 8) == [
        "seven eight nine, ten eleven twelve; ",
        "thirteen,000 is ",
        "742 and fourteen\n",
        "fifteen sixteen",
    ]


def test_words_without_a_pause_are_cut_evenly():
    pieces = split_to_say(" ".join("abcdefghijklmnopqrstuvwxyz"), 1, 12)
    assert [len(piece.split()) for piece in pieces] == [9, 9, 8]
    assert [len(piece) for piece in split_to_say("今天天气真好我们去北京", 1, 6)] == [6, 5]


@pytest.mark.parametrize(
    "part", ["a. ", ".", " ", "a", "\n", "(", "a,", "- ", "a b ", '." ', "1. "]
)
def test_time_grows_with_the_text(part):
    text = part * (100_000 // len(part))
    began = perf_counter()
    assert "".join(split_to_say(text, 1, 12)) == text
    assert perf_counter() - began < 15
