"""What is done to the scores [B] in step 4: normalised, clipped, less penalties; twin of `ppo_jax/ops/rewards.py`."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_torch_ref import ops


class ScoreMoments(NamedTuple):
    """Of all scores seen so far: how many, their mean, and the sum of their squared distances from it."""

    count: Tensor
    mean: Tensor
    m2: Tensor


def first_moments(dtype: torch.dtype) -> ScoreMoments:
    """Those of no score."""
    return ScoreMoments(*torch.zeros(3, dtype=dtype))


def merged_moments(moments: ScoreMoments, seq_scores: Tensor, answered: Tensor) -> ScoreMoments:
    """`moments` with the scores of the `answered` rows (bool [B]) among them (Chan et al. 1979)."""
    count = ops.masked_count(answered, dtype=seq_scores.dtype)
    centered = ops.masked_center(seq_scores, answered)
    total = moments.count + count
    share = count / total.clamp(min=1)
    # Row 0 is distance `centered` from the mean: large equal scores have exactly their own mean.
    first = torch.argmax(answered.int())
    distance = torch.where(count > 0, seq_scores[first] - centered[first] - moments.mean, torch.zeros_like(count))
    m2 = moments.m2 + ops.masked_sum(centered**2, answered) + distance**2 * moments.count * share
    return ScoreMoments(total, moments.mean + distance * share, m2)


def normalised_scores(seq_scores: Tensor, moments: ScoreMoments) -> Tensor:
    """(s − mean) / sqrt(var + 1e-8), population variance."""
    return (seq_scores - moments.mean) / torch.sqrt(moments.m2 / moments.count.clamp(min=1) + 1e-8)


def clipped_scores(seq_scores: Tensor, *, bound: float) -> Tensor:
    """s held within ± bound."""
    return seq_scores.clamp(-bound, bound)


def missing_eos_penalty(ended: Tensor, *, penalty: float, dtype=torch.float32) -> Tensor:
    """The penalty where an answer was cut off, `ended` [B] being False."""
    return penalty * (~ended).to(dtype)


def too_short_penalty(lengths: Tensor, *, min_tokens: int, penalty: float) -> Tensor:
    """penalty · max(0, 1 − L / min)."""
    return penalty * (min_tokens - lengths).clamp(min=0.0) / max(min_tokens, 1)


def too_long_penalty(lengths: Tensor, *, soft_max_tokens: int, max_tokens: int, penalty: float) -> Tensor:
    """penalty · clip((L − soft) / (max − soft), 0, 1): the soft overlong punishment of DAPO."""
    return penalty * ((lengths - soft_max_tokens) / (max_tokens - soft_max_tokens)).clamp(0.0, 1.0)
