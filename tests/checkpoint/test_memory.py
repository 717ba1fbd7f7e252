"""Host memory that loading takes, and the places of the parameters after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from g4attn_jax.checkpoint import load_hf_into, save_hf
from g4attn_jax.checkpoint.loading import parameters
from tests.checkpoint.directories import FIXTURES, abstract, read_config
from tests.everyday import everyday

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    """Standard output of a Python process that sees one CPU device unless told otherwise."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def large_config():
    """E2B's shape at half its width, short and with a small vocabulary: 0.5 GB."""
    config = json.loads((ROOT / "g4attn_jax/configs/gemma-4-e2b.json").read_text())["text_config"]
    return config | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 6,
        "layer_types": [*config["layer_types"][:5], "full_attention"],
        "num_kv_shared_layers": 1,
        "vocab_size": 65536,
        "vocab_size_per_layer_input": 65536,
    }


@everyday()
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through /proc")
def test_peak_is_within_a_shard_of_the_model(tmp_path):
    config = large_config()
    model = abstract(config)
    for variable in parameters(model).values():
        variable.set_value(np.ones(variable.shape, variable.dtype))
    save_hf(tmp_path, model, config, max_shard_bytes=202 * 10**6)
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(shards) > 2
    size, peak = map(int, run(Path(__file__).parent / "loading_program.py", tmp_path).split())
    # The model's arrays are host memory here. Two copies of it, or reading files whole, fail this.
    assert size > 2 * max(shards)
    assert peak - size <= 1.2 * max(shards), (size, peak, max(shards))


SHARDED = """
import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from g4attn_jax.checkpoint import load_hf_into
from g4attn_jax.checkpoint.loading import parameters
from tests.checkpoint.directories import FIXTURES, abstract, read_config

folder = FIXTURES / "gemma-4-e4b"
model = abstract(read_config(folder))
mesh = jax.make_mesh((2,), ("model",))
for path, variable in parameters(model).items():
    axes = (None, "model") if path.endswith("qkv_proj.weight") else ()
    variable.set_value(jax.ShapeDtypeStruct(
        variable.shape, variable.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    ))
model, _ = load_hf_into(folder, model)
for path, variable in parameters(model).items():
    value = variable[...]
    assert len(value.devices()) == 2, path
    parts = value.addressable_shards
    if path.endswith("qkv_proj.weight"):
        assert parts[0].data.shape[1] * 2 == value.shape[1], path
    else:
        assert parts[0].data.shape == value.shape, path
print(sum(float(variable[...].astype("float32").sum()) for variable in parameters(model).values()))
"""


@everyday()
def test_parameters_go_where_the_model_wants_them():
    output = run("-c", SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    folder = FIXTURES / "gemma-4-e4b"
    model, _ = load_hf_into(folder, abstract(read_config(folder)))
    leaves = [variable[...] for variable in parameters(model).values()]
    total = sum(float(leaf.astype("float32").sum()) for leaf in leaves)
    assert float(output) == pytest.approx(total, rel=1e-5)


def test_an_abstract_model_stays_abstract():
    folder = FIXTURES / "gemma-4-e4b"
    model = abstract(read_config(folder))
    load_hf_into(folder, model)
    assert all(not hasattr(v.get_value(), "devices") for v in parameters(model).values())
    assert isinstance(model, nnx.Module)
