"""The rating page: a person compares answers of the SFT model and of the policy without knowing which is which.

`pairs` makes the answers, `session` is what a rater sees and says, `server` the page on the loopback; what is stored,
and what follows from it, is in `ppo_jax.ratings`.
"""
