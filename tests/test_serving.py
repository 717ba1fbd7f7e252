"""Sequences come, grow, guess, leave and take each other's place in caches that nobody cleans.

What each token gets is held against the oracle, which sees whole streams and knows no caches.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from g4attn_jax import Gemma4Attention, Gemma4Config, ProjectionMode
from g4attn_jax.cache import CompactKVCache, KVCache, ReadableCache
from g4attn_jax.layout import Contiguous, Paged, Ring, plan_step
from g4attn_jax.page_allocator import OutOfPages, PageAllocator
from g4attn_jax.testing import oracle
from tests.everyday import everyday
from tests.ops.kernel import kernel_of
from tests.test_attention import COMMON, K_EQ_V, layer_of, weights_of

PLACES, LENGTH, PAGE = 3, 208, 16
COLUMNS = LENGTH // PAGE
# Two thirds of what three whole sequences need, so that pages are soon used again, and run out.
NUM_PAGES = 26
# A step is padded to one of these: decoding, a few drafts, a chunk of a prompt. A ring takes 8 at
# the most; elsewhere the last is long enough for the attention that prefills.
WIDTHS = {"ring": (1, 4, 8), "contiguous": (1, 4, 24), "paged": (1, 4, 24)}
# What is in a cache before anything is written: the worst that it may be, see
# `g4attn_jax.ops.decode_attention.reference`.
POISON = {"ring": 1e4, "contiguous": 1e4, "paged": np.nan}
# Outputs of up to 4 in float32, after 48 * 32 products and sums: 2e-6 was the largest error seen. A
# key too many or too few, or one of another token, changes outputs by 1e-3 and more.
ATOL = 1e-5


@functools.cache
def streams():
    """[6, LENGTH, E]: one; three that are the same for 1, 2 and 5 pages; two of their own."""
    x = np.random.default_rng(0).normal(size=(6, LENGTH, K_EQ_V.hidden_size)).astype(np.float32)
    for stream, pages in ((1, 1), (2, 2), (3, 5)):
        x[stream, : pages * PAGE] = x[0, : pages * PAGE]
    return x


@functools.cache
def outputs(layer):
    """Outputs of the oracle for `streams`."""
    attention = layer_of(K_EQ_V, layer)
    return oracle.attention(attention.spec, weights_of(attention), streams())[0]


def common_prefix(one, other):
    differs = np.any(streams()[one] != streams()[other], axis=-1)
    return int(np.argmax(differs)) if differs.any() else LENGTH


def layout_of(kind, spec, page_table):
    batch = len(page_table)
    if kind == "contiguous":
        return Contiguous(batch, LENGTH)
    if kind == "ring":
        return Ring(batch, spec.sliding_window, max_new_tokens=8)
    return Paged(NUM_PAGES, PAGE, page_table)


@functools.cache
def step_of(layer, kind, implementation):
    """The step; it compiles once for each form and width."""
    attention = layer_of(K_EQ_V, layer, implementation=implementation)
    graph, params = nnx.split(attention)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(x, positions, page_table, cache):
        layout = layout_of(kind, attention.spec, page_table)
        plan = plan_step(attention.spec, positions, layout)
        with jax.default_matmul_precision("highest"):
            return nnx.merge(graph, params)(x, plan, cache)

    return step


class Server:
    """A batch of places with a cache, whose every accepted token is held against the oracle."""

    def __init__(self, layer, kind, form, implementation):
        self.layer, self.kind, self.implementation = layer, kind, implementation
        self.rng = np.random.default_rng(1)
        self.allocator = PageAllocator(NUM_PAGES, PAGE)
        self.keys = itertools.count()
        self.sequences = [None] * PLACES  # (key, stream)
        self.lengths = [0] * PLACES
        self.max_length = 0
        attention = layer_of(K_EQ_V, layer)
        cache = attention.init_cache(layout_of(kind, attention.spec, self.page_table()), form)
        self.cache = jax.tree.map(lambda array: jnp.full_like(array, POISON[kind]), cache)

    def page_table(self):
        if self.kind != "paged":
            return np.zeros((PLACES, 1), np.int32)  # not looked at
        keys = [None if sequence is None else sequence[0] for sequence in self.sequences]
        return self.allocator.page_table(keys, COLUMNS)

    def replace(self, place, stream, parent):
        """Ends what is in a place; a new sequence begins there, sharing the parent's pages."""
        if self.sequences[place] is not None and self.kind == "paged":
            self.allocator.free(self.sequences[place][0])
        self.sequences[place], self.lengths[place] = None, 0
        if stream is None:
            return
        key = next(self.keys)
        if self.kind == "paged":
            shared = 0
            if self.sequences[parent] is not None:
                parent_key, parent_stream = self.sequences[parent]
                shared = min(common_prefix(stream, parent_stream), self.lengths[parent])
                shared -= shared % PAGE
            if shared:
                self.allocator.share(key, parent_key, shared)
            else:
                self.allocator.allocate(key, 0)
            self.lengths[place] = shared
        self.sequences[place] = key, stream

    def steps(self, times, tokens, rejected):
        """Each place takes some tokens, of which the last ones turn out to be wrong."""
        for _ in range(times):
            self._step([self._make_room(place, n) for place, n in enumerate(tokens)], rejected)

    def _step(self, tokens, rejected):
        width = min(w for w in WIDTHS[self.kind] if w >= max(tokens))
        # Garbage wherever there is no accepted token: rejected ones and padding alike.
        x = self.rng.normal(size=(PLACES, width, K_EQ_V.hidden_size)).astype(np.float32)
        positions = np.full((PLACES, width), -1, np.int32)
        accepted = {}  # the range of its stream that a place goes through
        for place, (n, wrong) in enumerate(zip(tokens, rejected, strict=True)):
            start = self.lengths[place]
            positions[place, :n] = start + np.arange(n)
            if n > wrong:
                accepted[place] = slice(start, start + n - wrong)
                x[place, : n - wrong] = streams()[self.sequences[place][1], accepted[place]]
        step = step_of(self.layer, self.kind, self.implementation)
        y, self.cache = step(x, positions, self.page_table(), self.cache)
        y = np.asarray(y)
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(y[positions < 0], 0)
        for place, tokens_of_stream in accepted.items():
            exact = outputs(self.layer)[self.sequences[place][1], tokens_of_stream]
            np.testing.assert_allclose(y[place, : len(exact)], exact, rtol=0, atol=ATOL)
            self.lengths[place] = tokens_of_stream.stop
        self.max_length = max(self.max_length, *self.lengths)
        for sequence, length in zip(self.sequences, self.lengths, strict=True):
            if sequence is not None and self.kind == "paged":
                self.allocator.truncate(sequence[0], length)

    def _make_room(self, place, n):
        """Number of n tokens that a place can take."""
        if self.sequences[place] is None:
            return 0
        n = min(n, LENGTH - self.lengths[place], max(WIDTHS[self.kind]))
        if self.kind == "paged":
            try:
                self.allocator.append(self.sequences[place][0], n)
            except OutOfPages:
                return 0
        return n


def of_each_place(*values):
    return st.tuples(*[st.sampled_from(values)] * PLACES)


def steps_of(rejected):
    return st.tuples(
        st.just("steps"), st.integers(1, 5), of_each_place(0, 1, 1, 2, 3, 4, 7, 8, 24), rejected
    )


places = st.integers(0, PLACES - 1)
operations = st.one_of(
    steps_of(of_each_place(0)),
    steps_of(of_each_place(0, 1, 2, 3)),
    steps_of(of_each_place(0, 0, 1, 8)),
    st.tuples(st.just("replace"), places, st.sampled_from([None, *range(6)]), places),
)


def serve(layer, kind, form, implementation, drawn):
    server = Server(layer, kind, form, implementation)
    # A prompt of more than two rounds of a ring of 64; after it, others that begin like it.
    server.replace(0, 0, 0)
    server.steps(144 // max(WIDTHS[kind]), (24, 0, 0), (0, 0, 0))
    server.replace(1, 3, 0)
    server.replace(2, 4, 0)
    for operation, *arguments in drawn:
        getattr(server, operation)(*arguments)
    assert server.max_length >= 144


KINDS = [
    (0, "contiguous", KVCache),
    (0, "ring", KVCache),
    (0, "paged", KVCache),
    (1, "contiguous", KVCache),
    (1, "contiguous", CompactKVCache),
    (1, "paged", KVCache),
    (1, "paged", CompactKVCache),
]
on_every_kind = pytest.mark.parametrize(("layer", "kind", "form"), KINDS)


@everyday("xla-0-ring-KVCache", "xla-1-paged-CompactKVCache")
@on_every_kind
@pytest.mark.parametrize(
    "implementation", ["xla", *kernel_of("qkv_norm_rope_write", "decode_attention")[1:]]
)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(drawn=st.lists(operations, min_size=25, max_size=25))
def test_every_token_is_as_in_its_stream_alone(layer, kind, form, implementation, drawn):
    serve(layer, kind, form, implementation, drawn)


@everyday("1-paged-CompactKVCache")
@pytest.mark.parametrize(("layer", "kind", "form"), [KINDS[1], KINDS[6]])
@settings(derandomize=True, deadline=None, max_examples=3)
@given(drawn=st.lists(operations, min_size=25, max_size=25))
def test_the_same_through_the_kernel_body(layer, kind, form, drawn):
    serve(layer, kind, form, "triton_interpret", drawn)


# Layers 2 and 3 are Q_ONLY: they read what 0 (QKV_FULL, sliding) and 1 (QK_ONLY, full) wrote.
SHARED_K_EQ_V = Gemma4Config.from_hf(
    COMMON
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
    }
)


@functools.cache
def shared_model_layer(layer):
    attention = Gemma4Attention(
        SHARED_K_EQ_V, layer, rngs=nnx.Rngs(layer), dtype=jnp.float32, param_dtype=jnp.float32
    )
    rng = np.random.default_rng(layer)
    for scale in (attention.q_norm, attention.k_norm):
        if scale is not None:
            scale[...] = jnp.asarray(rng.normal(0.5, 0.2, scale.shape), jnp.float32)
    return attention


@everyday()
@pytest.mark.parametrize(
    ("layer", "kind"),
    [(2, "contiguous"), (2, "ring"), (2, "paged"), (3, "contiguous"), (3, "paged")],
)
def test_a_shared_layer_reads_any_cache_of_its_producer(layer, kind):
    attention = shared_model_layer(layer)
    spec = attention.spec
    producer = shared_model_layer(spec.kv_layer)
    assert spec.mode is ProjectionMode.Q_ONLY
    forms = [KVCache] + [CompactKVCache] * (producer.spec.mode is ProjectionMode.QK_ONLY)
    assert len(forms) == (2 if layer == 3 else 1)
    x = streams()[4:]
    _, kv = oracle.attention(producer.spec, weights_of(producer), x)
    exact, _ = oracle.attention(spec, weights_of(attention), x, kv)
    table = np.random.default_rng(0).permutation(NUM_PAGES)[: 2 * 8].reshape(2, 8)

    @jax.jit
    def step(x, positions, cache):
        plan = plan_step(spec, positions, layout_of(kind, spec, table))
        _, cache = producer(x, plan, cache)
        readable = ReadableCache(cache, producer.k_norm[...])
        y, same = attention(x, plan, readable)
        assert same is readable
        return y, cache

    widths = [max(WIDTHS[kind])] * (72 // max(WIDTHS[kind])) + [1, 4, 1, 1, 4, 4, 1]
    ys = {}
    for form in forms:
        cache = producer.init_cache(layout_of(kind, spec, table), form)
        cache = jax.tree.map(lambda array: jnp.full_like(array, POISON[kind]), cache)
        ys[form], start = [], 0
        for width in widths:
            at = np.tile(np.arange(start, start + width), (2, 1))
            y, cache = step(x[:, at[0]], at, cache)
            ys[form].append(np.asarray(y))
            start += width
        ys[form] = np.concatenate(ys[form], axis=1)
        np.testing.assert_allclose(ys[form], exact[:, :start], rtol=0, atol=ATOL)
    np.testing.assert_allclose(ys[forms[-1]], ys[KVCache], rtol=0, atol=ATOL)
