"""The commands of `python -m g4attn_jax`."""
