"""An outside PPO: the numbers of TRL 1.12.0 are ours, or differ from ours by an equation that is written here.

TRL's masked reductions and log-probs are functions. Its rewards, its GAE and its losses are lines of
`PPOTrainer.train`: those very lines are taken from the installed source by their place in its syntax tree, and run.
"""

import ast
import inspect
import textwrap
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity.operations import call_all
from ppo_jax.ops import advantages, kl, logprobs, losses, masking, rewards
from ppo_torch_ref import ops as torch_ops

LENGTHS = np.array([7, 1, 3, 5])  # the first answer fills its row
T = 7
MASK = np.arange(T)[None] < LENGTHS[:, None]
# TRL lets an answer that ended before the row's end have one position more, its first pad.
MASK_P1 = np.arange(T)[None] < LENGTHS[:, None] + 1
SETTINGS = SimpleNamespace(
    gamma=0.9, lam=0.8, cliprange=0.2, cliprange_value=0.3, kl_coef=0.1, kl_estimator="k1", whiten_rewards=False
)
EPS = 1e-8
# TRL divides two integer tensors here, which makes n / (n − 1) a float32 in float64 too.
BESSEL = float(np.float32(MASK.sum()) / np.float32(MASK.sum() - 1))


@pytest.fixture(scope="module")
def trl():
    """TRL's PPO module; importing it warns that its interface may change."""
    pytest.importorskip("trl", reason="pip install '.[trl]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.ppo import ppo_trainer
    return ppo_trainer


@pytest.fixture(scope="module", autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def assigned(statement: ast.stmt) -> set[str]:
    """Names that a statement binds or writes into."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    names = [node for target in targets if target is not None for node in ast.walk(target)]
    return {node.id for node in names if isinstance(node, ast.Name)} if not isinstance(statement, ast.For) else set()


def run_lines(module: Any, first: str, last: str, **variables: Any) -> SimpleNamespace:
    """Variables after the statements of `PPOTrainer.train` from the one that assigns `first` to the one for `last`."""
    train = ast.parse(textwrap.dedent(inspect.getsource(module.PPOTrainer.train)))
    bodies = (
        node.body for node in ast.walk(train) if isinstance(getattr(node, "body", None), list)
    )  # outer ones first
    body = next(body for body in bodies if any(first in assigned(statement) for statement in body))
    start = next(i for i, statement in enumerate(body) if first in assigned(statement))
    stop = max(i for i, statement in enumerate(body) if last in assigned(statement))
    names = vars(module) | {"args": SETTINGS} | variables
    exec(compile(ast.Module(body[start : stop + 1], []), inspect.getfile(module), "exec"), names)
    return SimpleNamespace(**{name: names[name] for name in names if not name.startswith("__")})


def draw(*shapes: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [scale * rng.normal(size=shape) for shape in shapes]


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(x.copy()) for x in arrays]


def everywhere(expected: Any, function: Any, *inputs: np.ndarray, at: Any = ..., **fixed: Any) -> None:
    """Both stacks and the oracle say `expected`, in float64; of several results, each of them."""
    parts = expected if isinstance(expected, tuple) else (expected,)
    for stack, results in vars(call_all("float64", function, *inputs, **fixed)).items():
        for found, wanted in zip(results.values(), parts, strict=True):
            np.testing.assert_allclose(found[at], np.asarray(wanted)[at], rtol=0, atol=1e-12, err_msg=stack)


# ---------------------------------------------------------------------------- reductions


def test_masked_means_are_the_same_but_for_an_empty_mask_and_a_masked_nan(trl):
    (x,), nothing = draw(MASK.shape), np.zeros_like(MASK)
    everywhere(trl.masked_mean(*tensors(x, MASK)), masking.masked_mean, x, MASK)
    assert torch.isnan(trl.masked_mean(*tensors(x, nothing)))
    everywhere(0.0, masking.masked_mean, x, nothing)
    with_nan = np.where(MASK, x, np.nan)
    assert torch.isnan(trl.masked_mean(*tensors(with_nan, MASK)))
    everywhere(trl.masked_mean(*tensors(x, MASK)), masking.masked_mean, with_nan, MASK)


def test_its_variance_is_ours_times_n_over_n_minus_one(trl):
    (x,) = draw(MASK.shape)
    everywhere(trl.masked_var(*tensors(x, MASK), unbiased=False), masking.masked_var, x, MASK)
    everywhere(trl.masked_var(*tensors(x, MASK)) / BESSEL, masking.masked_var, x, MASK)


def test_of_a_single_element_its_variance_is_nan_and_ours_0(trl):
    (x,), one = draw(MASK.shape), np.arange(MASK.size).reshape(MASK.shape) == 3
    assert torch.isnan(trl.masked_var(*tensors(x, one)))
    everywhere(0.0, masking.masked_var, x, one)


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["far above epsilon", "as small as epsilon"])
def test_its_whitening_is_ours_times_the_root_of_the_two_variances(trl, scale):
    """sqrt((var + 1e-8) / (var n / (n − 1) + 1e-8)): 1e-8 is inside of both; a variance of that size would show."""
    (x,) = draw(MASK.shape, scale=scale)
    variance, mean = x[MASK].var(), x[MASK].mean()
    factor = np.sqrt((variance + EPS) / (variance * BESSEL + EPS))
    theirs = trl.masked_whiten(*tensors(x, MASK)).numpy()
    everywhere(theirs / factor, advantages.whiten, x, MASK, at=MASK)
    everywhere(np.zeros(MASK.shape), advantages.whiten, x, MASK, at=~MASK)  # theirs go on behind the mask
    assert np.abs(theirs[~MASK]).min() > 0
    unshifted = trl.masked_whiten(*tensors(x, MASK), shift_mean=False).numpy()
    everywhere((unshifted - mean) / factor, advantages.whiten, x, MASK, at=MASK)


# ---------------------------------------------------------------------------- log-probs, KL, rewards


def test_its_log_probs_are_ours_at_a_temperature_higher_by_1e_7(trl):
    (logits,), tokens = draw((6, 11), scale=3.0), np.arange(6)
    temperature = 0.7 + 1e-7
    theirs = trl.selective_log_softmax(*tensors(logits / temperature, tokens))
    everywhere(theirs, logprobs.token_logprobs, logits, tokens, temperature=temperature)


def experience(trl, **settings: Any) -> SimpleNamespace:
    """TRL's steps 4 to 6, from log-probs and scores to advantages and returns before whitening."""
    old, ref, values = draw(*[MASK.shape] * 3)
    (scores,) = draw((len(MASK),), seed=1)
    names = ("logprobs", "ref_logprobs", "values", "scores", "sequence_lengths")
    given = dict(zip(names, tensors(old, ref, values, scores, LENGTHS - 1), strict=True))
    given |= {"responses": torch.zeros(MASK.shape), "args": SimpleNamespace(**vars(SETTINGS) | settings)}
    found = run_lines(trl, "response_idxs", "returns", **given)
    np.testing.assert_array_equal(~found.padding_mask, MASK)
    np.testing.assert_array_equal(~found.padding_mask_p1, MASK_P1)
    return SimpleNamespace(**vars(found) | {"old": old, "ref": ref, "own_values": values, "own_scores": scores})


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_its_kl_estimators_are_ours(trl, name):
    found = experience(trl, kl_estimator=name)
    everywhere(found.kl, getattr(kl, name), found.old, found.ref, at=MASK)


def test_its_rewards_are_ours_of_answers_that_have_their_first_pad_too(trl):
    """There the score sits on the pad behind the last token; only an answer that fills its row has it on its last."""
    found = experience(trl)
    token_k1 = np.where(MASK, found.old - found.ref, 0.0)
    everywhere(found.rewards, rewards.token_rewards, found.own_scores, token_k1, MASK_P1, kl_coef=SETTINGS.kl_coef)


# ---------------------------------------------------------------------------- GAE


def test_its_gae_is_ours_on_the_same_rewards_and_values(trl):
    token_rewards, values = (np.where(MASK, x, 0.0) for x in draw(*[MASK.shape] * 2))
    r, v = tensors(token_rewards, values)
    found = run_lines(trl, "lastgaelam", "returns", rewards=r, values=v, responses=r)
    everywhere(
        (np.where(MASK, found.advantages, 0), np.where(MASK, found.returns, 0)),
        advantages.gae_advantages,
        *(token_rewards, values, MASK),
        discount=SETTINGS.gamma,
        gae_lambda=SETTINGS.lam,
    )


def test_a_score_on_the_pad_changes_gae_by_this_much(trl):
    """With s on the pad behind the last token, position L, and the value V_L that it reads there:

    A'_t − A_t = (γλ)^(L−1−t) (γ V_L + γλ (s − V_L) − s),   0 for an answer that fills its row.
    """
    found, discount, decay = experience(trl), SETTINGS.gamma, SETTINGS.gamma * SETTINGS.lam
    token_k1 = np.where(MASK, found.old - found.ref, 0.0)
    token_rewards = call_all(
        "float64", rewards.token_rewards, found.own_scores, token_k1, MASK, kl_coef=SETTINGS.kl_coef
    )
    moved = np.zeros(MASK.shape)
    for b, length in enumerate(LENGTHS):
        if length < T:
            score, value = found.own_scores[b], found.own_values[b, length]
            for t in range(length):
                moved[b, t] = decay ** (length - 1 - t) * (discount * value + decay * (score - value) - score)
    assert np.abs(moved).max() > 0.1
    wanted = found.advantages.numpy() - moved
    everywhere(
        (wanted, wanted + found.own_values),
        advantages.gae_advantages,
        *(token_rewards.oracle["token_rewards"], found.own_values, MASK),
        at=MASK,
        discount=discount,
        gae_lambda=SETTINGS.lam,
    )


# ---------------------------------------------------------------------------- losses


def gradients_of(jax_loss: Any, torch_loss: Any, *inputs: np.ndarray, weights: np.ndarray, clip_eps: float) -> dict:
    """Gradient of Σ w ℓ in the first input, by stack."""

    def reduced(x, *rest):
        return losses.weighted_sum(jax_loss(x, *rest, clip_eps=clip_eps), jnp.asarray(weights))

    x, *rest = tensors(*inputs)
    x.requires_grad_()
    torch_ops.weighted_sum(torch_loss(x, *rest, clip_eps=clip_eps), *tensors(weights)).backward()
    return {"JAX": jax.grad(reduced)(*map(jnp.asarray, inputs)), "torch": x.grad}


def test_its_policy_loss_is_ours_with_token_means(trl):
    new, old, advantage = draw(*[MASK.shape] * 3, scale=0.5)
    new_logprobs, mb_logprobs, mb_advantage = tensors(*(np.where(MASK, x, 0.0) for x in (new, old, advantage)))
    new_logprobs.requires_grad_()
    given = {"new_logprobs": new_logprobs, "mb_logprobs": mb_logprobs, "mb_advantage": mb_advantage}
    given |= {"padding_mask": torch.from_numpy(~MASK), "micro_batch_inds": slice(None)}
    found = run_lines(trl, "logprobs_diff", "pg_loss", **given)
    found.pg_loss.backward()
    inputs, eps = (new, old, advantage), SETTINGS.cliprange
    everywhere(found.pg_loss_max.detach(), losses.clipped_policy_loss, *inputs, at=MASK, clip_eps=eps)
    everywhere(found.pg_losses2 > found.pg_losses, losses.clipping_acts, *inputs, at=MASK, clip_eps=eps)
    assert 0 < (found.pg_losses2 > found.pg_losses).sum() < MASK.sum()
    weights = MASK / MASK.sum()
    everywhere(found.pg_loss.detach(), losses.weighted_sum, found.pg_loss_max.detach().numpy(), weights)
    for stack, gradient in gradients_of(
        losses.clipped_policy_loss, torch_ops.clipped_policy_loss, *inputs, weights=weights, clip_eps=eps
    ).items():
        np.testing.assert_allclose(gradient, new_logprobs.grad, rtol=0, atol=1e-12, err_msg=stack)


def test_its_approximate_kl_is_the_masked_mean_of_k2_times_the_share_of_real_tokens(trl):
    new, old = draw(*[MASK.shape] * 2, scale=0.5)
    found = run_lines(trl, "approxkl", "approxkl", logprobs_diff=torch.from_numpy(np.where(MASK, new - old, 0.0)))
    everywhere(found.approxkl / MASK.mean(), masking.masked_mean, (new - old) ** 2 / 2, MASK)


def test_its_value_loss_is_ours_with_token_means_of_answers_that_have_their_first_pad_too(trl):
    value, old, target = draw(*[MASK.shape] * 3)
    vpred, mb_values, mb_return = tensors(*(np.where(MASK_P1, x, 0.0) for x in (value, old, target)))
    vpred.requires_grad_()
    given = {"vpred": vpred, "mb_values": mb_values, "mb_return": mb_return}
    given |= {"padding_mask_p1": torch.from_numpy(~MASK_P1), "micro_batch_inds": slice(None)}
    found = run_lines(trl, "vpredclipped", "vf_loss", **given)
    found.vf_loss.backward()
    inputs, eps = (value, old, target), SETTINGS.cliprange_value
    per_token = found.vf_loss_max.detach().numpy() / 2  # TRL halves after the mean
    everywhere(per_token, losses.clipped_value_loss, *inputs, at=MASK_P1, clip_eps=eps)
    assert bool((found.vf_losses2 > found.vf_losses1).any())
    weights = MASK_P1 / MASK_P1.sum()
    everywhere(found.vf_loss.detach(), losses.weighted_sum, per_token, weights)
    for stack, gradient in gradients_of(
        losses.clipped_value_loss, torch_ops.clipped_value_loss, *inputs, weights=weights, clip_eps=eps
    ).items():
        np.testing.assert_allclose(gradient, vpred.grad, rtol=0, atol=1e-12, err_msg=stack)
