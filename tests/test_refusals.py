"""What surrounds a run and is not as it must be: devices, memory, directories, tokenizers without an end."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import build, checkpoint, cli, processes, scoring
from ppo_jax.config_file import load
from ppo_jax.errors import UserError
from ppo_jax.models import hf_io
from ppo_jax.monitor.sinks import MetricsWriter, read_rows
from ppo_jax.plan import print_plan
from tests.test_train import run, vowel_share


def test_another_platform_than_the_one_asked_for_is_refused_with_what_there_is():
    processes.check_platform("any")
    processes.check_platform("cpu")
    with pytest.raises(UserError, match=r"mesh\.platform is gpu, but JAX sees \d+ of cpu \(.*\); .*pip install"):
        processes.check_platform("gpu")


def test_a_gpu_that_jax_cannot_use_is_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ppo_jax.train", "--run.dir", str(tmp_path / "run")],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "JAX_PLATFORMS=cuda: " in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (cli.main, ["--run.dir", "out"]),
        (cli.generate_main, ["embedded", "--out", "out"]),
        (cli.reward_model_main, ["--run.dir", "out", "--data.path", "x.jsonl"]),
    ],
)
def test_every_command_refuses_a_gpu_that_is_not_there_before_it_writes(
    command, arguments, tmp_path, monkeypatch, capsys
):
    def none_found():
        raise RuntimeError("no device of the kind")

    monkeypatch.chdir(tmp_path)
    if command is not cli.reward_model_main:  # which has no mesh
        with pytest.raises(SystemExit, match="2"):
            command([*arguments, "--mesh.platform", "gpu"])
        assert "mesh.platform is gpu, but JAX sees" in capsys.readouterr().err
    monkeypatch.setattr(jax, "devices", none_found)
    with pytest.raises(SystemExit, match="2"):
        command(arguments)
    assert "no device of the kind; a GPU needs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["monitor.fixed_prompts", "prompts.evaluation_path"])
def test_the_dry_run_refuses_every_prompt_that_the_run_refuses(where, tiny_model, tmp_path):
    long, files = " ".join(["soup"] * 20), {name: tmp_path / name for name in ("short.txt", "long.txt")}
    for file, text in zip(files.values(), ("the soup", long), strict=True):
        file.write_text(text)
    given = [long] if where == "monitor.fixed_prompts" else str(files["long.txt"])
    changes = {"model.path": str(tiny_model), "prompts.path": str(files["short.txt"]), "rollout.max_new_tokens": 100}
    config = load(overrides=changes | {"run.dir": str(tmp_path / "run"), where: given})
    with pytest.raises(UserError, match=r"the longest prompt .* exceed the model's 128 positions"):
        print_plan(config, resume=False)
    with pytest.raises(UserError, match=r"the longest prompt .* exceed the model's 128 positions"):
        build.build(config)


def test_memory_that_runs_out_is_told_with_phase_and_shape_and_costs_no_iteration(tiny_model, tmp_path, monkeypatch):
    score, calls = scoring.score, []

    def hungry(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            jnp.zeros(2**45)  # 128 TiB
        return score(*arguments, **options)

    monkeypatch.setattr(scoring, "score", hungry)
    with pytest.raises(
        UserError, match=r"phase score: 16 answers of up to 10 tokens, 8 of.* Lower update\.micro_batch"
    ):
        run(tiny_model, tmp_path / "run", monitor__sample_every=0)
    assert list(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == [2]
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_memory_that_runs_out_while_a_model_loads_is_told(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "first_critic", lambda *_: jnp.zeros(2**45))
    with pytest.raises(UserError, match=r"phase loading: .*Lower what is kept: weights, their moments and the ref"):
        run(tiny_model, tmp_path / "run")


def test_a_full_disk_under_the_metrics_names_them_and_saves_what_can_be_saved(tiny_model, tmp_path, monkeypatch):
    write, calls = MetricsWriter.write, []

    def full_at_last(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            self._file.close()
            self._file = open("/dev/full", "a")  # noqa: SIM115
        write(self, *arguments)

    monkeypatch.setattr(MetricsWriter, "write", full_at_last)
    with pytest.raises(UserError, match=r"/dev/full cannot be written: No space left"):
        run(tiny_model, tmp_path / "run", monitor__sample_every=0)
    assert list(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == [3]


def test_a_failure_that_is_none_of_memory_is_left_as_it_is(tiny_model, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(scoring, "score", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run(tiny_model, tmp_path / "run", monitor__sample_every=0)


def test_a_run_directory_that_cannot_be_is_refused_before_the_model_is_looked_for(tmp_path):
    (tmp_path / "file").touch()
    config = load(overrides={"run.dir": str(tmp_path / "file" / "run"), "model.path": "./absent"})
    with pytest.raises(
        UserError, match=r"run\.dir: .*file/run.* cannot be written: .*/file is no directory to write to"
    ):
        build.build(config)


def test_what_a_user_put_beside_an_export_is_kept_under_another_name(tiny, tmp_path, caplog):
    policy = tmp_path / "policy"
    hf_io.save_model(policy, *tiny)
    hf_io.save_model(policy, *tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert not any("kept" in message for message in caplog.messages)
    for number in (1, 2):
        (policy / "notes.txt").write_text(f"mine {number}")
        hf_io.save_model(policy, *tiny)
        assert not (policy / "notes.txt").exists()
        assert (tmp_path / f"policy.kept_{number}" / "notes.txt").read_text() == f"mine {number}"
        assert (policy / "model.safetensors").is_file()
    assert "policy holds files of others (notes.txt); it is now policy.kept_1" in caplog.text


def without_pad_and_eos(tiny, directory, generation_config):
    directory.mkdir()
    if generation_config is not None:
        (directory / hf_io.GENERATION_CONFIG).write_text(json.dumps(generation_config))
    tokenizer = copy.deepcopy(tiny.model.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    return replace(tiny.model, path=directory, tokenizer=tokenizer)


def test_a_model_without_an_eos_is_refused_unless_something_names_one(tiny, tmp_path):
    for name, stated in (("none", None), ("empty", {}), ("null", {"eos_token_id": None})):
        with pytest.raises(UserError, match=r"names no EOS token.*set rollout\.eos_tokens"):
            build.eos_token_ids(load(), without_pad_and_eos(tiny, tmp_path / name, stated))
    model = without_pad_and_eos(tiny, tmp_path / "stated", {"eos_token_id": [1, 7]})
    assert build.eos_token_ids(load(), model) == [1, 7]
    named = load(overrides={"rollout.eos_tokens": ["<eos>"]})
    assert build.eos_token_ids(named, without_pad_and_eos(tiny, tmp_path / "named", None)) == [1]


def test_answers_that_are_only_an_eos_are_scored_as_empty_texts_and_train_without_a_nan(tiny_model, tiny, tmp_path):
    """Every token ends an answer, and each is a special one that no text shows."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    file = model / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described["added_tokens"] = [{"id": i, "content": token, **special} for token, i in vocabulary.items()]
    seen = []

    def reward(prompts, answers):
        seen.extend(answers)
        return [float(i % 3) for i in range(len(answers))]

    file.write_text(json.dumps(described))
    result = run(
        model,
        tmp_path / "run",
        reward=reward,
        run__iterations=2,
        monitor__sample_every=0,
        rollout__eos_tokens=list(vocabulary),
    )
    assert seen == [""] * 32
    for row in result.metrics:
        assert row["response/len_mean_tokens"] == 1
        assert all(np.isfinite(value) for value in row.values())
    assert vowel_share([], [""]) == [0.0]
