"""A case of an op: its sizes, a name and tags, arguments for it, and what NumPy says of them.

Every `g4attn_jax/ops/<op>/cases.py` lists the cases of its op, `CASES`. Tests, compile tests, tests
on a GPU, `check`, benchmarks and tuning take those with their tag. A test of one property (a
derivative, a refusal, `vmap`) may make a case of its own where it stands.

    everyday    few and small, of every kind of argument: run with every change
    published   the equivalence sweep of the original kernel (SGLang PR 25461), which `check` runs
    real        layers of the published models
    odd         sizes that no tile or block divides
    compile     one of each launch configuration and dtype, compiled for GPUs that are not there
    export      exported for CUDA by `jax.export` on a machine without a GPU
    large       of 2^31 elements and more: compiled, never run
    bench       what the benchmarks measure
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax.cache import FLOAT8, Cache, zeros
from g4attn_jax.config import AttentionSpec, Gemma4Config, ProjectionMode
from g4attn_jax.testing import oracle

TAGS = frozenset({"everyday", "published", "real", "odd", "compile", "export", "large", "bench"})
# Above, NumPy takes seconds for an array, and JAX compiles a program that does not.
_MAX_NUMPY_ELEMENTS = 2**24

# The published equivalence sweep.
PUBLISHED_HEAD_DIMS = (128, 256, 512)
PUBLISHED_HEADS = ((32, 16), (16, 8))
PUBLISHED_TOKENS = (1, 7, 64, 1024)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call of an op. A subclass adds them, as fields that come before these.

    Attributes:
        about: what the sizes are for, in words; "" leaves it to them.
        tags: of `TAGS`.
        dtype: name of the dtype of activations and weights.
    """

    op: ClassVar[str]  # the folder, g4attn_jax/ops/<op>

    about: str = dataclasses.field(default="", kw_only=True, compare=False, repr=False)
    tags: frozenset[str] = dataclasses.field(
        default=frozenset(), kw_only=True, compare=False, repr=False
    )
    dtype: str = dataclasses.field(default="bfloat16", kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "tags", frozenset(self.tags))
        if not self.tags <= TAGS:
            raise ValueError(f"tags are {sorted(self.tags)}; accepted: {sorted(TAGS)}")

    @property
    def name(self) -> str:
        """Purpose of the case, or its sizes; no two cases of an op share it."""
        if self.about:
            return self.about
        sizes, further = [], []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.kw_only:
                sizes.append(_word(value))
            elif field.compare and value != field.default:
                further.append(f"{field.name}={_word(value)}")
        return "-".join(sizes + further)

    def __str__(self):
        return f"{self.label.split()[0]}-{self.name}"

    @property
    def label(self) -> str:
        """The function, then of its kinds of arguments those of the case."""
        return self.op

    def structs(self, dtype=None) -> list:
        """Shapes and dtypes of the arguments.

        Args:
            dtype: of activations and weights; None is the case's.
        """
        raise NotImplementedError

    def arguments(self, dtype=None, seed: int = 0) -> list:
        """Random arguments, of magnitudes as a trained model has.

        Args:
            dtype: as in `structs`.
            seed: another one gives other numbers.
        """
        raise NotImplementedError

    def run(self, arguments, implementation: str | None = None) -> Any:
        """Outputs of the op."""
        raise NotImplementedError

    def result(self, outputs) -> Any:
        """Outputs of `run` that are compared with `exact`."""
        return outputs

    def exact(self, arguments) -> Any:
        """Outputs in float64."""
        raise NotImplementedError

    def usual(self, arguments) -> Any:
        """Outputs with the roundings of the usual path, Hugging Face transformers in that dtype."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Bytes that must move: arguments read once, outputs written once."""
        raise NotImplementedError

    def calls(self, min_bytes: int) -> list[list]:
        """Arguments of as many calls as move `min_bytes`, so that no cache holds those of all."""
        count = max(1, math.ceil(min_bytes / self.bytes()))
        return [self.arguments(seed=seed) for seed in range(count)]

    error = staticmethod(oracle.max_error)

    @staticmethod
    def relative_error(actual, exact) -> float:
        """The largest relative error of an element."""
        return oracle.max_error(np.asarray(actual) / exact, 1.0)


def norm_error(actual, exact) -> float:
    """The norm of the error over that of the result.

    For rotations, which may cancel to nearly nothing in an element, and attention, where the
    largest of few elements is a matter of chance.
    """
    difference = np.asarray(actual).astype(np.float64) - exact
    return float(np.linalg.norm(difference) / max(np.linalg.norm(exact), 1e-300))


def distinct(*cases: Case) -> tuple[Case, ...]:
    """Cases in order, one that is listed several times once, with all its tags."""
    found = {}
    for case in cases:
        before = found.get(case, case)
        found[case] = dataclasses.replace(before, tags=before.tags | case.tags)
    return tuple(found.values())


def tagged(cases: Iterable[Case], *tags: str) -> list[Case]:
    """The cases that have one of the tags."""
    return [case for case in cases if case.tags & set(tags)]


def struct(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """A shape and a dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)


class Draw:
    """Random arrays of given shapes and dtypes.

    NumPy makes them, as JAX would compile a program for every shape; JAX those of many millions.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def normal(self, like: jax.ShapeDtypeStruct, factor: float = 1.0) -> jax.Array:
        """Normal numbers times a factor; no 0, which has no relative error."""
        if like.size > _MAX_NUMPY_ELEMENTS:
            key = jax.random.key(int(self.rng.integers(2**31)))
            return _normal(key, like.shape, like.dtype, factor)
        x = self.rng.standard_normal(like.shape, np.float32)
        x = np.float32(factor) * np.where(x == 0, np.float32(1), x)
        return jnp.asarray(x.astype(like.dtype))

    def uniform(self, like: jax.ShapeDtypeStruct, low: float, high: float) -> jax.Array:
        """Uniform numbers between two."""
        return jnp.asarray(self.rng.uniform(low, high, like.shape), like.dtype)

    def integers(self, like: jax.ShapeDtypeStruct, stop: int) -> jax.Array:
        """Integers from 0 to `stop` - 1."""
        return jnp.asarray(self.rng.integers(0, stop, like.shape), like.dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key, shape, dtype, factor):
    drawn = dtype if dtype.itemsize > 1 else jnp.bfloat16
    return (jax.random.normal(key, shape, drawn) * factor).astype(dtype)


def cache_struct(
    form: type[Cache],
    *,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype,
) -> Cache:
    """Shapes and dtypes of a layer's cache."""
    spec = AttentionSpec(
        ProjectionMode.QK_ONLY, num_kv_heads, num_kv_heads, head_dim, None, 1e4, rotary_dim, 0, None
    )

    def make():
        scale = jnp.ones(2) if jnp.dtype(dtype) == FLOAT8 else None
        pages = {"num_pages": num_pages, "page_size": page_size}
        return zeros(form, spec, **pages, dtype=dtype, scale=scale)

    return jax.eval_shape(make)


@functools.cache
def real_layers() -> tuple[AttentionSpec, ...]:
    """Attention layers of the published models, one of each of their sizes."""
    specs = {}
    for name in Gemma4Config.preset_names():
        config = Gemma4Config.preset(name)
        for layer in range(config.num_hidden_layers):
            spec = config.attention_spec(layer)
            sizes = spec.mode, spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim
            specs.setdefault(sizes, spec)
    return tuple(specs.values())


def modes_and_forms(forms: Sequence[type[Cache]]) -> list[tuple]:
    """Projection modes with each of the forms of a cache that layers of the mode can have."""
    return [(mode, form) for mode in ProjectionMode for form in forms if mode in form.modes]


def nbytes(tree) -> int:
    """Bytes of all arrays."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _word(value) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple):
        if len(value) > 2 and len(set(value)) == 1:
            return f"{len(value)}x{_word(value[0])}"
        return ".".join(map(_word, value))
    return str(value)
