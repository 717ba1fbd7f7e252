"""The commands of `g4attn-jax`, or `python -m g4attn_jax`."""
