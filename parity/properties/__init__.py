"""The catalogue of properties: what must hold of the pure functions on any input, in both stacks.

A property is worth having when some plausible bug breaks it; each names such bugs, and they are planted. What is a
property of the whole system is tested where the system runs: the checkpoint's bitwise round trip, run(N) = run(k) +
resume + run(N − k) and equal metrics of equal seeds in tests/test_train.py and tests/test_checkpoint.py.
"""

from parity.properties import (
    advantages,
    controllers,
    gae,
    groups,
    kl,
    logprobs,
    losses,
    masking,
    models,
    policy_loss,
    rewards,
    sampling,
    scores,
)

TOPICS = (
    *(masking, logprobs, models, kl, controllers),
    *(scores, rewards, advantages, groups, gae, policy_loss, losses, sampling),
)
PROPERTIES = tuple(one for topic in TOPICS for one in topic.PROPERTIES)
