"""GPU that a program is compiled for: the process' own, those of a mesh, a described one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from g4attn_jax import ProjectionMode, ops
from g4attn_jax.ops import gpu as gpus
from g4attn_jax.ops.gpu import Gpu, gpu, gpu_refusal, targets


def device(kind, compute_capability, core_count, kib):
    return SimpleNamespace(
        device_kind=kind,
        compute_capability=compute_capability,
        core_count=core_count,
        shared_memory_per_block_optin=kib * 1024,
    )


# An RTX 4090 that no table names, and a card on which kernels do not run.
PRESENT = [device("NVIDIA GeForce RTX 4090", "8.9", 128, 99), device("Tesla P4", "6.1", 20, 48)]
RTX_4090 = Gpu(8.9, 128, 99 * 1024)


def mesh_of(name, num_sms):
    """Mesh of such devices, as a trace sees it."""
    described = jax.sharding.AbstractDevice(name, num_sms, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=described)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.fixture
def present(monkeypatch):
    monkeypatch.setattr(gpus, "_devices", lambda: PRESENT)


def test_of_the_process_what_all_have(present):
    assert gpu() == Gpu(6.1, 20, 48 * 1024)
    assert gpu_refusal() == "Tesla P4 has 6.1"


def test_under_a_mesh_of_present_devices_what_they_are(present):
    """Not what their names say: the table has no RTX 4090."""
    with mesh_of("NVIDIA GeForce RTX 4090", 128):
        assert gpu() == RTX_4090
        assert gpu_refusal(8.9) is None
        assert gpu_refusal(9.0) == "NVIDIA GeForce RTX 4090 has 8.9"
    with mesh_of("Tesla P4", 20):
        assert gpu_refusal() == "Tesla P4 has 6.1"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA L40S", Gpu(8.9, 142, 99 * 1024)),
        ("NVIDIA H100 80GB HBM3", Gpu(9.0, 142, 227 * 1024)),
        ("Tesla T4", Gpu(7.5, 142, 64 * 1024)),
        ("NVIDIA A100-SXM4-40GB", Gpu(8.0, 142, 163 * 1024)),
        ("Tesla V100-SXM2-16GB", Gpu(7.0, 142, 96 * 1024)),
        ("NVIDIA of another year", Gpu(8.0, 142, 99 * 1024)),
    ],
)
def test_a_described_gpu_is_known_by_its_name(present, name, expected):
    with mesh_of(name, 142):
        assert targets() == [(name, expected)]


def test_a_described_gpu_that_runs_no_kernel_gets_xla():
    """With nothing demanded; a demand is refused by name."""
    qkv, scale = jnp.ones((1, 2, 3, 16)), jnp.ones(16)

    def run(implementation):
        return jax.make_jaxpr(
            lambda x: ops.qkv_rms_norm(
                x, scale, scale, mode=ProjectionMode.QK_ONLY, implementation=implementation
            )
        )(qkv)

    with mesh_of("NVIDIA L4", 58):
        assert "pallas_call" in str(run(None))
    with mesh_of("Tesla T4", 40):
        assert "pallas_call" not in str(run(None))
        with pytest.raises(NotImplementedError, match=r"8.0 or higher; Tesla T4 has 7.5"):
            run("triton")


@pytest.mark.gpu
def test_a_real_mesh_is_read_from_its_devices():
    own = jax.local_devices(backend="cuda")[0]
    expected = float(own.compute_capability), own.core_count, own.shared_memory_per_block_optin
    with jax.set_mesh(jax.sharding.Mesh([own], ("x",))):
        assert gpu() == expected
        assert jax.jit(lambda: gpu() == expected)()
