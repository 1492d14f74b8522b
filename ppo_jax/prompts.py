"""Prompts: a file or data set becomes token rows, and the batch of an iteration is a function of (seed, step) alone."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ppo_jax.config import EMBEDDED, PromptsConfig
from ppo_jax.errors import UserError
from ppo_jax.records import PromptBatch
from ppo_jax.tracing import bucket

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SMALLEST_BUCKET = 8


@dataclass(frozen=True)
class Prompts:
    """All prompts, encoded. `encoded[i]` are the tokens of `texts[i]`."""

    texts: list[str]
    encoded: list[list[int]]
    seed: int

    def indices(self, step: int, count: int) -> list[int]:
        """Which prompts iteration `step` uses: windows over freshly shuffled epochs, exact over their borders."""
        size = len(self.texts)
        first, last = step * count, (step + 1) * count - 1
        epochs = range(first // size, last // size + 1)
        order = np.concatenate([np.random.default_rng([self.seed, epoch]).permutation(size) for epoch in epochs])
        start = first - epochs[0] * size
        return order[start : start + count].tolist()

    def batch(self, step: int, count: int, own: slice = slice(None)) -> PromptBatch:
        """The `own` ones of the `count` prompts of iteration `step`, left-padded as all of them need it."""
        indices = self.indices(step, count)
        whole = pad_left([self.texts[i] for i in indices], [self.encoded[i] for i in indices])
        return PromptBatch(whole.texts[own], whole.tokens[own], whole.mask[own])

    def in_order(self) -> PromptBatch:
        """All prompts as one batch."""
        return pad_left(self.texts, self.encoded)


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
    where = config.path if texts is None else "given"
    texts = _read_texts(config) if texts is None else list(texts)
    problems, kept, encoded = [], [], []
    skipped = 0
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            problems.append(f"{where}: prompt {i + 1} is {text!r}, expected a text that is not empty")
            continue
        tokens = encode(text, tokenizer, chat_template=config.chat_template)
        if len(tokens) > config.max_tokens:
            if config.too_long == "error":
                problems.append(
                    f"{where}: prompt {i + 1} has {len(tokens)} tokens, prompts.max_tokens is {config.max_tokens}"
                )
            if config.too_long != "truncate":
                skipped += 1
                continue
            tokens = tokens[-config.max_tokens :]
        kept.append(text)
        encoded.append(tokens)
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            "prompts cannot be used (prompts.too_long: skip or truncate deals with long ones):\n  "
            + "\n  ".join(problems[:20])
            + more
        )
    if not kept:
        raise UserError(f"{where}: no prompt left to train on ({skipped} of {len(texts)} were too long)")
    return Prompts(texts=kept, encoded=encoded, seed=seed)


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> list[int]:
    """Token ids of one prompt, as the model expects it before its answer."""
    if not chat_template:
        return tokenizer(text)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("prompts.chat_template is true, but the tokenizer has no chat template")
    message = [{"role": "user", "content": text}]
    tokens: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return tokens


def _read_texts(config: PromptsConfig) -> list[str]:
    if config.path == EMBEDDED:
        lines = (resources.files("ppo_jax") / "assets" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines]
    # Imported here: it takes a second, and the embedded prompts do not need it.
    import datasets

    file = Path(config.path).expanduser()
    datasets.disable_progress_bars()
    try:
        if file.is_file():
            loader = LOADERS.get(file.suffix)
            if loader is None:
                raise UserError(f"prompts.path: {file} ends in {file.suffix!r}; expected one of {', '.join(LOADERS)}")
            with tempfile.TemporaryDirectory() as cache:  # the file may change between runs: nothing is cached
                rows = datasets.load_dataset(
                    loader, data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
                )
        elif file.exists() or config.path.startswith((".", "/", "~")) or file.suffix in LOADERS:
            raise UserError(f"prompts.path: {config.path} (resolved: {file.absolute()}) is not a file")
        else:
            rows = datasets.load_dataset(config.path, split=config.split)
    except UserError:
        raise
    except Exception as error:  # datasets raises its own types, those of pyarrow, of pandas and of the hub's client
        raise UserError(_unreadable(config, file, error)) from error
    field = "text" if file.suffix == ".txt" else config.field
    if field not in rows.column_names:
        raise UserError(f"prompts.field: {config.path} has no column {field!r}; it has {', '.join(rows.column_names)}")
    return list(rows[field])


def _unreadable(config: PromptsConfig, file: Path, error: Exception) -> str:
    """Why a source could not be read, with the offending lines of a JSONL file."""
    lines = []
    if file.suffix == ".jsonl" and file.is_file():
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                json.loads(line or "{}")
            except ValueError as problem:
                lines.append(f"\n  {file}:{number}: {problem}")
    reason = "" if lines else ": " + str(error).split("\n")[0]
    return f"prompts.path: {config.path} could not be read{reason}" + "".join(lines[:20])
