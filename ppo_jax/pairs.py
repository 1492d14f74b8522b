"""Preference pairs: a file or data set becomes token rows, two of each pair, and some of them are held out."""

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_jax.errors import UserError
from ppo_jax.prompt_files import Problem, first_line, read_source, refuse
from ppo_jax.prompt_forms import Message, checked_text
from ppo_jax.reward_model_config import DataConfig

log = logging.getLogger("ppo_jax")

CHOSEN, REJECTED, PROMPT = "chosen", "rejected", "prompt"
LARGEST_MARGIN = 1e18  # as of a score; float32 holds its square
# As the dialogues of Bai et al., "Training a Helpful and Harmless Assistant", 2022, are written.
ANSWERS = "\n\nAssistant:"
TURNS = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which `chosen` was preferred."""

    prompt: str  # what both begin with; "" where they share none
    chosen: str
    rejected: str
    margin: float


@dataclass(frozen=True)
class Pairs:
    """Pairs as token rows: `chosen[i]` and `rejected[i]`, with the margin `margins[i]`.

    `keys[i]` are digests of what its texts begin with, or are (`keys_of`). `groups[i]` is the same for pairs that must
    not be parted between training and held out: those that a key joins, or a chain of keys.
    """

    chosen: list[list[int]]
    rejected: list[list[int]]
    margins: list[float]
    keys: list[tuple[str, ...]]
    groups: list[str]

    def __len__(self) -> int:
        return len(self.chosen)

    def at(self, indices: Sequence[int]) -> "Pairs":
        """Some of the pairs, in the order of `indices`."""
        return Pairs(*([values[i] for i in indices] for values in vars(self).values()))

    def digest(self) -> str:
        """A fingerprint of every token and margin, in order."""
        texts = repr((self.chosen, self.rejected, self.margins)).encode()
        return hashlib.sha256(texts).hexdigest()[:16]


def load_split(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Pairs, Pairs]:
    """(training, held out): no prompt and no token row is in both. Which pairs are which depends on their texts alone.

    Pairs are taken in the order of their prompts' digests: neither the order of the file nor a seed changes who is held
    out, and more rows move few of them.
    """
    if config.path is None:
        raise UserError("data.path: a file or data set of preference pairs must be given")
    pairs = load_pairs(config, tokenizer, path=config.path, split=config.split, key="data.path")
    if config.evaluation_path is None:
        pairs = _by_digest(pairs)
        held_out = _first(pairs, config.evaluation_pairs)
    else:
        source, split = config.evaluation_path, config.evaluation_split
        others = load_pairs(config, tokenizer, path=source, split=split, key="data.evaluation_path")
        groups = groups_of([*pairs.keys, *others.keys])
        pairs = _by_digest(replace(pairs, groups=groups[: len(pairs)]))
        held_out = _first(_by_digest(replace(others, groups=groups[len(pairs) :])), config.evaluation_pairs)
    training = _without_held_out(pairs, held_out, config)
    if not len(training):
        raise UserError(
            f"data.evaluation_pairs ({config.evaluation_pairs}): nothing is left to train on of the {len(pairs)} pairs "
            f"of {config.path}"
        )
    return training if config.train_pairs is None else training.at(
        range(min(config.train_pairs, len(training)))
    ), held_out


def _without_held_out(pairs: Pairs, held_out: Pairs, config: DataConfig) -> Pairs:
    """The pairs of other groups, none with a row that is held out: cut ones can be equal where their texts are not."""
    groups, rows = set(held_out.groups), set(map(tuple, [*held_out.chosen, *held_out.rejected]))
    others = [i for i, group in enumerate(pairs.groups) if group not in groups]
    kept = [i for i in others if rows.isdisjoint({tuple(pairs.chosen[i]), tuple(pairs.rejected[i])})]
    if config.evaluation_path is not None and len(others) < len(pairs):
        log.warning(
            "warning: %d of the %d pairs of %s have a prompt that is held out too, and are not trained on",
            *(len(pairs) - len(others), len(pairs), config.path),
        )
    if len(kept) < len(others):
        log.warning(
            "warning: %d pairs of %s, once cut to %d tokens, have a text that is held out too, and are not trained on",
            *(len(others) - len(kept), config.path, config.max_tokens),
        )
    return pairs.at(kept)


def _by_digest(pairs: Pairs) -> Pairs:
    return pairs.at(sorted(range(len(pairs)), key=lambda i: (pairs.groups[i], pairs.chosen[i], pairs.rejected[i])))


def _first(pairs: Pairs, count: int) -> Pairs:
    """The first pairs, `count` of them or a few more: the prompt of the last one comes with all of its pairs."""
    last = pairs.groups[min(count, len(pairs)) - 1]
    return pairs.at([i for i, group in enumerate(pairs.groups) if group <= last])


def load_pairs(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, path: str, split: str, key: str) -> Pairs:
    """Every usable pair of a source, encoded; all unusable ones are refused at once, or left out and counted."""
    rows = read_source(path, split=split, key=key)
    if rows and not any(CHOSEN in row.values and REJECTED in row.values for row in rows):
        names = dict.fromkeys(name for row in rows for name in row.values)
        raise UserError(f"{key}: {path} has no columns {CHOSEN!r} and {REJECTED!r}; it has {', '.join(names)}")
    problems, kept, cut, cut_apart = [], [], 0, 0
    for row in rows:
        try:
            pair = read_pair(row.values, config)
            whole = [
                encode(pair, answer, tokenizer, chat_template=config.chat_template)
                for answer in (pair.chosen, pair.rejected)
            ]
            chosen, rejected = cut_alike(*whole, most=config.max_tokens)
            if chosen == rejected:
                raise ValueError(
                    f"has the same tokens on both sides{' once they are cut' if whole[0] != whole[1] else ''}"
                )
        except (ValueError, RecursionError) as error:
            problems.append(Problem(row.where, str(error)))
            continue
        lost = [len(tokens) - len(rest) for tokens, rest in zip(whole, (chosen, rejected), strict=True)]
        cut, cut_apart = cut + any(lost), cut_apart + (lost[0] != lost[1])
        kept.append((chosen, rejected, pair.margin, keys_of(pair)))
    if problems and config.unusable == "error":
        refuse(f"{key}: pairs cannot be used (data.unusable: skip leaves them out)", problems)
    if not kept:
        raise UserError(f"{key}: {path} holds no pair that can be used, of {len(rows)}")
    log.info(
        "%s: %d pairs, %d more are unusable; %d longer than %d tokens are cut, %d of them into an answer",
        *(path, len(kept), len(problems), cut, config.max_tokens, cut_apart),
    )
    keys = [row[-1] for row in kept]
    return Pairs(*map(list, zip(*kept, strict=True)), groups=groups_of(keys))


def read_pair(values: dict[str, Any], config: DataConfig) -> Pair:
    """The pair of a row; ValueError says what is wrong with it.

    A column `prompt` comes before both answers. Without one the texts are whole, and in dialogues ("\\n\\nHuman: ...
    \\n\\nAssistant: ...") what comes before the last answer is the prompt, where it is the same on both sides.
    """
    chosen, rejected = (checked_text(values.get(name), repr(name)) for name in (CHOSEN, REJECTED))
    prompt = values.get(PROMPT)
    if prompt is not None:
        prompt = checked_text(prompt, repr(PROMPT))
    else:
        heads, answers = zip(*map(_split_dialogue, (chosen, rejected)), strict=True)
        for name, head, answer in zip((CHOSEN, REJECTED), heads, answers, strict=True):
            if head and not answer.strip():
                raise ValueError(f"{name!r} ends in an empty answer")
        if heads[0] == heads[1]:
            prompt, (chosen, rejected) = heads[0], answers
    if chosen == rejected:
        raise ValueError(f"{CHOSEN!r} and {REJECTED!r} are the same text, {chosen!r:.80}")
    margin = 0.0 if config.margin_field is None else _margin(values.get(config.margin_field), config.margin_field)
    return Pair(prompt or "", chosen, rejected, margin)


def _margin(value: Any, name: str) -> float:
    """A number, or the text of one: a cell of a CSV file is always a text."""
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not 0 <= margin <= LARGEST_MARGIN:
        raise ValueError(f"{name!r} is {value!r:.80}, expected a number from 0 to {LARGEST_MARGIN:g}")
    return margin


def _split_dialogue(text: str) -> tuple[str, str]:
    """(up to and with the last "Assistant:", the answer), or ("", the text) where it is no dialogue."""
    end = text.rfind(ANSWERS) + len(ANSWERS)
    return (text[:end], text[end:]) if ANSWERS in text else ("", text)


def keys_of(pair: Pair) -> tuple[str, ...]:
    """Digests of the prompt, or where both sides share none, of each text and of the dialogue before its answer."""
    heads = (_split_dialogue(text)[0] for text in (pair.chosen, pair.rejected))
    named = [pair.prompt] if pair.prompt else [pair.chosen, pair.rejected, *filter(None, heads)]
    return tuple(hashlib.sha256(repr([text]).encode()).hexdigest() for text in named)


def groups_of(keys: Sequence[tuple[str, ...]]) -> list[str]:
    """One name for all that a key, or a chain of keys, joins: the smallest key among them."""
    above: dict[str, str] = {}

    def top(key: str) -> str:
        while (next_one := above.setdefault(key, key)) != key:
            above[key] = above[next_one]  # half of the way is left for whoever comes next
            key = next_one
        return key

    for of_pair in keys:
        first, *others = sorted(map(top, of_pair))
        above.update(dict.fromkeys(others, first))
    return [top(of_pair[0]) for of_pair in keys]


def encode(pair: Pair, answer: str, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> list[int]:
    """Token ids of prompt and answer, as `rewards.classifier` makes them of the same texts."""
    if not chat_template:
        tokens: Any = tokenizer(pair.prompt + answer)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise UserError("data.chat_template is true, but the tokenizer has no chat template")
        try:
            tokens = tokenizer.apply_chat_template(messages_of(pair.prompt, answer), return_dict=False)
        except Exception as error:  # a template refuses by raising, and jinja2 has types of its own
            raise ValueError(f"is refused by the tokenizer's chat template: {first_line(error)}") from error
    if not tokens:
        raise ValueError(f"holds {answer!r:.80}, which the tokenizer makes no token of")
    return tokens


def messages_of(prompt: str, answer: str) -> list[Message]:
    """The turns of a dialogue, or prompt and answer as one turn of user and assistant.

    An answer behind a turn of "Assistant" goes on with it, as it does in the text; behind one of "Human" it is a turn.
    """
    if not prompt:
        raise ValueError("has no prompt that both sides share, which data.chat_template needs")
    parts = TURNS.split(prompt)
    if len(parts) == 1 or parts[0]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    *turns, (who, said) = zip(parts[1::2], parts[2::2], strict=True)
    turns += [("Assistant", said + answer)] if who == "Assistant" else [(who, said), ("Assistant", answer)]
    return [{"role": ROLES[who], "content": said.strip()} for who, said in turns]


def cut_alike(chosen: list[int], rejected: list[int], *, most: int) -> tuple[list[int], list[int]]:
    """Both rows with at most `most` tokens: the longer one's excess is taken from the beginning of both.

    So both sides show the same part of what they share, and no side knows more of the dialogue than the other. Where
    all that they share is gone and one is still too long, that one loses more alone.
    """
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)) - 1,
    )
    alike = min(max(len(chosen), len(rejected)) - most, shared)
    start = max(alike, 0)
    return chosen[start:][-most:], rejected[start:][-most:]
