"""The oracle on examples worked by hand, and what only it and finite differences see: both stacks wrong alike."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity import credit, finite_differences, operations, oracle, oracle_layers, primitives
from parity import oracle_losses as losses_oracle
from parity import oracle_rewards as rewards_oracle
from parity.cases import random_model
from parity.learners import EVERY_TERM
from parity.stacks import Pair
from ppo_jax.models import layers
from ppo_jax.ops import advantages, kl, logprobs, losses, masking, rewards
from ppo_torch_ref import layers as torch_layers
from ppo_torch_ref import ops as torch_ops

LN2 = math.log(2)
ROOT = math.sqrt(1 + 1e-8)
# An answer of three tokens, one of a single token, and none; NaN wherever nobody may look.
NAN = math.nan
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
X = np.array([[1, 2, 3], [4, NAN, NAN], [NAN, NAN, NAN]])


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_masked_reductions():
    check(oracle.masked_sum(X, MASK), 10)
    check(oracle.masked_mean(X, MASK), 2.5)
    check(oracle.masked_var(X, MASK), (1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 4)
    nothing = np.zeros_like(MASK)
    check([f(X, nothing) for f in (oracle.masked_sum, oracle.masked_mean, oracle.masked_var)], 0)


def test_log_probs_and_entropy():
    logits = np.log([[1.0, 2.0, 5.0], [2.0, 1.0, 1.0]])
    check(oracle.token_logprobs(logits, np.array([1, 0]), temperature=1.0), np.log([2 / 8, 2 / 4]))
    # At half the temperature the odds are squared: 1 : 4 : 25 and 4 : 1 : 1.
    check(oracle.token_logprobs(logits, np.array([1, 0]), temperature=0.5), np.log([4 / 30, 4 / 6]))
    with np.errstate(divide="ignore"):
        banned = np.log([[2.0, 1.0, 1.0, 0.0]])
    check(oracle.entropy(banned, temperature=1.0), [1.5 * LN2])


def test_divergences():
    logits, ref_logits = np.log([[2.0, 2.0]]), np.log([[1.0, 3.0]])
    check(oracle.exact_token_kl(logits, ref_logits, temperature=1.0), [0.5 * math.log(4 / 3)])
    # Squared: (1/2, 1/2) against (1/10, 9/10).
    check(oracle.exact_token_kl(logits, ref_logits, temperature=0.5), [0.5 * math.log(5) + 0.5 * math.log(5 / 9)])
    policy, reference = np.log([[0.5]]), np.log([[0.25]])
    check(oracle.k1(policy, reference), [[LN2]])
    check(oracle.k2(policy, reference), [[LN2**2 / 2]])
    check(oracle.k3(policy, reference), [[0.5 - 1 + LN2]])
    # Squared with token 0: 1/2 and 1/10.
    found = oracle.sampled_token_k3(logits, ref_logits, np.array([0]), temperature=0.5)
    check(found, [0.2 - 1 + math.log(5)])
    check(oracle.future_kl(X, MASK), [[5, 3, 0], [0, 0, 0], [0, 0, 0]])


def test_the_next_coefficient():
    settings = {"target_nats": 6.0, "horizon": 10.0}
    found = [oracle.next_kl_coef(0.2, seq_kl, **settings) for seq_kl in (12.0, 6.0, 5.4, 0.0)]
    check(found, [0.204, 0.2, 0.198, 0.196])


def test_rewards():
    scores = np.array([10.0, 20.0, 30.0])
    check(rewards_oracle.token_rewards(scores, X, MASK, kl_coef=0.5), [[-0.5, -1, 8.5], [18, 0, 0], [0, 0, 0]])
    check(rewards_oracle.exact_kl_token_rewards(scores, X, MASK, kl_coef=0.5), [[-1, -1.5, 10], [20, 0, 0], [0, 0, 0]])


def test_score_moments_and_normalised_scores():
    seen, counts = np.array([1.0, NAN, 3.0]), np.array([True, False, True])
    moments = rewards_oracle.merged_moments(rewards_oracle.first_moments(), seen, counts)
    assert moments == (2, 2, 2)
    # 1, 3, 5, 7: mean 4, squared distances 9 + 1 + 1 + 9.
    assert rewards_oracle.merged_moments(moments, np.array([5.0, 7.0]), np.ones(2, bool)) == (4, 4, 20)
    check(rewards_oracle.normalised_scores(np.array([3.0, 2.0]), moments), [1 / ROOT, 0])
    nobody = rewards_oracle.merged_moments(rewards_oracle.first_moments(), seen, np.zeros(3, bool))
    assert nobody == rewards_oracle.first_moments()


def test_penalties_and_clipped_scores():
    check(rewards_oracle.clipped_scores(np.array([-3.0, 0.5, 2.0]), bound=1.0), [-1, 0.5, 1])
    check(rewards_oracle.missing_eos_penalty(np.array([True, False]), penalty=0.5), [0, 0.5])
    lengths = np.array([0.0, 1, 4, 6, 8, 9])
    check(rewards_oracle.too_short_penalty(lengths, min_tokens=4, penalty=2.0), [2, 1.5, 0, 0, 0, 0])
    found = rewards_oracle.too_long_penalty(lengths, soft_max_tokens=4, max_tokens=8, penalty=2.0)
    check(found, [0, 0, 0, 1, 2, 2])
    check(rewards_oracle.kl_per_token(X, MASK), [[1 / 3, 2 / 3, 1], [4, 0, 0], [0, 0, 0]])


def test_advantages():
    # R is 6 and 4, its mean 5, its variance 1. To go: 6, 5, 3, and 4 held at 4.
    check(rewards_oracle.batch_mean_advantages(X, MASK), [[1, 1, 1], [-1, 0, 0], [0, 0, 0]])
    whitened = np.array([[1, 1, 1], [-1, 0, 0], [0, 0, 0]]) / ROOT
    check(rewards_oracle.whitened_batch_mean_advantages(X, MASK), whitened)
    check(rewards_oracle.leave_one_out_advantages(X, MASK), [[2, 2, 2], [-2, 0, 0], [0, 0, 0]])
    check(rewards_oracle.leave_one_out_advantages(X[:1], MASK[:1]), [[0, 0, 0]])
    check(rewards_oracle.leave_one_out_to_go_advantages(X, MASK), [[2, 1, -1], [-2, 0, 0], [0, 0, 0]])
    check(rewards_oracle.leave_one_out_to_go_advantages(X[:1], MASK[:1]), [[0, 0, 0]])
    check(rewards_oracle.whiten(np.array([1.0, 3.0, NAN]), np.array([True, True, False])), [-1 / ROOT, 1 / ROOT, 0])
    assert not rewards_oracle.whiten(np.full(7, 1e8 / 3), np.ones(7, bool)).any()


def test_groups():
    """R is 6 and 4 in one group, 10 and 30 in the other."""
    rewards_ = np.concatenate([X[:2], [[10, NAN, NAN], [30, NAN, NAN]]])
    mask = MASK[[0, 1, 1, 1]]
    options = {"answers_per_prompt": 2}
    check(rewards_oracle.group_mean_advantages(rewards_, mask, **options)[:, 0], [1, -1, -10, 10])
    normalised = rewards_oracle.group_normalised_advantages(rewards_, mask, **options)
    check(normalised[:, 0], [1 / ROOT, -1 / ROOT, -1 / math.sqrt(1 + 1e-10), 1 / math.sqrt(1 + 1e-10)])
    check(rewards_oracle.group_leave_one_out_advantages(rewards_, mask, **options)[:, 0], [2, -2, -20, 20])
    to_go = rewards_oracle.group_leave_one_out_to_go_advantages(rewards_, mask, **options)
    check(to_go, [[2, 1, -1], [-2, 0, 0], [-20, 0, 0], [20, 0, 0]])


def test_importance_weights_and_explained_variance():
    old, behaviour = np.log([[0.5, 0.5, 0.1]]), np.log([[0.25, 1.0, 0.1]])
    everywhere = np.ones((1, 3), bool)
    check(rewards_oracle.importance_weights(old, behaviour, everywhere, cap=1.5), [[1.5, 0.5, 1]])
    values, returns = np.array([[1.0, 1.0, NAN]]), np.array([[0.0, 2.0, NAN]])
    kept = np.array([[True, True, False]])
    assert rewards_oracle.explained_variance(values, returns, kept) == 0
    assert rewards_oracle.explained_variance(returns / 2, returns, kept) == 0.75
    assert rewards_oracle.explained_variance(returns, values, kept) == 0


def test_gae():
    """δ = 1 + 2/2 − 4, 2 + 2/2 − 2, 3 − 2 = −2, 1, 1; with γλ = 1/4: A = −2 + 1.25/4, 1 + 1/4, 1."""
    values = np.array([[4, 2, 2], [8, NAN, NAN], [NAN, NAN, NAN]])
    found, returns = rewards_oracle.gae_advantages(X, values, MASK, discount=0.5, gae_lambda=0.5)
    check(found, [[-1.6875, 1.25, 1], [-4, 0, 0], [0, 0, 0]])
    check(returns, [[2.3125, 3.25, 3], [4, 0, 0], [0, 0, 0]])
    # A value of 8 behind the first answer adds 4 to its last δ, and a quarter of what the next has to each before.
    factors = {"discount": 0.5, "gae_lambda": 0.5, "bootstrap_values": np.array([8.0, 0.0, NAN])}
    found, returns = rewards_oracle.gae_advantages(X, values, MASK, **factors)
    check(found, [[-1.4375, 2.25, 5], [-4, 0, 0], [0, 0, 0]])
    whitened, same = rewards_oracle.whitened_gae_advantages(X, values, MASK, **factors)
    check(whitened, rewards_oracle.whiten(found, MASK))
    check(same, returns)


def test_losses():
    ratios, advantage = np.array([1.5, 1.5, 0.5, 0.5, 1.1]), np.array([2.0, -2.0, 2.0, -2.0, 2.0])
    inputs = (np.log(ratios), np.zeros(5), advantage)
    check(losses_oracle.clipped_policy_loss(*inputs, clip_eps=0.2), [-2.4, 3.0, -1.0, 1.6, -2.2])
    assert losses_oracle.clipping_acts(*inputs, clip_eps=0.2).tolist() == [True, False, False, True, False]
    # The bound of a ratio that is too high is 1.4; a bad token's loss ends at 1.25 times what it lost.
    wide = {"clip_eps": 0.2, "clip_eps_high": 0.4}
    check(losses_oracle.clipped_policy_loss(*inputs, **wide), [-2.8, 3.0, -1.0, 1.6, -2.2])
    check(losses_oracle.dual_clipped_policy_loss(*inputs, **wide, dual_clip=1.25), [-2.8, 2.5, -1.0, 1.6, -2.2])
    acts = losses_oracle.clipping_acts(*inputs, clip_eps=0.2, clip_eps_high=0.6, dual_clip=1.25)
    assert acts.tolist() == [False, True, False, True, False]
    # The value moved from 1 to 3, clipped to 2.
    value, old, target = np.array([3.0, 3.0]), np.array([1.0, 1.0]), np.array([0.0, 4.0])
    check(losses_oracle.clipped_value_loss(value, old, target, clip_eps=1.0), [9 / 2, 4 / 2])
    check(losses_oracle.clipped_value_loss(value, old, target, clip_eps=math.inf), [9 / 2, 1 / 2])


def test_weights():
    constant, token_mean = (
        losses_oracle.constant_weights(MASK, max_response_tokens=4),
        losses_oracle.token_mean_weights(MASK),
    )
    check(constant, MASK / 12)
    check(token_mean, MASK / 4)
    check(losses_oracle.sequence_mean_weights(MASK), [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0], [0, 0, 0]])
    check([losses_oracle.weighted_sum(X, constant), losses_oracle.weighted_sum(X, token_mean)], [10 / 12, 10 / 4])


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [(1.0, 0, 4), (1.0, 2, 2), (1.0, 3, 4), (0.45, 0, 1), (0.6, 0, 2), (0.6, 2, 1), (0.0, 0, 1), (0.8, 0, 4)],
)
def test_truncation(top_p, top_k, kept):
    """The last two of 1/2, 1/4, 1/8, 1/8 come together; of the best two, 3/4, the first is more than 0.6."""
    weights = np.array([[0.5, 0.25, 0.125, 0.125]])
    found = oracle.truncated_weights(np.log(weights), temperature=1.0, top_p=top_p, top_k=top_k)
    check(found, weights * (np.arange(4) < kept))


def test_the_token_of_a_uniform():
    weights = np.array([[0.25, 0, 0.5]] * 4)
    # Edges are at 1/4 of 3/4; a uniform on an edge belongs to the token behind it.
    assert oracle.inverse_cdf(np.array([0.0, 0.3, 0.34, 0.99]), weights).tolist() == [0, 0, 2, 2]
    assert oracle.inverse_cdf(np.array([0.25]), np.array([[0.25, 0.25, 0.5]])).tolist() == [1]


@pytest.mark.parametrize("module", [advantages, kl, losses, rewards], ids=lambda module: module.__name__)
def test_every_formula_has_an_oracle_of_the_same_arguments(module):
    own = [f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    formulas = [f for f in own if not f.__name__.startswith("_")]
    assert formulas
    for formula in formulas:
        parameters = [x for x in inspect.signature(formula).parameters.values() if x.name != "dtype"]
        expected = [x.name for x in parameters if x.kind != x.VAR_KEYWORD]
        found = list(inspect.signature(getattr(operations.ORACLE, formula.__name__)).parameters)
        # What a formula hands on as it is, the oracle spells out.
        assert found == expected or (len(expected) < len(parameters) and found[: len(expected)] == expected)


# ---------------------------------------------------------------------------- primitives


def test_norms():
    x, gain = np.array([1.0, -7.0, 1.0, 7.0]), np.array([1.0, 2.0, 3.0, 4.0])
    check(oracle_layers.rms_norm(x, gain, eps=0.0), np.array([1, -14, 3, 28]) / 5)
    check(oracle_layers.rms_norm(np.zeros(4), gain, eps=1e-3), 0)
    # Less its mean of 3 it is −1, −1, 1, 1.
    found = oracle_layers.layer_norm(np.array([2.0, 2.0, 4.0, 4.0]), gain, np.ones(4), eps=3.0)
    check(found, [0.5, 0, 2.5, 3])


def test_activations():
    found = {name: [f(-2.0), f(0.0), f(2.0)] for name, f in oracle_layers.ACTIVATIONS.items()}
    logistic, normal = 0.8807970779778823, 0.9772498680518208  # of 2
    check(found["silu"], [-2 * (1 - logistic), 0, 2 * logistic])
    check(found["relu"], [0, 0, 2])
    check(found["gelu"], [-2 * (1 - normal), 0, 2 * normal])
    assert 5e-5 < found["gelu_tanh"][2] - found["gelu"][2] < 5e-4  # near, but another function


def test_a_rotation():
    """A quarter turn takes (1, 0) to (0, 1); the second pair turns a third as fast, the last channel not at all."""
    quarter, turned = math.pi / 6, math.pi / 3
    found = oracle_layers.rotate(np.array([1.0, 3.0, 0.0, 0.0, 9.0]), 3, [quarter, turned / 3], 2.0)
    check(found, [0, 3, 2, 3 * math.sqrt(3), 9])


def test_attention():
    keys, values = np.array([[1.0, 0.0], [0.0, 5.0]]), np.array([[3.0, 0.0], [0.0, 6.0]])
    query = np.array([LN2, 0.0])
    check(oracle_layers.attend(query, keys, values, scale=1.0, softcap=None), [2, 2])
    # tanh(ln 2 / 2) is 1/3, so the odds are those of e to the power of 2/3.
    odds = math.exp(2 / 3)
    check(oracle_layers.attend(query, keys, values, scale=1.0, softcap=2.0), [3 * odds / (1 + odds), 6 / (1 + odds)])


# ---------------------------------------------------------------------------- both wrong alike


RIGHT = {
    (stack, name): getattr(stack, name)
    for module, name in ((logprobs, "entropy"), (kl, "exact_token_kl"), (rewards, "token_rewards"))
    for stack in (module, torch_ops)
} | {(stack, "attend"): stack.attend for stack in (layers, torch_layers)}
TWIN = {layers: torch_layers}  # of all others it is `ops`


def right(x, module, name):
    """The unbroken function of the stack that an array belongs to."""
    return RIGHT[torch_ops if isinstance(x, torch.Tensor) else module, name]


def bits(logits, *, temperature):
    return right(logits, logprobs, "entropy")(logits, temperature=temperature) / LN2


def reversed_kl(logits, ref_logits, *, temperature):
    return right(logits, kl, "exact_token_kl")(ref_logits, logits, temperature=temperature)


def rewarded_kl(seq_scores, token_k1, response_mask, *, kl_coef):
    return right(token_k1, rewards, "token_rewards")(seq_scores, token_k1, response_mask, kl_coef=-kl_coef)


def ddof_1(x, mask):
    stack = torch_ops if isinstance(x, torch.Tensor) else masking
    n = stack.masked_count(mask, dtype=x.dtype).clip(2)
    return stack.masked_mean(stack.masked_center(x, mask) ** 2, mask) * n / (n - 1)


def optimistic(policy, old, advantage, *, clip_eps, clip_eps_high=None):
    stack = torch if isinstance(policy, torch.Tensor) else jnp
    ratio = stack.exp(policy - old)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    return -stack.maximum(ratio * advantage, stack.clip(ratio, 1 - clip_eps, 1 + high) * advantage)


# What divides by a standard deviation.
DIVIDED = ("whitened", "whitened batch mean", "normalised, groups of 2", "normalised, groups of 3", "whitened GAE")


def unscaled(*inputs, scale, softcap):
    stack = torch_layers if isinstance(inputs[0], torch.Tensor) else layers
    return RIGHT[stack, "attend"](*inputs, scale=1.0, softcap=softcap)


ALIKE = {
    "no scale of the scores": (layers, "attend", unscaled, primitives.primitives),
    "entropy in bits": (logprobs, "entropy", bits, operations.log_probs),
    "reversed KL": (kl, "exact_token_kl", reversed_kl, operations.divergences),
    "KL of the wrong sign": (rewards, "token_rewards", rewarded_kl, credit.score),
    "ddof 1": (masking, "masked_var", ddof_1, credit.advantage),
    "clipping of the wrong sign": (losses, "clipped_policy_loss", optimistic, operations.loss),
}


def patch(monkeypatch, module, name, mutant):
    monkeypatch.setattr(module, name, functools.wraps(getattr(module, name))(mutant))


@pytest.mark.parametrize("name", ALIKE)
def test_only_the_oracle_sees_what_both_stacks_do_wrong(monkeypatch, name):
    module, function, mutant, level = ALIKE[name]
    for stack in (module, TWIN.get(module, torch_ops)):
        patch(monkeypatch, stack, function, mutant)
    red = [row for row in level("float32") if row.diverged is not None]
    assert red
    assert all(row.compared.endswith(", oracle") for row in red)


@pytest.mark.parametrize("stack", ["jax", "torch"])
def test_a_bug_of_one_stack_is_red_between_the_stacks_and_against_the_oracle(monkeypatch, stack):
    patch(monkeypatch, {"jax": masking, "torch": torch_ops}[stack], "masked_var", ddof_1)
    red = {row.compared: row for row in credit.advantage("float32") if row.diverged is not None}
    assert set(red) == {f"{name}{against}" for name in DIVIDED for against in ("", ", oracle")}
    assert red["whitened, oracle"].diverged == f"whiten, {stack}"


def test_a_wrong_oracle_is_at_odds_with_both_stacks(monkeypatch):
    patch(monkeypatch, oracle, "masked_var", lambda x, mask: 1.1 * float(np.var(x[mask])))
    red = {row.compared: row for row in credit.advantage("float32") if row.diverged is not None}
    assert set(red) == {f"{name}, oracle" for name in DIVIDED}


@pytest.fixture
def in_float64():
    """Nothing that was compiled before a bug was planted, and nothing of it behind."""
    jax.clear_caches()
    with jax.enable_x64(True):
        yield
    jax.clear_caches()


def detached_kl(logits, ref_logits, *, temperature):
    """The right value and no gradient."""
    fixed = logits.detach() if isinstance(logits, torch.Tensor) else jax.lax.stop_gradient(logits)
    return right(logits, kl, "exact_token_kl")(fixed, ref_logits, temperature=temperature)


def test_only_differences_see_a_term_that_both_stacks_forget_to_differentiate(tmp_path, monkeypatch, in_float64):
    for stack in (kl, torch_ops):
        patch(monkeypatch, stack, "exact_token_kl", detached_kl)
    pair = Pair(random_model("llama-tied", tmp_path), "float64")
    (_, ours), (_, theirs) = finite_differences.backward(pair, EVERY_TERM)
    assert max(np.abs(ours[name] - theirs[name]).max() for name in theirs) < 1e-12
    rows = list(finite_differences.gradients(pair))
    assert {row.compared for row in rows if row.diverged is not None} == {
        "JAX gradients and differences",
        "torch gradients and differences",
    }
