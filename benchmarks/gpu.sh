#!/usr/bin/env bash
# The GPU lines, in one go, the dearest question first: the distance to the limit and an iteration beside TRL and the article's
# loop, then step-0 invariants, metrics, phase times, compile time and peak memory of the embedded default and of
# random models of Qwen2.5-0.5B's and Llama-3.2-1B's size, all in bfloat16. Results go to $1. Compiling a model's three
# stages takes minutes, so what is compiled is kept in $JAX_COMPILATION_CACHE_DIR, by default $1/xla, for the next start.
# Contestants live on the same GPU: TRL alone allocated 34 GB with the 0.5 B model (results/gpu_h200_contended.json).
set -euo pipefail
out=${1:?usage: benchmarks/gpu.sh RESULTS_DIRECTORY}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=${PYTHONPATH:-.}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/xla}
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # so that nvidia-smi sees what is used, not what is reserved

# Trains with the arguments after the first, a name, and prints the largest memory that any GPU held meanwhile.
measure() {
    local name=$1 watcher
    shift
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 > "$out/$name.memory" &
    watcher=$!
    trap "kill $watcher" EXIT
    "$python" -m ppo_jax.train --run.dir "$out/$name" --model.compute_dtype bfloat16 "$@"
    kill "$watcher"
    trap - EXIT
    echo "$name: peak memory of a GPU $(sort -n "$out/$name.memory" | tail -1) MiB" | tee -a "$out/memory.txt"
}

# What fails, for want of memory perhaps, is named and leaves the rest its turn.
for size in 0.5b 1b; do
    for what in "roofline --decode-batches 64" "iteration --epochs 1 --rounds 3"; do
        name=${what%% *}
        # shellcheck disable=SC2086  # the words of $what are arguments
        "$python" -m benchmarks.$what --workloads "$size" --json "$out/${name}_$size.json" ||
            echo "$name of $size failed" | tee -a "$out/failed.txt"
    done
done
measure tiny_reviews --run.iterations 40
for size in 0.5b 1b; do
    "$python" -m benchmarks.random_model --size "$size" --out "$out/model_$size"
    measure "random_$size" --config "configs/gpu_$size.yaml" --model.path "$out/model_$size" --run.iterations 8 \
        --prompts.path configs/smollm2_prompts.jsonl --prompts.chat_template false --rollout.min_new_tokens 256 \
        --update.warmup_steps 0 --monitor.sample_every 0 --checkpoint.save_every 0
    rm -rf "$out/model_$size"
done
"$python" -m scripts.summarise_runs "$out/tiny_reviews" "$out/random_0.5b" "$out/random_1b" | tee "$out/summary.md"
nvidia-smi --query-gpu=name,memory.total --format=csv | tee "$out/gpu.csv"
rm -rf "$out"/*/policy  # weights stay here; metrics travel
