import asyncio
import gc
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from ppo_jax.config import RewardConfig
from ppo_jax.errors import UserError
from ppo_jax.rewards import source
from ppo_jax.rewards.sentiment import vader_compound
from ppo_jax.rewards.source import Reward, audit, load_function, open_reward, score_answers, start_scoring

ANSWERS = ["one", "two", "three"]
PROMPTS = ["p"] * 3


def scores_of(function, prompts=PROMPTS, columns=None):
    return score_answers(open_reward(RewardConfig(), function), prompts, ANSWERS, columns).total


def lengths(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_a_reward_sees_prompts_and_answers_in_order_and_gives_float32():
    scores = scores_of(
        lambda prompts, answers: [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], ["", "a", "b"]
    )
    assert scores.dtype == np.float32
    assert scores.tolist() == [3, 4, 6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, True, "0.5", np.bool_(True), 1e300, 1j])
def test_a_score_that_is_no_finite_number_is_refused_with_its_answer(bad):
    with pytest.raises(UserError, match="answer 1") as error:
        scores_of(lambda prompts, answers: [0.0, bad, 1.0])
    assert "'two'" in str(error.value)


@pytest.mark.parametrize("scores", [[0.0, 1.0], [0.0] * 4])
def test_a_wrong_number_of_scores_is_refused(scores):
    with pytest.raises(UserError, match=f"{len(scores)} scores for 3"):
        scores_of(lambda prompts, answers: scores)


def test_a_reward_that_raises_or_returns_no_list_is_refused_with_the_reason():
    def broken(prompts, answers):
        raise KeyError("label")

    with pytest.raises(UserError, match=r"KeyError.*label"):
        scores_of(broken)
    with pytest.raises(UserError, match="NoneType"):
        scores_of(lambda prompts, answers: None)
    with pytest.raises(UserError, match="there are none"):
        scores_of(lambda prompts, answers: {})


def test_a_reward_that_asks_for_the_columns_gets_them_and_one_that_does_not_is_left_alone():
    def by_position(prompts, answers, rows):
        return rows["label"]

    def by_keyword(prompts, answers, *, columns):
        return columns["label"]

    def with_a_default(prompts, answers, columns=None):
        return columns["label"]

    class Called:
        def __call__(self, prompts, answers, columns):
            return columns["label"]

    for function in (by_position, by_keyword, with_a_default, Called()):
        assert scores_of(function, columns={"label": [1, 2, 3]}).tolist() == [1, 2, 3]
    assert scores_of(lambda prompts, answers, scale=2.0: [scale] * 3, columns={"label": [1, 2, 3]}).tolist() == [2] * 3
    assert scores_of(lambda prompts, answers, **other: [float(len(other))] * 3).tolist() == [0] * 3


def test_no_source_can_change_what_another_one_sees():
    def spoils(prompts, answers, columns):
        answers.sort()
        columns["label"].clear()
        return [0.0] * 3

    reward = Reward({"spoils": spoils, "reads": lambda prompts, answers, columns: columns["label"], "lengths": lengths})
    scores = score_answers(reward, PROMPTS, ANSWERS, {"label": [1, 2, 3]})
    assert scores.named["reads"].tolist() == [1, 2, 3]
    assert scores.named["lengths"].tolist() == [3, 3, 5]


def test_several_scores_are_summed_with_their_weights_and_kept_by_name():
    def judged(prompts, answers):
        return {"helpful": [1.0, 2.0, 3.0], "rude": [0.0, 1.0, 0.0]}

    reward = Reward({"length": lengths, "judge": judged}, {"rude": -10.0, "length": 0.5})
    scores = score_answers(reward, PROMPTS, ANSWERS)
    assert scores.total.tolist() == [2.5, -6.5, 5.5]
    assert {name: values.tolist() for name, values in scores.named.items()} == {
        "length": [3, 3, 5],
        "helpful": [1, 2, 3],
        "rude": [0, 1, 0],
    }


@pytest.mark.parametrize(
    ("sources", "weights", "reason"),
    [
        ({"a": lengths}, {"b": 2.0}, "no score is called b; there are a"),
        ({"a": lengths, "b": lambda p, a: {"a": [0.0] * 3}}, {}, "'b' returned a score named 'a'"),
        ({"a": lambda p, a: {1: [0.0] * 3}}, {}, "named 1"),
        ({"a": lambda p, a: {"shaped": [0.0] * 3}}, {}, "named 'shaped'"),
        ({"a": lambda p, a: {"x": [0.0] * 3, "y": [0.0, float("nan"), 0.0]}}, {}, "the reward 'a' returned nan"),
        ({"a": lengths, "b": lambda p, a: 1 / 0}, {}, "the reward 'b' raised ZeroDivisionError"),
        ({"a": lambda p, a: [1e18] * 3}, {"a": 1e18}, "sum of the scores a"),
    ],
)
def test_scores_that_cannot_be_added_up_are_refused_by_name(sources, weights, reason):
    with pytest.raises(UserError, match=reason):
        score_answers(Reward(sources, weights), PROMPTS, ANSWERS)


def test_asynchronous_sources_wait_together_in_one_loop_that_outlives_a_batch():
    loops = []

    def waiting_for_the_other(mine, other):
        async def source(prompts, answers):
            loops.append(asyncio.get_running_loop())
            mine.set()
            await other.wait()  # never, unless both run at once
            return lengths(prompts, answers)

        return source

    def uses_a_loop_of_its_own(prompts, answers):
        return asyncio.run(asyncio.sleep(0, lengths(prompts, answers)))

    first, second = asyncio.Event(), asyncio.Event()
    reward = Reward(
        {
            "a": waiting_for_the_other(first, second),
            "b": waiting_for_the_other(second, first),
            "plain": uses_a_loop_of_its_own,
        },
        time_limit_s=30.0,
    )
    for _ in range(2):
        assert score_answers(reward, PROMPTS, ANSWERS).total.tolist() == [9, 9, 15]
    assert len(set(loops)) == 1


def test_scores_can_be_awaited_where_a_loop_runs_already():
    async def source(prompts, answers):
        return lengths(prompts, answers)

    async def notebook():
        return scores_of(source)

    assert asyncio.run(notebook()).tolist() == [3, 3, 5]


def test_an_asynchronous_source_that_fails_is_named_and_leaves_nothing_running():
    seen = []

    async def fails(prompts, answers):
        raise KeyError("label")

    async def slow(prompts, answers):
        await asyncio.sleep(0.01)
        seen.append("done")
        return lengths(prompts, answers)

    with pytest.raises(UserError, match="'fails' raised KeyError"):
        score_answers(Reward({"fails": fails, "slow": slow}), PROMPTS, ANSWERS)
    assert seen == ["done"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="'plain' raised ZeroDivisionError"):
            score_answers(Reward({"slow": slow, "plain": lambda p, a: 1 / 0}), PROMPTS, ANSWERS)
        gc.collect()
    assert seen == ["done"]
    assert not warned  # of a coroutine that was never awaited


def test_answers_are_scored_in_the_background_and_failures_come_out_where_they_are_waited_for():
    go_on = threading.Event()

    def waits(prompts, answers):
        assert go_on.wait(30)
        return lengths(prompts, answers)

    finish = start_scoring(Reward({"function": waits}), PROMPTS, ANSWERS)
    go_on.set()  # never reached if scoring were done by now
    assert finish().total.tolist() == [3, 3, 5]
    failing = start_scoring(Reward({"function": lambda p, a: 1 / 0}), PROMPTS, ANSWERS)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        failing()


def test_a_source_on_the_devices_of_the_run_is_done_before_anything_else_starts_there():
    done = []

    class Model:
        on_devices = True

        def __call__(self, prompts, answers):
            threading.Event().wait(0.2)
            done.append(threading.current_thread())
            return lengths(prompts, answers)

    finish = start_scoring(Reward({"model": Model()}), PROMPTS, ANSWERS)
    assert len(done) == 1
    assert finish().total.tolist() == [3, 3, 5]


def test_a_source_that_hangs_is_given_up_after_the_time_limit():
    never = threading.Event()
    hangs = Reward({"function": lambda p, a: never.wait(60)}, time_limit_s=0.2)
    with pytest.raises(UserError, match=r"reward\.time_limit_s \(0\.2 s\)"):
        score_answers(hangs, PROMPTS, ANSWERS)
    never.set()


def test_a_function_that_raises_is_called_again_as_often_as_it_may(caplog):
    calls = []

    def fails_twice(prompts, answers):
        calls.append(answers)
        if len(calls) < 3:
            raise TimeoutError(f"no {len(calls)}")
        return lengths(prompts, answers)

    found = score_answers(Reward({"function": fails_twice}, function_retries=2), PROMPTS, ANSWERS)
    np.testing.assert_array_equal(found.total, lengths(PROMPTS, ANSWERS))
    assert calls == [ANSWERS] * 3
    assert [record.message.partition("; ")[2] for record in caplog.records] == [
        "it is called again, 2 times at most",
        "it is called again, 1 times at most",
    ]
    calls.clear()
    with pytest.raises(UserError, match="raised TimeoutError: no 2"):
        score_answers(Reward({"function": fails_twice}, function_retries=1), PROMPTS, ANSWERS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "5", True])
def test_an_answer_without_a_finite_score_is_dropped_where_the_caller_may_and_up_to_the_share_that_may_be(bad):
    def one_is_bad(prompts, answers):
        return [7.0, bad, 9.0]

    def another_is_bad(prompts, answers):
        return [float("nan"), 1.0, 1.0]

    reward = Reward({"a": one_is_bad, "b": lengths}, max_dropped_frac=0.34)
    found = start_scoring(reward, PROMPTS, ANSWERS, may_drop=True)()
    assert found.dropped.tolist() == [False, True, False]
    expected = np.array([7.0, 0.0, 9.0]) + np.where(found.dropped, 0, lengths(PROMPTS, ANSWERS))
    np.testing.assert_array_equal(found.total, expected.astype(np.float32))
    for refused, may_drop in (
        (reward, False),
        (Reward({"a": one_is_bad}, max_dropped_frac=0.3), True),
        (Reward({"a": one_is_bad, "b": another_is_bad}, max_dropped_frac=0.34), True),  # two of three together
    ):
        with pytest.raises(UserError, match=r"no finite score|expected a finite float"):
            start_scoring(refused, PROMPTS, ANSWERS, may_drop=may_drop)()


def test_the_time_limit_counts_from_the_start_of_the_scoring_not_of_the_wait_for_it(monkeypatch):
    clock, waits = iter([100.0, 107.0, 150.0]), []
    scores = source.Scores(np.zeros(3, np.float32), {}, np.zeros(3, bool), 0.0)
    never_done = SimpleNamespace(result=lambda seconds: waits.append(seconds) or scores)
    monkeypatch.setattr(source, "in_background", lambda work: never_done)
    monkeypatch.setattr(source, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    finish = start_scoring(Reward({"function": lengths}, time_limit_s=10.0), PROMPTS, ANSWERS)
    finish()
    finish()
    assert waits == [3.0, 0.0]


def test_functions_are_found_by_module_and_name():
    assert load_function("ppo_jax.rewards.sentiment:vader_compound") is vader_compound
    for name, reason in {
        "ppo_jax.rewards.sentiment": "expected module:function",
        "no_such_module_anywhere:f": "could not be imported",
        "ppo_jax.rewards.sentiment:absent": "no function 'absent'",
    }.items():
        with pytest.raises(UserError, match=reason):
            load_function(name)


def test_the_sources_of_a_run_are_those_that_are_set_and_the_one_function_where_none_is():
    vader = "ppo_jax.rewards.sentiment:vader_compound"
    assert list(open_reward(RewardConfig()).sources) == ["function"]
    both = open_reward(RewardConfig(functions={"mood": vader}, url="http://localhost:1/score", weights={"url": 2.0}))
    assert list(both.sources) == ["mood", "url"]
    assert both.weights == {"url": 2.0}
    assert list(open_reward(RewardConfig(functions={"mood": vader}), lengths).sources) == ["function"]
    with pytest.raises(UserError, match="'url' is the name"):
        open_reward(RewardConfig(functions={"url": vader}, url="http://localhost:1"))
    with pytest.raises(UserError, match=r"reward\.functions: mood: .* has no function"):
        open_reward(RewardConfig(functions={"mood": vader + "s"}))
    with pytest.raises(UserError, match=r"reward\.url: http://host:port/ cannot"):
        open_reward(RewardConfig(url="http://host:port/"))


def test_sentiment_orders_texts_and_bears_an_empty_one():
    good, bad, empty = vader_compound([""] * 3, ["I love this wonderful place!", "A horrible, disgusting mess.", ""])
    assert bad < -0.5 < 0.5 < good
    assert empty == 0


def test_constant_and_two_valued_scores_are_warned_of_and_graded_ones_are_not():
    lengths = np.array([3, 9, 4, 4, 5, 3, 8, 7])
    assert "nothing can be learned" in audit(np.full(8, 2.0), lengths)[0]
    assert "only the values 0 and 1" in audit(np.array([0, 1, 1, 0, 1, 0.0]), lengths[:6])[0]
    assert audit(np.linspace(0, 1, 8), lengths) == []


def test_one_score_that_outweighs_the_others_is_warned_of():
    scores = np.array([0.0, 1, -1, 2, -2, 1, -1, 0])
    assert audit(scores, np.full(8, 5)) == []
    found = audit(np.where(np.arange(8) == 3, -9.0, scores), np.full(8, 5))
    assert len(found) == 1
    assert "one score of 8, -9, makes more than half of their variance" in found[0]


def test_scores_that_go_with_the_length_are_warned_of_in_either_direction():
    rng = np.random.default_rng(0)
    lengths, noise = rng.integers(1, 48, 64), rng.normal(0, 1, 64)
    assert audit(noise, lengths) == []
    longer, shorter = (audit(sign * lengths / 14 + noise, lengths) for sign in (1, -1))
    assert len(longer) == len(shorter) == 1
    assert "longer answers instead of better" in longer[0]
    assert "shorter answers instead of better" in shorter[0]
