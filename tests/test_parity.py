"""JAX against PyTorch: the ladder holds in float64 and float32, and planted bugs turn it red."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from parity import forward
from parity.cases import random_model
from parity.ladder import LEVELS, OF_CHECKPOINT, climb
from parity.planting import planted
from parity.rows import compare
from parity.stacks import Pair
from ppo_jax.ops.sampling import sample_tokens
from ppo_torch_ref import ops as torch_ops


@pytest.fixture(scope="module", autouse=True)
def as_in_training():
    """optax promotes dtypes by itself, which the strict mode of the tests forbids; small tensors are faster alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.numpy_dtype_promotion("standard"):
        yield
    torch.set_num_threads(threads)


# Compiling takes longer than running, on models of this size.
FAST_COMPILATION = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start_parity(file: Path, *words: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "parity", *words, "--json", str(file)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)


@pytest.fixture(scope="module")
def ladder_rows(tmp_path_factory):
    """(exit code, rows) by dtype; a process each, side by side."""
    directory = tmp_path_factory.mktemp("parity")
    words = {"float64": (), "float32": ("--cases", "llama")}
    running = {
        dtype: start_parity(directory / f"{dtype}.json", "--dtype", dtype, *more, **FAST_COMPILATION)
        for dtype, more in words.items()
    }
    codes = {dtype: process.wait(timeout=2400) for dtype, process in running.items()}
    return {dtype: (codes[dtype], json.loads((directory / f"{dtype}.json").read_text())) for dtype in words}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_level_holds_on_shared_weights(ladder_rows, dtype):
    code, rows = ladder_rows[dtype]
    diverged = [f"{row['level']} {row['case']} {row['compared']}: {row}" for row in rows if row["diverged"]]
    assert not diverged, "\n".join(diverged)
    assert code == 0
    assert {row["level"] for row in rows} == set(LEVELS)
    assert {row["dtype"] for row in rows} == {dtype}
    assert all(row["error"] <= row["bound"] for row in rows)


def test_float64_is_float64_throughout(ladder_rows):
    """A float32 cast hidden in either stack leaves an error near 1e-7; the bounds alone would let 1e-11 pass."""
    _, rows = ladder_rows["float64"]
    assert max(row["error"] for row in rows if row["level"] in ("L3", "L4", "L5")) < 1e-12


def test_the_same_uniforms_draw_the_same_tokens():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2000, 61)).astype(np.float32)
    uniforms = rng.random(2000, np.float32)
    for top_p, top_k in ((1.0, 0), (0.8, 0), (1.0, 7), (0.8, 7)):
        ours, theirs = (
            np.asarray(sample(convert(uniforms), convert(logits), temperature=0.9, top_p=top_p, top_k=top_k))
            for sample, convert in ((sample_tokens, jnp.asarray), (torch_ops.sample_tokens, torch.from_numpy))
        )
        # A float32 sum may put a uniform that lies on an edge on either side of it.
        assert np.count_nonzero(ours != theirs) <= 2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return random_model("gpt2", tmp_path_factory.mktemp("models"))


def test_a_weight_that_is_one_rounding_off_turns_l0_red(gpt2):
    pair = Pair(gpt2, "float32")
    weight = pair.params["layer_1"]["mlp"]["up"]["kernel"]
    pair.params["layer_1"]["mlp"]["up"]["kernel"] = weight.at[0, 0].set(np.nextafter(weight[0, 0], np.float32(9)))
    diverged = [row.diverged for row in forward.weights(pair)]
    assert diverged == ["transformer.h.1.mlp.c_fc.weight", None, None]


@pytest.mark.parametrize(
    "theirs",
    [{"x": np.array([1.0, np.nan])}, {"x": np.array([[1.0, 2.0]])}, {"y": np.array([1.0, 2.0])}, {"x": np.zeros(0)}],
    ids=["NaN", "shape", "name", "empty"],
)
def test_what_cannot_be_compared_is_a_failure(theirs):
    row = compare("L3", "float64", "case", "what", {"x": np.array([1.0, 2.0])}, theirs, bound=1e30)
    assert row.diverged == "x"
    assert row.error == np.inf


@pytest.mark.parametrize("bound", [np.nan, np.inf])
def test_a_bound_that_is_no_number_holds_nothing(bound):
    """Bounds are scaled by what one side says, which may be NaN."""
    row = compare("L8", "float64", "case", "what", {"x": np.ones(2)}, {"x": np.array([np.nan, 1.0])}, bound=bound)
    assert row.diverged == "x"


def test_a_difference_counts_whatever_its_sign():
    for theirs in (1.5, 0.5):
        row = compare("L3", "float64", "case", "what", {"x": np.ones(2)}, {"x": np.array([1.0, theirs])}, bound=0.4)
        assert (row.error, row.diverged) == (0.5, "x")


def test_the_first_activation_that_diverges_is_named_in_the_order_of_computation(gpt2):
    with planted("ppo_torch_ref.layers:Mlp.forward", "hidden = spec.activation(hidden)", "hidden = hidden.relu()"):
        diverged = {row.diverged for row in forward.activations(Pair(gpt2, "float32"))}
    assert diverged == {"layer_0/mlp"}


def test_the_command_fails_when_a_comparison_does(monkeypatch, capsys):
    """In a process of its own the exit code would come too late to plant a bug; `main` returns it."""
    from parity import __main__ as command

    monkeypatch.setattr(sys, "argv", ["parity", "--dtype", "float32", "--levels", "L6", "--cases", "gpt2"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with planted("ppo_torch_ref.ops:masked_var", "return masked_mean(", "return 2 * masked_mean("):
        assert command.main() == 1
    assert "the first: L6 float32 shared inputs, whitened batch mean: whitened_batch_mean" in capsys.readouterr().out


def test_levels_and_models_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"unknown: L13; levels are L0, L1, .*, L12, cases llama, "):
        list(climb("float32", levels=["L13"]))
    with pytest.raises(SystemExit, match="unknown: L10; levels of a checkpoint are L0, L2, "):
        list(climb("float32", levels=["L10"], model=tmp_path))


@pytest.mark.parametrize(("words", "complaint"), [((), "it needs config.json and"), (("--cases", "llama"), "--cases")])
def test_a_directory_without_a_model_is_refused(words, complaint, tmp_path, monkeypatch, capsys):
    from parity import __main__ as command

    monkeypatch.setattr(sys, "argv", ["parity", "--model", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_bare_trunk_with_buffers_climbs_too(tmp_path):
    """As the hub's GPT-2 is stored: no prefix, and the causal mask of every layer beside the weights."""
    directory = random_model("gpt2", tmp_path).directory
    file, mask = directory / "model.safetensors", torch.ones(1, 1, 4, 4, dtype=torch.bool)
    trunk = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(trunk | {"h.0.attn.bias": mask}, file)
    rows = list(climb("float32", levels=["L0", "L4"], model=directory))
    assert [row for row in rows if row.diverged is not None] == []


@pytest.mark.parametrize("name", ["qwen3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_checkpoint_of_the_user_climbs_its_levels(name, tmp_path):
    rows = list(climb("float32", model=random_model(name, tmp_path).directory))
    assert [row for row in rows if row.diverged is not None] == []
    assert {row.level for row in rows} == set(OF_CHECKPOINT)


def test_the_levels_kill_the_mutants_of_the_twin(tmp_path):
    """Those of the trainer, for which JAX compiles everything anew, and those that whole iterations or tests see, are
    planted by the slow test below."""
    assert mutants_of(tmp_path, "--only", "ppo_torch_ref") > 50


@pytest.mark.slow
@pytest.mark.parametrize("package", ["ppo_jax", "ppo_torch_ref", "parity.rows"])
def test_every_mutant_is_killed(package, tmp_path):
    assert mutants_of(tmp_path, "--all", "--only", package) > 1


def mutants_of(directory, *words):
    """How many were planted; red if one survives."""
    command = [sys.executable, "-m", "parity.mutants", *words, "--json", str(directory / "mutants.json")]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | FAST_COMPILATION)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return len(json.loads((directory / "mutants.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_smollm2_climbs_its_levels(dtype, tmp_path):
    directory = Path(os.environ.get("SMOLLM2_DIR", "models/SmolLM2-135M-Instruct"))
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there; SMOLLM2_DIR names the weights")
    process = start_parity(tmp_path / "rows.json", "--dtype", dtype, "--model", str(directory))
    assert process.wait() == 0
    assert {row["level"] for row in json.loads((tmp_path / "rows.json").read_text())} == set(OF_CHECKPOINT)
