"""Slots of tokens in a cache: contiguous, ring and paged layouts, and the plan of a step.

One rule addresses all of them. A sequence owns the pages in its row of the page table, C slots in
all, and the token at position p lies in

    slot(b, p) = page_table[b, s // page_size] * page_size + s % page_size,    s = p mod C

and so s holds, for a sequence whose last position is n, position n - (n - s) mod C; a negative one
means that nothing was written there yet. Layouts differ in their table and in whether p may pass C.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from g4attn_jax.checks import check_array, check_integer, check_type, known_values
from g4attn_jax.config import AttentionSpec
from g4attn_jax.page_allocator import check_page_size
from g4attn_jax.rope import rope_cos_sin

# What attention is told instead of the position of a token that has no slot; it answers with NaN.
UNPLACED = -2

# A ring is a whole number of these, so that an attention kernel reads it in whole tiles.
_RING_TILE = 64


class _OnePagePerSequence:
    """Sequence b owns page b."""

    @property
    def num_pages(self) -> int:
        """One page a sequence."""
        return self.batch

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.capacity

    def pages(self) -> None:
        """The page table; None is the identity."""

    def sizes(self) -> Self:
        """The layout, which has nothing but sizes."""
        return self

    def sequences(self, array: Float[Array, "B C *rest"]) -> Float[Array, "B C *rest"]:
        """The slots of each sequence: the array as it is."""
        return array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contiguous(_OnePagePerSequence):
    """Position p of a sequence is the p-th of its slots.

    Attributes:
        batch: B, number of sequences.
        capacity: S, slots of each; positions 0 to S - 1 fit.
    """

    batch: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        _check_sizes(self, "batch", "capacity")
        _check_num_slots(self)

    @property
    def max_position(self) -> int:
        """The last position that fits."""
        return self.capacity - 1

    def check_layer(self, spec: AttentionSpec) -> None:
        """Accepts any layer."""

    def check_step(self, num_tokens: int) -> None:
        """Accepts any number of tokens."""

    def slots(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The slot of each position; -1 if it is negative or past the capacity."""
        first = jnp.arange(self.batch, dtype=jnp.int32)[:, None] * self.capacity
        fits = (positions >= 0) & (positions < self.capacity)
        return jnp.where(fits, first + positions, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring(_OnePagePerSequence):
    """A sliding layer's cache, bounded by the window: position p overwrites p - capacity.

    Attributes:
        batch: B, number of sequences.
        sliding_window: keys a query sees, its own included.
        max_new_tokens: the most tokens of a sequence in one step. They are written before they are
            read, and none may overwrite what the first of them sees.
    """

    batch: int = dataclasses.field(metadata={"static": True})
    sliding_window: int = dataclasses.field(metadata={"static": True})
    max_new_tokens: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        _check_sizes(self, "batch", "sliding_window", "max_new_tokens")
        _check_num_slots(self)

    @property
    def capacity(self) -> int:
        """Slots of each sequence: window + max_new_tokens, rounded up to a tile."""
        return -(-(self.sliding_window + self.max_new_tokens) // _RING_TILE) * _RING_TILE

    @property
    def max_position(self) -> int:
        """The last position that fits; the largest int32 stands for all that it does not hold."""
        return jnp.iinfo(jnp.int32).max - 1

    def check_layer(self, spec: AttentionSpec) -> None:
        """Refuses layers that see more or less than the window.

        Raises:
            ValueError: naming what was given and what is accepted.
        """
        if spec.sliding_window != self.sliding_window:
            raise ValueError(
                f"the layer has sliding_window {spec.sliding_window}; this ring accepts "
                f"{self.sliding_window}"
            )

    def check_step(self, num_tokens: int) -> None:
        """Refuses steps that overwrite what their first token sees.

        Raises:
            ValueError: naming what was given and what is accepted.
        """
        if num_tokens > self.max_new_tokens:
            raise ValueError(
                f"positions has {num_tokens} tokens a sequence; the ring's max_new_tokens accepts "
                f"{self.max_new_tokens} in a step"
            )

    def slots(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The slot of each position; -1 if it is negative."""
        first = jnp.arange(self.batch, dtype=jnp.int32)[:, None] * self.capacity
        fits = (positions >= 0) & (positions <= self.max_position)
        return jnp.where(fits, first + positions % self.capacity, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """Sequences own pages of a common pool, as `PageAllocator` deals them.

    Attributes:
        num_pages: pages of the pool.
        page_size: slots of a page, 16 to 256.
        page_table: integer [B, pages], the pages of each sequence in order; -1 where it has none.
            A cache is made with the sizes alone (None); a step needs the table.
    """

    num_pages: int = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})
    page_table: Int[Array, "B pages"] | None = None

    def __post_init__(self):
        _check_sizes(self, "num_pages", "page_size")
        check_page_size(self.page_size)
        _check_num_slots(self)

    @property
    def batch(self) -> int:
        """B, number of sequences."""
        return self.page_table.shape[0]

    @property
    def capacity(self) -> int:
        """The most tokens of a sequence."""
        return self.page_table.shape[1] * self.page_size

    @property
    def max_position(self) -> int:
        """The last position that fits, if the sequence has all its pages."""
        return self.capacity - 1

    def check_layer(self, spec: AttentionSpec) -> None:
        """Accepts any layer."""

    def check_step(self, num_tokens: int) -> None:
        """Refuses a page table that is none, or names a page that is not there.

        Raises:
            ValueError: naming what was given and what is accepted.
        """
        check_array("page_table", self.page_table, ("B", "pages"), "integer")
        check_page_table(self.page_table, self.num_pages)

    def sizes(self) -> Self:
        """The layout without its page table."""
        return dataclasses.replace(self, page_table=None)

    def pages(self) -> Int[Array, "B pages"]:
        """The page table in int32, -1 for whatever is no page of the pool."""
        table = _as_int32(self.page_table)
        return jnp.where((table >= 0) & (table < self.num_pages), table, -1)

    def slots(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The slot of each position; -1 if it is negative or the sequence has no page for it."""
        fits = (positions >= 0) & (positions < self.capacity)
        column = jnp.where(fits, positions, 0) // self.page_size
        page = jnp.take_along_axis(self.pages(), column, axis=1)
        slot = page * self.page_size + positions % self.page_size
        return jnp.where(fits & (page >= 0), slot, -1)

    def sequences(self, array: Float[Array, "num_pages page_size *rest"]):
        """The slots of each sequence, [B, C, ...]: gathered, zero where it has no page."""
        table = self.pages()
        # A negative index would count from the end.
        table = jnp.where(table >= 0, table, self.num_pages)
        pages = array.at[table].get(mode="fill", fill_value=0)
        return pages.reshape(self.batch, self.capacity, *array.shape[2:])


Layout = Contiguous | Ring | Paged


def read_layout(
    page_table: Int[Array, "B pages"] | None, num_pages: int, page_size: int
) -> Contiguous | Paged:
    """The layout that a cache is read by; without a page table a ring is read as `Contiguous` is.

    Args:
        page_table: int32 [B, pages]; None: sequence b owns page b.
        num_pages: pages of the cache.
        page_size: slots of a page.
    """
    if page_table is None:
        return Contiguous(num_pages, page_size)
    return Paged(num_pages, page_size, page_table)


class LayerType(NamedTuple):
    """Properties that layers must have in common to share a `StepPlan`."""

    head_dim: int
    rotary_dim: int
    rope_theta: float
    sliding_window: int | None

    @classmethod
    def of(cls, spec: AttentionSpec) -> "LayerType":
        """The type of a layer."""
        return cls(spec.head_dim, spec.rotary_dim, spec.rope_theta, spec.sliding_window)


class SegmentIds(NamedTuple):
    """Ids of several sequences in one row: a token sees keys of its own id alone.

    Attributes:
        query: int32 [B, T], of the new tokens.
        key: int32 [B, C], of the token in each slot.
    """

    query: Int[Array, "B T"]
    key: Int[Array, "B C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Arrays that all layers of one type share in one step, made once, by `plan_step`.

    Attributes:
        positions: int32 [B, T], -1 for padding.
        placed: int32 [B, T], the positions for attention: `UNPLACED` for tokens without a slot.
        cos: float32 [B, T, R/2].
        sin: float32 [B, T, R/2].
        slots: int32 [B, T], where the tokens go in every cache; -1 is nowhere.
        layout: of every cache.
        segment_ids: of rows with several sequences; None: a row has one.
        layer_type: the layers that the plan is for.
    """

    positions: Int[Array, "B T"]
    placed: Int[Array, "B T"]
    cos: Float[Array, "B T R/2"]
    sin: Float[Array, "B T R/2"]
    slots: Int[Array, "B T"]
    layout: Layout
    segment_ids: SegmentIds | None
    layer_type: LayerType = dataclasses.field(metadata={"static": True})

    def select(self, at: Int[Array, "B n"]) -> Self:
        """The plan of tokens `at` alone, for layers that write nothing."""
        names = "positions", "placed", "cos", "sin", "slots"
        fields = {name: select_tokens(getattr(self, name), at) for name in names}
        if self.segment_ids is not None:
            query = select_tokens(self.segment_ids.query, at)
            fields["segment_ids"] = self.segment_ids._replace(query=query)
        return dataclasses.replace(self, **fields)


def select_tokens(array: Shaped[Array, "B T *rest"], at: Int[Array, "B n"]):
    """Tokens `at` of an array, [B, n, ...]."""
    return jnp.take_along_axis(array, at.reshape(*at.shape, *[1] * (array.ndim - 2)), axis=1)


def check_page_table(page_table: Int[Array, "B pages"], num_pages: int) -> None:
    """Refuses a page table that is known to name a page which is not there.

    Raises:
        ValueError: naming the page and what is accepted.
    """
    table = known_values(page_table)
    if table is None:
        return
    wrong = table[(table < -1) | (table >= num_pages)]
    if wrong.size:
        raise ValueError(f"page_table has {wrong[0]}; accepted: -1 (none) and 0 to {num_pages - 1}")


def where_token(
    positions: Int[Array, "B T"], o: Float[Array, "B T Nq D"]
) -> Float[Array, "B T Nq D"]:
    """Attention's output: o for tokens, 0 for padding, NaN for tokens without a slot."""
    positions = positions[..., None, None]
    return jnp.where(positions >= 0, o, jnp.where(positions == UNPLACED, jnp.nan, 0))


def key_positions(positions: Int[Array, "B T"], layout: Layout) -> Int[Array, "B C"]:
    """The position of the token in each of a sequence's slots, negative where there is none.

    Args:
        positions: of the newest tokens, negative for those that have no slot.
        layout: of the cache.
    """
    capacity = layout.capacity
    last = jnp.max(positions, axis=1, initial=-1)[:, None]
    newest = last - (last - jnp.arange(capacity, dtype=jnp.int32)) % capacity
    pages = layout.pages()
    if pages is None:
        return newest
    return jnp.where(jnp.repeat(pages >= 0, layout.page_size, axis=1), newest, -1)


def plan_step(
    spec: AttentionSpec,
    positions: Int[Array, "B T"],
    layout: Layout,
    segment_ids: SegmentIds | None = None,
) -> StepPlan:
    """Everything of a step that depends on positions and layout, for all layers like `spec`.

    Args:
        spec: of any layer of the type.
        positions: integer [B, T], where the new tokens are. -1 marks padding. Sequences may be at
            different positions.
        layout: of the caches.
        segment_ids: of rows with several sequences, one after another; None: a row has one.

    Raises:
        ValueError: an argument has the wrong shape or dtype, a ring is too small for T tokens, a
            page is not there, or a position has no slot or the slot of another token. Under `jit`
            positions are unknown: there a token without a slot writes nothing and its output is
            NaN; of two tokens with one slot either may stay.
    """
    check_type("spec", spec, AttentionSpec)
    check_layout(layout)
    known = known_values(positions)
    if known is not None:
        positions = known  # as given: JAX would wrap what int32 does not hold
    layout.check_layer(spec)
    layout.check_step(positions.shape[1] if positions.ndim == 2 else 0)
    check_array("positions", positions, (layout.batch, "T"), "signed integer", empty=True)
    int32 = _as_int32(positions)
    slots = layout.slots(int32)
    known_slots = None if known is None else known_values(slots)
    if known_slots is not None:
        _check_placed(known, known_slots, layout)
    cos, sin = rope_cos_sin(
        int32, theta=spec.rope_theta, head_dim=spec.head_dim, rotary_dim=spec.rotary_dim
    )
    placed = jnp.where((int32 >= 0) & (slots < 0), UNPLACED, int32)
    return StepPlan(int32, placed, cos, sin, slots, layout, segment_ids, LayerType.of(spec))


def check_layout(layout: Layout) -> None:
    """Refuses what is no layout.

    Raises:
        ValueError: saying what is accepted.
    """
    check_type("layout", layout, Contiguous, Ring, Paged)


def _check_sizes(layout, *names):
    for name in names:
        object.__setattr__(layout, name, check_integer(name, getattr(layout, name)))


def _check_num_slots(layout):
    num_slots = int(layout.num_pages) * int(layout.page_size)
    if num_slots >= 2**31:
        raise ValueError(
            f"num_pages * page_size is {num_slots}; accepted: below 2^31, slots being int32"
        )


def _check_placed(positions, slots, layout):
    wrong = positions < -1
    if wrong.any():
        raise ValueError(
            f"positions has {positions[wrong][0]}; accepted: -1 (padding) and 0 or more"
        )
    lost = (positions >= 0) & (slots < 0)
    if lost.any():
        sequence = int(np.argwhere(lost)[0, 0])
        raise ValueError(
            f"positions has {positions[lost][0]}, for which sequence {sequence} has no slot; "
            f"accepted: -1 (padding) and 0 to {layout.max_position}, within its pages"
        )
    used, count = np.unique(slots[slots >= 0], return_counts=True)
    if (count > 1).any():
        (b, t), (other_b, other_t) = np.argwhere(slots == used[count > 1][0])[:2]
        raise ValueError(
            f"positions has {positions[b, t]} in sequence {b} and {positions[other_b, other_t]} in "
            f"sequence {other_b}, which have the same slot; accepted: one for every token"
        )


def _as_int32(integers):
    """Saturated, not wrapped: a position or page that int32 does not hold stays out of range."""
    given, limits = jnp.iinfo(integers.dtype), jnp.iinfo(jnp.int32)
    if given.max > limits.max:
        integers = integers.clip(max(given.min, limits.min), limits.max)
    return jnp.asarray(integers, jnp.int32)
