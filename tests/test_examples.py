"""The example configs, run as they are but for their size."""

import json
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

import ppo_jax
from configs.examples import reward_server
from ppo_jax.config_file import load
from ppo_jax.rewards.sentiment import vader_compound
from ppo_jax.rewards.source import open_reward, score_answers

ROOT = Path(__file__).parent.parent
SMALL = {
    "run.iterations": 2,
    "rollout.batch_size": 8,
    "rollout.max_new_tokens": 8,
    "update.minibatch_size": 8,
    "update.epochs": 1,
    "monitor.tensorboard": False,
    "monitor.sample_every": 0,
}


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), reward_server.Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


def test_several_rewards_with_columns_and_held_out_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = SMALL | {"run.dir": str(tmp_path / "run"), "monitor.evaluate_every": 2}
    result = ppo_jax.fine_tune(load("configs/several_rewards.yaml", changes))
    for row in result.metrics:
        mood, brevity, wanted, unwanted = (
            row[f"score/{name}_mean"] for name in ("mood", "brevity", "wanted", "unwanted")
        )
        assert row["score/mean"] == pytest.approx(mood + 0.5 * brevity + 2 * wanted - unwanted, abs=1e-5)
        assert 0.5 < brevity < 1
    assert [("evaluation/win_rate" in row) for row in result.metrics] == [False, True]


def test_an_adapter_is_trained_in_place_of_the_embedded_model(tmp_path):
    result = ppo_jax.fine_tune(load(ROOT / "configs/lora.yaml", SMALL | {"run.dir": str(tmp_path / "run")}))
    assert [leaf.shape[1] for name, leaf in trained(result.state.params) if name.endswith("lora_a']")] == [8] * 28
    first, second = result.metrics
    assert first["kl/seq_nats"] < 1e-6 < second["kl/seq_nats"]
    written = json.loads((result.adapter_directory / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (8, 16)


def trained(params):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def test_the_service_gives_the_scores_of_the_function_and_trains(service, tmp_path):
    config = load(ROOT / "configs/http_reward.yaml", SMALL | {"reward.url": service, "run.dir": str(tmp_path / "run")})
    answers = [f"{'good ' * i}bad" for i in range(40)]  # three requests
    scores = score_answers(open_reward(config.reward), [""] * 40, answers).total
    np.testing.assert_array_equal(scores, np.float32(vader_compound([""] * 40, answers)))
    result = ppo_jax.fine_tune(config)
    assert len(result.metrics) == 2
    assert result.metrics[0]["score/std"] > 0
