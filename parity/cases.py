"""The models and batches of the ladder. Weights are float32 numbers, so every dtype starts from the same values."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from parity.models import hf_model

# Of every family the variant in which most of its mathematics is switched on, and the three on which every level runs.
RANDOM_MODELS = (
    *("llama", "llama-tied", "llama3", "gpt2", "gpt2-scaled", "mistral", "qwen2-yarn", "qwen3", "smollm3-windows"),
    *("gemma2", "gemma3", "phi3-longrope", "pythia", "olmo2-biases", "starcoder2"),
)


@dataclass(frozen=True)
class ModelCase:
    """A model directory that both stacks and transformers load, and another one as its reference."""

    name: str
    directory: Path
    ref_directory: Path
    vocab_size: int
    is_real: bool


def random_model(name: str, root: Path) -> ModelCase:
    """The model of this name in `MODELS`, saved under `root`."""
    hf_model(name).save_pretrained(root / name)
    return with_reference(root / name, root, is_real=False)


def with_reference(directory: Path, root: Path, *, is_real: bool) -> ModelCase:
    """A model directory as it is; its reference, saved under `root`, has the same weights, each moved by 2%."""
    reference = root / f"{directory.name}-reference"
    reference.mkdir()
    config_text = (directory / "config.json").read_text(encoding="utf-8")
    (reference / "config.json").write_text(config_text, encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    for file in directory.glob("*.safetensors*"):
        if file.suffix == ".json":
            (reference / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
            continue
        tensors = load_file(file)
        for x in (x for x in tensors.values() if x.is_floating_point()):  # files of Pythia hold masks too
            x += 0.02 * x.std(correction=0) * torch.randn(x.shape, generator=generator).to(x.dtype)
        save_file(tensors, reference / file.name, metadata={"format": "pt"})
    return ModelCase(directory.name, directory, reference, json.loads(config_text)["vocab_size"], is_real)


@dataclass(frozen=True)
class Sequences:
    """Whole sequences and the mask of their real tokens; what lies under a pad is some token of the vocabulary."""

    layout: str
    tokens: np.ndarray  # int32 [B, S]
    mask: np.ndarray  # bool [B, S]


def padded_sequences(vocab_size: int) -> Iterator[Sequences]:
    """The paddings that a forward pass meets."""
    rng = np.random.default_rng(0)
    lengths, column = np.array([[9], [1], [4], [6]]), np.arange(9)[None]
    start = np.array([[0], [8], [2], [1]])
    long = np.ones((2, 300), bool)
    long[1, :37] = False
    masks = {
        "left pad": column >= 9 - lengths,
        "right pad": column < lengths,
        "both pads": (column >= start) & (column < start + lengths),
        "length 1": np.ones((2, 1), bool),
        "300 positions": long,
        "a single token": np.ones((1, 1), bool),
    }
    for layout, mask in masks.items():
        yield Sequences(layout, rng.integers(0, vocab_size, mask.shape).astype(np.int32), mask)


@dataclass(frozen=True)
class Answers:
    """Left-padded prompts and right-padded answers."""

    prompt_tokens: np.ndarray  # int32 [B, P]
    prompt_mask: np.ndarray  # bool [B, P]
    response_tokens: np.ndarray  # int32 [B, T]
    response_mask: np.ndarray  # bool [B, T]


def ragged_answers(vocab_size: int, *, batch: int = 6, prompt: int = 5, response: int = 7, seed: int = 0) -> Answers:
    """Answers of every length: a truncated one, one of a single token, and an empty row (padding of a bucket)."""
    rng = np.random.default_rng(seed)
    prompt_lengths = np.append([prompt, 1], rng.integers(1, prompt + 1, batch - 2))
    response_lengths = np.concatenate([[response, 1], rng.integers(2, response, batch - 3), [0]])
    return Answers(
        prompt_tokens=rng.integers(0, vocab_size, (batch, prompt)).astype(np.int32),
        prompt_mask=np.arange(prompt)[None] >= prompt - prompt_lengths[:, None],
        response_tokens=rng.integers(0, vocab_size, (batch, response)).astype(np.int32),
        response_mask=np.arange(response)[None] < response_lengths[:, None],
    )
