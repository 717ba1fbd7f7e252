"""`decode`: real layers at real shapes, prefill and jitted decode steps, checked and timed."""

import collections
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from g4attn_jax.attention import Gemma4Attention
from g4attn_jax.cache import Cache, CompactKVCache, KVCache, ReadableCache, bytes_per_token
from g4attn_jax.commands.layers import Job
from g4attn_jax.config import AttentionSpec, Gemma4Config, ProjectionMode
from g4attn_jax.layout import Contiguous
from g4attn_jax.testing.launches import launches_by_backend

# Norm-wise, over one step: bfloat16 operands give 1e-3 to 1e-2.
MAX_RELATIVE_ERROR = 2e-2
_COLUMNS = (
    *("model", "layer", "mode", "Nq/Nkv", "head_dim", "cache", "bytes/token"),
    *("launches", "max difference", "median ms", "ran"),
)
_LAYOUT = "{:<17} {:>5} {:<8} {:>7} {:>8} {:<14} {:>11} {:>13} {:>14} {:>9}  {}"


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of one layer's decode steps with one form of cache.

    Attributes:
        demanded: implementation asked for, or None.
        prologue_launches: of kernels before attention in a compiled step, by backend.
        attention_launches: of attention's kernels.
    """

    layer: int
    spec: AttentionSpec
    form: type[Cache]
    demanded: str | None
    prologue_launches: collections.Counter[str]
    attention_launches: collections.Counter[str]
    max_difference: float
    max_relative_error: float
    median_step_ms: float

    @property
    def implementation(self) -> str:
        """Backends of the kernels that the compiled step launches.

        Interpreters launch none and are known by their name alone.
        """
        backends = self.prologue_launches + self.attention_launches
        if backends:
            return " and ".join(backends)
        return self.demanded if self._is_interpreted else "xla"

    @property
    def launches(self) -> str:
        """Launches of kernels in a compiled step: the prologue's and attention's."""
        prologue, attention = self.prologue_launches.total(), self.attention_launches.total()
        if prologue or attention:
            return f"{prologue} + {attention}"
        return "interpreted" if self._is_interpreted else "fused by XLA"

    @property
    def _is_interpreted(self):
        return self.demanded is not None and self.demanded.endswith("_interpret")

    @property
    def passed(self) -> bool:
        """True if every step matched the reference path; an error of NaN does not."""
        return self.max_relative_error <= MAX_RELATIVE_ERROR


def decode_layers(
    config: Gemma4Config,
    layers: Sequence[int],
    *,
    batch: int,
    prompt_len: int,
    steps: int,
    seed: int = 0,
    implementation: str | None = None,
) -> Iterator[Row]:
    """Runs each layer by itself: a prefill, then `steps` jitted steps of one token a sequence.

    The caches are donated. Every step is compared with the reference path: the same weights in
    float32 through XLA, separate K and V, prompt and steps in one call. A K = V layer runs with
    either form of cache. A layer that shares K and V reads the caches of its producer, which is run
    first whether it is among `layers` or not.
    """
    producers = {config.attention_spec(layer).kv_layer for layer in layers}
    runs = {}
    for layer in sorted({*layers, *producers}):
        producer = runs.get(config.attention_spec(layer).kv_layer)
        runs[layer] = _LayerRun(
            config, layer, producer, batch, prompt_len, steps, seed, implementation
        )
        for row in runs[layer].decode():
            if layer in layers:
                yield row


class _LayerRun:
    def __init__(self, config, layer, producer, batch, prompt_len, steps, seed, implementation):
        self.config, self.layer = config, layer
        self.prompt_len, self.capacity = prompt_len, prompt_len + steps
        self.attention = Gemma4Attention(
            config, layer, rngs=nnx.Rngs(seed + layer), implementation=implementation
        )
        # With random weights and a scale of 1, scores reach sqrt(D) and softmax picks single keys,
        # which a rounding of q can swap. Trained scales keep the scores of order 1; so does this.
        head_dim = self.attention.spec.head_dim
        self.attention.q_norm[...] = jnp.full(head_dim, head_dim**-0.5, jnp.bfloat16)
        shape = (batch, self.capacity, config.hidden_size)
        self.x = jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)
        self.positions = jnp.broadcast_to(jnp.arange(self.capacity), shape[:2])
        layout = Contiguous(batch, self.capacity)
        if producer is None:
            forms = [KVCache]
            if self.attention.spec.mode is ProjectionMode.QK_ONLY:
                forms.append(CompactKVCache)
            self.caches = {form: self.attention.init_cache(layout, form) for form in forms}
            self.k_norm = None  # its own
            self.reference_cache = None
        else:
            self.caches, self.reference_cache = dict(producer.caches), producer.reference_cache
            self.k_norm = producer.attention.k_norm[...]
        self.layout = layout

    def decode(self) -> Iterator[Row]:
        """Decodes into the caches of the producer, or new ones where this layer is the producer."""
        expected = self._reference()
        for form in self.caches:
            yield self._decode_with(form, expected)

    def _decode_with(self, form, expected):
        cache = self.caches[form]
        forward, params = _jitted(self.attention)
        prompt = slice(self.prompt_len)
        arguments = self.x[:, prompt], self.positions[:, prompt]
        _, cache = forward(params, *arguments, cache, self.k_norm)
        steps = range(self.prompt_len, self.capacity)
        tokens = [(self.x[:, t, None], self.positions[:, t, None]) for t in steps]
        step = forward.lower(params, *tokens[0], cache, self.k_norm).compile()
        outputs, times = [], []
        for x, positions in tokens:
            start = time.perf_counter()
            y, cache = jax.block_until_ready(step(params, x, positions, cache, self.k_norm))
            times.append(time.perf_counter() - start)
            outputs.append(np.asarray(y[:, 0], np.float32))
        self.caches[form] = cache
        actual = np.stack(outputs, axis=1)
        difference = np.abs(actual - expected)
        per_step = np.linalg.norm(actual - expected, axis=(0, 2)) / np.linalg.norm(
            expected, axis=(0, 2)
        )
        text = step.as_text()
        return Row(
            layer=self.layer,
            spec=self.attention.spec,
            form=form,
            demanded=self.attention.implementation,
            prologue_launches=launches_by_backend(text, "norm_rope"),
            attention_launches=launches_by_backend(text, "decode_attention")
            + launches_by_backend(text, "combine_splits"),
            max_difference=float(difference.max()),
            max_relative_error=float(per_step.max()),
            median_step_ms=1e3 * statistics.median(times),
        )

    def _reference(self):
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
            if self.reference_cache is None:
                self.reference_cache = reference.init_cache(self.layout)
            forward, params = _jitted(reference)
            arguments = self.x.astype(jnp.float32), self.positions
            y, self.reference_cache = forward(params, *arguments, self.reference_cache, None)
        return np.asarray(y[:, self.prompt_len :])


def _jitted(attention):
    """(f, params), f(params, x, positions, cache, k_norm) jitted, the cache donated.

    k_norm is that of the layer whose cache a Q_ONLY layer reads, else None.
    """
    graph, params = nnx.split(attention)

    def forward(params, x, positions, cache, k_norm):
        attention = nnx.merge(graph, params)
        if k_norm is None:
            return attention(x, positions, cache)
        y, _ = attention(x, positions, ReadableCache(cache, k_norm))
        return y, cache

    return jax.jit(forward, donate_argnums=3), params


def decode(
    jobs: Sequence[Job],
    *,
    batch: int,
    prompt_len: int,
    steps: int,
    implementation: str | None = None,
) -> int:
    """Runs `decode_layers` for each job and prints a row a layer.

    Returns:
        The number of layers that did not match the reference path.
    """
    print(
        f"JAX {jax.__version__}; batch {batch}, prompt {prompt_len}, {steps} decode steps, "
        "bfloat16, random weights"
    )
    print(_LAYOUT.format(*_COLUMNS))
    failures = 0
    for job in jobs:
        rows = decode_layers(
            job.config,
            job.layers,
            batch=batch,
            prompt_len=prompt_len,
            steps=steps,
            implementation=implementation,
        )
        for row in rows:
            failures += not row.passed
            print(_LAYOUT.format(*_cells(job.name, row)), flush=True)
    print("launches: of the kernels in a step, before attention and of it")
    print(
        "max difference: largest |y - reference| over the decode steps, the reference being the "
        "same layer in float32"
    )
    print(f"{failures} failed" if failures else "all passed")
    return failures


def _cells(model, row):
    """Text of a row, by column."""
    spec, device = row.spec, jax.devices()[0].device_kind
    return (
        model,
        row.layer,
        spec.mode.name,
        f"{spec.num_q_heads}/{spec.num_kv_heads}",
        spec.head_dim,
        row.form.__name__,
        bytes_per_token(spec, row.form),
        row.launches,
        f"{row.max_difference:.2e}",
        f"{row.median_step_ms:.3f}",
        f"{row.implementation} on {device}: {'pass' if row.passed else 'FAIL'}",
    )
