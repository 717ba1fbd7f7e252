"""`router` as two launches: scores in parts (split-K), then one program for all that follows.

    scores of a part    (x * scale) W of some rows of W, and the sum of their x^2
    routes              scores = sum of parts * rsqrt(mean(x^2) + eps) / sqrt(E)
                        k times: the largest of what is left of a token's scores
                        weights, and rows sorted by counting: an expert has a token once at most

The norm is a factor of the scores, so that no program waits for it. Scores are compared as
integers, which order all floats: whatever they are, NaN too, a token has k experts.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.padding import pad
from g4attn_jax.ops.router.reference import Routing
from g4attn_jax.ops.triton_tiles import (
    dot,
    first_program_id,
    iota,
    load,
    load_tile,
    may_start_next,
    store_tile,
)

# Up to so many tokens each has programs of its own: a product of tiles takes at least 16 tokens.
_MAX_SINGLE = 4
# Up to so many tokens the scores have as many parts as W has blocks of rows, above half as many.
_MAX_WITH_ALL_PARTS = 8
_LOWEST = jnp.iinfo(jnp.int32).min


class RouterLaunch(NamedTuple):
    """Shape of both launches."""

    block_tokens: int  # of a program of the first: 1, or 16 and more
    block_depth: int  # rows of W, multiplied at a time
    parts: int  # of the scores
    num_warps: int
    sort_warps: int  # of the second


def choose_launch(num_sms: int, *, tokens: int, depth: int) -> RouterLaunch:
    """Launch for so many tokens, measured on an H200 for 26B-A4B.

    With more parts the first launch ends sooner, and the second adds them for longer. So few tokens
    have as many as there are blocks of rows, more tokens half as many.

    Args:
        num_sms: multiprocessors.
        tokens: M.
        depth: E.
    """
    block_tokens, block_depth = 1 if tokens <= _MAX_SINGLE else 16, 64
    parts = min(pl.cdiv(depth, block_depth), max(1, num_sms // 2))
    if tokens > _MAX_WITH_ALL_PARTS:
        parts = pl.cdiv(parts, 2)
    return RouterLaunch(block_tokens, block_depth, parts, 4, min(8, pl.next_power_of_2(tokens)))


def router(x, scale, w, per_expert_scale, *, top_k, eps, interpret=False, launch=None):
    """Kernel of `g4attn_jax.ops.router`; `launch` overrides the choice, for tuning."""
    tokens, experts = x.shape[0], w.shape[1]
    launch = launch or choose_launch(gpu().num_sms, tokens=max(tokens, 1), depth=x.shape[1])
    of_tokens = tokens * top_k
    shapes = Routing(
        weights=jax.ShapeDtypeStruct((of_tokens,), jnp.float32),
        experts=jax.ShapeDtypeStruct((of_tokens,), jnp.int32),
        group_sizes=jax.ShapeDtypeStruct((experts,), jnp.int32),
        row_tokens=jax.ShapeDtypeStruct((of_tokens,), jnp.int32),
        place=jax.ShapeDtypeStruct((of_tokens,), jnp.int32),
    )
    if tokens == 0:
        routing = Routing(*(jnp.zeros(shape.shape, shape.dtype) for shape in shapes))
    else:
        scores, squares = _scores(x, scale, w, launch, interpret)
        body = functools.partial(
            _route,
            tokens=tokens,
            depth=x.shape[1],
            top_k=top_k,
            eps=eps,
            parts=launch.parts,
            starts_next=may_start_next(interpret),
        )
        outputs = pl.pallas_call(
            body,
            name="router_top_k",
            out_shape=list(shapes),
            grid=(1,),
            in_specs=[pl.no_block_spec] * 3,
            out_specs=[pl.no_block_spec] * len(shapes),
            compiler_params=plgpu.CompilerParams(num_warps=launch.sort_warps, num_stages=1),
            interpret=interpret,
        )(scores, squares, per_expert_scale)
        routing = Routing(*outputs)
    shape = tokens, top_k
    return routing._replace(
        weights=routing.weights.reshape(shape),
        experts=routing.experts.reshape(shape),
        place=routing.place.reshape(shape),
    )


def _scores(x, scale, w, launch, interpret):
    """Parts [parts * M, X] of the scores before their norm, and [parts * M] of the sums of x^2."""
    tokens = x.shape[0]
    return pl.pallas_call(
        functools.partial(_add_scores, launch=launch, starts_next=may_start_next(interpret)),
        name="router_scores",
        out_shape=[
            jax.ShapeDtypeStruct((launch.parts * tokens, w.shape[1]), jnp.float32),
            jax.ShapeDtypeStruct((launch.parts * tokens,), jnp.float32),
        ],
        grid=(launch.parts * pl.cdiv(tokens, launch.block_tokens),),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=[pl.no_block_spec] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=launch.num_warps, num_stages=1),
        interpret=interpret,
    )(x, scale, w)


def _add_scores(x_ref, scale_ref, w_ref, scores_ref, squares_ref, *, launch, starts_next):
    """A part of the scores of a block of tokens: every n-th block of W's rows."""
    (tokens, depth), experts = x_ref.shape, w_ref.shape[1]
    program, parts = first_program_id(starts_next), jnp.int32(launch.parts)
    part, block = lax.rem(program, parts), lax.div(program, parts)
    token = block * launch.block_tokens + iota(launch.block_tokens)
    token_mask = None if tokens % launch.block_tokens == 0 else token < tokens
    column = iota(pad(experts))
    column_mask = None if column.size == experts else column < experts

    def add(i, sums):
        scores, squares = sums
        k = (i * launch.parts + part) * launch.block_depth + iota(launch.block_depth)
        k_mask = None if depth % launch.block_depth == 0 else k < depth
        w = load_tile(w_ref, k, column, k_mask, column_mask).astype(jnp.float32)
        scale = load(scale_ref.at[k], k_mask, k.shape).astype(jnp.float32)
        x = load_tile(x_ref, token, k, token_mask, k_mask).astype(jnp.float32)
        return scores + _product(x * scale, w), squares + jnp.sum(x * x, axis=1)

    blocks = pl.cdiv(depth, launch.block_depth)
    nothing = (token.size, column.size), token.shape
    scores, squares = lax.fori_loop(
        0,
        lax.div(blocks + parts - 1 - part, parts),
        add,
        tuple(jnp.zeros(shape, jnp.float32) for shape in nothing),
    )
    row = part * tokens + token
    store_tile(scores_ref, row, column, token_mask, column_mask, scores)
    plgpu.store(squares_ref.at[row], squares, mask=token_mask)


def _product(x, w):
    """x w of float32; of one token by sums, as a product of tiles would take 16 rows."""
    if x.shape[0] > 1:
        return dot(x, w)
    return jnp.sum(jnp.sum(x, axis=0)[:, None] * w, axis=0)[None, :]


def _route(
    scores_ref,
    squares_ref,
    scale_ref,
    *out_refs,
    tokens,
    depth,
    top_k,
    eps,
    parts,
    starts_next,
):
    """Experts, weights and sorted rows of all tokens."""
    out = Routing(*out_refs)
    experts = scores_ref.shape[1]
    token = iota(pl.next_power_of_2(tokens))
    token += first_program_id(starts_next)  # which is 0
    column = iota(pl.next_power_of_2(experts))[None, :]
    is_token, is_expert = token < tokens, column < experts
    shape = token.size, column.size
    mask = jnp.broadcast_to(is_token[:, None] & is_expert, shape)
    scores, squares = jnp.zeros(shape, jnp.float32), _squares(squares_ref, token, parts, tokens)
    for part in range(parts):
        row = part * tokens + token
        scores += load(scores_ref.at[row[:, None], column], mask, shape)
    scores *= (lax.rsqrt(squares * (1 / depth) + eps) * (1 / math.sqrt(depth)))[:, None]
    rank, best = _top_k(scores, mask, column, top_k)
    chosen = mask & (rank < top_k)
    weights = jnp.where(chosen, jnp.exp(scores - best[:, None]), 0)
    weights /= jnp.sum(weights, axis=1)[:, None]
    scale = load(scale_ref.at[column], is_expert, column.shape).astype(jnp.float32)
    # Rows before a token's: those of lower experts, and of its expert those of tokens before it.
    counts = chosen.astype(jnp.int32)
    sizes = jnp.sum(counts, axis=0, dtype=jnp.int32)
    place = lax.cumsum(counts, axis=0) - counts + (lax.cumsum(sizes) - sizes)[None, :]
    entry = token[:, None] * top_k + rank
    _store(out.weights, entry, weights * scale, chosen)
    _store(out.experts, entry, jnp.broadcast_to(column, shape), chosen)
    _store(out.place, entry, place, chosen)
    _store(out.row_tokens, place, jnp.broadcast_to(token[:, None], shape), chosen)
    column = iota(column.size)
    plgpu.store(out.group_sizes.at[column], sizes, mask=column < experts)


def _squares(ref, token, parts, tokens):
    """Sum of the parts of every token's sum of squares."""
    part = iota(pl.next_power_of_2(parts))[:, None]
    mask = (part < parts) & (token < tokens)[None, :]
    return jnp.sum(load(ref.at[part * tokens + token[None, :]], mask, mask.shape), axis=0)


def _top_k(scores, mask, column, top_k):
    """Rank [tokens, experts] of every score, `top_k` of those not chosen, and the largest scores.

    Of equal scores the lower column comes first.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    key = jnp.where(bits < 0, bits ^ jnp.int32(jnp.iinfo(jnp.int32).max), bits)
    key = jnp.where(mask, jnp.maximum(key, _LOWEST + 1), _LOWEST)
    rank = jnp.full(scores.shape, top_k, jnp.int32)
    for i in range(top_k):
        largest = jnp.max(key, axis=1)[:, None]
        first = jnp.min(jnp.where(key == largest, column, column.size), axis=1)[:, None]
        is_first = column == first
        rank = jnp.where(is_first, i, rank)
        key = jnp.where(is_first, _LOWEST, key)
    best = jnp.max(jnp.where(rank == 0, scores, -jnp.inf), axis=1)
    return rank, best


def _store(ref, index, values, mask):
    """Stores where the mask is true; elsewhere the index is past the end, for the interpreter."""
    index = jnp.where(mask, index, ref.shape[0])
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)
