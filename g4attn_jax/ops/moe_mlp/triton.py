"""`moe_mlp` as two launches, both with split-K: the memory bus has equal work for all programs.

    hidden    parts of h Wg and h Wu: a program has an expert of a token, a block of columns of
              both, and every n-th tile of their rows
    down      parts of the sum over experts: their matrices are one of k * F rows, of which a
              program has a range of tiles, in a block of columns

The second launch adds the parts of the first, gates them and multiplies them by the expert's weight
as it reads them, a vector for each tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear.reference import gelu_gate
from g4attn_jax.ops.moe_mlp.launch import choose_down_launch, choose_hidden_launch
from g4attn_jax.ops.triton_tiles import dot, iota, load, load_tile

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
    hidden_launch=None,
    down_launch=None,
):
    """Kernel of `g4attn_jax.ops.moe_mlp`; launches override the choice, for tuning."""
    tokens, top_k = experts.shape
    _, depth, columns = down.shape
    if tokens == 0:
        return jnp.zeros((num_partial_sums, 0, columns), jnp.float32)
    sizes = {"depth": columns, "columns": depth, "itemsize": h.dtype.itemsize}
    hidden_launch = hidden_launch or choose_hidden_launch(gpu(), rows=experts.size, **sizes)
    sizes |= {"depth": depth, "columns": columns}
    down_launch = down_launch or choose_down_launch(gpu(), tokens=tokens, top_k=top_k, **sizes)
    down_launch = down_launch._replace(parts=num_partial_sums)
    products = _hidden(h, gate_up, experts, hidden_launch, interpret)
    return _down(products, down, experts, weights, down_launch, interpret)


def _hidden(h, gate_up, experts, launch, interpret):
    """Float32 [parts * M * k * 2, F]: parts of the products with both matrices."""
    rows, width = experts.size, gate_up.shape[3]
    return pl.pallas_call(
        functools.partial(_multiply, top_k=experts.shape[1], launch=launch),
        name="moe_hidden",
        out_shape=jax.ShapeDtypeStruct((launch.parts * rows * 2, width), jnp.float32),
        grid=(launch.parts, pl.cdiv(width, launch.block_columns), rows),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        compiler_params=_params(launch),
        interpret=interpret,
    )(h, gate_up.reshape(-1, 2 * width), experts.reshape(-1))


def _multiply(h_ref, w_ref, experts_ref, out_ref, *, top_k, launch):
    part, block, entry = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    depth, width, rows = h_ref.shape[1], out_ref.shape[1], experts_ref.shape[0]
    expert, token = experts_ref[entry], lax.div(entry, jnp.int32(top_k))
    column = block * launch.block_columns + iota(launch.block_columns)
    column_mask = None if width % launch.block_columns == 0 else column < width
    row = iota(_ROWS)

    def step(i, sums):
        k = (i * launch.parts + part) * launch.block_depth + iota(launch.block_depth)
        k_mask = None if depth % launch.block_depth == 0 else k < depth
        x = load_tile(h_ref, token + row, k, row < 1, k_mask)
        tiles = [
            load_tile(w_ref, expert * depth + k, matrix * width + column, k_mask, column_mask)
            for matrix in range(2)
        ]
        return tuple(total + dot(x, w) for total, w in zip(sums, tiles, strict=True))

    tiles, parts = pl.cdiv(depth, launch.block_depth), jnp.int32(launch.parts)
    zero = jnp.zeros((_ROWS, column.size), jnp.float32)
    sums = lax.fori_loop(0, lax.div(tiles + parts - 1 - part, parts), step, (zero, zero))
    for matrix, total in enumerate(sums):
        out_row = (part * rows + entry) * 2 + matrix
        _store_row(out_ref, out_row, column, column_mask, total)


def _down(products, down, experts, weights, launch, interpret):
    """[parts, M, E]: parts of the weighted sum over experts."""
    (tokens, top_k), embed = experts.shape, down.shape[2]
    y = pl.pallas_call(
        functools.partial(_multiply_gated, top_k=top_k, launch=launch),
        name="moe_down",
        out_shape=jax.ShapeDtypeStruct((launch.parts * tokens, embed), jnp.float32),
        grid=(launch.parts, pl.cdiv(embed, launch.block_columns), tokens),
        in_specs=[pl.no_block_spec] * 4,
        out_specs=pl.no_block_spec,
        compiler_params=_params(launch),
        interpret=interpret,
    )(products, down.reshape(-1, embed), experts.reshape(-1), weights.reshape(-1))
    return y.reshape(launch.parts, tokens, embed)


def _multiply_gated(products_ref, w_ref, experts_ref, weights_ref, out_ref, *, top_k, launch):
    part, block, token = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    width, rows = products_ref.shape[1], experts_ref.shape[0]
    tokens, columns = rows // top_k, out_ref.shape[1]
    column = block * launch.block_columns + iota(launch.block_columns)
    column_mask = None if columns % launch.block_columns == 0 else column < columns
    row = iota(_ROWS)[:, None]
    tiles = pl.cdiv(width, launch.block_depth)  # of an expert
    # Loaded once: a tile whose address is loaded with it cannot be asked for as far ahead.
    entries = [token * top_k + i for i in range(top_k)]
    experts = [experts_ref[entry] for entry in entries]
    weights = [weights_ref[entry] for entry in entries]

    def step(tile, total):
        index = lax.div(tile, jnp.int32(tiles))
        entry = token * top_k + index
        k = (tile - index * tiles) * launch.block_depth + iota(launch.block_depth)
        k_mask = None if width % launch.block_depth == 0 else k < width
        gate, up = (_added(products_ref, rows, entry, matrix, k, k_mask) for matrix in range(2))
        x = gelu_gate(gate, up) * _selected(weights, index)
        x = jnp.where(row == 0, x[None, :], 0).astype(w_ref.dtype)
        w_row = _selected(experts, index) * width + k
        return total + dot(x, load_tile(w_ref, w_row, column, k_mask, column_mask))

    start, stop = (lax.div(p * (top_k * tiles), jnp.int32(launch.parts)) for p in (part, part + 1))
    zero = jnp.zeros((_ROWS, column.size), jnp.float32)
    total = lax.fori_loop(start, stop, step, zero)
    _store_row(out_ref, part * tokens + token, column, column_mask, total)


def _selected(scalars, index):
    """Scalar of an index that is known at run time alone."""
    selected = scalars[0]
    for i, scalar in enumerate(scalars[1:], 1):
        selected = jnp.where(index == i, scalar, selected)
    return selected


def _added(products_ref, rows, entry, matrix, k, k_mask):
    """Sum of the parts of a product, columns k."""
    parts = products_ref.shape[0] // (2 * rows)
    return sum(
        load(products_ref.at[(part * rows + entry) * 2 + matrix, k], k_mask, k.shape)
        for part in range(parts)
    )


def _store_row(ref, row, column, column_mask, tile):
    """Stores the first row of a tile, the only one that is not 0."""
    plgpu.store(ref.at[row, column], jnp.sum(tile, axis=0), mask=column_mask)


def _params(launch):
    return plgpu.CompilerParams(num_warps=launch.num_warps, num_stages=launch.num_stages)
