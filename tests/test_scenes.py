"""The counting of `benchmarks.scenes`: what it judges, what it calls harm, what it makes of a file that was torn."""

import json

import numpy as np
import pytest

from benchmarks import scenes
from benchmarks.scene_runs import RECIPES, SCENES, healthy_of, settings_of
from ppo_jax import jsonl
from tests.test_alarms import healthy


def of_lengths(*lengths):
    """What the harm of `reward is minus the length` reads."""
    return [{"step": step, "response/len_mean_tokens": float(x)} for step, x in enumerate(lengths)]


def unchanging(seed, iterations=12):
    """Rows of a policy that stays what it is: means of 16 scores, most of them good, as those of the embedded model."""
    scores = np.random.default_rng(seed).choice(
        [-0.4, 0.0, 0.3, 0.6, 0.9], (iterations, 16), p=[0.15, 0.25, 0.2, 0.2, 0.2]
    )
    columns = scores.mean(axis=1), scores.std(axis=1), (scores**2).mean(axis=1)
    return [
        {
            "step": step,
            "score/mean": mean,
            "score/std": std,
            "score/gold_mean": mean,
            "score/gold_squared_mean": squared,
        }
        for step, (mean, std, squared) in enumerate(zip(*columns, strict=True))
    ]


@pytest.mark.parametrize("name", ["gameable proxy", "learning rate x 1000"])
def test_a_policy_that_never_changes_does_no_harm_to_its_score_in_nine_of_ten_runs(name):
    found = [scenes.harmed(SCENES[name], unchanging(seed)) for seed in range(500)]
    assert sum(step is not None for step in found) < 500 / 10


def test_harm_begins_with_the_first_row_of_the_first_streak_of_three():
    scene = SCENES["reward is minus the length"]

    def harm(*lengths):
        return scenes.harmed(scene, of_lengths(*lengths))

    assert harm(20, 9, 9, 20, 9, 9, 9, 9) == 4
    assert harm(20, 9, 9, 20, 9, 9) is None
    assert harm(20, 20, 20, 9, 9, 9) == 3


def line(name, seed, **changes):
    return {"name": name, "seed": seed, "settings": settings_of(name, seed) | changes, "rows": [{"step": 0}]}


def test_only_the_seeds_and_scenes_that_are_asked_for_are_judged_and_only_in_the_settings_of_now():
    wanted = [line("beta 1000", 3), line("exact_kl", 3)]
    other = [line("beta 1000", 100), line("constant reward", 3), line("beta 1000", 3, **{"run.iterations": 4})]
    found = json.loads(json.dumps([*other, *wanted]))
    assert scenes.asked(found, ["beta 1000", "healthy"], range(10)) == json.loads(json.dumps(wanted))


def test_a_file_that_was_torn_is_continued_with_what_it_lacks_and_nothing_is_run_twice(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(scenes, "run", lambda name, config: ran.append((name, config.run.seed)) or [{"step": 0}])
    file = tmp_path / "runs.jsonl"
    names = ["beta 1000", "constant reward", "healthy"]
    scenes.run_the_rest(file, names, [0])
    assert sorted(ran) == sorted([(name, 0) for name in (*names[:2], *healthy_of(0))])
    whole, ran[:] = file.read_bytes(), []
    file.write_bytes(whole[:-9])
    scenes.run_the_rest(file, names, [0])
    assert ran == [(healthy_of(0)[-1], 0)]
    assert file.read_bytes() == whole
    assert len(jsonl.read(file)) == 5


def test_a_false_alarm_counts_for_its_recipe_and_its_seed_but_once():
    """Two of the three runs of a seed are wrong: that is one seed in two."""
    heard = [("default", 0, {"kl_runaway": 4}), ("exact_kl", 0, {"kl_runaway": 5}), ("critic_value_head", 0, {})]
    heard += [(name, 1, {}) for name in healthy_of(1)]
    table = scenes.healthy_table([{"name": name, "seed": seed, "heard": alarms} for name, seed, alarms in heard])
    assert [row[0] for row in table] == ["default", *RECIPES, "all"]
    assert table[0][1] == "1 of 2"
    assert table[-1][1:] == ["2 of 6", scenes.rate(1, 2), "kl_runaway 2"]


def test_a_scene_is_detected_only_by_its_own_alarm_with_its_own_cause():
    rows = [healthy(step) for step in range(12)]
    still = {"kl/token_nats": 0.0, "kl/seq_nats": 0.0, "update/param_rel_change": 0.0}
    rows = rows[:1] + [row | still for row in rows[1:]]
    assert scenes.judge("frozen parameters", 0, rows, 3)["detected"] == 4
    assert scenes.judge("frozen parameters", 0, rows, 1)["detected"] == 2
    for name in ("beta 1000", "learning rate x 1000"):
        judged = scenes.judge(name, 0, rows, 3)
        assert judged["heard"] == {"not_moving": 4}
        assert judged["detected"] is None


def test_an_alarm_in_the_iteration_of_the_harm_is_in_time_and_one_after_it_is_not():
    found = [("beta 1000", 4, None), ("a fixed phrase", 5, 5), ("a fixed phrase", 6, 5), ("a fixed phrase", None, 5)]
    judged = [{"name": name, "detected": x, "harm": harm, "heard": {"kl_runaway": 5}} for name, x, harm in found]
    judged += [{"name": "default", "heard": {}}, {"name": "stale rollout", "detected": None, "harm": 3, "heard": {}}]
    said = scenes.summary(judged)
    assert said.startswith("3 of 5 runs")
    assert "In 1 of the 4 " in said
    assert "in 3 any alarm" in said
