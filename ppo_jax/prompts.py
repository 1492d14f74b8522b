"""Prompts: a file or data set becomes token rows, and the batch of an iteration is a function of (seed, step) alone."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ppo_jax.config import EMBEDDED, PromptsConfig
from ppo_jax.errors import UserError
from ppo_jax.processes import is_lead
from ppo_jax.prompt_files import Problem, Row, first_line, read_rows, refuse
from ppo_jax.prompt_forms import Message, Prompt, missing_column, read_prompt, values_of_text
from ppo_jax.records import PromptBatch
from ppo_jax.tracing import bucket

log = logging.getLogger("ppo_jax")
SMALLEST_BUCKET = 8


@dataclass(frozen=True)
class Prompts:
    """All prompts, encoded. `encoded[i]` are the tokens of `texts[i]`, `columns[name][i]` what else its row held."""

    texts: list[str]
    encoded: list[list[int]]
    seed: int
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def indices(self, step: int, count: int) -> list[int]:
        """Which prompts iteration `step` uses: windows over freshly shuffled epochs, exact over their borders."""
        return shuffled_indices(self.seed, len(self.texts), step, count)

    def batch(self, step: int, count: int, own: slice = slice(None)) -> PromptBatch:
        """The `own` ones of the `count` prompts of iteration `step`, left-padded as all of them need it."""
        chosen = self.at(self.indices(step, count))
        whole = pad_left(chosen.texts, chosen.encoded)
        columns = {name: values[own] for name, values in chosen.columns.items()}
        return PromptBatch(whole.texts[own], whole.tokens[own], whole.mask[own], columns)

    def in_order(self) -> PromptBatch:
        """All prompts as one batch."""
        whole = pad_left(self.texts, self.encoded)
        return PromptBatch(whole.texts, whole.tokens, whole.mask, self.columns)

    def at(self, indices: Sequence[int]) -> "Prompts":
        """Some of the prompts, in the order of `indices`."""
        texts, encoded = [self.texts[i] for i in indices], [self.encoded[i] for i in indices]
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Prompts(texts, encoded, self.seed, columns)


def shuffled_indices(seed: int, size: int, step: int, count: int) -> list[int]:
    """Window number `step`, of `count`, over freshly shuffled epochs of `size`; exact over their borders."""
    first, last = step * count, (step + 1) * count - 1
    epochs = range(first // size, last // size + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(size) for epoch in epochs])
    start = first - epochs[0] * size
    return order[start : start + count].tolist()


def for_each_answer(batch: PromptBatch, answers_per_prompt: int) -> tuple[list[str], dict[str, list[Any]]]:
    """Texts and columns with every entry repeated for the answers to its prompt, which are neighbours."""
    indices = [i for i in range(len(batch.texts)) for _ in range(answers_per_prompt)]
    columns = {name: [values[i] for i in indices] for name, values in batch.columns.items()}
    return [batch.texts[i] for i in indices], columns


def pad_left(texts: list[str], encoded: Sequence[list[int]]) -> PromptBatch:
    """Token rows padded on the left to a bucket, so that few shapes are ever compiled."""
    longest = max(len(tokens) for tokens in encoded)
    width = bucket(longest, smallest=SMALLEST_BUCKET, largest=2**31)
    tokens = np.zeros((len(encoded), width), np.int32)
    mask = np.zeros((len(encoded), width), bool)
    for row, ids in enumerate(encoded):
        tokens[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = True
    return PromptBatch(texts=texts, tokens=tokens, mask=mask)


def load_prompts(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    texts: Sequence[str] | None = None,
) -> Prompts:
    """Prompts of the configured source, or the given texts; every one encoded, checked and of a fitting length."""
    if texts is not None:
        rows = [Row(f"given: prompt {i}", values_of_text(text, config)) for i, text in enumerate(texts, 1)]
    else:
        if config.path == EMBEDDED:
            config = config.model_copy(update={"field": "prompt"})
        rows = read_rows(config)
    if reason := missing_column(rows, config):
        raise UserError(reason)
    return _encode_all(rows, config, tokenizer, seed=seed, where=config.path if texts is None else "given")


def load_split(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    texts: Sequence[str] | None = None,
) -> tuple[Prompts, Prompts | None]:
    """Prompts to train on and those held out; no prompt, as the model reads it, is among both."""
    training = load_prompts(config, tokenizer, seed=seed, texts=texts)
    if config.evaluation_path is not None:
        source = config.model_copy(update={"path": config.evaluation_path, "split": config.evaluation_split})
        held_out = load_prompts(source, tokenizer, seed=seed)
        seen = {tuple(tokens) for tokens in training.encoded}
        shared = [text for text, tokens in zip(held_out.texts, held_out.encoded, strict=True) if tuple(tokens) in seen]
        if shared:
            raise UserError(
                f"prompts.evaluation_path: {len(shared)} of its {len(held_out.texts)} prompts are among those of "
                f"prompts.path, the first is {shared[0]!r}; held-out prompts must not be trained on"
            )
        return training, held_out
    return hold_out(training, config.evaluation_fraction) if config.evaluation_fraction else (training, None)


def hold_out(prompts: Prompts, fraction: float) -> tuple[Prompts, Prompts]:
    """(training, held out): the distinct prompts with the smallest digests are held out, each with its repetitions.

    Neither the order of the file nor a seed changes what is held out, and more rows move few prompts.
    """
    digests = [hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).digest() for tokens in prompts.encoded]
    distinct = sorted(set(digests))
    held = set(distinct[: round(fraction * len(distinct))])
    training = [i for i, digest in enumerate(digests) if digest not in held]
    if not held or not training:
        raise UserError(
            f"prompts.evaluation_fraction ({fraction:g}) of {len(distinct)} different prompts holds out {len(held)} of "
            f"them; at least one must be held out and one trained on"
        )
    return prompts.at(training), prompts.at([i for i, digest in enumerate(digests) if digest in held])


def _encode_all(
    rows: Sequence[Row], config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, where: str
) -> Prompts:
    problems: list[Problem] = []
    kept: list[Prompt] = []
    encoded: list[list[int]] = []
    skipped, shortened = 0, 0
    for row in rows:
        try:
            prompt = read_prompt(row.values, config)
            tokens = encode(prompt, tokenizer, chat_template=config.chat_template)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(row.where, str(error)))
            continue
        if len(tokens) > config.max_tokens:
            if config.too_long == "error":
                problems.append(
                    Problem(row.where, f"has {len(tokens)} tokens, prompts.max_tokens is {config.max_tokens}")
                )
            if config.too_long != "truncate":
                skipped += 1
                continue
            shortened += 1
            tokens = tokens[-config.max_tokens :]
        kept.append(prompt)
        encoded.append(tokens)
    if problems:
        refuse("prompts cannot be used (prompts.too_long: skip or truncate deals with long ones)", problems)
    if not kept:
        raise UserError(f"{where}: no prompt left to train on ({skipped} of {len(rows)} were too long)")
    if is_lead() and (skipped or shortened):
        log.warning(
            "warning: of the %d prompts of %s, %d with more than prompts.max_tokens (%d) are left out and %d are cut",
            *(len(rows), where, skipped, config.max_tokens, shortened),
        )
    return Prompts([prompt.text for prompt in kept], encoded, seed, _columns(kept))


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """One list per column that any row has; None where a row lacks it."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> list[int]:
    """Token ids of one prompt, as the model expects it before its answer; ValueError where there are none."""
    tokens = _in_template(prompt.messages, tokenizer) if chat_template else tokenizer(prompt.text)["input_ids"]
    if not tokens:
        raise ValueError(f"is {prompt.text!r:.80}, which the tokenizer makes no token of")
    return tokens


def check_ids(rows: Iterable[Sequence[int]], *, vocab_size: int, path: Path) -> None:
    """Refuse token ids that the embedding of the model at `path` has no row for: JAX would clamp them silently."""
    largest = max(max(tokens, default=0) for tokens in rows)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer of {path} gives token id {largest}, but the embedding has {vocab_size} rows; tokenizer and "
            f"model do not belong together"
        )


def _in_template(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> Any:
    if not tokenizer.chat_template:
        raise UserError("prompts.chat_template is true, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template refuses by raising, and jinja2 has types of its own
        raise ValueError(f"is refused by the tokenizer's chat template: {first_line(error)}") from error
