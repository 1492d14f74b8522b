"""The losses of a reward model on pairs of answers, one of which was preferred: per pair and unreduced."""

import jax
from jaxtyping import Array, Float


def bradley_terry_loss(
    chosen_scores: Float[Array, " B"], rejected_scores: Float[Array, " B"], margins: Float[Array, " B"]
) -> Float[Array, " B"]:
    """ℓ_b = −log σ(s⁺_b − s⁻_b − m_b): the negative log-likelihood of the preference, where m = 0.

    Shapes [B], scores and margins in units of the score, the loss in nats. Equal scores have ln 2; a number added to
    both scores of a pair changes nothing, so the loss does not say where 0 is (`centring_loss` does). A margin m > 0
    asks for a lead of m, and σ(s⁺ − s⁻) is then no longer the probability of the preference. Computed as softplus: a
    pair that is wrong by hundreds has a finite loss and a gradient of 1.
    Source: Bradley and Terry, "Rank Analysis of Incomplete Block Designs", 1952; as the loss of a reward model in
    Ouyang et al., "Training language models to follow instructions with human feedback", 2022, equation 1; the margin
    as in Touvron et al., "Llama 2", 2023, equation 2.
    """
    return jax.nn.softplus(margins - (chosen_scores - rejected_scores))


def centring_loss(chosen_scores: Float[Array, " B"], rejected_scores: Float[Array, " B"]) -> Float[Array, " B"]:
    """ℓ_b = (s⁺_b + s⁻_b)²: pulls the mean of a pair's scores to 0, and leaves their difference alone.

    Shapes [B], in squared units of the score. Its gradient is the same for both scores, that of `bradley_terry_loss`
    opposite: the two never work against each other on the scores of one pair.
    Source: Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward
    Hacking", 2023, section 2.
    """
    return (chosen_scores + rejected_scores) ** 2
