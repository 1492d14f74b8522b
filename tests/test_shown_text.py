import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.shown_text import printable, word_changes

# Hypothesis leaves out half surrogates unless they are asked for.
texts = st.text(alphabet=st.characters(categories=None), max_size=60)


@given(texts)
def test_nothing_that_is_shown_acts_on_a_terminal_or_a_page(text):
    shown = printable(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in shown)
    assert not set("\u202e\u2066\u200f\u061c") & set(shown)
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["", "plain words\n\tand more", "naïve 漢字 👩‍🚀 <b>&amp;"])
def test_ordinary_text_is_shown_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"), [("\x1b[31m", "␛[31m"), ("a\r\x00", "a␍␀"), ("\ud83d", "⟨U+D83D⟩"), ("x\u2028y", "x⟨U+2028⟩y")]
)
def test_what_acts_is_made_visible(text, shown):
    assert printable(text) == shown


@given(texts, texts)
def test_the_pieces_of_a_text_are_the_text_and_what_is_kept_is_the_same_in_both(before, after):
    old, new = word_changes(before, after)
    assert "".join(text for text, _ in old) == before
    assert "".join(text for text, _ in new) == after
    assert "".join(t for t, changed in old if not changed) == "".join(t for t, changed in new if not changed)


def test_changes_are_whole_words_and_characters_where_no_spaces_are_written():
    old, new = word_changes("the room was dirty, and cold", "the room was pretty, and old")
    assert [text for text, changed in old if changed] == ["dirty", "cold"]
    assert [text for text, changed in new if changed] == ["pretty", "old"]
    assert word_changes("模型很好", "模型不好")[1] == [("模型", False), ("不", True), ("好", False)]
