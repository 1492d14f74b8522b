"""What every contestant works on: one model directory, prompts of one length, answers of one forced length.

Nothing here imports transformers before it is called: a worker hides torch from it first.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    epochs: int = 1
    model: Path | None = None  # a checkpoint; None makes random weights of `shape`
    shape: dict[str, Any] | None = None
    micro_batch: int | None = None  # answers in a forward pass of the update; None is the batch
    our_micro_batch: int | None = None  # of ours alone; None is that of all


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("smollm2", 8, 16, 48, "float32", model=Path("models/SmolLM2-135M-Instruct")),
        Workload(
            "tiny", 32, 16, 64, "float32",
            shape=LLAMA | {
                "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 4,
            },
        ),
        Workload(  # Qwen2.5-0.5B's shape without its biases: transformers reads a "qwen2" with Qwen's tokenizer alone
            "0.5b", 64, 128, 256, "bfloat16", micro_batch=16,
            shape=LLAMA | {
                "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                "num_attention_heads": 14, "num_key_value_heads": 2,
            },
        ),
        Workload(
            "1b", 64, 128, 256, "bfloat16", micro_batch=16,
            shape=LLAMA | {
                "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 32, "num_key_value_heads": 8,
            },
        ),
    )
}  # fmt: skip


def prepare(workload: Workload, directory: Path) -> Workload:
    """The workload with a model directory; random weights are written to `directory` by transformers."""
    if workload.model is not None:
        return workload
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(workload.shape), encoding="utf-8")
    config = AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, workload.dtype)).save_pretrained(directory)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)
    return replace(workload, model=directory)


def prompts(workload: Workload) -> list[str]:
    """As many texts as answers, each of `prompt_tokens` tokens: words that are a token of their own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    candidates = [f"w{i}" for i in range(2, 200)] if workload.shape else [" dog", " cat", " sun", " tree", " house"]
    texts = [
        ("" if not workload.shape else " ").join(
            candidates[(row + column) % len(candidates)] for column in range(workload.prompt_tokens)
        )
        for row in range(workload.batch)
    ]
    for text in texts:
        found = len(tokenizer(text)["input_ids"])
        assert found == workload.prompt_tokens, f"{text!r} has {found} tokens"
    return texts
