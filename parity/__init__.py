"""Proof, on shared weights, that `ppo_jax` and `ppo_torch_ref` compute the same thing: `python -m parity`."""
