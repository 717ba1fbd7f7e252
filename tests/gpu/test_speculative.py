"""Speculative decoding on a GPU: the tokens of plain decoding, by the kernels."""

import jax
import pytest

from g4attn_jax import Generator
from tests.test_speculative import (
    CAPACITY,
    NEW,
    OWN,
    RIGHT,
    WRONG,
    K,
    assistant_of,
    guided,
    prompts_of,
    target_of,
    use,
)

pytestmark = pytest.mark.gpu(
    "decode_attention", "prefill_attention", "qkv_norm_rope_write", "linear", "add_rms_norm"
)


@pytest.mark.parametrize("name", ["gemma-4-e4b", "gemma-4-31b"])
def test_the_tokens_of_plain_decoding(name, monkeypatch):
    """In float32, where steps of one token and of five round the same choice of each token."""
    prompts, options = prompts_of(name), {"capacity": CAPACITY, "chunk_tokens": 16}
    with jax.default_matmul_precision("highest"):
        plain = Generator(target_of(name), **options)(prompts, NEW)
        generator = Generator(
            target_of(name), assistant=assistant_of(name), draft_tokens=K, **options
        )
        for kinds in (OWN, RIGHT, WRONG):
            use(guided(prompts, plain, kinds), monkeypatch)
            assert generator(prompts, NEW) == plain
