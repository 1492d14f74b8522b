#!/usr/bin/env bash
# The GPU lines of the main job, in one go: step-0 invariants, metrics and phase times of the embedded default and of a
# random-weight model of Qwen2.5-0.5B's size in the Llama architecture, both in bfloat16. Results go to $1.
set -euo pipefail
out=${1:?usage: benchmarks/gpu.sh RESULTS_DIRECTORY}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=${PYTHONPATH:-.}
"$python" -m ppo_jax.train --run.dir "$out/tiny_reviews" --model.compute_dtype bfloat16 --run.iterations 40
"$python" -m benchmarks.random_model --out "$out/half_billion"
"$python" -m ppo_jax.train --run.dir "$out/half_billion_run" --model.path "$out/half_billion" \
    --model.compute_dtype bfloat16 --prompts.path configs/smollm2_prompts.jsonl --run.iterations 8 \
    --rollout.batch_size 64 --rollout.max_new_tokens 256 --rollout.min_new_tokens 256 --update.minibatch_size 16 \
    --update.learning_rate 1e-6 --update.remat true --monitor.sample_every 0
"$python" -m scripts.summarise_runs "$out/tiny_reviews" "$out/half_billion_run" | tee "$out/summary.md"
nvidia-smi --query-gpu=name,memory.total --format=csv | tee "$out/gpu.csv"
rm -rf "$out/half_billion" "$out"/*/policy  # weights stay here; metrics travel
