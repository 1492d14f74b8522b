"""`python -m tests.reward_runs MODEL OUT`: one of two processes, of two devices each, that score texts of their own.

Process 1 has more texts than process 0, and longer ones: nothing that they do may wait for the other.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from ppo_jax import processes, sharding
from ppo_jax.config import MeshConfig, RewardConfig
from ppo_jax.rewards.classifier import load_reward_model
from ppo_jax.rewards.source import Reward, score_answers


def texts_of(process: int) -> tuple[list[str], list[str]]:
    answers = [
        " ".join(f"w{(process + i * k) % 34}" for k in range(1, 2 + 9 * process + i)) for i in range(3 + 8 * process)
    ]
    return [f"w{i} " for i in range(len(answers))], answers


def main(model: str, out: Path) -> None:
    processes.join()
    index = jax.process_index()
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    reward = load_reward_model(RewardConfig(model=model, model_batch_size=4), mesh, dtype="float32")
    with jax.set_mesh(mesh):
        scores = score_answers(Reward({"model": reward}), *texts_of(index)).total
    found = {
        "scores": scores.tolist(),
        "devices": sorted({device.process_index for device in reward.mesh.devices.flat}),
        "kernel": list(reward.trunk["layer_0"]["attn"]["q"]["kernel"].addressable_shards[0].data.shape),
    }
    (out / f"scores_{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
