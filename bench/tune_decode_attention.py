"""Kernel time of Triton's decode attention, launches around the chosen: fits `choose_launch`.

    python -m bench.tune_decode_attention [--out DIR]

Writes tune_decode_attention.json, a row for each shape, form, number of tokens and launch. Launches
that the shared memory does not hold are left out.
"""

import functools
import itertools
import math

from bench.decode_attention import FORMS
from bench.decode_shapes import QUERY_TOKENS, SHAPES
from bench.measure import kernel_times, machine, output_folder, read_gbps, write_json
from g4attn_jax.cache import Cache, CompactKVCache
from g4attn_jax.ops.decode_attention import triton
from g4attn_jax.ops.flash_attention.launch import AttentionLaunch as Launch


def launches_around(chosen: Launch, form: type[Cache], num_rows: int) -> list[Launch]:
    """Other tiles and stages, numbers of splits, and blocks of the query rows of a KV head."""

    def programs(rows, value_blocks):
        return math.ceil(num_rows / rows) * value_blocks

    splits = {max(1, round(chosen.num_splits * factor)) for factor in (0.5, 1, 2)}
    launches = {chosen._replace(num_splits=n) for n in splits}
    for keys, stages in itertools.product((16, 32, 64), (2, 3, 4)):
        launches.add(chosen._replace(block_keys=keys, num_stages=stages))
    if chosen.block_rows > 16:
        # Rows, programs that share the columns of their values, warps.
        blocks = [(16, 1, 4), (32, 1, 4), (64, 1, 8), (64, 2, 4)]
        if form is CompactKVCache:
            blocks.pop()
        wanted = chosen.num_splits * programs(chosen.block_rows, chosen.value_blocks)
        for rows, value_blocks, num_warps in blocks:
            launches.add(
                chosen._replace(
                    block_rows=rows,
                    value_blocks=value_blocks,
                    num_warps=num_warps,
                    block_keys=32,
                    num_stages=3,
                    num_splits=max(1, wanted // programs(rows, value_blocks)),
                )
            )
    return sorted(launches)


def main():
    """Measures, prints the best launch and the chosen one, writes."""
    folder = output_folder(__doc__)
    gbps = read_gbps()
    head = machine() | {
        "read_gbps": round(gbps, 1),
        "command": "python -m bench.tune_decode_attention",
    }
    rows = []
    for shape, query_tokens in itertools.product(SHAPES, QUERY_TOKENS):
        for form in shape.forms():
            calls = shape.calls(form, query_tokens, paged=False)
            attend = functools.partial(
                triton.decode_attention,
                sliding_window=shape.sliding_window,
                scale=1.0,
                num_splits=None,
            )
            chosen = triton.launch_for(*calls[0][:3], sliding_window=shape.sliding_window)
            functions = {
                launch: functools.partial(attend, launch=launch)
                for launch in launches_around(chosen, form, query_tokens * shape.group)
            }
            times = kernel_times(functions, calls, 5)
            best = min(times, key=lambda launch: times[launch].us)
            print(
                f"{tuple(shape)} {FORMS[form]} T={query_tokens}: best {tuple(best)} "
                f"{times[best].us:.2f} us, chosen {tuple(chosen)} {times[chosen].us:.2f} us",
                flush=True,
            )
            rows += [
                {
                    **shape.fields(),
                    "query_tokens": query_tokens,
                    "form": FORMS[form],
                    **launch._asdict(),
                    "us": round(time.us, 3),
                }
                for launch, time in times.items()
            ]
            write_json(folder / "tune_decode_attention.json", head, rows)  # so far


if __name__ == "__main__":
    main()
