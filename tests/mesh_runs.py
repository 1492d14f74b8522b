"""`python -m tests.mesh_runs MODEL OUT`: whole runs of the tiny model on meshes of 8 CPU devices, for test_sharding.

A process of its own, because the number of devices is fixed before JAX starts. Writes `OUT/results.json`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from ppo_jax import build, train
from ppo_jax.config import load, load_resumed
from ppo_jax.sharding import AXES
from tests.tiny import PROMPTS

SETTINGS = {
    "rollout.batch_size": 32,
    "rollout.answers_per_prompt": 2,
    "rollout.max_new_tokens": 8,
    "update.minibatch_size": 16,
    "update.micro_batch_size": 8,
    "update.epochs": 1,
    "update.learning_rate": 1e-2,
    "run.iterations": 2,
    "monitor.sample_every": 1,
    "monitor.tensorboard": False,
    "checkpoint.save_every": 1,
    "kl.coef": 0.01,
}
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (2, 2, 2)}


def vowel_share(prompts: list[str], answers: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in answer) / max(len(answer), 1) for answer in answers]


def mesh_settings(name: str) -> dict[str, int]:
    return {f"mesh.{axis}": size for axis, size in zip(AXES, MESHES[name], strict=True)}


def shard_shapes(tree) -> dict[str, list[int]]:
    """What one device holds of every leaf."""
    return {
        jax.tree_util.keystr(path): list(leaf.addressable_shards[0].data.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def run(config, *, resume: bool = False) -> dict:
    """A run, and what the test compares of it; the tokens are those that the rewards were computed of."""
    answers = []

    def reward(prompts, texts):
        answers.append(list(zip(prompts, texts, strict=True)))
        return vowel_share(prompts, texts)

    made, state = build.build(config, reward=reward, prompts=PROMPTS, resume=resume)
    placed = {"params": shard_shapes(state.params), "moments": shard_shapes(state.opt_state)}
    placed["reference"] = shard_shapes(made.ref_params)
    result = train.train(made, state)
    placed["trained"] = shard_shapes(result.state.params) | shard_shapes(result.state.opt_state)
    return {"metrics": result.metrics, "answers": answers, "placed": placed, "directory": str(result.directory)}


def main(model: str, out: Path) -> None:
    assert len(jax.devices()) == 8
    results = {}
    for name in MESHES:
        settings = SETTINGS | mesh_settings(name) | {"model.path": model, "run.dir": str(out / name)}
        results[name] = run(load(overrides=settings))
    # One iteration on (2, 4, 1), the next on another mesh.
    for name in ("data", "one"):
        directory = out / f"resumed_{name}"
        settings = SETTINGS | mesh_settings("fsdp") | {"model.path": model, "run.dir": str(directory)}
        run(load(overrides=settings | {"run.iterations": 1}))
        resumed = load_resumed(directory, mesh_settings(name) | {"run.iterations": 2})
        results[f"resumed_{name}"] = run(resumed, resume=True)
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
