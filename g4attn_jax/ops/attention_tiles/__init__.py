"""What the attention kernels share: how they see a cache, and tiles of its rows.

No op of its own; `decode_attention` and `prefill_attention` are.
"""
