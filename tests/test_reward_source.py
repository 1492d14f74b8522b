import numpy as np
import pytest

from ppo_jax.errors import UserError
from ppo_jax.rewards.sentiment import vader_compound
from ppo_jax.rewards.source import audit, load_function, score_answers

ANSWERS = ["one", "two", "three"]


def test_a_reward_sees_prompts_and_answers_in_order_and_gives_float32():
    scores = score_answers(
        lambda prompts, answers: [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)],
        ["", "a", "b"],
        ANSWERS,
    )
    assert scores.dtype == np.float32
    assert scores.tolist() == [3, 4, 6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, True, "0.5", np.bool_(True), 1e300, 1j])
def test_a_score_that_is_no_finite_number_is_refused_with_its_answer(bad):
    with pytest.raises(UserError, match="answer 1") as error:
        score_answers(lambda prompts, answers: [0.0, bad, 1.0], ["p"] * 3, ANSWERS)
    assert "'two'" in str(error.value)


@pytest.mark.parametrize("scores", [[0.0, 1.0], [0.0] * 4])
def test_a_wrong_number_of_scores_is_refused(scores):
    with pytest.raises(UserError, match=f"{len(scores)} scores for 3"):
        score_answers(lambda prompts, answers: scores, ["p"] * 3, ANSWERS)


def test_a_reward_that_raises_or_returns_no_list_is_refused_with_the_reason():
    def broken(prompts, answers):
        raise KeyError("label")

    with pytest.raises(UserError, match=r"KeyError.*label"):
        score_answers(broken, ["p"] * 3, ANSWERS)
    with pytest.raises(UserError, match="NoneType"):
        score_answers(lambda prompts, answers: None, ["p"] * 3, ANSWERS)


def test_functions_are_found_by_module_and_name():
    assert load_function("ppo_jax.rewards.sentiment:vader_compound") is vader_compound
    for name, reason in {
        "ppo_jax.rewards.sentiment": "expected module:function",
        "no_such_module_anywhere:f": "could not be imported",
        "ppo_jax.rewards.sentiment:absent": "no function 'absent'",
    }.items():
        with pytest.raises(UserError, match=reason):
            load_function(name)


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
