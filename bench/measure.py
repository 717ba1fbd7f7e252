"""How the benchmarks measure and report: kernel times by CUPTI, copy rate, JSON, plots."""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas import triton as plgpu

RESULTS = Path(__file__).parent / "results" / "h200"
L2_BYTES = 60 * 2**20


class Time(NamedTuple):
    """Microseconds of one call: median, 10th and 90th percentile over the calls; its launches.

    Where XLA shares a kernel between calls they are those of a run, divided by its calls. `kernels`
    are the microseconds of a call by the name of the kernel.
    """

    us: float
    p10: float
    p90: float
    launches: float
    kernels: dict[str, float]


def kernel_time(
    f: Callable[..., Any], calls: Sequence[tuple], iterations: int = 20, state: Any = None
) -> Time:
    """Time on the GPU of `f(*arguments)`, the kernels of a call added up.

    Args:
        f: the function; compiled as one program with all calls, in order.
        calls: argument tuples. Several, of more than the L2 together, keep the inputs of one call
            from being in the cache when it runs.
        iterations: how often the program runs.
        state: of functions that update something in place: `f(*arguments, state)` returns
            (result, state). It is donated, and goes from call to call and from run to run.
    """
    return _time(_program(f, state), calls, iterations)


def kernel_times(
    functions: dict[Hashable, Callable[..., Any]], calls: Sequence[tuple], iterations: int
) -> dict[Hashable, Time]:
    """`kernel_time` of several functions, compiled side by side; without those that do not fit."""
    programs = {}
    with ThreadPoolExecutor() as pool:
        warm = {name: pool.submit(_warm, f, calls) for name, f in functions.items()}
    for name, program in warm.items():
        error = program.exception()
        if error is None:
            programs[name] = program.result()
        elif "Shared memory size limit exceeded" not in str(error):
            raise error
    return {name: _time(program, calls, iterations) for name, program in programs.items()}


def _program(f, state=None):
    def program(calls, state):
        results = []
        for arguments in calls:
            # Each call waits for the one before: XLA must not merge them.
            arguments, state, results = lax.optimization_barrier((arguments, state, results))
            result = f(*arguments) if state is None else f(*arguments, state)
            if state is not None:
                result, state = result
            results.append(result)
        return results, state

    return _Donating(program, state)


def _warm(f, calls):
    program = _program(f)
    jax.block_until_ready(program(calls))
    return program


def _time(program, calls, iterations):
    _, runs = profiler.measure(program, aggregate=False, iterations=iterations)(calls)
    launches = len(runs[0]) / len(calls)
    step = int(launches) if launches.is_integer() else len(runs[0])
    times = [
        1e3 * sum(ms for _, ms in run[i : i + step]) * launches / step
        for run in runs
        for i in range(0, len(run), step)
    ]
    deciles = statistics.quantiles(times, n=10)
    kernels = {
        name: statistics.median(1e3 * sum(ms for n, ms in run if n == name) for run in runs)
        / len(calls)
        for name in {name for name, _ in runs[0]}
    }
    return Time(statistics.median(times), deciles[0], deciles[-1], round(launches, 2), kernels)


def profile_step(
    step: jax.stages.Compiled, params: Any, state: Any
) -> tuple[list[tuple[str, float]], Any]:
    """The kernels of one step, (name, ms) each in order, and the state after it.

    Args:
        step: compiled, (params, state) to the next state; donates it.
        params: what stays.
        state: what goes from step to step.
    """
    stepping = _Stepping(step, params, state)
    _, kernels = profiler.measure(stepping, aggregate=False)()
    return kernels, stepping.state


class _Stepping(jax.stages.Wrapped):
    """A compiled step that keeps its state, see `_Donating`."""

    def __init__(self, step, params, state):
        self.step, self.params, self.state = step, params, state

    def __call__(self):
        self.state = self.step(self.params, self.state)
        return self.state

    def trace(self):
        raise NotImplementedError("it is compiled")

    lower = trace


class _Donating(jax.stages.Wrapped):
    """A jitted program that keeps its state between calls; `measure` jits what is not Wrapped."""

    def __init__(self, program, state):
        self.jitted = jax.jit(program, donate_argnums=1)
        self.state = jax.tree.map(jnp.copy, state)

    def __call__(self, calls):
        results, self.state = self.jitted(calls, self.state)
        return results

    def trace(self, calls):
        return self.jitted.trace(calls, self.state)

    def lower(self, calls):
        return self.jitted.lower(calls, self.state)


def copy_gbps(gib: int = 1) -> float:
    """Bytes read and written per ns by the best copy of `gib` GiB: jnp.copy or a block copy."""
    x = jax.random.normal(jax.random.key(0), (gib * 2**29,), jnp.bfloat16)
    traffic = 2 * x.size * x.dtype.itemsize
    rates = {"jnp.copy": traffic / host_time(jax.jit(jnp.copy), x) / 1e9}
    for block in (1024, 2048, 4096, 8192):
        for num_warps in (1, 2, 4, 8):
            us = kernel_time(lambda x, b=block, w=num_warps: _block_copy(x, b, w), [(x,)], 10).us
            rates[f"{block} elements, {num_warps} warps"] = traffic / us / 1e3
    best = max(rates, key=rates.get)
    print(f"copy rate: {rates[best]:.0f} GB/s ({best}); jnp.copy {rates['jnp.copy']:.0f} GB/s")
    return rates[best]


def read_gbps(gib: int = 2) -> float:
    """Bytes per ns that a float32 sum of `gib` GiB of bfloat16 reads."""
    x = jax.random.normal(jax.random.key(0), (gib * 2**29,), jnp.bfloat16)
    us = kernel_time(lambda x: jnp.sum(x, dtype=jnp.float32), [(x,)]).us
    rate = x.size * x.dtype.itemsize / us / 1e3
    print(f"read rate: {rate:.0f} GB/s")
    return rate


def host_time(f: Callable[..., Any], x: Any, repeats: int = 20) -> float:
    """Seconds of one f(x) by the host's clock, all that CUPTI does not list as a kernel included.

    Args:
        f: jitted, to an array.
        x: its argument.
        repeats: calls that are waited for together.
    """
    f(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        y = f(x)
    y.block_until_ready()
    return (time.perf_counter() - start) / repeats


def _block_copy(x, block, num_warps):
    def body(x_ref, o_ref):
        index = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        plgpu.store(o_ref.at[index], plgpu.load(x_ref.at[index]))

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.size // block,),
        in_specs=[pl.no_block_spec],
        out_specs=pl.no_block_spec,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
    )(x)


def machine() -> dict[str, str]:
    """What was measured on."""
    device = jax.devices()[0]
    return {
        "gpu": device.device_kind,
        "driver": _driver_version(),
        "jax": jax.__version__,
    }


def _driver_version():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def argument_parser(description: str) -> argparse.ArgumentParser:
    """With `--out`, the folder of the results."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def output_folder(description: str) -> Path:
    """The folder of the `--out` argument, made."""
    folder = argument_parser(description).parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes `head` and "rows", a row a line."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text("\n".join(["{", *lines, ' "rows": [', body, " ]", "}"]) + "\n")


def launch_rows(shape: Any, tokens: int, num_rows: int, times: dict, chosen: Any) -> list[dict]:
    """Rows of a tuning's JSON, a launch each; prints the best and the one the heuristic chose.

    Args:
        shape: with `fields()`.
        tokens: M.
        num_rows: heads that are read.
        times: microseconds by launch.
        chosen: one of the launches.
    """
    best = min(times, key=times.get)
    print(
        f"{shape!s:<30} M={tokens:<5} rows={num_rows:<7} best {tuple(best)} {times[best]:.2f} us, "
        f"chosen {tuple(chosen)} {times[chosen]:.2f} us",
        flush=True,
    )
    head = {**shape.fields(), "tokens": tokens, "num_rows": num_rows}
    return [{**head, **launch._asdict(), "us": round(us, 3)} for launch, us in times.items()]


def plot_times(axis: Any, title: str, rows: list[dict], lines: dict[str, tuple]) -> None:
    """Time against tokens, and the memory limit.

    Args:
        axis: of matplotlib.
        title: of the panel.
        rows: of one shape.
        lines: (label, color, marker) by the prefix of a field; one that a row lacks is left out.
    """
    tokens = [row["tokens"] for row in rows]
    for name, (label, color, marker) in lines.items():
        times = [row[f"{name}_us"] for row in rows]
        if None not in times:
            axis.loglog(tokens, times, color=color, marker=marker, ms=4, label=label)
    axis.loglog(tokens, [row["limit_us"] for row in rows], "k--", lw=1, label="memory limit")
    axis.set(title=title, ylim=(0.8, None), xlabel="tokens", ylabel="kernel time, us")
    axis.set_xticks(tokens, [str(t) for t in tokens])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
