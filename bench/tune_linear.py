"""Kernel time of few rows times 31B's weights, for launches; `choose_launch` is fitted to it.

    python -m bench.tune_linear [--out DIR]

Writes tune_linear.json, a row for each weight, number of tokens and launch, and one for XLA's own
matmul (launch fields null). Launches that the shared memory does not hold are left out.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from bench.measure import (
    L2_BYTES,
    kernel_times,
    machine,
    output_folder,
    read_gbps,
    write_json,
)
from g4attn_jax import ops
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear import reference, triton
from g4attn_jax.ops.linear.launch import MatmulLaunch as Launch

# Name, K, matrices, columns.
WEIGHTS = (
    ("sliding qkv", 5376, 1, 16384),
    ("sliding output", 8192, 1, 5376),
    ("full qkv", 5376, 1, 18432),
    ("full output", 16384, 1, 5376),
    ("gate and up", 5376, 2, 21504),
    ("down", 21504, 1, 5376),
)
TOKENS = (1, 8, 32, 64)


def launches(chosen: Launch, matrices: int) -> list[Launch]:
    """Tiles of 8 to 32 KiB, of which 3 to 5 are there at a time."""
    found = {chosen}
    for columns, k, stages in itertools.product((64, 128), (32, 64, 128), (3, 4, 5)):
        if 8 * 1024 <= 2 * columns * k * matrices <= 32 * 1024:
            found.add(Launch(columns, k, 4, stages))
    return sorted(found)


def parts_of(k: int, matrices: int, columns: int, tokens: int) -> list[int]:
    """Numbers of parts; the chosen one first."""
    if matrices > 1:
        return [1]
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, k), (k, columns)))
    chosen = jax.eval_shape(
        functools.partial(ops.linear_partial_sums, implementation=None), x, w
    ).shape[0]
    return list(dict.fromkeys((chosen, 1, 2, 3, 4)))


def calls(k, matrices, columns, tokens):
    """(x, w), as many as the L2 does not hold."""
    shape = (k, columns) if matrices == 1 else (k, matrices, columns)
    count = math.ceil(2 * L2_BYTES / (2 * math.prod(shape)))
    return [
        (
            jax.random.normal(jax.random.key(i), (tokens, k), jnp.bfloat16),
            jax.random.normal(jax.random.key(-i - 1), shape, jnp.bfloat16) * k**-0.5,
        )
        for i in range(count)
    ]


def main():
    """Measures, prints the best launch and the chosen one, writes."""
    folder = output_folder(__doc__)
    gbps = read_gbps()
    rows = []
    for (name, k, matrices, columns), tokens in itertools.product(WEIGHTS, TOKENS):
        parts = parts_of(k, matrices, columns, tokens)
        chosen = triton.choose_launch(
            gpu(),
            rows=tokens,
            columns=columns,
            matrices=matrices,
            num_partial_sums=parts[0],
            itemsize=2,
        )
        chosen = chosen, parts[0]
        if matrices == 2:
            functions = {None: reference.geglu}
        else:
            functions = {None: functools.partial(reference.linear_partial_sums, num_partial_sums=1)}
        for launch, n in itertools.product(launches(chosen[0], matrices), parts):
            kernel = triton.geglu
            if matrices == 1:
                kernel = functools.partial(triton.linear_partial_sums, num_partial_sums=n)
            functions[launch, n] = functools.partial(kernel, launch=launch)
        times = kernel_times(functions, calls(k, matrices, columns, tokens), 5)
        limit = 2 * k * matrices * columns / gbps / 1e3
        best = min(times.keys() - {None}, key=lambda launch: times[launch].us)
        print(
            f"{name:<15} M={tokens:<3} limit {limit:6.1f} XLA {times[None].us:6.1f} "
            f"({times[None].launches} launches), best {tuple(best[0])}, {best[1]} parts "
            f"{times[best].us:6.1f}, chosen {tuple(chosen[0])}, {chosen[1]} parts "
            f"{times[chosen].us:6.1f} us",
            flush=True,
        )
        for key, time in times.items():
            launch, n = key or (None, 1)
            fields = dict.fromkeys(Launch._fields) if launch is None else launch._asdict()
            rows.append(
                {"weight": name, "k": k, "matrices": matrices, "columns": columns}
                | {"tokens": tokens, "parts": n, **fields, "us": round(time.us, 2)}
            )
    head = machine() | {"read_gbps": round(gbps, 1), "command": "python -m bench.tune_linear"}
    write_json(folder / "tune_linear.json", head, rows)


if __name__ == "__main__":
    main()
