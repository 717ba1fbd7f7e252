import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4attn_jax.checkpoint import packing
from g4attn_jax.checkpoint.packing import Packed

K, G, D, E = 2, 3, 4, 5
CASES = {
    "qkv": (
        Packed(
            {"q": "k g d, e", "k": "k g d, e", "v": "k g d, e"}, "g", (G, 1, 1), axes=tuple("ekgd")
        ),
        (E, K, G + 2, D),
        {"q": (K * G * D, E), "k": (K * D, E), "v": (K * D, E)},
    ),
    "of two at once": (
        Packed({"q": "k g, e, d", "kv": "g, k, e, d"}, "g", (G, 2), axes=tuple("ekgd")),
        (E, K, G + 2, D),
        {"q": (K * G, E, D), "kv": (2, K, E, D)},
    ),
    "in an axis that is last": (
        Packed({"a": "c, e", "b": "c, e"}, "c", (1, 2), axes=tuple("ec")),
        (E, 3),
        None,
    ),
    "transposed": (Packed({"w": "x, d, e"}, axes=tuple("xed")), (7, E, D), {"w": (7, D, E)}),
    "as it is": (Packed({"w": "e, d"}), (E, D), {"w": (E, D)}),
    "scalar": (Packed({"w": "1"}), (), {"w": (1,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_unpack_is_the_inverse_of_pack(case):
    packed, shape, shapes = CASES[case]
    if shapes is not None:
        assert packed.shapes(shape) == shapes
    parameter = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
    tensors = packed.unpack(parameter)
    assert {name: tensor.shape for name, tensor in tensors.items()} == packed.shapes(shape)
    again = packed.pack(list(tensors.values()), shape, jnp.float32)
    np.testing.assert_array_equal(again, parameter)


def test_order_of_rows():
    packed, shape, _ = CASES["qkv"]
    q, k, v = (np.full(s, i, np.float32) for i, s in enumerate(packed.shapes(shape).values()))
    q = q + 10 * np.arange(K * G * D)[:, None] // D
    parameter = packed.pack([q, k, v], shape, jnp.float32)
    np.testing.assert_array_equal(parameter[0, :, :, 0], [[0, 10, 20, 1, 2], [30, 40, 50, 1, 2]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_casts_on_the_device(dtype):
    packed = Packed({"w": "e"})
    value = np.linspace(-3, 3, E, dtype=np.float32)
    assert (packed.pack([value], (E,), dtype) == value.astype(dtype)).all()


def test_the_parameter_is_a_copy():
    """Else weights would change with the file that is mapped."""
    # At 64 bytes JAX' CPU backend takes an array over without copying it.
    buffer = np.zeros(1024 + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    tensor = buffer[start : start + 1024]
    parameter = Packed({"w": "e"}).pack([jax.device_put(tensor)], (1024,), jnp.float32)
    tensor[:] = 1
    assert not parameter.any()


def test_layers_of_one_shape_share_a_program():
    packing._compiled_pack.cache_clear()
    tensor = np.zeros((D, E), np.float32)
    for layer in range(3):
        row = Packed({"w": "d, e"}, axes=("e", "d")).under(f"layers.{layer}.")
        row.pack([tensor], (E, D), jnp.float32)
    assert packing._compiled_pack.cache_info().currsize == 1
    (program,) = [packing._compiled_pack(("e", "d"), "", ("d, e",), None)]
    assert program._cache_size() == 1
