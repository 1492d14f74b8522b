"""Eight devices, and two processes, do what one device does: the same tokens, the same losses to rounding.

The runs are made by `mesh_runs` in processes of their own, because the number of devices is fixed before JAX starts.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppo_jax import sharding
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from tests.mesh_runs import MESHES, SETTINGS

MANY = ("data", "fsdp", "tensor")
# Ten times the largest differences measured over two iterations in float32: 4e-6 of a metric, or 1.5e-6 where it is
# near 0, and 1e-5 in a weight.
METRIC_RTOL, METRIC_ATOL, WEIGHT_ATOL = 4e-5, 1.5e-5, 1e-4


def start(module, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(module, *arguments, **environment):
    """Two processes that join one another on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"} | environment
    return [start(module, *arguments, JAX_PROCESS_ID=str(index), **joined) for index in range(2)]


def finish(*processes, code=0, timeout=600):
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            with process:
                process.kill()  # one that still runs here hangs
    assert [process.returncode for process in processes] == [code] * len(processes), "\n----\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def meshes(tiny_model, tmp_path_factory):
    """(results by name, directory of the runs)."""
    out = tmp_path_factory.mktemp("meshes")
    finish(start("tests.mesh_runs", tiny_model, out))
    return json.loads((out / "results.json").read_text()), out


@pytest.fixture(scope="module")
def two_processes(tiny_model, tmp_path_factory):
    """(results of process 0 and of process 1, directory of the runs, what both printed)."""
    out = tmp_path_factory.mktemp("processes")
    printed = finish(*start_two("tests.mesh_runs", tiny_model, out, "distributed"))
    return [json.loads((out / f"results_{index}.json").read_text()) for index in range(2)], out, printed


def assert_same_metrics(rows, expected, atol=METRIC_ATOL):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, expected_row in zip(rows, expected, strict=True):
        assert set(row) == set(expected_row)
        for name, value in row.items():
            if not name.startswith(("time/", "throughput/")):
                np.testing.assert_allclose(value, expected_row[name], rtol=METRIC_RTOL, atol=atol, err_msg=name)


def assert_same_policy(directory, expected):
    weights = load_file(directory / "policy" / "model.safetensors")
    expected = load_file(expected / "policy" / "model.safetensors")
    assert set(weights) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=WEIGHT_ATOL, err_msg=name)


@pytest.mark.parametrize("name", MANY)
def test_a_run_on_eight_devices_is_the_run_on_one(meshes, name):
    results, out = meshes
    masks = [mask for _, _, mask, _ in results["one"]["rollouts"]]
    lengths = np.sum(max(masks, key=len), axis=1)  # those to the fixed prompts are fewer, and not halved
    shards = MESHES[name][0] * MESHES[name][1]
    of_devices = np.sort(lengths.reshape(shards, -1), axis=1)
    halves = of_devices[:, : of_devices.shape[1] // 2]
    assert halves.max() < lengths.max()  # so half of the answers of every device went on alone
    # No token of any answer differs, those to the fixed prompts included, nor does a text that was scored.
    assert results[name]["rollouts"] == results["one"]["rollouts"]
    assert results[name]["answers"] == results["one"]["answers"]
    assert_same_metrics(results[name]["metrics"], results["one"]["metrics"])
    assert_same_policy(out / name, out / "one")


@pytest.mark.parametrize("name", ["data", "one", "tensor"])
def test_a_checkpoint_of_one_mesh_resumes_on_another(meshes, name):
    results, out = meshes
    resumed = results[f"resumed_{name}"]
    for kind in ("rollouts", "answers"):
        assert resumed[kind] == results["one"][kind][-len(resumed[kind]) :]
    assert_same_metrics(resumed["metrics"], results["one"]["metrics"][1:])
    assert_same_policy(out / f"resumed_{name}", out / "one")
    assert resumed["held"]["before"] == results[name]["held"]["before"]


def test_weights_moments_and_reference_are_split_and_stay_split(meshes):
    results, _ = meshes
    whole = {name: np.asarray(shape) for name, shape in results["one"]["held"]["before"].items()}
    reference = {name: np.asarray(shape) for name, shape in results["one"]["held"]["reference"].items()}
    for mesh in MANY:
        held, (_, fsdp, tensor) = results[mesh]["held"], MESHES[mesh]
        assert held["after"] == held["before"]
        for part, full in ((held["before"], whole), (held["reference"], reference)):
            kernels = [name for name in full if name.endswith(("['kernel']", "['embed']"))]
            # The policy, its critic with a head of one column, and the two moments of both.
            assert len(kernels) == (15 if full is reference else 3 * (15 + 16))
            for name in kernels:
                split = (tensor, fsdp) if any(key in name for key in ("'o'", "'down'", "embed")) else (fsdp, tensor)
                expected = [
                    size // n if size % n == 0 else size for size, n in zip(full[name].tolist(), split, strict=False)
                ]
                assert part[name] == expected, (mesh, name)


@pytest.mark.slow
def test_an_adapter_on_eight_devices_is_split_and_is_the_adapter_on_one(tiny_model, tmp_path):
    finish(start("tests.mesh_runs", tiny_model, tmp_path, "lora"))
    results = json.loads((tmp_path / "results.json").read_text())
    one, tensor = results["one"], results["tensor"]
    assert tensor["rollouts"] == one["rollouts"]
    # With `rollout.reuse_states` scoring has the decode's rounding, which is another one where heads are split.
    assert_same_metrics(tensor["metrics"], one["metrics"], atol=5e-5)
    assert_same_policy(tmp_path / "tensor", tmp_path / "one")
    assert tensor["held"]["after"] == tensor["held"]["before"]
    for name, shape in one["held"]["before"].items():
        if "lora" in name:  # in (of A) and out (of B) over fsdp and tensor together where they divide
            axis = 0 if "lora_a" in name else 1
            parts = 4 if shape[axis] % 4 == 0 else 1
            expected = [size // parts if i == axis else size for i, size in enumerate(shape)]
            assert tensor["held"]["before"][name] == expected, name


def test_two_processes_do_the_run_of_one_and_resume_it(meshes, two_processes):
    (results, out), (both, processes_out, _) = meshes, two_processes
    for process in both:
        assert process["whole"]["rollouts"] == results["one"]["rollouts"]
        assert_same_metrics(process["whole"]["metrics"], results["one"]["metrics"])
        assert_same_metrics(process["parts"]["metrics"], results["one"]["metrics"][1:])
    assert_same_policy(processes_out / "whole", out / "one")
    assert_same_policy(processes_out / "parts", out / "one")


def test_every_answer_is_scored_by_one_process_and_the_fixed_prompts_by_the_first(meshes, two_processes):
    results, (first, second) = meshes[0], two_processes[0]
    expected = results["one"]["answers"]
    rows = SETTINGS["rollout.batch_size"]
    assert [len(call) for call in first["whole"]["answers"]] == [rows // 2 if len(c) == rows else 4 for c in expected]
    assert [len(call) for call in second["whole"]["answers"]] == [rows // 2, rows // 2]
    batches = [call for call in expected if len(call) == rows]
    halves = [[call for call in process["whole"]["answers"] if len(call) != 4] for process in (first, second)]
    assert [a + b for a, b in zip(*halves, strict=True)] == batches
    assert [c for c in first["whole"]["answers"] if len(c) == 4] == [c for c in expected if len(c) == 4]


def test_only_the_first_process_writes_and_prints(two_processes):
    _, out, (first, second) = two_processes
    for name, steps in (("whole", [0, 1]), ("parts", [0, 1])):
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps
        samples = [json.loads(line)["step"] for line in (out / name / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 4 * len(set(samples))
        kept = [json.loads(line)["step"] for line in (out / name / "answers.jsonl").read_text().splitlines()]
        assert set(kept) <= set(steps)
        assert all(1 <= kept.count(step) <= 6 for step in set(kept))
    assert json.loads((out / "whole" / "versions.json").read_text())["processes"] == 2
    assert "KL nats/seq" in first
    assert "stopped: all 2 iterations" in first
    assert "KL nats/seq" not in second
    assert "stopped" not in second
    assert "Same prompts" not in second


def test_a_reward_that_fails_in_one_process_ends_both_and_loses_no_finished_iteration(tiny_model, tmp_path):
    settings = {
        "model.path": tiny_model,
        "run.dir": tmp_path / "run",
        "run.iterations": 4,
        "reward.function": "tests.mesh_runs:lost_at_the_third_call",
        "prompts.max_tokens": 8,
        "prompts.too_long": "truncate",
        "rollout.batch_size": 4,
        "rollout.max_new_tokens": 8,
        "update.minibatch_size": 4,
        "update.epochs": 1,
        "monitor.sample_every": 0,
        "monitor.tensorboard": False,
        "checkpoint.save_every": 0,
    }
    overrides = [word for key, value in settings.items() for word in (f"--{key}", value)]
    processes = start_two("ppo_jax.train", "--distributed", *overrides, XLA_FLAGS="--xla_backend_optimization_level=0")
    first, second = finish(*processes, code=2)
    assert "ppo-jax: the reward function raised ConnectionError: the service is gone" in second
    assert "ppo-jax: the reward failed in process 1, whose own message says why" in first
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, r"mesh.fsdp \(3\) x mesh.tensor \(1\) is 3, which must divide the 1 devices"),
        ({"mesh.data": 2}, r"mesh.data \(2\) x mesh.fsdp \(1\) x mesh.tensor \(1\) is 2, but there are 1 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(load(overrides=changes).mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update.minibatch_size": 4}, r"update.minibatch_size \(4\) must be divisible by mesh.data \(2\) x mesh.fsdp"),
        ({"update.micro_batch_size": 2}, r"update.micro_batch_size \(2\) must be divisible by mesh.data \(2\)"),
        ({"rollout.answers_per_prompt": 16}, r"rollout.batch_size / rollout.answers_per_prompt \(4\) must be"),
    ],
)
def test_a_batch_that_does_not_fit_the_mesh_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        sharding.check_batch(load(overrides=changes), {"data": 2, "fsdp": 4, "tensor": 1})


def test_an_axis_that_does_not_divide_a_dimension_is_left_out():
    shape = {"data": 1, "fsdp": 4, "tensor": 2}
    assert tuple(sharding.param_spec(shape, "layer_3/attn/q/kernel", (8, 6))) == ("fsdp", "tensor")
    assert tuple(sharding.param_spec(shape, "layer_3/attn/q/kernel", (6, 5))) == (None, None)
    assert tuple(sharding.param_spec(shape, "layer_3/mlp/down/kernel", (6, 8))) == ("tensor", "fsdp")
    assert tuple(sharding.param_spec(shape, "embed", (301, 8))) == (None, "fsdp")
    assert tuple(sharding.param_spec(shape, "layer_3/attn/q/bias", (8,))) == ("tensor",)
    assert tuple(sharding.param_spec(shape, "layer_3/norm1/scale", (8,))) == (None,)
    module = "lora/model.layers.3.self_attn.q_proj"
    assert tuple(sharding.param_spec(shape, f"{module}/lora_a", (16, 4))) == (("fsdp", "tensor"), None)
    assert tuple(sharding.param_spec(shape, f"{module}/lora_b", (4, 16))) == (None, ("fsdp", "tensor"))
    assert tuple(sharding.param_spec(shape, "head_lora_b", (4, 301))) == (None, None)
