"""NVIDIA GPUs that are not there: the CUDA plugin compiles for a described one.

python -m g4attn_jax.testing.gpu_target      exit status 1, with the reason, if it cannot here
"""

import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Without a GPU the plugin loads only if it does not look for CUDA's libraries first. JAX reads this
# when it looks for devices, so tests/conftest.py imports this module before anything does.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

# Of NVIDIA's data sheets; only the compute capability and the shared memory limit matter here.
_GPUS = {
    "8.0": ("NVIDIA A100", 108, 166912),
    "9.0": ("NVIDIA H200", 132, 232448),
    "10.0": ("NVIDIA B200", 148, 232448),
}
COMPUTE_CAPABILITIES = tuple(_GPUS)

_TARGET_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_memory}
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{name}"
"""


@functools.cache
def mesh(compute_capability: str) -> jax.sharding.Mesh:
    """A mesh of one described GPU."""
    name, cores, shared_memory = _GPUS[compute_capability]
    major, minor = compute_capability.split(".")
    config = _TARGET_CONFIG.format(
        name=name, cores=cores, shared_memory=shared_memory, major=major, minor=minor
    )
    topology = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=config, topology="1x1x1"
    )
    return topologies.make_mesh(topology, (1,), ("x",))


@functools.cache
def unavailable() -> str | None:
    """Reason why nothing can be compiled for a GPU here, or None."""
    try:
        mesh("9.0")
    except Exception as error:
        return (
            "the CUDA plugin does not load (jax-cuda12-plugin, jax-cuda12-pjrt and "
            f"nvidia-cuda-nvcc-cu12 are needed): {str(error).splitlines()[0]}"
        )
    return None


def compile_for(compute_capability: str, f, *arguments, donate_argnums=(), options=None):
    """`jax.jit(f)` compiled for the GPU; arguments may be ShapeDtypeStructs.

    Args:
        compute_capability: of the GPU.
        f: a function.
        arguments: of f.
        donate_argnums: of `jax.jit`.
        options: XLA's.
    """
    target = mesh(compute_capability)
    on_target = NamedSharding(target, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_target), arguments
    )
    with jax.sharding.use_abstract_mesh(target.abstract_mesh):
        lowered = jax.jit(f, donate_argnums=donate_argnums).lower(*arguments)
        return lowered.compile(compiler_options=options)


def assembly(compute_capability: str, f, *arguments) -> str:
    """PTX of all kernels of `compile_for`'s program."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            # XLA writes the PTX of kernels whose pipeline has a step of that name.
            "xla_dump_to": folder,
            "xla_dump_emitter_re": "ptx",
            "xla_gpu_dump_llvmir": True,
            # As users compile, also under JAX_DISABLE_MOST_OPTIMIZATIONS, with which tests run.
            "xla_backend_optimization_level": 3,
            "xla_llvm_disable_expensive_passes": False,
        }
        compile_for(compute_capability, f, *arguments, options=options)
        return "\n".join(path.read_text() for path in Path(folder).glob("*.ptx"))


if __name__ == "__main__":
    sys.exit(unavailable())
