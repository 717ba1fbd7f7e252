"""Kernel time of few rows times the models' weights, for launches; `choose_launch` is fitted to it.

XLA's own matmul has a row too, its launch fields null. Launches that the shared memory does not
hold are left out. The assistant of 31B is there as well, see `assistant_of`.
"""

import functools
import itertools

import jax.numpy as jnp

from bench import measure
from bench.benchmark import Benchmark, Point
from bench.steps.speculative import assistant_of
from g4attn_jax.config import Gemma4Config
from g4attn_jax.ops.gpu import gpu
from g4attn_jax.ops.linear import triton
from g4attn_jax.ops.linear.cases import LogitsCase, Weight, case_of, weights_of
from g4attn_jax.ops.linear.launch import (
    MatmulLaunch,
    choose_launch,
    choose_logits_launch,
    choose_num_partial_sums,
)

TOKENS = (1, 2, 4, 5, 8, 9, 16, 32, 64)
ASSISTANT = "gemma-4-31b-assistant"


def weights():
    """(model, weight's name, its sizes) of all published models and an assistant."""
    for model in Gemma4Config.preset_names():
        for name, weight in weights_of(Gemma4Config.preset(model)).items():
            yield model, name, weight
    config = assistant_of(Gemma4Config.preset("31b"))
    for name, weight in weights_of(config.text).items():
        yield ASSISTANT, name, weight
    inner, outer = config.text.hidden_size, config.backbone_hidden_size
    yield ASSISTANT, "pre-projection", Weight(2 * outer, 1, inner)
    yield ASSISTANT, "post-projection", Weight(inner, 1, outer)


def points():
    """The weights, by the number of tokens."""
    return [
        Point(
            {
                "model": model,
                "weight": name,
                "k": weight.depth,
                "matrices": weight.matrices,
                "columns": weight.columns,
                "tokens": tokens,
            },
            case_of(model, name, weight, tokens),
        )
        for model, name, weight in weights()
        for tokens in TOKENS
    ]


def chosen(case):
    """(launch, number of partial sums) that the op takes."""
    if isinstance(case, LogitsCase):
        return choose_logits_launch(gpu(), rows=case.tokens, itemsize=2), 1
    count = 1
    if case.num_matrices == 1:
        count = choose_num_partial_sums(gpu(), k=case.depth, columns=case.columns)
    return launch_of(case, count), count


def launch_of(case, count):
    """The launch that is chosen for a number of partial sums."""
    return choose_launch(
        gpu(),
        rows=case.tokens,
        k=case.depth,
        columns=case.columns,
        matrices=case.num_matrices,
        num_partial_sums=count,
        itemsize=2,
    )


def candidates(case):
    """The chosen (launch, number of partial sums), and others around it."""
    launch, count = chosen(case)
    counts = [1]
    if case.label == "linear_partial_sums":
        counts = sorted({max(1, count // 2), count, min(2 * count, 16)})
    found = {}
    for number in counts:
        near = launch if isinstance(case, LogitsCase) else launch_of(case, number)
        for stages, k in itertools.product((-1, 0, 1, 3), (1, 2)):
            block_k, num_stages = near.block_k * k, max(2, (near.num_stages + stages) // k)
            found[near._replace(block_k=block_k, num_stages=num_stages), number] = None
    return [(launch, count), *(key for key in found if key != (launch, count))]


def functions(case):
    """Functions by (launch, number of partial sums), the chosen one first; None is XLA's matmul."""
    kernels = {"geglu": triton.geglu, "logits": triton.logits}
    for launch, count in candidates(case):
        kernel = kernels.get(case.label)
        if kernel is None:
            kernel = functools.partial(
                triton.linear_partial_sums, num_partial_sums=count, dtype=_dtype(count)
            )
        yield (launch, count), functools.partial(kernel, launch=launch)
    yield None, functools.partial(case_run, case)


def case_run(case, *arguments):
    """The case by XLA."""
    return case.run(arguments, "xla")


def _dtype(count):
    return jnp.dtype(jnp.bfloat16 if count == 1 else jnp.float32)


def rows(points, gbps):
    """A row for each point, launch and number of partial sums."""
    for point in points:
        case = point.subject
        times = measure.kernel_times(dict(functions(case)), measure.calls_from_memory(case), 5)
        first = chosen(case)
        best = min(times.keys() - {None}, key=lambda key: times[key].us)
        print(
            f"{case.model} {case.weight:<20} M={case.tokens:<3} "
            f"limit {case.bytes() / gbps / 1e3:6.1f} "
            f"XLA {times[None].us:6.1f} ({times[None].launches} launches), "
            f"best {tuple(best[0])}, {best[1]} sums {times[best].us:6.1f}, "
            f"chosen {tuple(first[0])}, {first[1]} sums {times[first].us:6.1f} us",
            flush=True,
        )
        for key, time in times.items():
            launch, count = key or (None, 1)
            fields = dict.fromkeys(MatmulLaunch._fields) if launch is None else launch._asdict()
            yield point.fields | {"partial_sums": count} | fields | {"us": round(time.us, 2)}


BENCHMARK = Benchmark(
    name="tune_linear",
    about="tiles, stages and partial sums of matmuls of few tokens, of all models' weights",
    identity=(
        "model",
        "weight",
        "k",
        "matrices",
        "columns",
        "tokens",
        "partial_sums",
        *MatmulLaunch._fields,
    ),
    fields=("us",),
    points=points,
    measure=rows,
    watched={"us": None},
    rate="read_gbps",
)
