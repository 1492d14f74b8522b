"""The PPO loop of `ppo_jax` in plain PyTorch: a file here is the twin of the file of the same name there.

It shares no code with its twin, only the mathematics, the names and the order of arguments, so that `python -m parity`
can put the two side by side on shared weights. It is a reference: no cache, no mesh, no checkpoint, one device.
"""
