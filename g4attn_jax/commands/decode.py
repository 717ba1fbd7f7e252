"""`decode`: real layers at real shapes, prefill and jitted decode steps, checked and timed."""

import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from g4attn_jax.attention import Gemma4Attention
from g4attn_jax.cache import KVCache
from g4attn_jax.config import AttentionSpec, Gemma4Config

# Norm-wise, over one step: bfloat16 operands give 1e-3 to 1e-2.
MAX_RELATIVE_ERROR = 2e-2


@dataclasses.dataclass(frozen=True)
class Row:
    """What one layer's decode steps showed."""

    layer: int
    spec: AttentionSpec
    norm_launches: int
    max_difference: float
    max_relative_error: float
    median_step_ms: float

    @property
    def implementation(self) -> str:
        """What the compiled step holds, rather than what was asked for."""
        return "triton" if self.norm_launches else "xla"

    @property
    def passed(self) -> bool:
        """Whether every step matched the reference path; false where the error is NaN."""
        return self.max_relative_error <= MAX_RELATIVE_ERROR


def load_config(name: str) -> Gemma4Config:
    """A preset by its name, or a `config.json` by its path.

    Raises:
        ValueError: it is neither, or not a config this package takes.
    """
    if os.path.isfile(name):
        return Gemma4Config.from_hf(name)
    if os.path.sep in name or name.endswith(".json"):
        raise ValueError(f"config is {name!r}; there is no such file")
    return Gemma4Config.preset(name)


def first_of_each_kind(config: Gemma4Config) -> list[int]:
    """The first layer of every kind the model has."""
    kinds = {}
    for layer in range(config.num_hidden_layers):
        kinds.setdefault(dataclasses.replace(config.attention_spec(layer), kv_layer=-1), layer)
    return list(kinds.values())


def decode_layers(
    config: Gemma4Config,
    layers: Sequence[int],
    *,
    batch: int,
    prompt_len: int,
    steps: int,
    seed: int = 0,
) -> Iterator[Row]:
    """Runs each layer by itself: a prefill, then `steps` jitted steps of one token a sequence.

    The caches are donated. Every step is compared with the reference path: the same weights in
    float32 through XLA, prompt and steps in one call. A layer that shares K and V reads the cache
    of its producer, which is run first whether it is among `layers` or not.
    """
    producers = {config.attention_spec(layer).kv_layer for layer in layers}
    caches = {}
    for layer in sorted({*layers, *producers}):
        kv_layer = config.attention_spec(layer).kv_layer
        run = _LayerRun(config, layer, batch, prompt_len, steps, seed)
        row, caches[kv_layer] = run.decode(caches.get(kv_layer))
        if layer in layers:
            yield row


@dataclasses.dataclass(frozen=True)
class _Caches:
    """The caches of a producing layer: the one under test and the reference's."""

    own: KVCache
    reference: KVCache


class _LayerRun:
    def __init__(self, config, layer, batch, prompt_len, steps, seed):
        self.config, self.layer, self.batch = config, layer, batch
        self.prompt_len, self.capacity = prompt_len, prompt_len + steps
        self.attention = Gemma4Attention(config, layer, rngs=nnx.Rngs(seed + layer))
        # With random weights and a scale of 1, scores reach sqrt(D) and softmax picks single keys,
        # which a rounding of q can swap. Trained scales keep the scores of order 1; so does this.
        head_dim = self.attention.spec.head_dim
        self.attention.q_scale[...] = jnp.full(head_dim, head_dim**-0.5, jnp.bfloat16)
        shape = (batch, self.capacity, config.hidden_size)
        self.x = jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)
        self.positions = jnp.broadcast_to(jnp.arange(self.capacity), shape[:2])

    def decode(self, shared: _Caches | None) -> tuple[Row, _Caches]:
        """Decodes with the producer's caches, or with new ones where this layer is the producer."""
        expected, reference_cache = self._reference(shared and shared.reference)
        cache = shared.own if shared else self.attention.init_cache(self.batch, self.capacity)
        forward, params = _jitted(self.attention)
        prompt = slice(self.prompt_len)
        _, cache = forward(params, self.x[:, prompt], self.positions[:, prompt], cache)
        steps = range(self.prompt_len, self.capacity)
        tokens = [(self.x[:, t, None], self.positions[:, t, None]) for t in steps]
        step = forward.lower(params, *tokens[0], cache).compile()
        outputs, times = [], []
        for x, positions in tokens:
            start = time.perf_counter()
            y, cache = jax.block_until_ready(step(params, x, positions, cache))
            times.append(time.perf_counter() - start)
            outputs.append(np.asarray(y[:, 0], np.float32))
        actual = np.stack(outputs, axis=1)
        difference = np.abs(actual - expected)
        per_step = np.linalg.norm(actual - expected, axis=(0, 2)) / np.linalg.norm(
            expected, axis=(0, 2)
        )
        row = Row(
            layer=self.layer,
            spec=self.attention.spec,
            norm_launches=count_norm_launches(step.as_text()),
            max_difference=float(difference.max()),
            max_relative_error=float(per_step.max()),
            median_step_ms=1e3 * statistics.median(times),
        )
        return row, _Caches(cache, reference_cache)

    def _reference(self, cache):
        with jax.default_matmul_precision("highest"):
            reference = Gemma4Attention(
                self.config,
                self.layer,
                rngs=nnx.Rngs(0),
                dtype=jnp.float32,
                param_dtype=jnp.float32,
                implementation="xla",
            )
            weights = jax.tree.map(lambda w: w.astype(jnp.float32), nnx.state(self.attention))
            nnx.update(reference, weights)
            if cache is None:
                cache = reference.init_cache(self.batch, self.capacity)
            forward, params = _jitted(reference)
            y, cache = forward(params, self.x.astype(jnp.float32), self.positions, cache)
        return np.asarray(y[:, self.prompt_len :]), cache


def count_norm_launches(compiled_text: str) -> int:
    """Launches of the norm kernel in a compiled program."""
    return sum(
        "__gpu$xla.gpu.triton" in line and "head_norm" in line
        for line in compiled_text.splitlines()
    )


def _jitted(attention):
    """(f, params) with f(params, x, positions, cache) jitted, the cache donated."""
    graph, params = nnx.split(attention)

    def forward(params, x, positions, cache):
        return nnx.merge(graph, params)(x, positions, cache)

    return jax.jit(forward, donate_argnums=3), params


@dataclasses.dataclass(frozen=True)
class Job:
    """Layers of one model to decode."""

    name: str
    config: Gemma4Config
    layers: tuple[int, ...]


def plan(names: Sequence[str], layers: Sequence[int] | None) -> list[Job]:
    """A job a config; `layers` None is the first of each kind.

    Raises:
        ValueError: there is no such config, or it has no such layer.
    """
    jobs = []
    for name in names:
        config = load_config(name)
        chosen = first_of_each_kind(config) if layers is None else layers
        for layer in chosen:
            config.attention_spec(layer)
        jobs.append(Job(os.path.basename(name), config, tuple(chosen)))
    return jobs


def decode(jobs: Sequence[Job], *, batch: int, prompt_len: int, steps: int) -> int:
    """Runs `decode_layers` for each job and prints a row a layer.

    Returns:
        The number of layers that did not match the reference path.
    """
    device = jax.devices()[0].device_kind
    print(
        f"JAX {jax.__version__}; batch {batch}, prompt {prompt_len}, {steps} decode steps, "
        "bfloat16, random weights"
    )
    layout = "{:<17} {:>5} {:<8} {:>7} {:>8} {:>13} {:>14} {:>9}  {}"
    print(
        layout.format(
            *("model", "layer", "mode", "Nq/Nkv", "head_dim", "norm launches", "max difference"),
            *("median ms", "ran"),
        )
    )
    failures = 0
    for job in jobs:
        rows = decode_layers(
            job.config,
            job.layers,
            batch=batch,
            prompt_len=prompt_len,
            steps=steps,
        )
        for row in rows:
            failures += not row.passed
            print(
                layout.format(
                    job.name,
                    row.layer,
                    row.spec.mode.name,
                    f"{row.spec.num_q_heads}/{row.spec.num_kv_heads}",
                    row.spec.head_dim,
                    row.norm_launches or "fused by XLA",
                    f"{row.max_difference:.2e}",
                    f"{row.median_step_ms:.3f}",
                    f"{row.implementation} on {device}: {'pass' if row.passed else 'FAIL'}",
                ),
                flush=True,
            )
    print(
        "max difference: largest |y - reference| over the decode steps, the reference being the "
        "same layer in float32"
    )
    print(f"{failures} failed" if failures else "all passed")
    return failures
