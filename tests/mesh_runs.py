"""`python -m tests.mesh_runs MODEL OUT`: whole runs of the tiny model on meshes of 8 CPU devices, for test_sharding.

A process of its own, because the number of devices is fixed before JAX starts. Writes `OUT/results.json`. With a third
argument, `lora`, only runs of an adapter; with `distributed` it is one of the processes of a run on the mesh (2, 2, 1).
"""

import itertools
import json
import os
import shutil
import string
import sys
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    DEVICES = 2 if sys.argv[3:] == ["distributed"] else 8
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import build, sharding, train
from ppo_jax.config_file import load
from ppo_jax.ops import streaming
from ppo_jax.resumed import load_resumed
from ppo_jax.sharding import AXES
from tests.tiny import PROMPTS

SETTINGS = {
    "rollout.batch_size": 32,
    "rollout.answers_per_prompt": 2,
    "rollout.max_new_tokens": 8,
    "rollout.halvings": 2,
    "rollout.eos_tokens": [*string.ascii_letters, *string.digits],  # most answers end early, on every device
    "update.minibatch_size": 16,
    "update.micro_batch_size": 8,
    "update.epochs": 1,
    "update.learning_rate": 1e-2,
    "run.iterations": 2,
    "monitor.sample_every": 2,
    "monitor.tensorboard": False,
    "checkpoint.save_every": 1,
    "kl.coef": 0.01,
    "kl.form": "exact",
    "kl.target_nats": 0.5,
    "reward.normalise": "running",
    "advantage.estimator": "gae",
    "critic.kind": "model",
}
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (2, 2, 2)}

reward_calls = itertools.count(1)


def lost_at_the_third_call(prompts: list[str], answers: list[str]) -> list[float]:
    """A reward whose service is gone in process 1 alone, in the third iteration."""
    if next(reward_calls) == 3 and jax.process_index() == 1:
        raise ConnectionError("the service is gone")
    return [float(len(answer)) for answer in answers]


def vowel_share(prompts: list[str], answers: list[str]) -> list[float]:
    """Computed on a device of its own, as a reward model would be: a reward knows nothing of the run's mesh."""
    vowels = [sum(letter in "aeiou" for letter in answer) for answer in answers]
    lengths = [max(len(answer), 1) for answer in answers]
    counted, out_of = jax.device_put((np.float32(vowels), np.float32(lengths)), jax.local_devices()[-1])
    return jnp.divide(counted, out_of).tolist()


def on(*sizes: int) -> dict[str, int]:
    return {f"mesh.{axis}": size for axis, size in zip(AXES, sizes, strict=True)}


def shard_shapes(tree) -> dict[str, list[int]]:
    """What one device holds of every leaf."""
    return {
        jax.tree_util.keystr(path): list(leaf.addressable_shards[0].data.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def run(config, *, resume: bool = False) -> dict:
    """A run, and what the tests compare of it.

    The answers are the texts that the reward was called with, the rollouts are what the model wrote: ids that decode
    alike, special tokens and masks do not show in a text.
    """
    answers, rollouts = [], []

    def reward(prompts, texts):
        answers.append(list(zip(prompts, texts, strict=True)))
        return vowel_share(prompts, texts)

    def kept(*arguments, **keywords):
        made = answer(*arguments, **keywords)
        arrays = (made.prompt_tokens, made.response_tokens, made.response_mask, made.finish_reason)
        rollouts.append([sharding.read(arguments[0].mesh, array).tolist() for array in arrays])
        return made

    answer = train.answer
    made, state = build.build(config, reward=reward, prompts=PROMPTS, resume=resume)
    held = {"reference": shard_shapes(made.ref_params), "before": shard_shapes((state.params, state.opt_state))}
    with mock.patch.object(train, "answer", kept):
        result = train.train(made, state)
    held["after"] = shard_shapes((result.state.params, result.state.opt_state))
    return {"metrics": result.metrics, "answers": answers, "rollouts": rollouts, "held": held}


def resumed(source: Path, directory: Path, mesh: dict[str, int]) -> dict:
    """The second iteration of a finished run again, from its first checkpoint, on another mesh."""
    shutil.copytree(source, directory)
    shutil.rmtree(directory / "checkpoints" / "step_00000002")
    return run(load_resumed(directory, mesh), resume=True)


def main(model: str, out: Path) -> None:
    # The shorter half of the answers is computed on half of the axis, which all devices have to choose alike.
    streaming.SHORTEST_AXIS = 4
    results = {}
    for name, sizes in MESHES.items():
        settings = SETTINGS | on(*sizes) | {"model.path": model, "run.dir": str(out / name)}
        results[name] = run(load(overrides=settings))
    for name in ("data", "one", "tensor"):
        results[f"resumed_{name}"] = resumed(out / "fsdp", out / f"resumed_{name}", on(*MESHES[name]))
    (out / "results.json").write_text(json.dumps(results))


def adapters(model: str, out: Path) -> None:
    results = {}
    for name in ("one", "tensor"):
        settings = SETTINGS | on(*MESHES[name]) | {"model.path": model, "run.dir": str(out / name)}
        settings |= {"lora.rank": 4, "lora.targets": ["all-linear", "lm_head"], "critic.kind": "value_head"}
        settings["rollout.reuse_states"] = True
        results[name] = run(load(overrides=settings))
    (out / "results.json").write_text(json.dumps(results))


def distributed(model: str, out: Path) -> None:
    """One process of several: a run, and its second iteration again from the first checkpoint."""
    from jax.experimental.multihost_utils import sync_global_devices

    from ppo_jax import processes

    processes.join()
    settings = SETTINGS | on(2, 2, 1) | {"model.path": model, "run.dir": str(out / "whole")}
    results = {"whole": run(load(overrides=settings))}
    if processes.is_lead():
        shutil.copytree(out / "whole", out / "parts")
        shutil.rmtree(out / "parts" / "checkpoints" / "step_00000002")
    sync_global_devices("copied")
    results["parts"] = run(load_resumed(out / "parts", {}), resume=True)
    (out / f"results_{jax.process_index()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    {"": main, "distributed": distributed, "lora": adapters}["".join(sys.argv[3:])](sys.argv[1], Path(sys.argv[2]))
