"""Kernel time of reading 31B's weights: by a float32 sum, which does nothing else, and by ours.

    python -m bench.weight_reads [--out DIR]

Writes weight_reads.json, a row for each weight: its bytes over the rate of a sum of 2 GiB, the same
sum's longest kernel over that weight, and our matmul of one token.
"""

import functools
import heapq
import statistics

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import profiler

from bench.measure import kernel_time, machine, output_folder, read_gbps, write_json
from bench.tune_linear import WEIGHTS, calls
from g4attn_jax import ops


def sum_us(weights) -> float:
    """Microseconds of the kernel that reads a weight for a sum, one weight after the other."""

    def program(weights):
        total = jnp.float32(0)
        for weight in weights:
            weight, total = lax.optimization_barrier((weight, total))
            total += jnp.sum(weight, dtype=jnp.float32)
        return total

    _, runs = profiler.measure(program, aggregate=False, iterations=20)(weights)
    longest = [heapq.nlargest(len(weights), (ms for _, ms in run)) for run in runs]
    return 1e3 * statistics.median(map(statistics.mean, longest))


def main():
    """Measures, prints, writes."""
    folder = output_folder(__doc__)
    gbps = read_gbps()
    rows = []
    for name, k, matrices, columns in WEIGHTS:
        pairs = calls(k, matrices, columns, tokens=1)
        multiply = ops.geglu if matrices == 2 else ops.linear_partial_sums
        ours = kernel_time(functools.partial(multiply, implementation="triton"), pairs)
        rows.append(
            {"weight": name, "k": k, "matrices": matrices, "columns": columns}
            | {"limit_us": round(2 * k * matrices * columns / gbps / 1e3, 2)}
            | {"sum_us": round(sum_us([w for _, w in pairs]), 2), "ours_us": round(ours.us, 2)}
        )
        print(rows[-1], flush=True)
    head = machine() | {"read_gbps": round(gbps, 1), "command": "python -m bench.weight_reads"}
    write_json(folder / "weight_reads.json", head, rows)


if __name__ == "__main__":
    main()
