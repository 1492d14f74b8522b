"""Single formulas, on a table of logits: one row of them for every unfinished beginning of an answer.

A table can be any policy at all, and what is exact for it is, by the chain rule, exact for every model. Each formula is
a loss per token [N, T] of every answer; weighted with the frozen probability of its answer, its gradient is the
expected gradient of that loss under sampling. Part A compares it with the gradient of the KL of whole answers, part B
with that of the expected score, part G with that of a sum over the visited states, the visits held constant.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from parity.truth import objectives
from parity.truth.claims import FLOOR, Row, relative_error, row_of
from parity.truth.enumeration import CLIP_EPS, TEMPERATURE, VOCAB_SIZE, Answers, all_answers
from parity.truth.objectives import Listed, Objective, list_answers
from parity.truth.stacks import Stack, both_stacks


class Case(NamedTuple):
    """What belongs to one random policy besides its table; the baselines are [N, T], with a number everywhere."""

    ref_table: Any  # [states, V]
    another_table: Any  # of a policy that may have drawn the answers
    seq_scores: Any  # [N]
    constant: Any
    of_position: Any
    of_prefix: Any  # random, equal wherever the tokens so far are equal
    of_action: Any  # random, equal wherever the tokens so far and the chosen one are equal
    true_values: Any  # E[s | the tokens so far]


@dataclass(frozen=True)
class Seen:
    """What an estimator may look at."""

    stack: Stack
    case: Case
    mask: Any  # bool [N, T]
    counted: Any  # the same as numbers
    tokens: Any  # int [N, T]
    logits: Any  # [N, T, V]
    ref_logits: Any
    logprobs: Any  # [N, T]
    ref_logprobs: Any
    logprobs_of_another: Any


Estimator = Callable[[Seen], Any]


class Formula(NamedTuple):
    """An estimator and the objective it is held against; where it is claimed to be biased, what its error exceeds."""

    estimator: Estimator
    truth: Objective
    floor: float | None = None


Formulas = dict[str, Formula]


def against(truth: Objective, estimators: dict[str, tuple[Estimator, float | None]]) -> Formulas:
    return {name: Formula(estimator, truth, floor) for name, (estimator, floor) in estimators.items()}


# ---------------------------------------------------------------------------- what the estimators are made of


def policy_loss(seen: Seen, advantages: Any) -> Any:
    """PPO's loss per token at ratio 1."""
    old_logprobs = seen.stack.frozen(seen.logprobs)
    return seen.stack.ops.clipped_policy_loss(seen.logprobs, old_logprobs, advantages, clip_eps=CLIP_EPS)


def divergence(seen: Seen, form: str) -> Any:
    """One of the forms of the KL, [N, T] in nats."""
    if form == "exact":
        return seen.stack.ops.exact_token_kl(seen.logits, seen.ref_logits, temperature=TEMPERATURE)
    return getattr(seen.stack.ops, form)(seen.logprobs, seen.ref_logprobs)


def whole(seen: Seen, token_rewards: Any) -> Any:
    """An answer's whole reward, on each of its tokens."""
    return seen.stack.ops.masked_sum(token_rewards, seen.mask, axis=1)[:, None] * seen.counted


def to_go(seen: Seen, token_rewards: Any) -> Any:
    """The reward from each token on."""
    return generalised(seen, token_rewards, 0.0 * token_rewards, gae_lambda=1.0)


def generalised(seen: Seen, token_rewards: Any, values: Any, *, gae_lambda: float) -> Any:
    advantages, _ = seen.stack.ops.gae_advantages(token_rewards, values, seen.mask, discount=1.0, gae_lambda=gae_lambda)
    return advantages


# ---------------------------------------------------------------------------- A. the gradient of the KL


def in_reward(seen: Seen, *, form: str, spread: Callable[[Seen, Any], Any]) -> Any:
    penalty = seen.stack.frozen(divergence(seen, form))
    no_scores = 0.0 * seen.case.seq_scores
    rewards = seen.stack.ops.token_rewards(no_scores, penalty, seen.mask, kl_coef=1.0)
    return policy_loss(seen, spread(seen, rewards))


def in_loss(seen: Seen, *, form: str) -> Any:
    return divergence(seen, form)


def in_both(seen: Seen, *, own_share: float) -> Any:
    """KL_t in the loss, F_t in the reward; a share of KL_t in the reward is a baseline, for it knows no action."""
    token_kl = divergence(seen, "exact")
    frozen_kl = seen.stack.frozen(token_kl)
    return policy_loss(seen, -seen.stack.ops.future_kl(frozen_kl, seen.mask) - own_share * frozen_kl) + token_kl


def in_both_by_rewards(seen: Seen) -> Any:
    """The same as training has it: F_t is the reward to go of charging each KL to the token before it."""
    token_kl = divergence(seen, "exact")
    rewards = seen.stack.ops.exact_kl_token_rewards(
        0.0 * seen.case.seq_scores, seen.stack.frozen(token_kl), seen.mask, kl_coef=1.0
    )
    return policy_loss(seen, to_go(seen, rewards)) + token_kl


OF_KL = against(
    objectives.seq_kl,
    {
        "k1 in the reward, whole answer": (partial(in_reward, form="k1", spread=whole), None),
        "k1 in the reward, to go": (partial(in_reward, form="k1", spread=to_go), None),
        "exact in the loss, of the future in the reward": (partial(in_both, own_share=0.0), None),
        "the same, its own in the reward too": (partial(in_both, own_share=1.0), None),
        "the same, by the rewards of training": (in_both_by_rewards, None),
        "exact in the reward": (partial(in_reward, form="exact", spread=whole), FLOOR),
        "exact in the loss": (partial(in_loss, form="exact"), FLOOR),
        "k2 in the loss": (partial(in_loss, form="k2"), FLOOR),
        "k3 in the loss": (partial(in_loss, form="k3"), FLOOR),
        "k3 in the reward": (partial(in_reward, form="k3", spread=whole), FLOOR),
        "k1 in the loss": (partial(in_loss, form="k1"), 1 - 1e-12),  # its expectation is zero, which errs by 1
    },
)


# ---------------------------------------------------------------------------- B. the gradient of the expected score


def minus_baseline(seen: Seen, *, baseline: str) -> Any:
    return policy_loss(seen, whole(seen, score_rewards(seen)) - getattr(seen.case, baseline) * seen.counted)


def by_gae(seen: Seen, *, values: str, gae_lambda: float) -> Any:
    advantages = generalised(seen, score_rewards(seen), getattr(seen.case, values), gae_lambda=gae_lambda)
    return policy_loss(seen, advantages)


def drawn_by_another(seen: Seen, *, correction: str) -> Any:
    """The answers come as often as another policy draws them, which `frequency` says of each."""
    log_ratio = seen.stack.frozen(seen.logprobs) - seen.logprobs_of_another
    product = seen.stack.exp(seen.stack.ops.masked_sum(log_ratio, seen.mask, axis=1))[:, None]
    advantages, frequency = whole(seen, score_rewards(seen)), 1 / product
    if correction == "product":
        advantages = product * advantages
    if correction == "per token":
        ratios = (seen.stack.frozen(seen.logprobs), seen.logprobs_of_another, seen.mask)
        advantages = seen.stack.ops.importance_weights(*ratios, cap=1e12) * advantages
    return frequency * policy_loss(seen, advantages)


def score_rewards(seen: Seen) -> Any:
    return seen.stack.ops.token_rewards(seen.case.seq_scores, 0.0 * seen.logprobs, seen.mask, kl_coef=0.0)


OF_SCORE = against(
    objectives.minus_expected_score,
    {
        "no baseline": (lambda seen: policy_loss(seen, whole(seen, score_rewards(seen))), None),
        "no baseline, to go": (lambda seen: policy_loss(seen, to_go(seen, score_rewards(seen))), None),
        "minus a constant": (partial(minus_baseline, baseline="constant"), None),
        "minus a function of the position": (partial(minus_baseline, baseline="of_position"), None),
        "minus a function of the tokens so far": (partial(minus_baseline, baseline="of_prefix"), None),
        "GAE, λ = 1, wrong values": (partial(by_gae, values="of_prefix", gae_lambda=1.0), None),
        "GAE, λ = 0.9, the true values": (partial(by_gae, values="true_values", gae_lambda=0.9), None),
        "GAE, λ = 0.9, wrong values": (partial(by_gae, values="of_prefix", gae_lambda=0.9), FLOOR),
        "minus a function of the chosen token too": (partial(minus_baseline, baseline="of_action"), FLOOR),
        "drawn by another policy": (partial(drawn_by_another, correction="none"), FLOOR),
        "the same, a ratio per token": (partial(drawn_by_another, correction="per token"), FLOOR),
        "the same, the product of an answer's ratios": (partial(drawn_by_another, correction="product"), None),
    },
)


# ---------------------------------------------------------------------------- G. sums over the visited states


def grpo_k3(seen: Seen) -> Any:
    return seen.stack.ops.sampled_token_k3(seen.logits, seen.ref_logits, seen.tokens, temperature=TEMPERATURE)


def entropy(seen: Seen) -> Any:
    return seen.stack.ops.entropy(seen.logits, temperature=TEMPERATURE)


OF_STATES = (
    against(
        objectives.kl_of_states,
        {
            "exact in the loss: KL(π ‖ ρ)": (partial(in_loss, form="exact"), None),
            "k2 in the loss: KL(π ‖ ρ)": (partial(in_loss, form="k2"), None),
            "k3 in the loss: KL(π ‖ ρ)": (grpo_k3, FLOOR),
        },
    )
    | against(objectives.reverse_kl_of_states, {"k3 in the loss: KL(ρ ‖ π)": (grpo_k3, None)})
    | against(objectives.entropy_of_states, {"entropy in the loss: H": (entropy, None)})
    | against(objectives.seq_entropy, {"entropy in the loss: H of whole answers": (entropy, FLOOR)})
)


# ---------------------------------------------------------------------------- expectations


def rows_of(part: str, formulas: Formulas, *, pairs: int, torch_pairs: int) -> Iterator[Row]:
    """One row per formula and stack."""
    answers = all_answers()
    for stack, count in zip(both_stacks(), (pairs, torch_pairs), strict=True):
        cases = [random_case(pair, answers) for pair in range(count)]
        truths = {
            truth: stack.gradient(partial(true_value, stack=stack, answers=answers, truth=truth))
            for truth in {formula.truth for formula in formulas.values()}
        }
        for name, (estimator, truth, floor) in formulas.items():
            found = stack.gradient(partial(expected_loss, stack=stack, answers=answers, estimator=estimator))
            errors = [relative_error(found(*case), truths[truth](*case)) for case in cases]
            yield row_of(part, name, stack.name, errors, floor=floor)


def expected_loss(table: Any, case: Case, *, stack: Stack, answers: Answers, estimator: Estimator) -> Any:
    """Σ_y π(y) Σ_t m_t ℓ_t with π(y) held constant."""
    states, tokens, mask = (stack.array(x) for x in (answers.states, answers.tokens, answers.mask))
    counted = stack.array(answers.mask.astype(np.float64))
    logits, ref_logits, logits_of_another = (x[states] for x in (table, case.ref_table, case.another_table))
    logprobs = (
        stack.ops.token_logprobs(x, tokens, temperature=TEMPERATURE) for x in (logits, ref_logits, logits_of_another)
    )
    seen = Seen(stack, case, mask, counted, tokens, logits, ref_logits, *logprobs)
    probabilities = stack.frozen(stack.exp(_listed(table, case, stack, answers).log_p))
    return stack.ops.weighted_sum(estimator(seen), probabilities[:, None] * counted)


def true_value(table: Any, case: Case, *, stack: Stack, answers: Answers, truth: Objective) -> Any:
    return truth(_listed(table, case, stack, answers), case.seq_scores)


def _listed(table: Any, case: Case, stack: Stack, answers: Answers) -> Listed:
    """Log-probabilities, written out."""
    states, one_hot = stack.array(answers.states), stack.array(answers.one_hot)
    logits = (x[states] / TEMPERATURE for x in (table, case.ref_table))
    token_log_p, token_log_q = (x - stack.log(stack.exp(x).sum(-1))[..., None] for x in logits)
    return list_answers(stack.exp, stack.frozen, token_log_p, token_log_q, one_hot)


def random_case(pair: int, answers: Answers) -> tuple[np.ndarray, Case]:
    """A policy's table, and what goes with it."""
    rng = np.random.default_rng(pair)
    states = answers.states
    table, ref_table = rng.normal(size=(2, states.max() + 1, VOCAB_SIZE))
    seq_scores = rng.normal(size=len(states))
    return table, Case(
        ref_table=ref_table,
        another_table=np.random.default_rng(1000 + pair).normal(size=table.shape),
        seq_scores=seq_scores,
        constant=np.full(states.shape, rng.normal()),
        of_position=np.broadcast_to(rng.normal(size=states.shape[1]), states.shape).copy(),
        of_prefix=rng.normal(size=len(table))[states],
        of_action=rng.normal(size=table.shape)[states, answers.tokens],
        true_values=_true_values(table, seq_scores, answers),
    )


def _true_values(table: np.ndarray, seq_scores: np.ndarray, answers: Answers) -> np.ndarray:
    """E[s | the tokens so far] [N, T]: the mean over the answers that begin so, by their probability."""
    counted = answers.one_hot.sum(-1)
    token_probs = np.exp(table / TEMPERATURE) / np.exp(table / TEMPERATURE).sum(-1, keepdims=True)
    picked = np.where(counted > 0, token_probs[answers.states, answers.tokens], 1.0)
    weights = picked.prod(1)[:, None] * counted
    mass, of_score = (np.bincount(answers.states.ravel(), (weights * x).ravel()) for x in (1.0, seq_scores[:, None]))
    return (of_score / mass)[answers.states]
