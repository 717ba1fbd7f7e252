"""Times of kernels by CUPTI, of steps by the host's clock, and memory rates of the GPU."""

import collections
import re
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import profiler

L2_BYTES = 60 * 2**20
# Launches start before those ahead of them end (`first_program_id` of ops/triton_tiles.py), and the
# time by CUPTI of one that waits is not its own. Where kernels are timed they do not start early.
ONE_BY_ONE = {"xla_gpu_enable_pdl": False}
if jax.__version_info__ >= (0, 11):
    ONE_BY_ONE["xla_gpu_enable_pdl_launch"] = False


class Time(NamedTuple):
    """Time of one call.

    Attributes:
        us: median of the calls, in microseconds.
        p10: their 10th percentile.
        p90: their 90th percentile.
        launches: of a call; where XLA shares a kernel between calls, those of a run over its calls.
        kernels: microseconds of a call by the name of the kernel.
    """

    us: float
    p10: float
    p90: float
    launches: float
    kernels: dict[str, float]

    def fields(self, name: str) -> dict[str, Any]:
        """Fields of a row: time, spread and launches of what has a name in it."""
        return {
            f"{name}_us": round(self.us, 3),
            f"{name}_p10_p90_us": [round(self.p10, 3), round(self.p90, 3)],
            f"{name}_launches": self.launches,
        }


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
    """Times of several functions, compiled side by side, as `kernel_time`.

    Functions whose launch the shared memory does not hold are left out.
    """
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
        self.jitted = jax.jit(program, donate_argnums=1, compiler_options=ONE_BY_ONE)
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
    # Imported here: without Pallas' Triton backend everything else can still be measured.
    from bench.triton_copy import block_copy

    rates = {"jnp.copy": traffic / host_time(jax.jit(jnp.copy), x) / 1e9}
    for block in (1024, 2048, 4096, 8192):
        for num_warps in (1, 2, 4, 8):
            us = kernel_time(lambda x, b=block, w=num_warps: block_copy(x, b, w), [(x,)], 10).us
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


def calls_from_memory(case: Any) -> list[list]:
    """Arguments of as many calls of an op's case as the L2 does not hold."""
    return case.calls(2 * L2_BYTES)


def step_ms(
    step: Callable[[Any, Any], Any], params: Any, state: Any, *, steps: int = 20, repeats: int = 3
) -> tuple[list[float], Any]:
    """Milliseconds of a step by the host's clock, once for each repeat, and the state after them.

    Args:
        step: compiled, (params, state) to the next state; donates it.
        params: what stays.
        state: what goes from step to step.
        steps: steps that are waited for together.
        repeats: how often so many are timed, after a few that warm up.
    """
    times = []
    for count in (3, *[steps] * repeats):
        start = time.perf_counter()
        for _ in range(count):
            state = step(params, state)
        jax.block_until_ready(state)
        times.append(1e3 * (time.perf_counter() - start) / count)
    return times[1:], state


def kernel_table(kernels: Sequence[tuple[str, float]], steps: int = 1) -> list[dict[str, Any]]:
    """Kernels of a step, those that take most of it first: name, launches, us of a launch.

    Names that differ in a number alone ("fusion_12", "fusion_13") are one entry.

    Args:
        kernels: (name, ms) of every launch.
        steps: how many steps they are of.
    """
    times, counts = collections.Counter(), collections.Counter()
    for name, ms in kernels:
        name = re.sub(r"[_.]?\d+", "", name)[:80]
        times[name] += ms
        counts[name] += 1
    return [
        {"name": name, "count": counts[name] / steps, "us": round(1e3 * ms / counts[name], 2)}
        for name, ms in times.most_common()
    ]


def rounded(value: Any, digits: int = 3) -> Any:
    """A number of a row, or a list of them, rounded if it is a float."""
    if isinstance(value, list):
        return [rounded(x, digits) for x in value]
    return round(value, digits) if isinstance(value, float) else value


RATES = {"copy_gbps": copy_gbps, "read_gbps": read_gbps}
