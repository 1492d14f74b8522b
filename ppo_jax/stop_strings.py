"""Stop strings as a table over tokens, so that the device can match them without seeing text.

The classical automaton of Knuth, Morris and Pratt runs over characters; here its steps over all characters of a token
are taken at once, for every token of the vocabulary and every state.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def _longest_border(text: str, prefix_of: str) -> int:
    """Length of the longest suffix of `text` that is a proper start of `prefix_of` or all of it."""
    return next(n for n in range(min(len(text), len(prefix_of)), -1, -1) if text.endswith(prefix_of[:n]))


def _next_state(stop: str, state: int, token_text: str) -> int:
    """State after a token's characters; once the string is complete it stays so."""
    for character in token_text:
        if state == len(stop):
            break
        state = _longest_border(stop[:state] + character, stop)
    return state


def token_texts(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """What each token adds to a text, special tokens nothing.

    Decoded behind an anchor, because some tokenizers drop a leading space at the start. A token that is part of a
    multi-byte character decodes to a replacement character: a stop string outside ASCII is only found when whole
    characters are tokens.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    prefix = len(tokenizer.decode(anchor))
    special, size = set(tokenizer.all_special_ids), min(vocab_size, len(tokenizer))
    decoded = tokenizer.batch_decode([[*anchor, token] for token in range(size)])
    return ["" if token in special else text[prefix:] for token, text in enumerate(decoded)] + [""] * (
        vocab_size - size
    )


def stop_table(stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """int32 [strings, states, V], see `rollout.Endings`: all strings end in the last state, whatever their length.

    Without stop strings the table is empty, [0, 1, V].
    """
    longest = max((len(stop) for stop in stop_strings), default=0)
    table = np.zeros((len(stop_strings), longest + 1, vocab_size), np.int32)
    texts = token_texts(tokenizer, vocab_size) if stop_strings else []
    for row, stop in enumerate(stop_strings):
        cache: dict[tuple[int, str], int] = {}
        for token, text in enumerate(texts):
            # Only a token that contains the string, or ends in a start of it, or continues it, leaves state 0.
            for state in range(len(stop) + 1):
                key = (state, text)
                if key not in cache:
                    cache[key] = _next_state(stop, state, text)
                end = cache[key]
                table[row, state, token] = longest if end == len(stop) else end
    return table
