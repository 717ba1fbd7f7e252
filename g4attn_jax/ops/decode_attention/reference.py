"""`decode_attention` in `jnp`."""

from g4attn_jax.cached_attention import cached_attention
from g4attn_jax.layout import Contiguous, Paged


def decode_attention(q, cache, page_table, positions, *, sliding_window, scale, num_splits):
    """See `g4attn_jax.ops.decode_attention`; `num_splits` is the kernel's."""
    num_pages, page_size = cache.v.shape[:2]
    if page_table is None:
        layout = Contiguous(num_pages, page_size)  # or a ring, which is read by the same rule
    else:
        layout = Paged(page_table, num_pages, page_size)
    return cached_attention(q, cache, positions, layout, sliding_window=sliding_window, scale=scale)
