"""`python -m benchmarks.random_model --out DIR`: random weights of a 0.5 B or 1 B shape, the embedded tokenizer."""

import argparse
import json
import shutil
from importlib import resources
from pathlib import Path

import jax
from transformers import AutoConfig

from ppo_jax.models import hf_io
from ppo_jax.models.decoder import init_params
from ppo_jax.models.families import spec_of

# The sizes of Qwen2.5-0.5B (biases left out, which the Llama architecture here does not need) and Llama-3.2-1B.
SIZES = {
    "0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--size", choices=list(SIZES), default="0.5b")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON of fields of config.json that differ")
    options = parser.parse_args()
    embedded = Path(str(resources.files("ppo_jax") / "assets" / "tiny_reviews"))
    options.out.mkdir(parents=True)
    for file in embedded.glob("tokenizer*"):
        shutil.copy(file, options.out)
    (options.out / "config.json").write_text(
        json.dumps(CONFIG | SIZES[options.size] | options.config, indent=2), encoding="utf-8"
    )
    config = AutoConfig.from_pretrained(options.out)
    spec = spec_of(config)
    model = hf_io.ModelDirectory(options.out, config, spec, hf_io.load_tokenizer(options.out))
    params = init_params(spec, jax.random.PRNGKey(0))
    finished = options.out.with_name(options.out.name + ".finished")
    hf_io.save_model(finished, model, params, dtype="bfloat16")
    shutil.rmtree(options.out)
    finished.rename(options.out)


if __name__ == "__main__":
    main()
