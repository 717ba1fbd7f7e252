"""JAX without Triton: the CPU path and Mosaic kernels work, and Triton is refused by name."""

import ast
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import g4attn_jax
from g4attn_jax.testing import gpu_target
from tests.everyday import everyday

PACKAGE = Path(g4attn_jax.__file__).parent
TRITON = "jax.experimental.pallas.triton"
BLOCKED = f"""
import sys
sys.modules[{TRITON!r}] = None
from g4attn_jax.testing import gpu_target
import jax, jax.numpy as jnp
from g4attn_jax import *
from g4attn_jax.cache import KVCache
struct = jax.ShapeDtypeStruct
"""


def without_triton(code):
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def imported(path):
    """Modules, and names of modules, that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_files_named_triton_alone_import_triton():
    """Nor does another file import one of them: they are named, and imported where they are run."""
    for path in PACKAGE.rglob("*.py"):
        if path.stem.startswith("triton"):
            continue
        for name in imported(path):
            assert not name.startswith(TRITON), path
            last = name.split(".")[-1]
            assert not (name.startswith("g4attn_jax.ops") and last.startswith("triton")) or (
                last == "triton_refusal"
            ), (path, name)


def test_triton_is_not_imported_until_a_kernel_is_traced():
    code = (
        "import sys\n"
        "from g4attn_jax import *\n"
        "import jax.numpy as jnp\n"
        "ops.linear(jnp.ones((1, 64)), jnp.ones((64, 6400)), implementation='xla')\n"
        f"assert {TRITON!r} not in sys.modules\n"
        "ops.linear(jnp.ones((1, 64)), jnp.ones((64, 640)), implementation='triton_interpret')\n"
        f"assert {TRITON!r} in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ops_on_a_cpu():
    without_triton("""
qkv, scale, angle = jnp.ones((2, 1, 3, 16)), jnp.ones(16), jnp.ones((2, 4))
cache = KVCache(*jnp.zeros((2, 1, 16, 1, 16)))
mode, slots = ProjectionMode.QKV_FULL, jnp.arange(2, dtype=jnp.int32)
write = jax.jit(ops.qkv_norm_rope_write, static_argnames=("mode", "implementation"))
q, cache = write(qkv, scale, scale, angle, angle, slots, cache, mode=mode)
o = ops.decode_attention(q[None], cache, None, slots[None])
assert o.shape == (1, 2, 1, 16) and jnp.isfinite(o).all()
for name in "triton", "triton_interpret":
    try:
        write(qkv, scale, scale, angle, angle, slots, cache, mode=mode, implementation=name)
    except NotImplementedError as error:
        assert f"implementation '{name}'" in str(error), error
        assert "Accepted here: None, 'xla'" in str(error), error
    else:
        raise AssertionError(name)
""")


def test_a_model_on_a_cpu():
    without_triton("""
from flax import nnx
config = Gemma4Config.from_hf("tests/golden_model/gemma-4-12b/config.json").truncated(2)
decoder = Gemma4Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
answers = Generator(decoder, capacity=48)([[1, 2, 3]], 4)
assert "jax.experimental.pallas.mosaic_gpu" not in sys.modules
""")


def test_check_skips_its_kernels():
    without_triton("""
import contextlib, io
from g4attn_jax.commands import check
from g4attn_jax.ops.qkv_rms_norm.cases import QkvRmsNormCase
check.sweep = lambda: [QkvRmsNormCase(ProjectionMode.QKV_FULL, 4, 2, 128, 3)]
with contextlib.redirect_stdout(io.StringIO()) as output:
    assert check.check() == 0
by_kernel, by_xla = output.getvalue().splitlines()[-3:-1]
assert " triton_interpret " in by_kernel and "skipped: this JAX lacks" in by_kernel, by_kernel
assert " xla " in by_xla and by_xla.endswith("pass"), by_xla
""")


@everyday()
@pytest.mark.skipif(gpu_target.unavailable() is not None, reason=str(gpu_target.unavailable()))
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU of JAX 0.10 is another")
def test_on_hopper_mosaic_runs_and_xla_the_rest():
    without_triton("""
def attend(*arguments, implementation=None, tokens=6):
    q = struct((5, tokens, 32, 512), jnp.bfloat16)
    cache = KVCache(*[struct((40, 64, 4, 512), jnp.bfloat16)] * 2)
    run = lambda *a: ops.decode_attention(*a, num_splits=3, implementation=implementation)
    others = struct((5, 8), jnp.int32), struct((5, tokens), jnp.int32)
    return gpu_target.compile_for("9.0", run, q, cache, *others).as_text()

for implementation in None, "mosaic_gpu":
    text = attend(implementation=implementation)
    assert text.count('custom_call_target="mosaic_gpu') == 1
    assert "xla.gpu.triton" not in text
text = attend(tokens=1)
assert "mosaic_gpu" not in text and "xla.gpu.triton" not in text
""")
