"""The decoder without caches: logits of whole sequences, packed rows, derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from g4attn_jax import Contiguous, KVCache, ops
from g4attn_jax.layout import SegmentIds
from tests.everyday import everyday
from tests.ops.test_decode_attention import case
from tests.test_speculative import MODELS, target_of

on_every_model = pytest.mark.parametrize("name", MODELS)


def tokens_of(name, *shape):
    vocab_size = target_of(name).config.vocab_size
    return np.random.default_rng(0).integers(1, vocab_size, shape)


def cached(decoder, tokens):
    """Logits of a prompt, written to caches."""
    layouts = dict.fromkeys(decoder.config.layer_types, Contiguous(*tokens.shape))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    cache = decoder.init_cache(layouts)
    return decoder(tokens, decoder.plan(positions, cache), cache)[0]


@everyday("9-gemma-4-12b", "1-gemma-4-e4b")
@on_every_model
@pytest.mark.parametrize("length", [1, 9, 40])
def test_the_logits_of_a_prompt(name, length):
    decoder, tokens = target_of(name), tokens_of(name, 2, length)
    with jax.default_matmul_precision("highest"):
        logits = decoder(tokens)
        np.testing.assert_allclose(logits, cached(decoder, tokens), atol=1e-4)
        at = np.array([[length - 1], [0]])
        some = decoder(tokens, logits_at=at)
    np.testing.assert_allclose(some[:, 0], logits[[0, 1], at[:, 0]], atol=1e-4)


@everyday()
@on_every_model
def test_packed_sequences_are_as_if_apart(name):
    """With padding between them and at the end, and a window shorter than a sequence."""
    decoder, lengths = target_of(name), (13, 1, 22)
    apart = [tokens_of(name, 1, length) for length in lengths]
    row = np.concatenate([apart[0], np.zeros((1, 3), int), *apart[1:], np.zeros((1, 2), int)], 1)
    ids = np.repeat([7, 0, 2, 9, 0], [13, 3, 1, 22, 2])[None]
    with jax.default_matmul_precision("highest"):
        packed = decoder(row, segment_ids=ids)
        for number, tokens in zip((7, 2, 9), apart, strict=True):
            np.testing.assert_allclose(packed[ids == number], decoder(tokens)[0], atol=1e-4)
        at = np.argwhere(ids[0] == 9)[-3:].T
        some = decoder(row, segment_ids=ids, logits_at=at)
    np.testing.assert_allclose(some[0], packed[0, at[0]], atol=1e-4)


def loss(decoder, tokens, segment_ids=None):
    """Mean negative log-likelihood of the next tokens of the same sequence."""
    log_probs = jax.nn.log_softmax(decoder(tokens, segment_ids=segment_ids)[:, :-1])
    likelihood = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    if segment_ids is None:
        return -jnp.mean(likelihood)
    counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return -jnp.sum(jnp.where(counts, likelihood, 0)) / jnp.sum(counts)


@everyday("True-gemma-4-12b")
@on_every_model
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives(name, packed):
    """Every parameter has one, and along it the loss changes as differences say."""
    tokens = jnp.asarray(tokens_of(name, 2, 24))
    ids = jnp.asarray(np.repeat([[1, 2], [3, 0]], 12, axis=1)) if packed else None
    graph, params = nnx.split(target_of(name))

    @jax.jit
    def loss_of(params):
        return loss(nnx.merge(graph, params), tokens, ids)

    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(loss_of)(params)
        leaves = dict(jax.tree_util.tree_leaves_with_path(gradient))
        assert all(bool(jnp.isfinite(x).all()) for x in leaves.values())
        # An expert may have no token; a token may not occur.
        still = [jax.tree_util.keystr(path) for path, x in leaves.items() if not x.any()]
        assert not still
        norm = np.sqrt(sum(float(jnp.vdot(x, x)) for x in leaves.values()))
        step = 1e-2 / norm
        up, down = (
            float(
                loss_of(
                    jax.tree.map(lambda p, g, s=sign: p + s * step * g / norm, params, gradient)
                )
            )
            for sign in (1, -1)
        )
    np.testing.assert_allclose((up - down) / (2 * step), norm, rtol=2e-2)


@everyday()
def test_flax_transforms_take_it():
    decoder, tokens = target_of("gemma-4-e2b"), jnp.asarray(tokens_of("gemma-4-e2b", 1, 12))
    value, gradient = nnx.value_and_grad(loss)(decoder, tokens)
    assert np.isfinite(value)
    assert jax.tree.structure(gradient) == jax.tree.structure(nnx.state(decoder, nnx.Param))


@everyday("150-{'pages': 44}")
@pytest.mark.parametrize("sizes", [{"capacity": 700}, {"pages": 44}], ids=str)
@pytest.mark.parametrize("window", [None, 150])
def test_attention_of_segments_over_many_blocks(sizes, window):
    """As of each segment alone, without what another one has: NaN there is not read."""
    q, cache, table, positions = case([659], tokens=300, num_kv_heads=1, poison=np.nan, **sizes)
    capacity = 700 if table is None else 704
    slot = np.arange(capacity)
    ids = np.select([slot < 400, slot < 550], [1, 2], 3).astype(np.int32)[None]
    segment_ids = SegmentIds(jnp.asarray(ids[:, 360:660]), jnp.asarray(ids))
    run = functools.partial(ops.prefill_attention, sliding_window=window)
    o = run(q, cache, table, positions, segment_ids=segment_ids)
    k, v = (np.asarray(x) for x in cache[:2])
    if table is not None:
        k, v = (x[np.asarray(table)[0]].reshape(1, capacity, *x.shape[2:]) for x in (k, v))
    for number, (start, stop) in {1: (0, 400), 2: (400, 550), 3: (550, 660)}.items():
        rows = np.asarray(segment_ids.query[0]) == number
        alone = KVCache(*(jnp.asarray(x[:, start:stop]) for x in (k, v)))
        expected = run(q[:, rows], alone, None, positions[:, rows] - start)
        np.testing.assert_allclose(o[:, rows], expected, atol=2e-6)


class TestBadInput:
    TOKENS = np.ones((2, 20), int)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokens": np.ones(20, int)}, r"tokens .* \(20,\).*\[B, T\]"),
            ({"tokens": np.ones((2, 20))}, "tokens .* float64; accepted: integer"),
            ({"tokens": np.ones((2, 0), int)}, r"tokens .* \(2, 0\).*\[B, T\]"),
            ({"step": TOKENS}, "step is given and cache is not"),
            ({"segment_ids": np.ones((2, 19), int)}, r"segment_ids .* \(2, 19\).*\(2, 20\)"),
            ({"segment_ids": np.ones((2, 20))}, "segment_ids .* float64"),
            ({"logits_at": np.ones((3, 1), int)}, r"logits_at has shape \(3, 1\)"),
        ],
    )
    def test_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            target_of("gemma-4-31b")(**({"tokens": self.TOKENS} | change))

    @pytest.mark.parametrize(
        ("segment_ids", "message"),
        [
            (jnp.ones((1, 20), jnp.int32), "segment_ids is a .*"),
            (SegmentIds(*np.ones((2, 1, 20), np.int32)), r"segment_ids.key has shape \(1, 20\)"),
            (SegmentIds(*np.ones((2, 1, 24))), r"segment_ids.query has dtype float64"),
        ],
    )
    def test_of_the_op(self, segment_ids, message):
        arguments = case([19], tokens=20, capacity=24)
        with pytest.raises(ValueError, match=message):
            ops.prefill_attention(*arguments, segment_ids=segment_ids)

    def test_a_kernel_for_segments_is_refused(self):
        arguments = case([19], tokens=20, capacity=20)
        ids = SegmentIds(*jnp.ones((2, 1, 20), jnp.int32))
        for implementation in ("triton", "triton_interpret"):
            with pytest.raises(NotImplementedError, match="with segment_ids accepted: None, 'xla'"):
                ops.prefill_attention(*arguments, segment_ids=ids, implementation=implementation)
