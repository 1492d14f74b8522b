"""What a person is shown of a text that a model wrote: nothing invisible acts, and changed words can be marked."""

import re
import unicodedata
from difflib import SequenceMatcher

# Scripts that write no spaces between words are compared by character.
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|\w+|\s+|[^\w\s]")
# Characters that turn the direction of what follows, or break a line where JSON and terminals see none.
_ACTING = {0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}


def printable(text: str) -> str:
    """The text with every control character, direction mark and half of a surrogate pair made visible.

    Line feeds and tabs stay. A terminal or a page that gets the result does nothing but show it.
    """
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # a picture of it
    if unicodedata.category(character) in ("Cc", "Cs") or code in _ACTING:
        return f"⟨U+{code:04X}⟩"
    return character


def word_changes(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts as pieces (text, changed): what is gone from `before`, and what is new in `after`, word by word.

    The pieces of a text put together are the text.
    """
    old, new = _WORD.findall(before), _WORD.findall(after)
    same = SequenceMatcher(a=old, b=new, autojunk=False).get_matching_blocks()
    return _pieces(old, [(m.a, m.a + m.size) for m in same]), _pieces(new, [(m.b, m.b + m.size) for m in same])


def _pieces(words: list[str], kept: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    pieces, done = [], 0
    for start, end in kept:
        pieces += [("".join(words[done:start]), True), ("".join(words[start:end]), False)]
        done = end
    return [(text, changed) for text, changed in pieces if text]
