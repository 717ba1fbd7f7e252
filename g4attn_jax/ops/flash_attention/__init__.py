"""Attention kernel in Triton that `decode_attention` and `prefill_attention` launch.

It has no public function: the ops say how many rows, keys and splits a launch has. What Mosaic
kernels share with it stands in `operands`.
"""
