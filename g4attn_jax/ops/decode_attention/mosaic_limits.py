"""Arguments that the Mosaic GPU kernel for several tokens takes."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from g4attn_jax.ops.gpu import gpu

KEYS = 64  # of a tile
ROWS = 64  # of a program's products; those past its query rows are not stored
CHUNK = 128  # numbers of each key


def num_blocks(tokens: int, group: int) -> int:
    """Number of programs that share the tokens."""
    return 1 if tokens * group <= ROWS else 2


def refusal(q, cache, page_table, positions, *, sliding_window, interpret, **static) -> str | None:
    """Reason for which the kernel cannot take arguments of `decode_attention`, or None."""
    _, tokens, num_q_heads, width = q.shape
    values = cache.value_part.array
    _, page_size, num_kv_heads, head_dim = values.shape
    group, capability = num_q_heads // num_kv_heads, gpu().compute_capability
    accepted = {
        f"the GPU has compute capability {capability}; accepted: 9.0": (
            interpret or capability == 9.0
        ),
        f"sliding_window is {sliding_window}; accepted: None": sliding_window is None,
        f"q is {q.dtype} and the cache {values.dtype}; accepted: bfloat16 or float16, of both": (
            q.dtype in (jnp.bfloat16, jnp.float16) and values.dtype == q.dtype
        ),
        # The ring holds all keys of a tile at a time, and would not of more numbers.
        f"heads have {head_dim} numbers and {width - head_dim} rotated ones apart; accepted: 512 "
        f"and 0 or {CHUNK}": head_dim == 512 and width - head_dim in (0, CHUNK),
        f"{tokens} tokens have {group} query heads a KV head; accepted: 8, 16, 32 or {ROWS} heads, "
        f"in all 17 to {2 * ROWS}, of them at most {ROWS} of half of the tokens, rounded "
        "up": group in (8, 16, 32, ROWS)
        and 16 < tokens * group
        and pl.cdiv(tokens, num_blocks(tokens, group)) * group <= ROWS,
        f"pages have {page_size} slots; accepted: a multiple of {KEYS}": page_size % KEYS == 0,
    }
    return next((reason for reason, is_so in accepted.items() if not is_so), None)
