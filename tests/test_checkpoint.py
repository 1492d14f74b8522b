import json
import logging
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax import checkpoint, durable
from ppo_jax.checkpoint import Checkpoints
from ppo_jax.errors import UserError
from ppo_jax.ops.rewards import ScoreMoments
from ppo_jax.records import TrainState


def some_state(step, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "a": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "b": {"c": jnp.asarray(rng.normal(size=2), jnp.float32)},
    }
    optimizer = optax.adamw(1e-3)
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        moments = optimizer.update(params, optimizer.init(params), params)[1]
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state=moments,
        kl_coef=jnp.float32(0.05 + step),
        score_moments=ScoreMoments(*(jnp.float32(step + i) for i in range(3))),
        skipped_in_a_row=jnp.int32(step % 3),
    )


def save(directory, *states, keep=100, keep_best=False, rewards=None):
    with Checkpoints(directory, keep=keep, keep_best=keep_best) as checkpoints:
        for state in states:
            checkpoints.rewards |= rewards or {}
            path = checkpoints.save(state)
        checkpoints.finish()
    return path


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = some_state(3)
    save(tmp_path, state)
    assert_same(checkpoint.restore_newest(tmp_path, some_state(0, seed=1)), state)


def test_only_the_newest_checkpoints_stay_and_the_newest_is_restored(tmp_path):
    save(tmp_path, *map(some_state, (1, 2, 9, 10)), keep=2)
    assert list(checkpoint.saved_steps(tmp_path)) == [9, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000009", "step_00000010"]
    assert int(checkpoint.restore_newest(tmp_path, some_state(0)).step) == 10


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    rewards = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}  # of the policies of steps 1 to 4; that of 5 has not answered yet
    states = [some_state(step) for step in (1, 2, 3, 4, 5)]
    save(tmp_path / "best", *states, keep=1, keep_best=True, rewards=rewards)
    assert list(checkpoint.saved_steps(tmp_path / "best")) == [2, 5]
    save(tmp_path / "newest", *states, keep=1, rewards=rewards)
    assert list(checkpoint.saved_steps(tmp_path / "newest")) == [5]


@given(
    st.lists(st.integers(0, 40), unique=True, min_size=1),
    st.integers(1, 5),
    st.dictionaries(st.integers(0, 40), st.floats()),
)
def test_what_expires_is_neither_new_nor_best(steps, keep, rewards):
    gone = checkpoint.expired(steps, keep=keep, rewards=rewards)
    stay = set(steps) - set(gone)
    newest = sorted(steps)[-keep:]
    assert stay >= set(newest)
    finite = [rewards[step] for step in steps if step in rewards and np.isfinite(rewards[step])]
    if finite:
        assert max(finite) in [rewards.get(step) for step in stay]
    assert len(stay) <= len(newest) + bool(finite)


def test_training_goes_on_while_a_state_is_written_and_does_not_reach_into_it(tmp_path, monkeypatch):
    """The update takes the state's buffers; here it runs a hundred times before the files are complete."""
    publish, may_publish = durable.publish, threading.Event()

    def waits(*arguments):
        assert may_publish.wait(timeout=60)
        publish(*arguments)

    monkeypatch.setattr(durable, "publish", waits)
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    params = step({"large": jnp.arange(2.0**20), "small": jnp.zeros(3)})
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        path = checkpoints.save(some_state(1).replace(params=params))
        for _ in range(100):
            params = step(params)
        assert not path.exists()
        may_publish.set()
        checkpoints.finish()
        assert path.exists()
    like = some_state(0).replace(params=params)
    assert_same(checkpoint.restore_newest(tmp_path, like).params, expected)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no checkpoint"):
            checkpoint.restore_newest(directory, some_state(0))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"x": jnp.zeros(7)}, r"\.params\['a'\] is float32\[4, 3\], expected none of that name"),
        ({"a": jnp.zeros((4, 4)), "b": {"c": jnp.zeros(2)}}, r"\['a'\] is float32\[4, 3\], expected float32\[4, 4\]"),
        ({"a": jnp.zeros((4, 3), jnp.bfloat16), "b": {"c": jnp.zeros(2)}}, "expected bfloat16"),
    ],
    ids=["other names", "other shape", "other dtype"],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_arrays_that_differ(tmp_path, params, message):
    save(tmp_path, some_state(1))
    with pytest.raises(UserError, match=f"does not fit this model and optimizer: .*{message}"):
        checkpoint.restore_newest(tmp_path, some_state(1).replace(params=params))


def test_everything_is_on_the_disk_before_the_name_and_the_name_before_anything_is_dropped(tmp_path, monkeypatch):
    """A loss of power keeps only what was flushed: files, then directories, then the rename, then the next step."""
    save(tmp_path, some_state(1))
    events, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(descriptor):
        events.append(("flushed", os.readlink(f"/proc/self/fd/{descriptor}").replace(".partial", "")))
        fsync(descriptor)

    def noted_rename(source, target, **options):
        events.append(("named", str(target)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    path = save(tmp_path, some_state(2), keep=1)
    named, dropped = events.index(("named", str(path))), events.index(("named", f"{tmp_path}/step_00000001.expired"))
    below = {str(below) for below in path.rglob("*")}
    assert {f"{path}/manifest.json", f"{path}/state"} < below
    assert {("flushed", str(one)) for one in below} | {("flushed", str(path))} <= set(events[:named])
    assert ("flushed", str(tmp_path)) in events[named:dropped]


def files_of(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_a_flipped_bit_in_any_file_is_noticed_named_and_passed_over(tmp_path, caplog):
    states = [some_state(1), some_state(2, seed=1)]
    path = save(tmp_path / "whole", *states)
    files, rng = files_of(path), np.random.default_rng(0)
    assert {"manifest.json", "state/_METADATA", "state/manifest.ocdbt"} < set(files)
    for name in files:
        shutil.copytree(tmp_path / "whole", tmp_path / "flipped")
        file = tmp_path / "flipped" / path.name / name
        data = bytearray(file.read_bytes())
        if not data:
            data = bytearray(1)  # a byte in an empty file
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        caplog.clear()
        assert_same(checkpoint.restore_newest(tmp_path / "flipped", some_state(0)), states[0])
        [line] = caplog.messages
        assert str(file) in line
        assert "set aside as step_00000002.damaged, continuing from step 1" in line
        assert (tmp_path / "flipped" / "step_00000002.damaged" / name).read_bytes() == bytes(data)
        shutil.rmtree(tmp_path / "flipped")


def test_any_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path):
    path = save(tmp_path, some_state(1))
    file = path / "manifest.json"
    data, manifest = file.read_bytes(), checkpoint.verified(path)
    for position in range(0, len(data), 5):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        try:
            assert checkpoint.verified(path) == manifest
        except checkpoint.Damaged as damage:
            assert "manifest.json is damaged" in str(damage)  # noqa: PT017


def without_data(path):
    next((path / "state").rglob("d/*")).unlink()


def with_a_shorter_file(path):
    file = max((path / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def with_half_a_manifest(path):
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])


def with_a_list_for_a_manifest(path):
    (path / "manifest.json").write_text("[]")


def under_another_name(path):
    shutil.copytree(path.with_name("step_00000001"), path, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_data, "is missing"),
        (with_a_shorter_file, "bytes, .* were written"),
        (emptied, "has no manifest.json"),
        (with_half_a_manifest, "manifest.json is damaged"),
        (with_a_list_for_a_manifest, "manifest.json is damaged"),
        (under_another_name, "the checkpoint of step 1 under another name"),
    ],
)
def test_damage_is_passed_over_or_refused_when_strict_or_when_nothing_is_whole(tmp_path, caplog, damage, message):
    states = [some_state(1), some_state(2, seed=1)]
    path = save(tmp_path, *states)
    damage(path)
    with pytest.raises(UserError, match=message + ".*checkpoint.strict"):
        checkpoint.restore_newest(tmp_path, some_state(0), strict=True)
    assert path.exists()
    assert_same(checkpoint.restore_newest(tmp_path, some_state(0)), states[0])
    assert len(caplog.messages) == 1
    shutil.rmtree(tmp_path / "step_00000001")
    (tmp_path / "step_00000002.damaged").rename(path)
    with pytest.raises(UserError, match="(?s)no checkpoint is whole:\n.*" + message):
        checkpoint.restore_newest(tmp_path, some_state(0))


def test_a_step_that_was_set_aside_is_written_anew(tmp_path):
    states = [some_state(1), some_state(2, seed=1)]
    without_data(save(tmp_path, *states))
    checkpoint.restore_newest(tmp_path, some_state(0))
    save(tmp_path, states[1])
    assert_same(checkpoint.restore_newest(tmp_path, some_state(0)), states[1])


def test_what_a_killed_process_left_is_named_and_removed_and_nothing_else(tmp_path, caplog):
    save(tmp_path, some_state(1))
    left = ["step_00000002.partial", "step_00000000.expired"]
    others = ["step_00000003.damaged", "step_1.partial", "notes"]
    for name in left + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with Checkpoints(tmp_path, keep=1):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "step_00000001"])
    assert all(any(name in line for line in caplog.messages) for name in left)
    assert len(caplog.messages) == 2


def test_a_failed_save_keeps_what_is_there_warns_at_the_next_and_is_raised_at_the_end(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)

    def full(*_):
        raise OSError(28, "No space left on device")

    states = [some_state(step) for step in (1, 2, 3, 4)]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(states[0])
        checkpoints.finish()
        with monkeypatch.context() as patched:
            patched.setattr(durable, "publish", full)
            checkpoints.save(states[1])
            assert caplog.messages == []
            checkpoints.save(states[2])
            assert "checkpoint of step 2 was not written" in caplog.messages[0]
            assert "No space left on device" in caplog.messages[0]
            assert "the newest is that of step 1" in caplog.messages[0]
            with pytest.raises(UserError, match="checkpoint of step 3 was not written"):
                checkpoints.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        checkpoints.save(states[3])
        checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_a_save_that_cannot_fit_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(some_state(1))
        with pytest.raises(UserError, match="are free"):
            checkpoints.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    durable.write_text(file, "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_text(file, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert file.read_text() == "before"


def test_the_manifest_lists_every_file_and_array(tmp_path):
    state = some_state(5)
    path = save(tmp_path, state)
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    assert manifest["step"] == 5
    assert sorted([*manifest["files"], "manifest.json"]) == files_of(path)
    assert manifest["arrays"][".params['a']"] == "float32[4, 3]"
    assert len(manifest["arrays"]) == len(jax.tree.leaves(state))
