"""The true objectives, sums over every answer, to be differentiated by the caller's stack.

They see nothing of the code under test: log-probabilities are picked by `Answers.one_hot`, lengths are counted by it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from parity.truth.enumeration import LENGTH

KL_COEF, ENTROPY_COEF = 0.7, 0.4


class Listed(NamedTuple):
    """All N answers, as the policy that is differentiated and the reference say them, in one stack."""

    exp: Callable[[Any], Any]
    frozen: Callable[[Any], Any]  # the same number without a gradient
    token_log_p: Any  # log π of every token behind every beginning [N, T, V]
    token_log_q: Any  # the reference's
    visited: Any  # 1 on the tokens of an answer [N, T], 0 behind its end
    log_p: Any  # log π(y) [N]
    log_q: Any

    @property
    def lengths(self) -> Any:
        return self.visited.sum(1)

    @property
    def visits(self) -> Any:
        """How often a state is visited, held constant: π(y) at every token of y, [N, T]."""
        return self.frozen(self.exp(self.log_p))[:, None] * self.visited


def list_answers(exp: Any, frozen: Any, token_log_p: Any, token_log_q: Any, one_hot: Any) -> Listed:
    log_p, log_q = ((x * one_hot).sum((1, 2)) for x in (token_log_p, token_log_q))
    return Listed(exp, frozen, token_log_p, token_log_q, one_hot.sum(2), log_p, log_q)


Objective = Callable[[Listed, Any], Any]  # the second argument: constants [N], one to an answer


# ---------------------------------------------------------------------------- of whole answers


def minus_expected_score(listed: Listed, seq_scores: Any) -> Any:
    """−E[s] = −Σ_y π(y) s(y)."""
    return -(listed.exp(listed.log_p) * seq_scores).sum()


def minus_weighted_answers(listed: Listed, coefficients: Any) -> Any:
    """−Σ_y π(y) c(y) with c held constant: the gradient that raises answer y by its weight c(y)."""
    return minus_expected_score(listed, coefficients)


def seq_kl(listed: Listed, _: Any = None) -> Any:
    """KL(π ‖ ρ) of whole answers, Σ_y π(y) log(π(y) / ρ(y)), in nats: E[Σ_t KL_t] by the chain rule."""
    return (listed.exp(listed.log_p) * (listed.log_p - listed.log_q)).sum()


def seq_entropy(listed: Listed, _: Any = None) -> Any:
    """−Σ_y π(y) log π(y), in nats: E[Σ_t H_t] by the chain rule."""
    return -(listed.exp(listed.log_p) * listed.log_p).sum()


def kl_per_token(listed: Listed, _: Any = None) -> Any:
    """E[log(π(y) / ρ(y)) / L(y)]: the mean over answers of their mean k1 per token."""
    return (listed.exp(listed.log_p) * (listed.log_p - listed.log_q) / listed.lengths).sum()


def kl_per_token_less_a_bonus(listed: Listed, _: Any = None) -> Any:
    """The same minus E[1 / L(y)], which short answers raise.

    E[k/L] has the gradient E[∇log π · k/L] + E[∇log π(y) / L(y)]. A reward is held constant, so that only the first
    term comes of it; the second is ∇E[1/L], and not 0 as it would be for one length.
    """
    return kl_per_token(listed) - (listed.exp(listed.log_p) / listed.lengths).sum()


# ---------------------------------------------------------------------------- of the states as they are visited


def kl_of_states(listed: Listed, _: Any = None) -> Any:
    """E[Σ_t KL(π ‖ ρ)_t] with the visits held constant: what the choice does to later states is not in its gradient."""
    kl = (listed.exp(listed.token_log_p) * (listed.token_log_p - listed.token_log_q)).sum(2)
    return (listed.visits * kl).sum()


def reverse_kl_of_states(listed: Listed, _: Any = None) -> Any:
    """E[Σ_t KL(ρ ‖ π)_t], the other way round, with the visits held constant."""
    kl = (listed.exp(listed.token_log_q) * (listed.token_log_q - listed.token_log_p)).sum(2)
    return (listed.visits * kl).sum()


def entropy_of_states(listed: Listed, _: Any = None) -> Any:
    """E[Σ_t H_t] with the visits held constant."""
    entropy = -(listed.exp(listed.token_log_p) * listed.token_log_p).sum(2)
    return (listed.visits * entropy).sum()


# ---------------------------------------------------------------------------- of a whole recipe


def minus_objective(listed: Listed, seq_scores: Any, *, penalty: Objective = seq_kl) -> Any:
    """(−E[s] + β KL) / `LENGTH`: the constant normaliser divides by the longest length."""
    return (minus_expected_score(listed, seq_scores) + KL_COEF * penalty(listed, None)) / LENGTH


def with_entropy(listed: Listed, seq_scores: Any) -> Any:
    return minus_objective(listed, seq_scores) - ENTROPY_COEF * seq_entropy(listed) / LENGTH


def with_entropy_of_states(listed: Listed, seq_scores: Any) -> Any:
    return minus_objective(listed, seq_scores) - ENTROPY_COEF * entropy_of_states(listed) / LENGTH


def with_reverse_kl_of_states(listed: Listed, seq_scores: Any) -> Any:
    return minus_objective(listed, seq_scores, penalty=reverse_kl_of_states)


def with_kl_per_token(listed: Listed, seq_scores: Any) -> Any:
    return minus_objective(listed, seq_scores, penalty=kl_per_token)


def with_kl_per_token_less_a_bonus(listed: Listed, seq_scores: Any) -> Any:
    return minus_objective(listed, seq_scores, penalty=kl_per_token_less_a_bonus)


def token_logprobs(listed: Listed, one_hot: Any) -> Any:
    """log π of every token of every answer [N, T], 0 behind its end."""
    return (listed.token_log_p * one_hot).sum(2)
