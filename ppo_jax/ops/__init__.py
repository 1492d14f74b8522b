"""The mathematics of PPO as pure functions: arrays in, arrays out, nothing else.

Reading order, in the order of the six steps: `sampling` (1), `logprobs` and `kl` (3), `rewards` (4),
`advantages` (5), `losses` (6). `masking` holds every reduction, `streaming` applies a function to [B, T] rows block
by block, `randomness` derives every key.
"""
