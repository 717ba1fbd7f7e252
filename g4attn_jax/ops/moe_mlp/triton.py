"""`moe_mlp` as two launches: what the experts gate, then the sum over their answers with split-K.

    gated    a program has an expert of a token and a block of columns of both its matrices
    down     the matrices of a token's experts are one of k * F rows, of which a program has a range
             of tiles, in a block of columns: equal work, however many experts there are

The first launch multiplies what it gates by the weight of the expert.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear.reference import gelu_gate
from g4attn_jax.ops.moe_mlp.launch import choose_down_launch, choose_gated_launch
from g4attn_jax.ops.triton_tiles import dot, iota, load_tile

_ROWS = 16  # of a tile of one token, the least that tensor cores take


def moe_mlp(
    h,
    gate_up,
    down,
    experts,
    weights,
    *,
    num_partial_sums,
    interpret=False,
    gated_launch=None,
    down_launch=None,
):
    """Kernel of `g4attn_jax.ops.moe_mlp`; launches override the choice, for tuning."""
    tokens, top_k = experts.shape
    _, depth, columns = down.shape
    if tokens == 0:
        return jnp.zeros((num_partial_sums, 0, columns), jnp.float32)
    sizes = {"depth": columns, "columns": depth, "itemsize": h.dtype.itemsize}
    gated_launch = gated_launch or choose_gated_launch(gpu(), **sizes)
    sizes |= {"depth": depth, "columns": columns}
    down_launch = down_launch or choose_down_launch(gpu(), tokens=tokens, top_k=top_k, **sizes)
    down_launch = down_launch._replace(parts=num_partial_sums)
    gated = _gated(h, gate_up, experts, weights, gated_launch, interpret)
    return _down(gated, down, experts, down_launch, interpret)


def _gated(h, gate_up, experts, weights, launch, interpret):
    """[M * k, F] in the dtype of h: weight * gelu(h Wg) * (h Wu)."""
    rows, width = experts.size, gate_up.shape[3]
    return pl.pallas_call(
        functools.partial(_gate, top_k=experts.shape[1], launch=launch),
        name="moe_gated",
        out_shape=jax.ShapeDtypeStruct((rows, width), h.dtype),
        grid=(pl.cdiv(width, launch.block_columns), rows),
        in_specs=[pl.no_block_spec] * 4,
        out_specs=pl.no_block_spec,
        compiler_params=_params(launch),
        interpret=interpret,
    )(h, gate_up.reshape(-1, 2 * width), experts.reshape(-1), weights.reshape(-1))


def _gate(h_ref, w_ref, experts_ref, weights_ref, out_ref, *, top_k, launch):
    block, row = pl.program_id(0), pl.program_id(1)
    depth, width = h_ref.shape[1], out_ref.shape[1]
    first, token = experts_ref[row] * depth, lax.div(row, jnp.int32(top_k))
    column, column_mask = _columns(block, width, launch)

    def step(i, sums):
        k, k_mask = _depth(i, depth, launch)
        x = _one_row(h_ref, token, k, k_mask)
        tiles = [
            load_tile(w_ref, first + k, matrix * width + column, k_mask, column_mask)
            for matrix in range(2)
        ]
        return tuple(total + dot(x, w) for total, w in zip(sums, tiles, strict=True))

    zero = jnp.zeros((_ROWS, column.size), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(depth, launch.block_depth), step, (zero, zero))
    _store_row(out_ref, row, column, column_mask, gelu_gate(*sums) * weights_ref[row])


def _down(gated, down, experts, launch, interpret):
    """[parts, M, E]: parts of the sum over experts."""
    (tokens, top_k), embed = experts.shape, down.shape[2]
    y = pl.pallas_call(
        functools.partial(_multiply, top_k=top_k, launch=launch),
        name="moe_down",
        out_shape=jax.ShapeDtypeStruct((launch.parts * tokens, embed), jnp.float32),
        grid=(launch.parts, pl.cdiv(embed, launch.block_columns), tokens),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        compiler_params=_params(launch),
        interpret=interpret,
    )(gated, down.reshape(-1, embed), experts.reshape(-1))
    return y.reshape(launch.parts, tokens, embed)


def _multiply(gated_ref, w_ref, experts_ref, out_ref, *, top_k, launch):
    part, block, token = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    (rows, depth), columns = gated_ref.shape, out_ref.shape[1]
    column, column_mask = _columns(block, columns, launch)
    # Loaded once: a tile whose address is loaded with it cannot be asked for as far ahead.
    experts = [experts_ref[token * top_k + i] for i in range(top_k)]
    tiles = pl.cdiv(depth, launch.block_depth)  # of an expert

    def step(tile, total):
        index = lax.div(tile, jnp.int32(tiles))
        k, k_mask = _depth(tile - index * tiles, depth, launch)
        x = _one_row(gated_ref, token * top_k + index, k, k_mask)
        w_row = _selected(experts, index) * depth + k
        return total + dot(x, load_tile(w_ref, w_row, column, k_mask, column_mask))

    start, stop = (lax.div(p * (top_k * tiles), jnp.int32(launch.parts)) for p in (part, part + 1))
    total = lax.fori_loop(start, stop, step, jnp.zeros((_ROWS, column.size), jnp.float32))
    _store_row(out_ref, part * (rows // top_k) + token, column, column_mask, total)


def _columns(block, width, launch):
    """Columns of a block, and which of them there are; None: all."""
    column = block * launch.block_columns + iota(launch.block_columns)
    return column, None if width % launch.block_columns == 0 else column < width


def _depth(tile, depth, launch):
    """Rows of a weight in a tile, and which of them there are; None: all."""
    k = tile * launch.block_depth + iota(launch.block_depth)
    return k, None if depth % launch.block_depth == 0 else k < depth


def _one_row(ref, row, k, k_mask):
    """Tile whose first row is a row of `ref`; the others are 0."""
    index = iota(_ROWS)
    return load_tile(ref, row + index, k, index < 1, k_mask)


def _selected(scalars, index):
    """Scalar of an index that is known at run time alone."""
    selected = scalars[0]
    for i, scalar in enumerate(scalars[1:], 1):
        selected = jnp.where(index == i, scalar, selected)
    return selected


def _store_row(ref, row, column, column_mask, tile):
    """Stores the first row of a tile, the only one that is not 0."""
    plgpu.store(ref.at[row, column], jnp.sum(tile, axis=0).astype(ref.dtype), mask=column_mask)


def _params(launch):
    return plgpu.CompilerParams(num_warps=launch.num_warps, num_stages=launch.num_stages)
