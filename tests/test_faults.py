"""What the program does when it is killed, signalled, or when its disk is taken away."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import jax
import numpy as np
import pytest
import yaml

import ppo_jax
from ppo_jax import build, checkpoint, durable
from ppo_jax.errors import UserError
from ppo_jax.interruption import SIGNALS, noted_signals
from ppo_jax.models import hf_io
from ppo_jax.monitor.sinks import read_rows
from ppo_jax.run_lock import RunLock
from tests.checkpoint_writer import state_of
from tests.test_train import SMALL, run
from tests.tiny import PROMPTS


@contextmanager
def python(*arguments, **options):
    """A process that does not outlive its test."""
    words = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(words, **({"stdout": subprocess.PIPE, "text": True} | options)) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def writer():
    """Asks the process of `checkpoint_writer` to start a writer and to kill it."""
    with python("-m", "tests.checkpoint_writer", stdin=subprocess.PIPE) as process:

        def ask(**request):
            process.stdin.write(json.dumps({k: str(v) if k == "directory" else v for k, v in request.items()}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask


def restored_step(directory):
    """The step that a restart goes on from, after checking that its state is to the bit the one that was saved."""
    state = checkpoint.restore_newest(directory, state_of(0))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(int(state.step)))
    return int(state.step)


def kill_at_random_moments(writer, directory, times):
    rng, acknowledged = np.random.default_rng(times), 0
    for _ in range(times):
        told = writer(directory=directory, after_s=float(rng.uniform(0, 0.7)))
        assert told["code"] == -signal.SIGKILL
        acknowledged = max(acknowledged, told["acknowledged"])
        if checkpoint.saved_steps(directory):
            assert restored_step(directory) >= acknowledged
        else:
            assert acknowledged == 0
        assert not list(directory.glob("*.damaged"))  # what bears the name is whole
    assert acknowledged > times // 2


def test_a_writer_that_is_killed_at_any_moment_leaves_a_state_it_saved(writer, tmp_path):
    kill_at_random_moments(writer, tmp_path, 5)


@pytest.mark.slow
def test_a_writer_that_is_killed_a_hundred_times_leaves_a_state_it_saved(writer, tmp_path):
    kill_at_random_moments(writer, tmp_path, 100)


def kill_at_events(writer, tmp_path, events):
    """Kill a save before each of these events, the third of three that keep two; returns what restarts found."""
    for _ in range(2):
        assert writer(directory=tmp_path / "before", at_event=10**9)["code"] == 0
    found = []
    for event in events:
        directory = tmp_path / str(event)
        shutil.copytree(tmp_path / "before", directory)
        code = writer(directory=directory, at_event=event)["code"]
        assert code in (0, -signal.SIGKILL)
        saved = checkpoint.saved_steps(directory)
        assert all(checkpoint.verified(path) for path in saved.values())
        found.append((code, restored_step(directory), len(saved)))
        with checkpoint.Checkpoints(directory, keep=1) as checkpoints:
            checkpoints.save(state_of(9))
            checkpoints.finish()
        assert [path.name for path in directory.iterdir()] == ["step_00000009"]
        if code == 0:
            break
    return found


def test_a_save_that_is_killed_at_any_phase_is_undone_or_done(writer, tmp_path):
    assert kill_at_events(writer, tmp_path, range(3, 200, 9))[-1][0] == 0


@pytest.mark.slow
def test_a_save_that_is_killed_before_every_one_of_its_events_is_undone_or_done(writer, tmp_path):
    found = kill_at_events(writer, tmp_path, range(1, 1000))
    assert len(found) > 40
    # Undone up to the rename, done from there on; then the oldest goes, and only then.
    assert {(step, saved) for _, step, saved in found} == {(2, 2), (3, 3), (3, 2)}
    assert (found[0][1], found[-1][1]) == (2, 3)


# orbax closes its event loop at the first file that fails; the others report to a loop that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_refuses_bytes_in_the_middle_of_a_file_keeps_the_checkpoint_before(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state_of(1))
        checkpoints.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a full disk, EFBIG comes from write itself
        try:
            checkpoints.save(state_of(2))
            with pytest.raises(UserError, match=r"checkpoint of step 2 was not written.*newest is that of step 1"):
                checkpoints.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(checkpoint.saved_steps(tmp_path)) == [1]
        (tmp_path / "step_00000002.partial" / "state").mkdir(parents=True, exist_ok=True)  # by a thread still writing
        checkpoints.save(state_of(3))
        checkpoints.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    assert restored_step(tmp_path) == 3
    assert caplog.messages == []  # orbax would log it three times over, with tracebacks


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch, error):
    def refuses(path, *_):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(os, "mkdir", refuses)
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(state_of(1))
        with pytest.raises(UserError, match=f"{tmp_path}.*{os.strerror(error)}.*there is none before it"):
            checkpoints.finish()


def test_a_full_disk_ends_no_run_before_its_end_and_costs_no_policy(tiny_model, tmp_path, monkeypatch, capsys):
    def full_for_checkpoints(partial, final):
        if final.parent.name == "checkpoints":
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(partial, final)

    publish = durable.publish
    monkeypatch.setattr(durable, "publish", full_for_checkpoints)
    with pytest.raises(UserError, match=r"checkpoint of step 2 was not written .*No space left on device"):
        run(tiny_model, tmp_path / "run", run__iterations=2, checkpoint__save_every=1)
    assert "checkpoint of step 1 was not written" in capsys.readouterr().out
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_an_export_that_fails_leaves_the_policy_before_it(tiny, tmp_path, monkeypatch):
    hf_io.save_model(tmp_path / "policy", *tiny)
    before = (tmp_path / "policy" / "model.safetensors").read_bytes()
    changed = jax.tree.map(lambda leaf: leaf + 1, tiny.params)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"could not be written to .*policy.*No space left on device"):
            hf_io.save_model(tmp_path / "policy", tiny.model, changed)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == before
    hf_io.save_model(tmp_path / "policy", tiny.model, changed)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() != before


def test_damaged_metrics_are_named_by_line_and_a_torn_last_line_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n{"step": 1}\n{"st')
    assert read_rows(file) == [{"step": 0}, {"step": 1}]
    for damaged in (b'{"step": 0}\n{"sXep": 1}\n', b'{"step": 0}\n{"step" 1}\n', b'{"step": 0}\n\xff\n', b"[]\n[]\n"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"metrics.jsonl:[12] is damaged .* remove this line"):
            read_rows(file)


HOLDER = """
import sys, time
from pathlib import Path
from ppo_jax.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_run_directory_is_locked_by_one_process_until_it_dies(tmp_path):
    with python("-c", HOLDER, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        lock = RunLock(tmp_path)
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}"):
            lock.acquire()
        holder.kill()
    with lock:
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(UserError, match="in use"):
            RunLock(tmp_path).acquire()
        lock.acquire()
    RunLock(tmp_path).acquire()  # nobody keeps it, so it is free at once
    with RunLock(tmp_path):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path):
        assert "cannot be locked (No locks available)" in caplog.text


def test_a_directory_that_fills_while_the_model_loads_is_not_written_over(tiny_model, tmp_path, monkeypatch):
    open_model = build.open_model

    def meanwhile(config):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("mine")
        return open_model(config)

    monkeypatch.setattr(build, "open_model", meanwhile)
    with pytest.raises(UserError, match="not empty"):
        run(tiny_model, tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine"
    (tmp_path / "run" / "config.yaml").unlink()
    monkeypatch.setattr(build, "open_model", open_model)
    with pytest.raises(UserError, match="reward"):  # the lock alone, free again, is no obstacle
        run(tiny_model, tmp_path / "run", reward=lambda prompts, answers: None)


BUSY = """
import hashlib
from ppo_jax.interruption import noted_signals
with noted_signals() as signal_so_far:
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", ITERATIONS)  # one call into C, as a compiled function is
print("finished", signal_so_far(), flush=True)
"""


@contextmanager
def busy(iterations):
    with python("-c", BUSY.replace("ITERATIONS", str(iterations)), stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "busy\n"
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once_and_the_second_one_stops_in_the_middle_of_a_call(number):
    with busy(2 * 10**9) as process:  # an hour
        process.send_signal(number)
        assert f"{number.name}: the iteration is finished and saved first" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number


def test_one_signal_is_noted_and_stops_nothing():
    with busy(10**6) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "finished 15\n"
        assert process.returncode == 0


def test_signals_do_again_what_they_did_when_the_run_is_over():
    before = [signal.getsignal(number) for number in SIGNALS]
    with noted_signals() as signal_so_far:
        assert signal_so_far() == 0
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


FORKS = """
import os, signal, sys, time
from pathlib import Path
from ppo_jax.interruption import noted_signals
from ppo_jax.run_lock import RunLock

def worker():
    child = os.fork()
    if child == 0:
        time.sleep(600)
    return child

with RunLock(Path(sys.argv[1])), noted_signals() as signal_so_far:
    print(worker(), flush=True)  # outlives all
    other = worker()
    os.kill(other, signal.SIGTERM)  # as a pool does with its workers
    code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
    time.sleep(0.2)
    print("the other ended with %d, heard %d" % (code, signal_so_far()), flush=True)
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_workers_that_a_reward_forks_get_their_own_signals_and_keep_no_lock(tmp_path, killed):
    with python("-c", FORKS, tmp_path / "run", *(["die"] if killed else [])) as process:
        worker = int(process.stdout.readline())
        try:
            assert process.stdout.readline() == "the other ended with -15, heard 0\n"
            assert process.wait(timeout=60) == (-signal.SIGKILL if killed else 0)
            RunLock(tmp_path / "run").acquire()  # although the worker lives
        finally:
            os.kill(worker, signal.SIGKILL)


REWARDS = """
import time

def score(prompts, answers):
    time.sleep(0.3)
    return [sum(letter in "aeiou" for letter in answer) / max(len(answer), 1) for answer in answers]
"""


FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def command(directory, *arguments):
    environment = os.environ | FAST | {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache")}
    return python("-m", "ppo_jax.train", *arguments, cwd=directory, env=environment, stderr=subprocess.STDOUT)


def wait_for_rows(file, count, process):
    while not file.is_file() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """A directory with `recipe.yaml`, a reward and prompts, where the command runs."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    settings = SMALL | {"model.path": str(tiny_model), "prompts.path": "p.jsonl", "reward.function": "rewards:score"}
    sections = {}
    for key, value in (settings | {"run.iterations": 9, "checkpoint.save_every": 1}).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path


def test_a_run_that_is_killed_and_stopped_again_and_again_ends_where_the_unbroken_one_ends(recipe):
    with command(recipe, "--config", "recipe.yaml", "--run.dir", "whole") as process:
        said = process.communicate(timeout=500)[0]
        assert process.returncode == 0, said
    arguments, file = ("--config", "recipe.yaml", "--run.dir", "parts"), recipe / "parts" / "metrics.jsonl"
    # With the third row the first checkpoint is on the disk: the second save has waited for it.
    for more, number in ((3, signal.SIGKILL), (1, signal.SIGTERM), (1, signal.SIGINT)):
        rows = len(read_rows(file)) + more
        with command(recipe, *arguments) as process:
            wait_for_rows(file, rows, process)
            process.send_signal(number)
            said = process.communicate(timeout=300)[0]
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), said
        if number != signal.SIGKILL:
            saved = max(checkpoint.saved_steps(recipe / "parts" / "checkpoints"))
            assert saved == len(read_rows(file)) >= rows
            assert f"step_{saved:08d}; --resume {recipe / 'parts'} continues" in " ".join(said.split())
            assert "Traceback" not in said
        with RunLock(recipe / "parts"), pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
            ppo_jax.fine_tune(resume=recipe / "parts")
        arguments = ("--resume", "parts")
    with command(recipe, *arguments) as process:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    whole, parts = ((recipe / name / "policy" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert parts == whole
    whole, parts = (
        [
            {key: value for key, value in row.items() if not key.startswith(("time/", "throughput/"))}
            for row in read_rows(recipe / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    )
    assert parts == whole
    assert [row["step"] for row in whole] == list(range(9))
    assert (recipe / "parts" / "samples.jsonl").read_bytes() == (recipe / "whole" / "samples.jsonl").read_bytes()


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_what_two_save_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                python(
                    "-m",
                    "tests.checkpoint_writer",
                    tmp_path / "checkpoints",
                    env=os.environ | joined | {"JAX_PROCESS_ID": str(index)},
                )
            )
            for index in range(2)
        ]
        for process in processes:
            assert "ready\n" in iter(process.stdout.readline, "")  # the collectives' library speaks first
        processes[1].send_signal(signal.SIGTERM)
        saved = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    [step] = checkpoint.saved_steps(tmp_path / "checkpoints")
    assert saved == [f"saved {step}\n"] * 2
    assert restored_step(tmp_path / "checkpoints") == step > 20


def test_the_soak_finds_everything_that_it_watches():
    with python("-c", "from benchmarks.soak import Phases; Phases().watch()", stderr=subprocess.PIPE) as process:
        said = process.communicate(timeout=120)
        assert process.returncode == 0, said
