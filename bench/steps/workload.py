"""Time of a workload on 31B: 32 prompts of 10 240 tokens, 800 new tokens each.

Source: SGLang PR 25461, the change that this package began from, was measured with it. A prompt is
read by itself, in chunks; one is measured and counts 32 times. Then all decode together: 800 times
the mean of steps measured in the first and the last hundred of them.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from bench import measure
from bench.benchmark import Benchmark, Point
from bench.steps._ablated import Variant
from bench.steps._model import StepCase, random_like
from g4attn_jax import Gemma4Config

MODEL = "gemma-4-31b"
VARIANTS = (Variant.XLA, Variant.K_EQ_V_NORM, Variant.QKV_NORM, Variant.COMPACT)
PROMPTS, PROMPT, NEW_TOKENS, CHUNK = 32, 10240, 800, 2048


def points():
    """The variants."""
    return [
        Point(
            {
                "model": MODEL,
                "variant": variant.letter,
                "prompts": PROMPTS,
                "prompt_tokens": PROMPT,
                "new_tokens": NEW_TOKENS,
            },
            variant,
        )
        for variant in VARIANTS
    ]


def rows(points, _):
    """A row for each point."""
    config = Gemma4Config.preset(MODEL)
    weights = random_like(StepCase(config, Variant.XLA, 1, PROMPT).weights)
    for point in points:
        prefill = prefill_s(config, weights, point.subject)
        times = decode_ms(config, weights, point.subject)
        decode = 1e-3 * NEW_TOKENS * statistics.mean(times)
        per_s = PROMPTS / (prefill + decode)
        yield point.fields | {
            "prefill_s": round(prefill, 2),
            "decode_s": round(decode, 2),
            "total_tokens_per_s": round(per_s * (PROMPT + NEW_TOKENS), 1),
            "output_tokens_per_s": round(per_s * NEW_TOKENS, 1),
            "mean_tpot_ms": round(statistics.mean(times), 3),
            "median_tpot_ms": round(statistics.median(times), 3),
        }


def prefill_s(config, weights, variant):
    """Seconds of all prompts."""
    case = StepCase(config, variant, 1, PROMPT + NEW_TOKENS, CHUNK)
    chunk, cache = case.chunk(CHUNK), random_like(case.cache())
    tokens = jax.random.randint(jax.random.key(2), (1, PROMPT), 0, config.vocab_size)
    for end in (CHUNK, PROMPT):  # first a chunk, to warm up
        start = time.perf_counter()
        for first in range(0, end, CHUNK):
            positions = first + jnp.arange(CHUNK, dtype=jnp.int32)[None]
            cache = chunk(weights, tokens[:, first : first + CHUNK], positions, cache)
        jax.block_until_ready(cache)
        seconds = time.perf_counter() - start
    return PROMPTS * seconds


def decode_ms(config, weights, variant):
    """Milliseconds of steps at both ends of the new tokens."""
    case = StepCase(config, variant, PROMPTS, PROMPT + NEW_TOKENS)
    step, cache, times = case.step(), random_like(case.cache()), []
    for position in (PROMPT, PROMPT + NEW_TOKENS - 100):
        state = (*case.tokens(position), cache)
        more, (_, _, cache) = measure.step_ms(step, weights, state)
        times += more
    return times


BENCHMARK = Benchmark(
    name="workload",
    about="32 prompts of 10 240 tokens and 800 new tokens each, on 31B",
    variants={variant.letter: variant.value for variant in VARIANTS},
    identity=("model", "variant", "prompts", "prompt_tokens", "new_tokens"),
    fields=(
        "prefill_s",
        "decode_s",
        "total_tokens_per_s",
        "output_tokens_per_s",
        "mean_tpot_ms",
        "median_tpot_ms",
    ),
    points=points,
    measure=rows,
    watched={"prefill_s": None, "mean_tpot_ms": None},
    memory_fraction=0.94,
)
