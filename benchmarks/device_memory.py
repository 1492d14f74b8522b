"""`python -m benchmarks.device_memory`: what one of 8 devices holds in each stage, for a 1B and an 8B shape.

Rollout, scoring and update are compiled for 8 host devices from shapes with shardings; no weight is allocated. The
bytes are the compiler's own memory analysis: arguments (weights, moments and the batch, exact on any machine),
outputs that are not donated arguments, and temporaries. The temporaries are those of the CPU compiler, which computes
bfloat16 products in float32 copies: too many for a GPU, good for comparing meshes.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

DEVICES = 8
# The CPU's default schedule begins everything that can begin, all gathers of weights among it; the other one, like that
# of a GPU, keeps memory low. The CPU also joins the sums of all gradients over devices into one, for which the whole
# gradient must be there; a GPU joins 30 MB at most. No code is run, so none is optimised.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_disable_hlo_passes=cpu-all-reduce-combiner --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from ppo_jax import build, plan, sharding  # noqa: E402
from ppo_jax.config import Config  # noqa: E402
from ppo_jax.config_file import load  # noqa: E402
from ppo_jax.models.decoder import abstract_params, parameter_count  # noqa: E402
from ppo_jax.models.families import spec_of  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "device_memory.json"
SPLIT = ((1, 8, 1), (2, 2, 2), (2, 4, 1))
# Weights, moments and reference of 8B are 112 GB where they are not split: nothing to compile.
MESHES = {"Llama-3.2-1B": ((1, 1, 1), (8, 1, 1), *SPLIT), "Llama-3.1-8B": SPLIT}
ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
COMMON = {
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "Llama-3.2-1B": COMMON | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_parameters": ROPE,
    },
    "Llama-3.1-8B": COMMON | {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False, "rope_parameters": ROPE | {"factor": 8.0},
    },
}  # fmt: skip
PROMPT_TOKENS = 256
SETTINGS = {
    "model.compute_dtype": "bfloat16",
    "rollout.batch_size": 64,
    "rollout.max_new_tokens": 256,
    "update.minibatch_size": 32,
    "update.micro_batch_size": 8,
    "update.remat": True,
}


def config_of(mesh: tuple[int, ...]) -> Config:
    return load(overrides=SETTINGS | {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, mesh, strict=True)})


def measure(shape: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Bytes on one device: arguments, outputs and temporaries of every stage."""
    config = config_of(sizes)
    mesh = sharding.make_mesh(config.mesh)
    spec = spec_of(LlamaConfig(**SHAPES[shape]))
    model = replace(build.open_model(config), spec=spec)  # the embedded tokenizer will do: only shapes are used
    row: dict[str, Any] = {"shape": shape, "mesh": list(sizes), "parameters": parameter_count(abstract_params(spec))}
    for name, compiled in plan.compile_stages(config, model, mesh, prompt_length=PROMPT_TOKENS).items():
        memory = compiled.memory_analysis()
        row[name] = {
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for shape in options.shapes:
        for mesh in MESHES[shape]:
            started = time.perf_counter()
            row = measure(shape, mesh)
            row["compile_s"] = round(time.perf_counter() - started, 1)
            rows.append(row)
            stages = "; ".join(
                f"{name} {row[name]['argument_bytes'] / 1e9:.2f} + {row[name]['temporary_bytes'] / 1e9:.2f}"
                for name in ("rollout", "score", "update")
            )
            print(f"{shape} {mesh}, arguments + temporaries in GB of one device: {stages}", flush=True)
            described = {"jax": jax.__version__, "machine": platform.platform(), "settings": SETTINGS, "rows": rows}
            options.out.write_text(json.dumps(described | {"prompt_tokens": PROMPT_TOKENS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
