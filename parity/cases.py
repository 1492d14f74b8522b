"""Random models and batches on which no term is inert.

Weights have a standard deviation of 0.2 to 0.3, norm gains are not 1, biases not 0, matrices not square: a dropped
gain, bias, scale or transpose shows. Weights are float32 numbers, so every dtype starts from the same values.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

VOCAB_SIZE = 61
POSITIONS = 320

# 4 query heads share 2 key heads, and all heads together (32 channels) are wider than the model (24).
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 24,
    "n_head": 3,
    "n_inner": 40,
    "n_layer": 2,
    "n_positions": POSITIONS,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def random_configs() -> dict[str, PretrainedConfig]:
    """What the random models are; every field that changes the mathematics is away from its default somewhere."""
    return {
        "llama": LlamaConfig(
            **LLAMA, num_hidden_layers=2, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE
        ),
        "llama-tied": LlamaConfig(**LLAMA, num_hidden_layers=1, tie_word_embeddings=True),
        # Layer 0 is scaled by 1 / 1, so both kinds of scale are in it.
        "gpt2": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    }


@dataclass(frozen=True)
class ModelCase:
    """A model directory that both stacks and transformers load, and another one as its reference."""

    name: str
    directory: Path
    ref_directory: Path
    vocab_size: int
    is_real: bool


def random_model(name: str, root: Path) -> ModelCase:
    """The random model of `random_configs` of this name, saved under `root`."""
    config = random_configs()[name]
    model = AutoModelForCausalLM.from_config(config)
    _randomise(model)
    model.save_pretrained(root / name)
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
        for x in tensors.values():
            x += 0.02 * x.std(correction=0) * torch.randn(x.shape, generator=generator).to(x.dtype)
        save_file(tensors, reference / file.name, metadata={"format": "pt"})
    return ModelCase(directory.name, directory, reference, json.loads(config_text)["vocab_size"], is_real)


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if param.ndim == 2:
            is_embedding = any(word in name for word in ("embed", "wte", "wpe"))
            param.copy_((0.3 if is_embedding else 0.2) * noise)
        else:
            param.copy_(0.2 * noise if name.endswith("bias") else 1.0 + 0.3 * noise)


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
